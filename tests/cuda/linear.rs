//! Linear layers on the CUDA device agree with float64, whatever the format and the tile, and
//! the result of a row depends only on that row.

use common::cpu::{Random, bits, dequantized, weights};
use common::gpu;
use half::{bf16, f16};
use quell::internals::device::cuda::{CudaDevice, CudaLinear};
use quell::internals::device::*;
use quell::internals::weights::DType;
use quell::{CudaActivations, CudaOptions};

const TYPES: [CudaActivations; 2] = [CudaActivations::Bf16, CudaActivations::F16];

fn device(activations: CudaActivations) -> CudaDevice {
    let options = CudaOptions {
        activations,
        ..CudaOptions::default()
    };
    CudaDevice::new(&options).unwrap()
}

/// Rounds a value to the type of the activations.
fn rounded(activations: CudaActivations, value: f32) -> f32 {
    match activations {
        CudaActivations::Bf16 => bf16::from_f32(value).to_f32(),
        CudaActivations::F16 => f16::from_f32(value.clamp(-65504.0, 65504.0)).to_f32(),
    }
}

/// Half the distance from 1 to the next larger value of the activation type.
fn epsilon(activations: CudaActivations) -> f64 {
    match activations {
        CudaActivations::Bf16 => 2f64.powi(-8),
        CudaActivations::F16 => 2f64.powi(-11),
    }
}

/// A part of a linear layer, with its weights in float32, in the order in which they are used.
struct Part {
    dtype: DType,
    rows: usize,
    columns: usize,
    order: RowOrder,
    data: Vec<u8>,
    weights: Vec<f32>,
}

impl Part {
    fn new(random: &mut Random, dtype: DType, (rows, columns): (usize, usize)) -> Self {
        Self::ordered(random, dtype, (rows, columns), RowOrder::AsStored)
    }

    fn ordered(
        random: &mut Random,
        dtype: DType,
        (rows, columns): (usize, usize),
        order: RowOrder,
    ) -> Self {
        let data = weights(random, dtype, rows, columns);
        let stored = dequantized(dtype, &data, rows * columns);
        let row = |row: usize| &stored[order.stored_row(row) * columns..][..columns];
        Self {
            dtype,
            rows,
            columns,
            order,
            weights: (0..rows).flat_map(|index| row(index).to_vec()).collect(),
            data,
        }
    }

    fn spec(&self) -> WeightRows<'_> {
        WeightRows {
            dtype: self.dtype,
            rows: self.rows,
            columns: self.columns,
            data: &self.data,
            order: self.order,
        }
    }
}

fn load(device: &mut CudaDevice, parts: &[Part], bias: Option<&[f32]>) -> CudaLinear {
    let spec = LinearSpec {
        parts: parts.iter().map(Part::spec).collect(),
        bias: bias.map(<[f32]>::to_vec),
    };
    device.load_linear(&spec).unwrap()
}

/// Returns `W x + b` for the first `rows` rows of `x`. The output starts as NaN, and its row
/// after the last one must stay NaN.
fn multiply(
    device: &mut CudaDevice,
    weight: &CudaLinear,
    x: &[f32],
    rows: usize,
    (input, output): (Precision, Precision),
) -> Vec<f32> {
    let x = device.tensor(weight.columns(), input, x).unwrap();
    let poison = vec![f32::NAN; (rows + 1) * weight.rows()];
    let mut out = device.tensor(weight.rows(), output, &poison).unwrap();
    device.linear(&x, weight, rows, &mut out).unwrap();
    let mut values = device.values(&out, rows + 1).unwrap();
    let beyond = values.split_off(rows * weight.rows());
    assert!(
        beyond.iter().all(|value| value.is_nan()),
        "a row beyond the last was written"
    );
    values
}

/// Returns whether weights are stored in the type of the activations. Those in block formats are
/// not rounded, except in IQ4_XS, which has no kernel of its own.
fn is_expanded(dtype: DType) -> bool {
    dtype.is_float() || dtype == DType::Iq4Xs
}

