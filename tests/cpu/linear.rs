//! Linear layers on the CPU device agree with float64, whatever the format, the instruction
//! set, the batch and the number of threads.

use common::cpu::*;
use quell::internals::device::cpu::CpuDevice;
use quell::internals::device::*;
use quell::internals::weights::DType;
use quell::{Activations, CpuOptions, SimdLevel};

const MODES: [Activations; 2] = [Activations::F32, Activations::Int8];

fn shapes(dtype: DType) -> Vec<(usize, usize)> {
    match dtype.block_elements() {
        1 => vec![(1, 1), (16, 16), (37, 51), (130, 96)],
        32 => vec![(1, 32), (16, 64), (37, 96), (130, 576)],
        _ => vec![(1, 256), (37, 512), (66, 768)],
    }
}

fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |largest, x| largest.max(x.abs()))
}

/// Returns the product in float64 and how far from it a result may be. The largest value of the
/// row is not rounded to an integer.
fn expected(w: &[f32], x: &[f32], integer: bool) -> (f64, f64) {
    let (mut sum, mut bound) = (0.0, 1e-12);
    let exact = largest(x);
    for (w, x) in w.chunks(32).zip(x.chunks(32)) {
        let rounded = x.iter().filter(|x| x.abs() != exact).copied();
        let largest = largest(&rounded.collect::<Vec<_>>());
        for (&w, &x) in w.iter().zip(x) {
            let product = f64::from(w) * f64::from(x);
            sum += product;
            // Float32 rounding, and half a step of the integers.
            bound += 1e-5 * product.abs();
            if integer {
                bound += f64::from(w.abs()) * f64::from(largest) / 127.0 * 0.501;
                // The minimums and zero points are much larger than the weights.
                bound += 1e-7 * f64::from(largest);
            }
        }
    }
    (sum, bound)
}

/// Compares every output of every row of `x` with float64.
fn check(
    w: &[f32],
    x: &[f32],
    out: &[f32],
    (rows, columns): (usize, usize),
    integer: bool,
    what: &str,
) {
    for (x, out) in x.chunks(columns).zip(out.chunks(rows)) {
        for (w, &out) in w.chunks(columns).zip(out) {
            let (sum, bound) = expected(w, x, integer);
            let error = (f64::from(out) - sum).abs();
            assert!(
                error <= bound,
                "{what}: {out} is {error} from {sum}, more than {bound}"
            );
        }
    }
}

#[test]
fn every_format_agrees_with_float64() {
    let mut random = Random::new(1);
    for dtype in DType::ALL {
        for (rows, columns) in shapes(dtype) {
            let data = weights(&mut random, dtype, rows, columns);
            let w = dequantized(dtype, &data, rows * columns);
            let x = random.numbers(11 * columns);
            for level in levels() {
                for mode in MODES {
                    let mut device = device(level, 2, mode);
                    let weight = linear(&mut device, dtype, rows, columns, &data);
                    let out = multiply(&mut device, &weight, &x);
                    let integer = mode == Activations::Int8 && !dtype.is_float();
                    let what = format!("{dtype} {rows}×{columns} {level:?} {mode:?}");
                    check(&w, &x, &out, (rows, columns), integer, &what);
                }
            }
        }
    }
}

#[test]
fn an_outlier_does_not_reduce_the_precision_of_other_values() {
    let mut random = Random::new(7);
    for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
        let (rows, columns) = (37, 512);
        let data = weights(&mut random, dtype, rows, columns);
        let w = dequantized(dtype, &data, rows * columns);
        let mut x = random.numbers(11 * columns);
        // The column differs between most rows; pairs of rows use the same one.
        for (row, x) in x.chunks_mut(columns).enumerate() {
            x[row / 2 * 37] = if row % 3 == 0 { -300.0 } else { 200.0 };
        }
        for level in levels() {
            let mut device = device(level, 2, Activations::Int8);
            let weight = linear(&mut device, dtype, rows, columns, &data);
            let out = multiply(&mut device, &weight, &x);
            check(
                &w,
                &x,
                &out,
                (rows, columns),
                true,
                &format!("{dtype} {level:?}"),
            );
        }
    }
}

#[test]
fn batch_size_and_thread_count_change_no_bit_of_a_row() {
    let mut random = Random::new(2);
    for dtype in DType::ALL {
        let (rows, columns) = (130, if dtype.is_float() { 77 } else { 512 });
        let data = weights(&mut random, dtype, rows, columns);
        let x = random.numbers(33 * columns);
        for level in levels() {
            for mode in MODES {
                let mut alone = Vec::new();
                for (threads, batch) in [(1, 1), (1, 7), (2, 32), (3, 33), (2, 2), (1, 4), (3, 12)]
                {
                    let mut device = device(level, threads, mode);
                    let weight = linear(&mut device, dtype, rows, columns, &data);
                    let mut out = Vec::new();
                    for x in x.chunks(batch * columns) {
                        out.extend(multiply(&mut device, &weight, x));
                    }
                    if alone.is_empty() {
                        alone = bits(&out);
                    }
                    assert!(
                        bits(&out) == alone,
                        "{dtype} {level:?} {mode:?} {threads} {batch}"
                    );
                }
            }
        }
    }
}

