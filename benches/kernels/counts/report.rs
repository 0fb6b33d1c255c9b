//! Counted operations with their bounds, as a table and as JSON.

use crate::report::Work;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use virtual_gpu::bounds::{self, Block, Bounds, GPUS, Gpu};

/// Number of differences that are described.
const DESCRIBED: usize = 20;

/// What each kernel takes of a multiprocessor, by ptxas.
pub struct Resources(Value);

impl Resources {
    /// Reads the file that `scripts/check-resources --write` writes.
    pub fn read(path: &Path) -> Result<Self, Box<dyn Error>> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(serde_json::from_str(&text)?))
    }

    /// Returns the registers per thread of a kernel for bfloat16 activations.
    fn registers(&self, kernel: &str, architecture: &str) -> Result<u64, Box<dyn Error>> {
        let found = &self.0["bf16"][kernel][architecture]["registers"];
        found.as_u64().ok_or_else(|| {
            format!("nothing is known of {kernel} for {architecture}; run `make kernel-counts`")
                .into()
        })
    }
}

/// A launch with its counts, as the virtual GPU describes them.
struct Launch {
    counts: Value,
    /// What a block takes on each of [`GPUS`].
    blocks: Vec<Block>,
    /// The bounds on each of [`GPUS`].
    bounds: Vec<Bounds>,
}

impl Launch {
    fn new(counts: Value, resources: &Resources) -> Result<Self, Box<dyn Error>> {
        let kernel = counts["kernel"].as_str().unwrap_or_default().to_owned();
        let mut launch = Self {
            counts,
            blocks: Vec::new(),
            bounds: Vec::new(),
        };
        for gpu in &GPUS {
            launch.blocks.push(Block {
                threads: launch.product("block"),
                registers: resources.registers(&kernel, gpu.architecture)?,
                shared: launch.number("static_shared") + launch.number("dynamic_shared"),
            });
            launch.bounds.push(gpu.bounds(launch.work()));
        }
        Ok(launch)
    }

    fn number(&self, name: &str) -> u64 {
        self.counts[name].as_u64().unwrap_or(0)
    }

    /// Returns the product of the three sizes of a grid or a block.
    fn product(&self, name: &str) -> u64 {
        let sizes = self.counts[name].as_array();
        sizes.map_or(0, |sizes| sizes.iter().filter_map(Value::as_u64).product())
    }

    /// Returns a count of all ways to access a memory together.
    fn sum(&self, memory: &str, what: &str) -> u64 {
        let ways = self.counts[memory].as_object();
        let values = ways.map(|ways| ways.values().filter_map(|way| way[what].as_u64()).sum());
        values.unwrap_or(0)
    }

    fn work(&self) -> bounds::Work {
        bounds::Work {
            blocks: self.product("grid"),
            bytes: self.number("read") + self.number("written"),
            wavefronts: self.sum("shared", "wavefronts"),
            instructions: self.number("machine"),
            multiplications: self.number("multiplications"),
        }
    }
}

/// An operation and the launches that it takes.
pub struct Operation {
    work: Work,
    launches: Vec<Launch>,
}

impl Operation {
    pub fn new(
        work: Work,
        launches: Vec<Value>,
        resources: &Resources,
    ) -> Result<Self, Box<dyn Error>> {
        if launches.is_empty() {
            return Err(format!("{} launches no kernel", work.kernel).into());
        }
        let launches = launches.into_iter();
        let launches = launches.map(|counts| Launch::new(counts, resources));
        Ok(Self {
            work,
            launches: launches.collect::<Result<_, _>>()?,
        })
    }

    /// Returns the least time on a GPU, and the resource that most of it is spent on.
    fn bound(&self, gpu: usize) -> (&'static str, f64) {
        let mut seconds = BTreeMap::<_, f64>::new();
        for launch in &self.launches {
            let (resource, time) = launch.bounds[gpu].tightest();
            *seconds.entry(resource).or_default() += time;
        }
        let longest = seconds.iter().max_by(|a, b| a.1.total_cmp(b.1));
        (
            longest.map_or("", |(name, _)| *name),
            seconds.values().sum(),
        )
    }