/// Compares `out` with the float64 product of the operands as the device stores them.
fn check(
    activations: CudaActivations,
    parts: &[Part],
    bias: Option<&[f32]>,
    x: &[f32],
    (out, output): (&[f32], Precision),
) {
    let columns = parts[0].columns;
    let outputs: usize = parts.iter().map(|part| part.rows).sum();
    let rounding = match output {
        Precision::Full => 0.0,
        Precision::Activation => epsilon(activations),
    };
    let kept = |part: &Part| -> Vec<f32> {
        let exact = !is_expanded(part.dtype);
        let kept = |&w: &f32| if exact { w } else { rounded(activations, w) };
        part.weights.iter().map(kept).collect()
    };
    let all: Vec<f32> = parts.iter().flat_map(kept).collect();
    for (row, (x, out)) in x.chunks(columns).zip(out.chunks(outputs)).enumerate() {
        for (index, (w, &out)) in all.chunks(columns).zip(out).enumerate() {
            let (mut sum, mut magnitude) = (0.0, 0.0f64);
            for (&w, &x) in w.iter().zip(x) {
                let product = f64::from(w) * f64::from(rounded(activations, x));
                sum += product;
                magnitude += product.abs();
            }
            if let Some(bias) = bias {
                sum += f64::from(bias[index]);
            }
            // The bound covers float32 summation and the rounding of the result.
            let bound = 2e-6 * magnitude + rounding * sum.abs() * 1.01 + 1e-7;
            let error = (f64::from(out) - sum).abs();
            assert!(
                error <= bound,
                "{activations:?} {:?} row {row} output {index}: {out}, not {sum}: {error:e} is \
                 more than {bound:e}",
                parts[0].dtype
            );
        }
    }
}

/// Returns a number of inputs for a format: a few groups, but not a whole number of tiles.
fn inputs(dtype: DType) -> usize {
    match dtype.block_elements() {
        1 => 200,
        32 => 224,
        _ => 512,
    }
}

/// Returns a number of inputs that is more than the stages of shared memory hold.
fn many_inputs(dtype: DType) -> usize {
    match dtype.block_elements() {
        1 => 648,
        32 => 2080,
        _ => 2304,
    }
}

#[test]
fn every_format_agrees_with_float64_in_every_tile() {
    let _gpu = gpu::lock();
    let mut random = Random::new(11);
    for activations in TYPES {
        let mut device = device(activations);
        for dtype in DType::ALL {
            for (most, many) in [(8, false), (16, false), (70, false), (8, true), (30, true)] {
                let columns = if many {
                    many_inputs(dtype)
                } else {
                    inputs(dtype)
                };
                let shape = (37 + random.below(40), columns);
                let parts = [Part::new(&mut random, dtype, shape)];
                let weight = load(&mut device, &parts, None);
                let rows = 1 + random.below(most);
                let x = random.numbers(rows * shape.1);
                let output = [Precision::Full, Precision::Activation][random.below(2)];
                let kinds = (Precision::Activation, output);
                let out = multiply(&mut device, &weight, &x, rows, kinds);
                check(activations, &parts, None, &x, (&out, output));
            }
        }
    }
}

#[test]
fn float_weights_support_any_outputs_and_multiples_of_eight_inputs() {
    let _gpu = gpu::lock();
    let mut random = Random::new(12);
    let mut device = device(CudaActivations::Bf16);
    for (rows, outputs, inputs) in [
        (1, 1, 8),
        (3, 33, 16),
        (17, 65, 136),
        (64, 5, 72),
        (70, 31, 24),
        // More inputs than the stages hold.
        (5, 33, 1928),
        (20, 65, 648),
    ] {
        let parts = [Part::new(&mut random, DType::BF16, (outputs, inputs))];
        let bias = random.numbers(outputs);
        let weight = load(&mut device, &parts, Some(&bias));
        let x = random.numbers(rows * inputs);
        for output in [Precision::Full, Precision::Activation] {
            let kinds = (Precision::Activation, output);
            let out = multiply(&mut device, &weight, &x, rows, kinds);
            check(
                CudaActivations::Bf16,
                &parts,
                Some(&bias),
                &x,
                (&out, output),
            );
        }
    }
}

