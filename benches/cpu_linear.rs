//! How close the CPU device's linear layers come to the machine's limits: GB/s for one row
//! compared with the read bandwidth, GMAC/s for many rows compared with the peak of int8 dot
//! products.
//!
//! `cargo bench --bench cpu_linear [-- THREADS]`

use quell::CpuOptions;
use quell::internals::device::cpu::{CpuDevice, CpuLinear};
use quell::internals::device::*;
use quell::internals::weights::DType;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Larger than the last-level cache, so that one row has to read its weights from memory.
const WORKING_SET: usize = 192 << 20;

/// Returns the median time of `work`, which is repeated for at least a quarter of a second.
fn median(mut work: impl FnMut()) -> Duration {
    work();
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < 7 || begin.elapsed() < Duration::from_millis(250) {
        let start = Instant::now();
        work();
        times.push(start.elapsed());
    }
    times.sort_unstable();
    times[times.len() / 2]
}

/// Returns the memory read bandwidth of `threads` threads in GB/s.
fn read_bandwidth(threads: usize) -> f64 {
    let words = vec![1u64; WORKING_SET / 8];
    let time = median(|| {
        std::thread::scope(|scope| {
            for part in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(move || {
                    let mut sums = [0u64; 32];
                    for chunk in part.chunks_exact(32) {
                        for (sum, word) in sums.iter_mut().zip(chunk) {
                            *sum ^= word;
                        }
                    }
                    black_box(sums);
                });
            }
        });
    });
    WORKING_SET as f64 / time.as_secs_f64() / 1e9
}

/// Returns the GMAC/s of int8 dot products whose operands never leave the registers. `None` if
/// the CPU lacks AVX-512 VNNI.
#[cfg(target_arch = "x86_64")]
fn int8_peak(threads: usize) -> Option<f64> {
    use std::arch::x86_64::*;
    const ROUNDS: usize = 1 << 20;
    const SUMS: usize = 16;

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn work(rounds: usize) -> i32 {
        let (a, b) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(5)));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        sums.into_iter()
            .map(|sum| _mm512_reduce_add_epi32(sum))
            .fold(0, i32::wrapping_add)
    }

    if !is_x86_feature_detected!("avx512f") || !is_x86_feature_detected!("avx512vnni") {
        return None;
    }
    let time = median(|| {
        std::thread::scope(|scope| {
            for _ in 0..threads {
                // SAFETY: the CPU has both features, as checked above.
                scope.spawn(|| black_box(unsafe { work(ROUNDS) }));
            }
        });
    });
    Some((threads * ROUNDS * SUMS * 64) as f64 / time.as_secs_f64() / 1e9)
}

#[cfg(not(target_arch = "x86_64"))]
fn int8_peak(_threads: usize) -> Option<f64> {
    None
}

/// Loads weights whose bytes are all equal: the speed of the kernels does not depend on them.
fn load(device: &mut CpuDevice, dtype: DType, rows: usize, columns: usize) -> CpuLinear {
    let data = vec![0x11; dtype.bytes_for(columns).unwrap_or(0) * rows];
    let part = WeightRows {
        dtype,
        rows,
        columns,
        data: &data,
        order: RowOrder::AsStored,
    };
    match device.load_linear(&LinearSpec {
        parts: vec![part],
        bias: None,
    }) {
        Ok(linear) => linear,
        Err(error) => panic!("{error}"),
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = std::env::args()
        .skip(1)
        .find_map(|argument| argument.parse().ok());
    let mut device = CpuDevice::new(&CpuOptions {
        threads,
        ..Default::default()
    })?;
    let threads = threads.unwrap_or(std::thread::available_parallelism()?.get());
    println!("{}", device.info().description);
    println!("read bandwidth: {:.1} GB/s", read_bandwidth(threads));
    if let Some(peak) = int8_peak(threads) {
        println!("int8 peak (AVX-512 VNNI): {peak:.0} GMAC/s");
    }
    println!(
        "{:>16} {:>6} {:>10} {:>10} {:>10} {:>10}",
        "columns × rows", "", "1: GB/s", "16: GMAC/s", "128", "512"
    );
    for (columns, rows) in [
        (576, 960),
        (576, 576),
        (576, 3072),
        (1536, 576),
        (576, 49152),
    ] {
        for dtype in [DType::Q4_1, DType::Q8_0, DType::BF16] {
            let first = load(&mut device, dtype, rows, columns);
            let bytes = first.bytes();
            let copies = (WORKING_SET / 2 / bytes).clamp(1, 200);
            let mut weights = vec![first];
            weights.resize_with(copies, || load(&mut device, dtype, rows, columns));
            print!("{columns:>7} × {rows:>6} {:>6}", dtype.name());
            for count in [1, 16, 128, 512] {
                if count * rows > 1 << 23 {
                    continue;
                }
                let mut x = device.allocate(count, columns, Precision::Full)?;
                for row in 0..count {
                    x.row_mut(row)
                        .iter_mut()
                        .enumerate()
                        .for_each(|(i, x)| *x = (i % 13) as f32);
                }
                let mut out = device.allocate(count, rows, Precision::Full)?;
                let used = if count == 1 {
                    weights.len()
                } else {
                    4.min(weights.len())
                };
                let time = median(|| {
                    for weight in &weights[..used] {
                        if let Err(error) = device.linear(&x, weight, count, &mut out) {
                            panic!("{error}");
                        }
                    }
                });
                let seconds = time.as_secs_f64() / used as f64;
                if count == 1 {
                    print!(" {:>10.1}", bytes as f64 / seconds / 1e9);
                } else {
                    print!(" {:>10.1}", (count * rows * columns) as f64 / seconds / 1e9);
                }
            }
            println!();
        }
    }
    Ok(())
}