    /// Returns the bytes that the launches read and write.
    fn bytes(&self) -> u64 {
        self.launches.iter().map(|launch| launch.work().bytes).sum()
    }

    fn bounds_json(&self) -> Value {
        let gpus = GPUS.iter().enumerate().map(|(index, gpu)| {
            let (by, seconds) = self.bound(index);
            let mut bounds = json!({"microseconds": microseconds(seconds), "by": by});
            for launch in &self.launches {
                for (name, seconds) in launch.bounds[index].all() {
                    let sum = bounds[name].as_f64().unwrap_or(0.0);
                    bounds[name] = json!(rounded(sum + microseconds(seconds)));
                }
            }
            (gpu.name.to_owned(), bounds)
        });
        Value::Object(gpus.collect::<Map<_, _>>())
    }
}

fn microseconds(seconds: f64) -> f64 {
    rounded(seconds * 1e6)
}

fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// Formats the results, with one launch per line.
pub fn json(operations: &[Operation]) -> String {
    let mut text = String::from("{\n\"what\": \"make kernel-counts\",\n\"operations\": [\n");
    for (index, operation) in operations.iter().enumerate() {
        let Work {
            kernel,
            shape,
            rows,
            bytes,
            operations: minimum,
            ..
        } = &operation.work;
        let head = json!({"kernel": kernel, "shape": shape, "rows": rows, "bytes": bytes, "operations": minimum});
        let head = head.to_string();
        text += &format!("{},\n \"launches\": [\n", head.trim_end_matches('}'));
        let launches = operation.launches.iter().map(|launch| {
            let mut counts = launch.counts.clone();
            let gpus = GPUS.iter().zip(&launch.blocks);
            let resident =
                gpus.map(|(gpu, block)| (gpu.name.to_owned(), gpu.resident(*block).into()));
            counts["blocks_per_multiprocessor"] = Value::Object(resident.collect());
            format!("  {counts}")
        });
        text += &launches.collect::<Vec<_>>().join(",\n");
        let bounds = operation.bounds_json();
        let end = if index + 1 < operations.len() {
            ","
        } else {
            ""
        };
        text += &format!("\n ],\n \"bounds\": {bounds}}}{end}\n");
    }
    text + "]\n}\n"
}

/// Describes how the results differ from the committed ones.
pub fn differences(committed: &str, text: &str) -> Result<Vec<String>, Box<dyn Error>> {
    if committed == text {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let (old, new) = (
        serde_json::from_str(committed)?,
        serde_json::from_str(text)?,
    );
    compare("", &old, &new, &mut found);
    if found.is_empty() {
        found.push("the results are written differently".to_owned());
    }
    if found.len() > DESCRIBED {
        let more = found.len() - DESCRIBED;
        found.truncate(DESCRIBED);
        found.push(format!("and {more} more differences"));
    }
    Ok(found)
}

fn compare(place: &str, old: &Value, new: &Value, found: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            let names = old
                .keys()
                .chain(new.keys().filter(|name| !old.contains_key(*name)));
            for name in names {
                let (old, new) = (old.get(name), new.get(name));
                let place = format!("{place}{name} ");
                compare(
                    &place,
                    old.unwrap_or(&Value::Null),
                    new.unwrap_or(&Value::Null),
                    found,
                );
            }
        }
        (Value::Array(old), Value::Array(new)) if old.len() == new.len() => {
            for (index, (old, new)) in old.iter().zip(new).enumerate() {
                let named = ["kernel", "shape", "rows"].iter().map(|name| &new[*name]);
                let named = named.filter(|value| !value.is_null());
                let name: String = named.map(|value| format!("{value} ")).collect();
                let name = if name.is_empty() {
                    format!("{index} ")
                } else {
                    name
                };
                compare(&format!("{place}{name}"), old, new, found);
            }
        }
        (Value::Array(old), Value::Array(new)) => {
            found.push(format!(
                "{place}has {} entries, was {}",
                new.len(),
                old.len()
            ));
        }
        (old, new) if old != new => found.push(format!("{place}is {new}, was {old}")),
        _ => {}
    }
}