#[test]
fn avx2_and_avx512_are_bit_identical() {
    if !levels().starts_with(&[SimdLevel::Avx512, SimdLevel::Avx2]) {
        eprintln!("skipped: this machine has no AVX-512");
        return;
    }
    let mut random = Random::new(3);
    for dtype in DType::ALL {
        let (rows, columns) = (50, 256);
        let data = weights(&mut random, dtype, rows, columns);
        let x = random.numbers(9 * columns);
        for mode in MODES {
            let [a, b] = [SimdLevel::Avx512, SimdLevel::Avx2].map(|level| {
                let mut device = device(level, 1, mode);
                let weight = linear(&mut device, dtype, rows, columns, &data);
                bits(&multiply(&mut device, &weight, &x))
            });
            assert!(a == b, "{dtype} {mode:?}");
        }
    }
}

#[test]
fn parts_of_several_formats_stack_and_the_bias_is_added() {
    let mut random = Random::new(4);
    let columns = 256;
    let formats = [
        (DType::Q4K, 20),
        (DType::Q4K, 24),
        (DType::Q6K, 9),
        (DType::BF16, 17),
    ];
    let data: Vec<_> = formats
        .iter()
        .map(|&(dtype, rows)| weights(&mut random, dtype, rows, columns))
        .collect();
    let rows = formats.iter().map(|(_, rows)| rows).sum::<usize>();
    let bias = random.numbers(rows);
    let x = random.numbers(5 * columns);
    for level in levels() {
        let mut device = device(level, 2, Activations::F32);
        let part = |i: usize| {
            let (dtype, rows) = formats[i];
            WeightRows {
                dtype,
                rows,
                columns,
                data: &data[i],
                order: RowOrder::AsStored,
            }
        };
        let spec = LinearSpec {
            parts: (0..4).map(part).collect(),
            bias: Some(bias.clone()),
        };
        let stacked = device.load_linear(&spec).unwrap();
        let out = multiply(&mut device, &stacked, &x);
        let mut first = 0;
        for (i, &(dtype, part_rows)) in formats.iter().enumerate() {
            let alone = linear(&mut device, dtype, part_rows, columns, &data[i]);
            let alone = multiply(&mut device, &alone, &x);
            for (out, alone) in out.chunks(rows).zip(alone.chunks(part_rows)) {
                for (j, alone) in alone.iter().enumerate() {
                    assert_eq!(out[first + j], alone + bias[first + j], "{dtype} {j}");
                }
            }
            first += part_rows;
        }
    }
}

#[test]
fn interleaved_rope_rows_are_reordered_to_half_split() {
    let mut random = Random::new(5);
    let (rows, columns, head_dim) = (48, 64, 24);
    let data = weights(&mut random, DType::Q8_0, rows, columns);
    let x = random.numbers(columns);
    let mut device = device(SimdLevel::Auto, 1, Activations::F32);
    let plain = linear(&mut device, DType::Q8_0, rows, columns, &data);
    let plain = multiply(&mut device, &plain, &x);
    let order = RowOrder::RopeInterleaved {
        head_dim,
        rotary_dim: 16,
    };
    let part = WeightRows {
        dtype: DType::Q8_0,
        rows,
        columns,
        data: &data,
        order,
    };
    let weight = device
        .load_linear(&LinearSpec {
            parts: vec![part],
            bias: None,
        })
        .unwrap();
    let out = multiply(&mut device, &weight, &x);
    for row in 0..rows {
        assert_eq!(out[row], plain[order.stored_row(row)]);
    }
    let stored = (0..head_dim).map(|row| order.stored_row(row));
    let halves = (0..16).step_by(2).chain((1..16).step_by(2));
    assert!(stored.eq(halves.chain(16..24)));
}

