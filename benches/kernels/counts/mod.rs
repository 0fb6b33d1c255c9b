//! What the kernels do, counted on the virtual GPU, and the bounds on their speed that follow.
//!
//! `cargo bench --bench kernels -- --virtual [--only KERNEL] [--format json] [--write | --check]`
//!
//! Counts depend only on the kernels and on the shapes in `list.rs`, so they are the same on
//! every machine. `--write` writes them to `benches/results/kernel-counts.json`, and `--check`
//! fails if they differ from that file.

mod gpu;
mod list;
pub mod recorder;
mod report;

use crate::arguments::{after, has};
use crate::bench::Bench;
use crate::report::Report;
use crate::shapes::BLOCK;
use gpu::VirtualGpu;
use quell::CudaOptions;
use quell::internals::device::cuda::CudaDevice;
use quell::internals::device::*;
use recorder::Recorder;
use report::{Operation, Resources};
use std::error::Error;
use std::path::{Path, PathBuf};
use virtual_gpu::bounds::GPUS;

/// Returns the path of a file with results.
fn results(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("benches/results")
        .join(name)
}

/// Counts all operations, and prints, writes or checks the results. Returns whether that
/// succeeded.
pub fn run() -> Result<bool, Box<dyn Error>> {
    let gpu = VirtualGpu::load()?;
    // One thread, so that no kernel's course depends on the order of its blocks. Kernels are
    // checked by the tests.
    // As many multiprocessors as the first GPU of the bounds has: the device divides work among
    // them.
    let multiprocessors = GPUS[0].multiprocessors.to_string();
    for (key, value) in [
        ("threads", "1"),
        ("multiprocessors", &multiprocessors),
        ("check_races", "0"),
        ("check_initialised", "0"),
    ] {
        gpu.set(key, value)?;
    }
    let options = CudaOptions {
        max_graphs: 0,
        ..CudaOptions::default()
    };
    let mut device = CudaDevice::new(&options)?;
    let info = device.info();
    if !info.description.starts_with(gpu::NAME) {
        let found = &info.description;
        return Err(format!("counts need the {}; this is {found}", gpu::NAME).into());
    }
    device.reserve(&DeviceLimits {
        rows: 2048,
        sequences: 256,
        sequence_tokens: 2048,
        block_tokens: BLOCK,
        groups: 1,
        vocabulary: 128_256,
        model: ModelShape::default(),
    })?;
    let mut bench = Bench {
        device,
        report: Report::failures(info),
        small: false,
        short: false,
        only: after("--only"),
        end: None,
        counts: Some(Recorder::new(
            gpu,
            Resources::read(&results("kernel-resources.json"))?,
        )),
    };
    list::run(&mut bench)?;
    let succeeded = bench.report.succeeded();
    let operations = bench.counts.map_or(Vec::new(), |counts| counts.operations);
    Ok(finish(&operations)? && succeeded)
}

/// Prints, writes or checks the results.
fn finish(operations: &[Operation]) -> Result<bool, Box<dyn Error>> {
    let path = results("kernel-counts.json");
    let text = report::json(operations);
    if (has("--write") || has("--check")) && has("--only") {
        return Err("--write and --check concern all kernels".into());
    }
    if has("--write") {
        std::fs::write(&path, text)?;
        return Ok(true);
    }
    if has("--check") {
        let committed = std::fs::read_to_string(&path)?;
        let differences = report::differences(&committed, &text)?;
        for difference in &differences {
            eprintln!("kernels: {difference}");
        }
        if !differences.is_empty() {
            eprintln!(
                "kernels: the kernels do not do what {} says; if that is intended, run \
                 `make kernel-counts`",
                path.display()
            );
        }
        return Ok(differences.is_empty());
    }
    if after("--format").as_deref() == Some("json") {
        print!("{text}");
    } else {
        report::print(operations);
    }
    Ok(true)
}