/// Prints a table of the operations and their launches.
pub fn print(operations: &[Operation]) {
    println!(
        "bytes: of the 32-byte sectors that a launch touches, each counted once, and of the minimum"
    );
    println!(
        "instr.: PTX instructions of warps · s/r: sectors per request, of the fewest for its bytes"
    );
    println!(
        "conflicts: wavefronts of shared memory over the fewest · SM, occ.: blocks per multiprocessor and occupancy, H200"
    );
    for operation in operations {
        let work = &operation.work;
        let bytes = operation.bytes();
        println!(
            "\n{} · {}, {} rows: {:.3} MB, {:.2} × the minimum",
            work.kernel,
            work.shape,
            work.rows,
            bytes as f64 / 1e6,
            bytes as f64 / work.bytes.max(1) as f64
        );
        println!(
            "  {:<28} {:>7} {:>5} {:>4} {:>7} {:>3} {:>5} {:>10} {:>12} {:>9} {:>6} {:>9}",
            "launch",
            "blocks",
            "thr.",
            "reg.",
            "shared",
            "SM",
            "occ.",
            "instr.",
            "s/r",
            "conflicts",
            "lanes",
            "divergent"
        );
        operation.launches.iter().for_each(print_launch);
        for (index, gpu) in GPUS.iter().enumerate() {
            print_bound(operation, index, gpu);
        }
    }
}

fn print_launch(launch: &Launch) {
    let (gpu, block) = (&GPUS[0], launch.blocks[0]);
    let ratio = |a: u64, b: u64| a as f64 / b.max(1) as f64;
    let requests = launch.sum("global", "requests");
    let instructions = launch.number("instructions");
    println!(
        "  {:<28} {:>7} {:>5} {:>4} {:>7} {:>3} {:>4.0}% {:>10} {:>5.2} /{:>5.2} {:>9.2} {:>5.1}% {:>8.1}%",
        launch.counts["kernel"].as_str().unwrap_or_default(),
        launch.product("grid"),
        block.threads,
        block.registers,
        block.shared,
        gpu.resident(block),
        100.0 * gpu.occupancy(block),
        instructions,
        ratio(launch.sum("global", "sectors"), requests),
        ratio(launch.sum("global", "bytes"), 32 * requests),
        ratio(
            launch.sum("shared", "wavefronts"),
            launch.sum("shared", "least")
        ),
        100.0 * ratio(launch.number("lanes"), 32 * instructions),
        100.0 * ratio(launch.number("divergent"), launch.number("branches")),
    );
    let classes = launch.counts["classes"].as_object();
    let mut classes: Vec<(&String, u64)> = classes
        .into_iter()
        .flatten()
        .map(|(name, count)| (name, count.as_u64().unwrap_or(0)))
        .collect();
    classes.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let mix = classes
        .iter()
        .filter(|(_, count)| 100 * count >= instructions);
    let mix =
        mix.map(|(name, count)| format!("{name} {:.0}%", 100.0 * ratio(*count, instructions)));
    println!(
        "      {}; {} barriers of blocks, {} multiplications on tensor cores",
        mix.collect::<Vec<_>>().join(", "),
        launch.number("barriers"),
        launch.number("multiplications")
    );
}

fn print_bound(operation: &Operation, index: usize, gpu: &Gpu) {
    let (by, seconds) = operation.bound(index);
    println!(
        "    {:<9} at least {:>9.2} µs, by {by}: at most {:.2} TB/s, {:.0} TFLOP/s",
        gpu.name,
        seconds * 1e6,
        operation.work.bytes as f64 / seconds / 1e12,
        operation.work.operations as f64 / seconds / 1e12,
    );
}