#[test]
fn parts_of_different_formats_and_orders_form_one_layer() {
    let _gpu = gpu::lock();
    let mut random = Random::new(13);
    let heads = RowOrder::RopeInterleaved {
        head_dim: 16,
        rotary_dim: 12,
    };
    for activations in TYPES {
        let mut device = device(activations);
        let columns = 512;
        let parts = [
            Part::ordered(&mut random, DType::Q4K, (48, columns), heads),
            Part::ordered(&mut random, DType::Q4K, (16, columns), heads),
            Part::new(&mut random, DType::Q6K, (19, columns)),
            Part::ordered(&mut random, DType::F16, (32, columns), heads),
            Part::new(&mut random, DType::F32, (7, columns)),
            Part::new(&mut random, DType::Q8_0, (5, columns)),
        ];
        let outputs = parts.iter().map(|part| part.rows).sum();
        let bias = random.numbers(outputs);
        let weight = load(&mut device, &parts, Some(&bias));
        assert_eq!((weight.rows(), weight.columns()), (outputs, columns));
        for rows in [2, 21] {
            let x = random.numbers(rows * columns);
            for output in [Precision::Full, Precision::Activation] {
                let kinds = (Precision::Activation, output);
                let out = multiply(&mut device, &weight, &x, rows, kinds);
                check(activations, &parts, Some(&bias), &x, (&out, output));
            }
        }
    }
}

#[test]
fn a_float32_operand_is_rounded_first() {
    let _gpu = gpu::lock();
    let mut random = Random::new(14);
    for activations in TYPES {
        let mut device = device(activations);
        let parts = [Part::new(&mut random, DType::Q4_0, (24, 96))];
        let weight = load(&mut device, &parts, None);
        let x = random.numbers(5 * 96);
        let results = [Precision::Full, Precision::Activation].map(|input| {
            let kinds = (input, Precision::Full);
            multiply(&mut device, &weight, &x, 5, kinds)
        });
        assert_eq!(bits(&results[0]), bits(&results[1]));
        check(
            activations,
            &parts,
            None,
            &x,
            (&results[0], Precision::Full),
        );
    }
}

/// Unused rows of the operands are NaN. Rows are computed alone, with a few others and with
/// many others, each in the tile for that number of rows.
#[test]
fn other_rows_change_no_bit_of_a_row() {
    let _gpu = gpu::lock();
    let mut random = Random::new(15);
    for activations in TYPES {
        let mut device = device(activations);
        for dtype in [
            DType::BF16,
            DType::Q4_0,
            DType::Q4K,
            DType::Q5_1,
            DType::Q6K,
            DType::Q8_0,
        ] {
            let columns = many_inputs(dtype);
            let parts = [Part::new(&mut random, dtype, (41, columns))];
            let weight = load(&mut device, &parts, None);
            let x = random.numbers(70 * columns);
            let kinds = (Precision::Activation, Precision::Full);
            let many = multiply(&mut device, &weight, &x, 70, kinds);
            for (first, rows) in [(0, 1), (69, 1), (4, 8), (5, 16), (30, 23), (3, 64)] {
                let mut x = x[first * columns..(first + rows) * columns].to_vec();
                x.extend(vec![f32::NAN; 3 * columns]);
                let few = multiply(&mut device, &weight, &x, rows, kinds);
                let expected = &many[first * 41..(first + rows) * 41];
                assert_eq!(bits(&few), bits(expected), "{dtype}: {rows} from {first}");
            }
        }
    }
}

/// A product that applies the activation itself leaves the gates' own tensor alone.
#[test]
fn gates_within_the_product_change_no_bit() {
    let _gpu = gpu::lock();
    let mut random = Random::new(18);
    for activations in TYPES {
        let mut device = device(activations);
        for (dtypes, hidden, within) in [
            ([DType::BF16; 2], 64, true),
            // 70 rows are multiplied in the largest tile.
            ([DType::BF16; 2], 99 * 64, true),
            ([DType::Q4_0; 2], 192, true),
            ([DType::Q4K; 2], 64, true),
            ([DType::Q8_0; 2], 40, false),
            ([DType::Q4_0, DType::Q8_0], 64, false),
        ] {
            let columns = inputs(dtypes[0]);
            let parts = dtypes.map(|dtype| Part::new(&mut random, dtype, (hidden, columns)));
            let bias = random.numbers(2 * hidden);
            let weight = load(&mut device, &parts, Some(&bias));
            for (rows, activation) in [
                (1, Activation::Silu),
                (12, Activation::GeluTanh),
                (70, Activation::Silu),
            ] {
                let numbers = random.numbers(rows * columns);
                let x = device.tensor(columns, Precision::Activation, &numbers);
                let x = x.unwrap();
                let nan = vec![f32::NAN; rows * 2 * hidden];
                let mut empty = |width: usize| {
                    let numbers = &nan[..rows * width];
                    device
                        .tensor(width, Precision::Activation, numbers)
                        .unwrap()
                };
                let (mut gate_up, mut unused) = (empty(2 * hidden), empty(2 * hidden));
                let (mut expected, mut found) = (empty(hidden), empty(hidden));
                device.linear(&x, &weight, rows, &mut gate_up).unwrap();
                device
                    .gated_activation(&gate_up, activation, rows, &mut expected)
                    .unwrap();
                device
                    .gated_linear(&x, &weight, activation, rows, &mut unused, &mut found)
                    .unwrap();
                let expected = device.values(&expected, rows).unwrap();
                let found = device.values(&found, rows).unwrap();
                assert_eq!(bits(&found), bits(&expected), "{dtypes:?}, {rows} rows");
                let unused = device.values(&unused, rows).unwrap();
                let is_unused = unused.iter().all(|value| value.is_nan());
                assert_eq!(is_unused, within, "{dtypes:?}, {hidden} gates");
            }
        }
    }
}