#[test]
fn embeddings_are_rows_of_the_packed_table() {
    let mut random = Random::new(6);
    for dtype in DType::ALL {
        let (rows, columns) = (53, 256);
        let data = weights(&mut random, dtype, rows, columns);
        let table = dequantized(dtype, &data, rows * columns);
        let mut device = device(SimdLevel::Auto, 2, Activations::Auto);
        let weight = linear(&mut device, dtype, rows, columns, &data);
        let tokens = [0, 52, 17, 16, 15];
        let mut batch = Batch::new(1);
        batch.push(&tokens, 0, 16, [(0, [0])]);
        device.stage(&batch).unwrap();
        let mut out = device.allocate(5, columns, Precision::Full).unwrap();
        device.embed(&weight, 2.0, &mut out).unwrap();
        for (row, &token) in tokens.iter().enumerate() {
            let expected = &table[token as usize * columns..][..columns];
            for (out, expected) in out.row(row).iter().zip(expected) {
                assert_eq!(*out, expected * 2.0, "{dtype}");
            }
        }
        device
            .stage(&Batch {
                tokens: vec![53, 0, 0, 0, 0],
                ..batch
            })
            .unwrap();
        let error = device.embed(&weight, 1.0, &mut out);
        assert!(matches!(
            error,
            Err(DeviceError::Failed {
                operation: "embed",
                ..
            })
        ));
    }
}

#[test]
fn packed_weights_take_about_as_much_memory_as_in_the_file() {
    let mut random = Random::new(7);
    for dtype in DType::ALL {
        let (rows, columns) = (160, 512);
        let data = weights(&mut random, dtype, rows, columns);
        let mut device = device(SimdLevel::Auto, 1, Activations::Auto);
        let weight = linear(&mut device, dtype, rows, columns, &data);
        assert_eq!(device.weight_bytes(), weight.bytes());
        // Codes of 2 and 3 bits are stored in 4 bits, wider codes and code books in 8.
        let most = match dtype {
            DType::Q2K | DType::Iq4Nl | DType::Iq4Xs | DType::Mxfp4 => 2.1,
            DType::Tq1_0 => 2.7,
            DType::Tq2_0 => 2.2,
            DType::Q5_0 | DType::Q5_1 | DType::Q5K => 1.6,
            DType::Q3K | DType::Q6K => 1.4,
            DType::Q4K => 1.03,
            _ => 1.0,
        };
        let ratio = weight.bytes() as f64 / data.len() as f64;
        assert!(ratio <= most, "{dtype}: {ratio}");
    }
}

#[test]
fn a_nan_activation_reaches_every_output_of_its_own_row_only() {
    let mut random = Random::new(8);
    let (rows, columns) = (40, 64);
    for dtype in [DType::Q4_1, DType::Q8_0, DType::BF16] {
        let data = weights(&mut random, dtype, rows, columns);
        let mut x = random.numbers(3 * columns);
        x[columns + 40] = f32::NAN;
        for level in levels() {
            let mut device = device(level, 1, Activations::Auto);
            let weight = linear(&mut device, dtype, rows, columns, &data);
            let out = multiply(&mut device, &weight, &x);
            assert!(
                out[rows..2 * rows].iter().all(|v| v.is_nan()),
                "{dtype} {level:?}"
            );
            assert!(
                out[..rows]
                    .iter()
                    .chain(&out[2 * rows..])
                    .all(|v| v.is_finite())
            );
        }
    }
}

#[test]
fn inconsistent_specifications_are_refused() {
    let mut device = CpuDevice::new(&CpuOptions::default()).unwrap();
    let part = |rows, columns, bytes: &'static [u8], order| WeightRows {
        dtype: DType::F32,
        rows,
        columns,
        data: bytes,
        order,
    };
    static ZEROS: [u8; 64] = [0; 64];
    let interleaved = RowOrder::RopeInterleaved {
        head_dim: 2,
        rotary_dim: 1,
    };
    for (parts, bias) in [
        (vec![part(4, 4, &ZEROS[..60], RowOrder::AsStored)], None),
        (
            vec![part(4, 4, &ZEROS, RowOrder::AsStored)],
            Some(vec![0.0; 3]),
        ),
        (vec![part(4, 4, &ZEROS, interleaved)], None),
        (
            vec![
                part(4, 4, &ZEROS, RowOrder::AsStored),
                part(8, 2, &ZEROS, RowOrder::AsStored),
            ],
            None,
        ),
    ] {
        let error = device.load_linear(&LinearSpec { parts, bias });
        assert!(matches!(
            error.err(),
            Some(DeviceError::Failed {
                operation: "load_linear",
                ..
            })
        ));
    }
    let weight = device
        .load_linear(&LinearSpec {
            parts: vec![part(4, 4, &ZEROS, RowOrder::AsStored)],
            bias: None,
        })
        .unwrap();
    let (x, mut out) = (
        device.allocate(1, 5, Precision::Full).unwrap(),
        device.allocate(1, 4, Precision::Full).unwrap(),
    );
    assert!(device.linear(&x, &weight, 1, &mut out).is_err());
    let x = device.allocate(1, 4, Precision::Full).unwrap();
    assert!(device.linear(&x, &weight, 2, &mut out).is_err());
    assert!(device.linear(&x, &weight, 1, &mut out).is_ok());
}
