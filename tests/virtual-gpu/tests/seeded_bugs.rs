//! Tests that the virtual GPU finds bugs. Typical kernel bugs are put into quell's own kernels
//! one at a time; each must be found, by a fault or by a wrong result.
//!
//! A bug is a change to one line of the compiled kernel. The test fails if it no longer finds
//! the line to change; it must then be adapted to the kernel.

use virtual_gpu::ptx::{
    Argument, Fault, FaultKind, HostMemory, Launch, Module, Options, arguments, run,
};

fn image(family: &str) -> String {
    let path = format!(
        "{}/../../kernels/ptx/{family}.bf16.ptx",
        env!("CARGO_MANIFEST_DIR")
    );
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Returns the image for compute capability 9.0, whose kernels may overlap.
fn newer_image(family: &str) -> String {
    let image = image(family).replace(".target sm_80", ".target sm_90");
    image.replace("// sm_90: ", "")
}

/// Returns the range of lines of an image that contains one kernel, or one function that kernels
/// call.
fn kernel_lines(lines: &[String], kernel: &str) -> std::ops::Range<usize> {
    let begins = |line: &String| line.contains(".entry ") || line.starts_with(".func ");
    let entry = format!(".entry {kernel}(");
    let is_function = |line: &str| line.starts_with(".func ") && line.contains(kernel);
    let is_meant = |line: &String| line.contains(&entry) || is_function(line);
    let first = lines.iter().position(is_meant);
    let first = first.unwrap_or_else(|| panic!("there is no kernel {kernel}"));
    let rest = lines[first + 1..].iter();
    let end = rest.clone().position(begins);
    first..end.map_or(lines.len(), |end| first + 1 + end)
}

/// Returns the image after applying `change` to the `nth` line of `kernel` that `is_meant`
/// selects.
fn with_bug(
    family: &str,
    kernel: &str,
    nth: usize,
    is_meant: impl Fn(&str, &str) -> bool,
    change: impl Fn(&str) -> String,
) -> String {
    changed(&image(family), kernel, nth, is_meant, change)
}

/// Like [`with_bug`], for the text of an image.
fn changed(
    image: &str,
    kernel: &str,
    nth: usize,
    is_meant: impl Fn(&str, &str) -> bool,
    change: impl Fn(&str) -> String,
) -> String {
    let mut lines: Vec<String> = image.lines().map(str::to_owned).collect();
    let range = kernel_lines(&lines, kernel);
    // Source positions stand between instructions: a line's predecessor is the previous
    // instruction.
    let mut before = String::new();
    let mut found = 0;
    for index in range {
        // The images have no spaces between operands.
        let line = lines[index].trim().replace(',', ", ").replace(",  ", ", ");
        if line.is_empty() || line.starts_with(".loc") || line.starts_with("//") {
            continue;
        }
        if is_meant(&before, &line) {
            if found == nth {
                let changed = change(&line);
                assert_ne!(changed, line, "the change changes nothing");
                lines[index] = changed;
                return lines.join("\n");
            }
            found += 1;
        }
        before = line;
    }
    panic!("{kernel} has only {found} matching lines");
}

fn without(_: &str) -> String {
    String::new()
}

fn is_barrier(_: &str, line: &str) -> bool {
    line.starts_with("bar.sync")
}

fn bf16(value: f32) -> u16 {
    (value.to_bits() >> 16) as u16
}

fn from_bf16(value: u16) -> f32 {
    f32::from_bits(u32::from(value) << 16)
}

/// Returns small multiples of one half: they are exact in bfloat16, and so are the sums of
/// their products in float32.
fn values(count: usize, seed: u32) -> Vec<u16> {
    let mut state = seed;
    let next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16(((state >> 24) % 9) as f32 * 0.5 - 2.0)
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Turns a run into a result: an error is a fault, or a wrong result.
fn outcome(run: Result<bool, Fault>) -> Result<(), String> {
    match run {
        Ok(true) => Ok(()),
        Ok(false) => Err("wrong result".to_owned()),
        Err(fault) => Err(fault.to_string()),
    }
}

/// Runs `linear_m16` with three rows, 40 outputs, and so many inputs that the last of them lie
/// in the first stage, whose memory the results overwrite. Uses several orders of warps.
fn product(image: &str) -> Result<bool, Fault> {
    let (rows, outputs, inputs) = (3usize, 40usize, 1400usize);
    let module = Module::parse(image).unwrap();
    let kernel = module.kernel("linear_m16").unwrap();
    for seed in [None, Some(1), Some(2), Some(3)] {
        let (x, weight) = (values(rows * inputs, 1), values(outputs * inputs, 2));
        let mut memory = HostMemory::new();
        let out = memory.alloc_uninitialised("out", rows * outputs * 4);
        let parameters = arguments(
            kernel,
            &[
                Argument::Pointer(out),
                Argument::Pointer(memory.alloc("x", &x)),
                Argument::Pointer(memory.alloc("weight", &weight)),
                Argument::Pointer(0),
                Argument::Pointer(0),
                Argument::Pointer(0),
                Argument::Pointer(memory.alloc("sums", &[0u32; 1024])),
                Argument::U32(2048),
                Argument::U32(rows as u32),
                Argument::U32(1),
                Argument::U32(outputs as u32),
                Argument::U32(inputs as u32),
                Argument::U32(outputs as u32),
                Argument::U32(1),
            ],
        );
        let launch = Launch {
            grid: [outputs.div_ceil(32) as u32, 1, 1],
            block: [128, 1, 1],
            dynamic_shared: 5 * (16 + 32) * 128 * 2,
            parameters,
        };
        let options = Options {
            shuffle_seed: seed,
            ..Options::default()
        };
        run(kernel, &launch, &memory.regions(), &options)?;
        let found = memory.read::<f32>(out, rows * outputs);
        for (index, &found) in found.iter().enumerate() {
            let (row, output) = (index / outputs, index % outputs);
            let pairs = (0..inputs).map(|i| (x[row * inputs + i], weight[output * inputs + i]));
            let sum: f32 = pairs.map(|(x, w)| from_bf16(x) * from_bf16(w)).sum();
            if found != sum {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Runs `linear_m16` with three blocks that share a tile, one unit of the inputs each, in several
/// orders, and twice with the same memory. The results must be those of a single block, bit for
/// bit: they are not exact, so they depend on the order of addition.
fn shared_product(image: &str) -> Result<bool, Fault> {
    let (rows, outputs, inputs) = (3usize, 32usize, 2600usize);
    let module = Module::parse(image).unwrap();
    let kernel = module.kernel("linear_m16").unwrap();
    // Of many magnitudes, so that sums are rounded.
    let spread = |values: Vec<u16>| -> Vec<u16> {
        let scaled = |(index, value): (usize, u16)| {
            bf16(from_bf16(value) / 3.0 * 2f32.powi((index * 7 % 13) as i32 - 6))
        };
        values.into_iter().enumerate().map(scaled).collect()
    };
    let x = spread(values(rows * inputs, 1));
    let weight = spread(values(outputs * inputs, 2));
    let mut expected = None;
    for (blocks, seed) in [
        (1, None),
        (3, None),
        (3, Some(1)),
        (3, Some(2)),
        (3, Some(3)),
    ] {
        let mut memory = HostMemory::new();
        let sum_bytes = 3 * 16 * outputs * 4;
        let mut sums = vec![0u32; 1024 + sum_bytes / 4];
        // What a product leaves there means nothing to the next one.
        sums[1024..].fill(0x7fc0_0000);
        let nan = vec![f32::NAN; rows * outputs];
        let outs = ["first", "second"].map(|name| memory.alloc(name, &nan));
        let (x, weight) = (memory.alloc("x", &x), memory.alloc("weight", &weight));
        let sums = memory.alloc("sums", &sums);
        for out in outs {
            let mut parameters = [out, x, weight, 0, 0, 0, sums]
                .map(Argument::Pointer)
                .to_vec();
            let numbers = [1024, rows, 1, outputs, inputs, outputs, 1];
            parameters.extend(numbers.map(|number| Argument::U32(number as u32)));
            let launch = Launch {
                grid: [1, 1, blocks],
                block: [128, 1, 1],
                dynamic_shared: 5 * (16 + 32) * 128 * 2,
                parameters: arguments(kernel, &parameters),
            };
            let options = Options {
                shuffle_seed: seed,
                check_initialised: false,
                ..Options::default()
            };
            run(kernel, &launch, &memory.regions(), &options)?;
            let found = memory.read::<u32>(out, rows * outputs);
            if *expected.get_or_insert_with(|| found.clone()) != found {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Number of the launch in [`copy`].
const COPY: u32 = 7;

/// Lets a kernel of `kernels/norm.cu`, `gather_rows`, write numbers to an address.
fn copy(image: &str, memory: &mut HostMemory, (to, x): (u64, &[f32])) -> Result<(), Fault> {
    let module = Module::parse(image).unwrap();
    let kernel = module.kernel("gather_rows").unwrap();
    let parameters = [
        Argument::Pointer(to),
        Argument::Pointer(memory.alloc("source", x)),
        Argument::Pointer(memory.alloc("indices", &[0u32])),
        Argument::U32(x.len() as u32),
    ];
    let launch = Launch {
        grid: [1, 1, 1],
        block: [256, 1, 1],
        dynamic_shared: 0,
        parameters: arguments(kernel, &parameters),
    };
    let options = Options {
        number: COPY,
        ..Options::default()
    };
    run(kernel, &launch, &memory.regions(), &options).map(|_| ())
}

/// Runs `rms_norm` with two rows of 1032 columns.
fn norm(image: &str) -> Result<bool, Fault> {
    norm_after(image, false)
}

/// Runs `rms_norm` while the kernel that writes its input may still run, if it `overlaps`.
fn norm_after(image: &str, overlaps: bool) -> Result<bool, Fault> {
    let (rows, columns) = (2usize, 1032usize);
    let module = Module::parse(image).unwrap();
    let kernel = module.kernel("rms_norm").unwrap();
    for seed in [None, Some(1), Some(2), Some(3)] {
        let x: Vec<f32> = values(rows * columns, 3)
            .into_iter()
            .map(from_bf16)
            .collect();
        let mut memory = HostMemory::new();
        let written = memory.alloc_uninitialised("x", rows * columns * 4);
        copy(image, &mut memory, (written, &x))?;
        let out = memory.alloc_uninitialised("out", rows * columns * 2);
        let parameters = arguments(
            kernel,
            &[
                Argument::Pointer(out),
                Argument::Pointer(written),
                Argument::Pointer(memory.alloc("weight", &vec![1.0f32; columns])),
                Argument::F32(1e-5),
                Argument::U32(columns as u32),
            ],
        );
        let launch = Launch {
            grid: [rows as u32, 1, 1],
            block: [256, 1, 1],
            dynamic_shared: 0,
            parameters,
        };
        let options = Options {
            shuffle_seed: seed,
            overlaps: overlaps.then_some(COPY),
            ..Options::default()
        };
        run(kernel, &launch, &memory.regions(), &options)?;
        let found = memory.read::<u16>(out, rows * columns);
        for (found, x) in found.chunks(columns).zip(x.chunks(columns)) {
            let square = x.iter().map(|x| x * x).sum::<f32>() / columns as f32;
            let scale = 1.0 / (square + 1e-5).sqrt();
            let near = |(&found, &x): (&u16, &f32)| (from_bf16(found) - x * scale).abs() < 0.01;
            if !found.iter().zip(x).all(near) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Runs `attend_decode_hd16` twice for a sequence of 1,280 tokens, which three blocks share, in an
/// order of blocks that depends on the seed. Returns the bits of the second result.
fn attention(image: &str, seed: Option<u64>) -> Result<Vec<u16>, Fault> {
    let (tokens, q_heads, head_dim) = (1280usize, 2usize, 16usize);
    let units = tokens.div_ceil(128);
    let module = Module::parse(image).unwrap();
    let kernel = module.kernel("attend_decode_hd16").unwrap();
    let mut memory = HostMemory::new();
    let partials = units * q_heads;
    // The result is the mean of all values. Those of two units cancel each other, and whatever is
    // added in between is lost, so that the order matters.
    let mut seen = values(tokens * head_dim, 6);
    let unit = 128 * head_dim;
    seen[..unit].fill(bf16(1048576.0));
    seen[3 * unit..4 * unit].fill(bf16(-1048576.0));
    let out = memory.alloc_uninitialised("out", q_heads * head_dim * 2);
    let mut parameters = vec![
        Argument::Pointer(out),
        Argument::Pointer(memory.alloc_uninitialised("partial_out", partials * head_dim * 4)),
        Argument::Pointer(memory.alloc_uninitialised("partial_stats", partials * 8)),
        Argument::Pointer(memory.alloc("arrivals", &[0u32])),
        Argument::Pointer(memory.alloc("qkv", &vec![0u16; (q_heads + 2) * head_dim])),
        Argument::Pointer(memory.alloc("keys", &values(tokens * head_dim, 5))),
        Argument::Pointer(memory.alloc("values", &seen)),
        Argument::Pointer(memory.alloc("tables", &[0u32])),
        Argument::Pointer(memory.alloc("sequences", &[0u32, 1, tokens as u32, 0])),
        Argument::Pointer(memory.alloc("decode_list", &[0u32, 0])),
    ];
    parameters.extend([Argument::Pointer(0); 4]);
    parameters.extend([Argument::F32(0.0), Argument::U32(0), Argument::U32(0)]);
    let (columns, block_vectors) = ((q_heads + 2) * head_dim, tokens * head_dim / 8);
    let sizes = [q_heads, 1, columns, tokens, block_vectors];
    parameters.extend(sizes.map(|number| Argument::U32(number as u32)));
    parameters.extend([Argument::F32(0.37), Argument::F32(0.0)]);
    parameters.extend([Argument::U32(0); 2]);
    let launch = Launch {
        grid: [3, 1, 1],
        block: [128, 1, 1],
        dynamic_shared: (1 + 4 * 8) * 16 * (2 * head_dim + 16),
        parameters: arguments(kernel, &parameters),
    };
    let options = Options {
        shuffle_seed: seed,
        ..Options::default()
    };
    run(kernel, &launch, &memory.regions(), &options)?;
    memory.write(out, &vec![0u16; q_heads * head_dim]);
    run(kernel, &launch, &memory.regions(), &options)?;
    Ok(memory.read(out, q_heads * head_dim))
}

/// Compares attention with that of the unmodified kernel, whose blocks ran in ascending order.
fn same_attention(image: &str, newer: bool) -> Result<bool, Fault> {
    let expected = attention(&crate::image("attention"), None)?;
    assert!(expected.iter().any(|bits| *bits != 0));
    let seeds = [None, Some(1), Some(2), Some(3), Some(4)];
    let seeds = if newer { &seeds[..1] } else { &seeds };
    for &seed in seeds {
        if attention(image, seed)? != expected {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Runs `linear_q4_m8` with three rows and weights that are all zero: two stages of x, and warps
/// with two records, one and none.
fn quantised(image: &str) -> Result<bool, Fault> {
    let (rows, outputs, inputs) = (3usize, 40usize, 600usize);
    let record_bytes = 1152;
    let records = outputs.div_ceil(16) * inputs.div_ceil(128);
    let module = Module::parse(image).unwrap();
    let kernel = module.kernel("linear_q4_m8").unwrap();
    for seed in [None, Some(1), Some(2), Some(3)] {
        let mut memory = HostMemory::new();
        let out = memory.alloc_uninitialised("out", rows * outputs * 4);
        let weight = vec![0u8; records * record_bytes];
        let mut parameters = vec![
            Argument::Pointer(out),
            Argument::Pointer(memory.alloc("x", &values(rows * inputs, 1))),
            Argument::Pointer(memory.alloc("weight", &weight)),
        ];
        parameters.extend([Argument::Pointer(0); 3]);
        parameters.push(Argument::Pointer(memory.alloc("sums", &[0u32; 1024])));
        parameters.extend([rows, outputs, inputs, outputs, 1].map(|n| Argument::U32(n as u32)));
        let launch = Launch {
            grid: [outputs.div_ceil(32) as u32, 1, 1],
            block: [256, 1, 1],
            dynamic_shared: 4 * (8 * 1024 + 8 * record_bytes),
            parameters: arguments(kernel, &parameters),
        };
        let options = Options {
            shuffle_seed: seed,
            ..Options::default()
        };
        run(kernel, &launch, &memory.regions(), &options)?;
        let found = memory.read::<f32>(out, rows * outputs);
        if found.iter().any(|&found| found != 0.0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Runs `group_pairs_of256` with 45 rows, each of which goes to two of six experts; the third one gets
/// none, and the first one more than a tile of rows.
fn grouping(image: &str) -> Result<bool, Fault> {
    let (rows, experts, top_k) = (45usize, 6usize, 2usize);
    let pair_expert: Vec<u32> = (0..rows as u32)
        .flat_map(|row| [0, [1, 3, 4, 5][row as usize % 4]])
        .collect();
    let pairs = pair_expert.len();
    let tile_rows = [8, 16, 64, 128];
    let places = tile_rows.map(|tile| experts + (pairs - experts) / tile);
    let module = Module::parse(image).unwrap();
    let kernel = module.kernel("group_pairs_of256").unwrap();
    let mut memory = HostMemory::new();
    let count: usize = places.iter().sum();
    let tiles = memory.alloc_uninitialised("tiles", count * 16);
    let row_index = memory.alloc_uninitialised("row_index", pairs * 4);
    let pair_slot = memory.alloc_uninitialised("pair_slot", pairs * 4);
    let mut parameters = vec![
        Argument::Pointer(tiles),
        Argument::Pointer(row_index),
        Argument::Pointer(pair_slot),
        Argument::Pointer(memory.alloc("pair_expert", &pair_expert)),
    ];
    let numbers = [rows, experts, top_k].into_iter().chain(places);
    parameters.extend(numbers.map(|number| Argument::U32(number as u32)));
    let launch = Launch {
        grid: [1, 1, 1],
        block: [1024, 1, 1],
        dynamic_shared: 0,
        parameters: arguments(kernel, &parameters),
    };
    run(kernel, &launch, &memory.regions(), &Options::default())?;

    let mut slots: Vec<usize> = (0..pairs).collect();
    slots.sort_by_key(|&pair| pair_expert[pair]);
    let mut expected = Vec::new();
    for (tile, places) in tile_rows.into_iter().zip(places) {
        let begin = expected.len();
        for expert in 0..experts as u32 {
            let before = |limit| pair_expert.iter().filter(|&&e| e < limit).count() as u32;
            let (first, end) = (before(expert), before(expert + 1));
            let starts = (first..end).step_by(tile);
            expected.extend(starts.map(|start| [expert, start, end, 0]));
        }
        expected.resize(begin + places, [0; 4]);
    }
    let found = memory.read::<u32>(tiles, count * 4);
    let rows_found = memory.read::<u32>(row_index, pairs);
    let slots_found = memory.read::<u32>(pair_slot, pairs);
    Ok(found == expected.concat()
        && slots.iter().enumerate().all(|(slot, &pair)| {
            rows_found[slot] as usize == pair / top_k && slots_found[pair] as usize == slot
        }))
}

#[test]
fn unmodified_kernels_pass() {
    assert_eq!(outcome(product(&image("linear"))), Ok(()));
    assert_eq!(outcome(shared_product(&image("linear"))), Ok(()));
    assert_eq!(outcome(grouping(&image("experts"))), Ok(()));
    assert_eq!(outcome(quantised(&image("linear_quant"))), Ok(()));
    assert_eq!(outcome(norm(&image("norm"))), Ok(()));
    assert_eq!(outcome(norm_after(&newer_image("norm"), true)), Ok(()));
    assert_eq!(outcome(same_attention(&image("attention"), false)), Ok(()));
    let newer = newer_image("attention");
    assert_eq!(outcome(same_attention(&newer, true)), Ok(()));
}

fn is_wait(_: &str, line: &str) -> bool {
    line.contains("griddepcontrol.wait")
}

#[test]
fn a_kernel_that_does_not_wait_for_the_one_before_it_is_detected() {
    let image = newer_image("norm");
    let without_wait = |line: &str| line.replace("griddepcontrol.wait; ", "");
    let image = changed(&image, "rms_norm", 0, is_wait, without_wait);
    let fault = norm_after(&image, true).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Overlap, "{fault}");
}

#[test]
fn a_kernel_that_reads_before_it_waits_is_detected() {
    // The wait moves behind the first loads of the row.
    let image = newer_image("norm");
    let image = changed(&image, "rms_norm", 0, is_wait, without);
    let is_load = |_: &str, line: &str| line.starts_with("ld.global.v4.f32");
    let late = |line: &str| format!("{line}\ngriddepcontrol.wait;");
    let image = changed(&image, "rms_norm", 0, is_load, late);
    let fault = norm_after(&image, true).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Overlap, "{fault}");
    assert!(fault.detail.contains("reads what"), "{fault}");
}

#[test]
fn a_kernel_that_lets_the_next_one_begin_before_it_waits_is_detected() {
    let turned = |_: &str| "griddepcontrol.launch_dependents; griddepcontrol.wait;".to_owned();
    let image = changed(&newer_image("norm"), "rms_norm", 0, is_wait, turned);
    let fault = norm_after(&image, true).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Overlap, "{fault}");
}

#[test]
fn a_count_of_blocks_that_is_not_reset_is_detected() {
    // The only store of a word to global memory.
    let is_reset = |_: &str, line: &str| line.starts_with("st.global.u32");
    let image = with_bug("attention", "is_last_to_arrive", 0, is_reset, without);
    let found = outcome(same_attention(&image, false));
    assert_eq!(found, Err("wrong result".to_owned()));
}

#[test]
fn units_that_are_merged_in_another_order_change_bits() {
    // Where a unit's partial result goes: at its index, which becomes that of its neighbour.
    let is_place = |before: &str, line: &str| {
        before.starts_with("add.s32") && line.starts_with("mul.wide.u32")
    };
    let neighbour = |line: &str| {
        let index = line.split(", ").nth(1).unwrap();
        format!("xor.b32 {index}, {index}, 1;\n{line}")
    };
    let nth = 6;
    let image = with_bug("attention", "attend_decode_hd16", nth, is_place, neighbour);
    let found = outcome(same_attention(&image, false));
    assert_eq!(found, Err("wrong result".to_owned()));
}

#[test]
fn a_merge_that_does_not_wait_for_the_other_blocks_is_detected() {
    // The first block to arrive merges, while the others have not written their results.
    let is_comparison = |_: &str, line: &str| line.starts_with("setp.eq.s32");
    let always = |line: &str| {
        let predicate = line["setp.eq.s32 ".len()..].split(',').next().unwrap();
        format!("setp.eq.s32 {predicate}, 0, 0;")
    };
    // The second comparison: the first one finds the thread that counts.
    let image = with_bug("attention", "is_last_to_arrive", 1, is_comparison, always);
    let fault = same_attention(&image, false).unwrap_err();
    assert_eq!(fault.kind, FaultKind::UninitialisedRead, "{fault}");
}

#[test]
fn a_missing_barrier_after_waiting_for_copies_is_a_race() {
    let after_wait = |before: &str, line: &str| {
        before.starts_with("cp.async.wait_group") && line.starts_with("bar.sync")
    };
    let fault = product(&with_bug("linear", "linear_m16", 0, after_wait, without)).unwrap_err();
    assert_eq!(fault.kind, FaultKind::SharedRace, "{fault}");
}

#[test]
fn a_missing_barrier_at_the_end_of_a_loop_is_a_race() {
    // The second of three barriers: after the loop, before its memory is reused for the results.
    let image = with_bug("linear", "linear_m16", 1, is_barrier, without);
    let fault = product(&image).unwrap_err();
    assert_eq!(fault.kind, FaultKind::SharedRace, "{fault}");
}

#[test]
fn sums_of_several_warps_that_are_added_up_too_soon_are_a_race() {
    // The last of three barriers: between writing the sums to shared memory and adding them up.
    let image = with_bug("linear_quant", "linear_q4_m8", 2, is_barrier, without);
    let fault = quantised(&image).unwrap_err();
    assert_eq!(fault.kind, FaultKind::SharedRace, "{fault}");
}

#[test]
fn a_missing_barrier_inside_a_block_reduction_is_detected() {
    // The last barrier is the one before the partial sums are read.
    let last = (0..).take_while(|&nth| {
        std::panic::catch_unwind(|| with_bug("norm", "rms_norm", nth, is_barrier, without)).is_ok()
    });
    let last = last.last().expect("the reduction has a barrier");
    let found = outcome(norm(&with_bug(
        "norm", "rms_norm", last, is_barrier, without,
    )));
    assert!(found.is_err(), "nothing was found");
}

#[test]
fn waiting_for_one_copy_group_too_few_is_detected() {
    let is_wait = |_: &str, line: &str| line.starts_with("cp.async.wait_group");
    let one_more = |line: &str| {
        let pending: u32 = line
            .trim_end_matches(';')
            .rsplit(' ')
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap();
        format!("cp.async.wait_group {};", pending + 1)
    };
    let found = outcome(product(&with_bug(
        "linear",
        "linear_m16",
        0,
        is_wait,
        one_more,
    )));
    assert!(found.is_err(), "nothing was found");
}

#[test]
fn swapped_operands_of_a_matrix_instruction_give_a_wrong_result() {
    let is_mma = |_: &str, line: &str| line.starts_with("mma.sync");
    // {d}, {a0, a1, a2, a3}, {b0, b1}, {c}: swap the two registers of b.
    let swap = |line: &str| {
        let open = line.match_indices('{').nth(2).unwrap().0;
        let close = open + line[open..].find('}').unwrap();
        let (first, second) = line[open + 1..close].split_once(',').unwrap();
        let (head, tail) = (&line[..open], &line[close + 1..]);
        format!("{head}{{{}, {}}}{tail}", second.trim(), first.trim())
    };
    let found = product(&with_bug("linear", "linear_m16", 0, is_mma, swap));
    assert_eq!(outcome(found), Err("wrong result".to_owned()));
}

#[test]
fn a_missing_bounds_check_reads_out_of_bounds() {
    // How many rows a thread copies: none unless its chunk is inside the rows.
    let is_guard = |before: &str, line: &str| {
        let chooses = line.starts_with("selp.b32") && line.contains(", 0, %p");
        before.starts_with("setp.lt.u32") && chooses
    };
    let unguarded = |line: &str| {
        let operands: Vec<&str> = line["selp.b32 ".len()..].split(", ").collect();
        format!("mov.b32 {}, {};", operands[0], operands[1])
    };
    // In the loop; the first stages are always inside.
    let fault = product(&with_bug("linear", "linear_m16", 1, is_guard, unguarded)).unwrap_err();
    assert_eq!(fault.kind, FaultKind::OutOfBounds, "{fault}");
}

#[test]
fn a_list_of_tiles_that_is_off_by_one_expert_is_detected() {
    let is_entry = |_: &str, line: &str| line.starts_with("st.global.v4.u32");
    // {expert, first slot, end of the slots, 0}
    let next_expert = |line: &str| {
        let (_, operands) = line.split_once('{').unwrap();
        let expert = operands.split(',').next().unwrap();
        format!("add.s32 {expert}, {expert}, 1;\n{line}")
    };
    let image = with_bug("experts", "group_pairs_of256", 0, is_entry, next_expert);
    assert_eq!(outcome(grouping(&image)), Err("wrong result".to_owned()));
}

#[test]
fn wrong_lanes_of_a_matrix_load_give_a_wrong_result() {
    // The row of x that a lane points at: lane % 16.
    let is_lane = |_: &str, line: &str| line.starts_with("and.b32") && line.ends_with(", 15;");
    let wrong = |line: &str| line.replace(", 15;", ", 7;");
    let found = outcome(product(&with_bug(
        "linear",
        "linear_m16",
        0,
        is_lane,
        wrong,
    )));
    assert!(found.is_err(), "nothing was found");
}

#[test]
fn a_counter_that_is_not_reset_gives_a_wrong_result() {
    let is_reset = |_: &str, line: &str| line.starts_with("st.global.u32");
    let found = shared_product(&with_bug(
        "linear",
        "is_last_to_arrive",
        0,
        is_reset,
        without,
    ));
    assert_eq!(outcome(found), Err("wrong result".to_owned()));
}

/// The block that arrives last begins with its own sum, instead of the first one.
#[test]
fn sums_that_are_added_in_the_order_of_arrival_give_a_wrong_result() {
    let is_load = |_: &str, line: &str| line.starts_with("ld.global.cg.v4.f32");
    // The sums of the only tile follow the counters, 2,048 bytes each.
    let rotated = |line: &str| {
        let (head, rest) = line.split_once('[').unwrap();
        let (address, tail) = rest.split_once(']').unwrap();
        format!(
            "{{.reg .b32 number;\n.reg .b64 first, place, block, other;\n\
             ld.param.u64 first, [p6];\n\
             add.s64 first, first, 4096;\n\
             sub.s64 place, {address}, first;\n\
             shr.u64 place, place, 11;\n\
             mov.u32 number, %ctaid.z;\n\
             cvt.u64.u32 block, number;\n\
             add.s64 other, place, block;\n\
             rem.u64 other, other, 3;\n\
             sub.s64 other, other, place;\n\
             shl.b64 other, other, 11;\n\
             add.s64 other, other, {address};\n\
             {head}[other]{tail}}}"
        )
    };
    // The loop over the places that are left after whole fours of them.
    let image = with_bug("linear", "linear_m16", 4, is_load, rotated);
    assert_eq!(
        outcome(shared_product(&image)),
        Err("wrong result".to_owned())
    );
}