/// The inputs make three units. There are enough outputs for many rows to be multiplied in the
/// largest tile, and on the virtual GPU more tiles than blocks.
#[test]
fn all_tiles_are_bit_identical() {
    let gpu = gpu::lock();
    let tiles = if gpu::is_real() { 132 } else { 2 };
    gpu.set("multiprocessors", "1");
    let mut random = Random::new(16);
    let (outputs, columns) = (tiles * 128 + 3, 2056);
    let mut device = device(CudaActivations::Bf16);
    let parts = [Part::new(&mut random, DType::BF16, (outputs, columns))];
    let weight = load(&mut device, &parts, None);
    let x = random.numbers(67 * columns);
    let kinds = (Precision::Activation, Precision::Full);
    let many = multiply(&mut device, &weight, &x, 67, kinds);
    for (first, rows) in [(0, 2), (50, 17)] {
        let x = &x[first * columns..(first + rows) * columns];
        let few = multiply(&mut device, &weight, x, rows, kinds);
        assert_eq!(bits(&few), bits(&many[first * outputs..][..rows * outputs]));
        let output = Precision::Full;
        check(CudaActivations::Bf16, &parts, None, x, (&few, output));
    }
}

/// Returns the products of the first rows of `x`, for each number of rows: by a GPU that has no
/// block to spare, and by one that lets as many blocks as possible share a tile. Each computes
/// them twice.
fn alone_and_shared(
    gpu: &gpu::Gpu,
    activations: CudaActivations,
    parts: &[Part],
    x: &[f32],
    numbers: &[usize],
) -> [Vec<Vec<f32>>; 2] {
    // One multiprocessor with the least shared memory runs one block at once.
    [("1", "99K"), ("132", "0")].map(|(multiprocessors, shared_memory)| {
        gpu.set("multiprocessors", multiprocessors);
        gpu.set("shared_memory", shared_memory);
        let mut device = device(activations);
        let weight = load(&mut device, parts, None);
        let kinds = (Precision::Activation, Precision::Full);
        let products = numbers.iter().map(|&rows| {
            gpu.take_launches();
            gpu.set("count", "1");
            let once = multiply(&mut device, &weight, x, rows, kinds);
            gpu.set("count", "0");
            let launches = gpu.take_launches();
            let launch = launches.iter().find(|launch| launch.contains("linear_"));
            let launch: serde_json::Value = serde_json::from_str(launch.unwrap()).unwrap();
            let sharing = launch["grid"][2].as_u64().unwrap();
            assert_eq!(sharing > 1, multiprocessors == "132", "{launch}");
            let again = multiply(&mut device, &weight, x, rows, kinds);
            assert_eq!(bits(&once), bits(&again), "{rows} rows");
            once
        });
        products.collect()
    })
}

/// The inputs make several units, and the last one is not complete.
#[test]
fn blocks_that_share_a_tile_change_no_bit() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return;
    }
    let mut random = Random::new(19);
    let numbers = [1, 12, 20];
    for (dtype, columns) in [
        (DType::BF16, 3400),
        // Rounds of more than sixteen records.
        (DType::Q4_0, 8480),
        (DType::Q8_0, 2464),
        (DType::Q4K, 4608),
        (DType::Q2K, 4608),
        (DType::Q6K, 4352),
    ] {
        let activations = TYPES[random.below(2)];
        let parts = [Part::new(&mut random, dtype, (41, columns))];
        let x = random.numbers(20 * columns);
        let [alone, shared] = alone_and_shared(&gpu, activations, &parts, &x, &numbers);
        for ((alone, shared), rows) in alone.iter().zip(&shared).zip(numbers) {
            assert_eq!(bits(alone), bits(shared), "{dtype}, {rows} rows");
            let of_rows = (&alone[..], Precision::Full);
            check(activations, &parts, None, &x[..rows * columns], of_rows);
        }
    }
}

#[test]
fn results_beyond_float16_saturate() {
    let _gpu = gpu::lock();
    let mut device = device(CudaActivations::F16);
    let data: Vec<u8> = [3e4f32; 16].iter().flat_map(|w| w.to_le_bytes()).collect();
    let part = Part {
        dtype: DType::F32,
        rows: 2,
        columns: 8,
        order: RowOrder::AsStored,
        weights: vec![3e4; 16],
        data,
    };
    let weight = load(&mut device, &[part], None);
    let x: Vec<f32> = [[1.0f32; 8], [-1.0; 8]].concat();
    let kinds = (Precision::Activation, Precision::Activation);
    let out = multiply(&mut device, &weight, &x, 2, kinds);
    assert_eq!(out, [65504.0, 65504.0, -65504.0, -65504.0]);
}

/// Tests tables in every format, because one that is tied to the output may have any format.
#[test]
fn embeddings_are_the_rows_of_the_table() {
    let _gpu = gpu::lock();
    let mut random = Random::new(17);
    let (vocabulary, scale) = (43, 1.5f32);
    let tokens = [0u32, 42, 7, 8, 8];
    for activations in TYPES {
        for dtype in DType::ALL {
            let columns = inputs(dtype);
            let mut device = device(activations);
            let limits = DeviceLimits {
                rows: 8,
                sequences: 4,
                sequence_tokens: 64,
                block_tokens: 16,
                groups: 1,
                vocabulary,
                model: ModelShape::default(),
            };
            device.reserve(&limits).unwrap();
            let parts = [Part::new(&mut random, dtype, (vocabulary, columns))];
            let table = load(&mut device, &parts, None);
            let mut batch = Batch::new(1);
            batch.push(&tokens, 0, 16, [(0, [0])]);
            batch.sample_rows.push(4);
            device.stage(&batch).unwrap();
            let mut out = device.allocate(8, columns, Precision::Full).unwrap();
            device.embed(&table, scale, &mut out).unwrap();
            let found = device.values(&out, 5).unwrap();
            for (&token, found) in tokens.iter().zip(found.chunks(columns)) {
                let row = &parts[0].weights[token as usize * columns..][..columns];
                for (&weight, &found) in row.iter().zip(found) {
                    let kept = if is_expanded(dtype) {
                        rounded(activations, weight)
                    } else {
                        weight
                    };
                    let error = (found - kept * scale).abs();
                    // The device adds the minimum with one rounding less.
                    assert!(
                        error <= 1e-6 * (1.0 + kept.abs()),
                        "{dtype} {token}: {found}, {kept}"
                    );
                }
            }
        }
    }
}

#[test]
fn invalid_weights_are_refused() {
    let _gpu = gpu::lock();
    let mut random = Random::new(18);
    let mut device = device(CudaActivations::F16);
    let odd = Part::new(&mut random, DType::F32, (3, 20));
    let short = WeightRows {
        data: &odd.data[..80],
        ..odd.spec()
    };
    let mut huge = Part::new(&mut random, DType::Q8_0, (2, 32));
    huge.data[..2].copy_from_slice(&f16::from_f32(6e4).to_le_bytes());
    let cases = [
        (odd.spec(), None, "20 inputs"),
        (short, None, "20 inputs"),
        (huge.spec(), None, "Q8_0 weights"),
    ];
    for (part, bias, expected) in cases {
        let spec = LinearSpec {
            parts: vec![part],
            bias,
        };
        let Err(error) = device.load_linear(&spec) else {
            panic!("{expected}: was loaded")
        };
        assert!(matches!(
            error,
            DeviceError::Unsupported { device: "cuda", .. }
        ));
        assert!(error.to_string().contains(expected), "{error}");
    }
    let part = Part::new(&mut random, DType::F32, (3, 16));
    let spec = LinearSpec {
        parts: vec![part.spec()],
        bias: Some(vec![0.0; 4]),
    };
    let error = device.load_linear(&spec).err().unwrap().to_string();
    assert!(error.contains("a bias has 4 values for 3 rows"), "{error}");
}
