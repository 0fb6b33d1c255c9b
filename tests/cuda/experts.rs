//! Mixture-of-experts layers on the CUDA device agree with float64, and the result of a row
//! depends only on that row.

use common::cpu::{Random, bits, dequantized, weights};
use common::experts;
use common::experts::{COLUMNS, EXPERTS, Mixture};
use common::gpu;
use half::{bf16, f16};
use quell::internals::device::cpu::CpuDevice;
use quell::internals::device::cuda::{CudaDevice, CudaExperts};
use quell::internals::device::*;
use quell::internals::weights::DType;
use quell::{CpuOptions, CudaActivations, CudaOptions};

fn device(activations: CudaActivations) -> CudaDevice {
    let options = CudaOptions {
        activations,
        ..CudaOptions::default()
    };
    CudaDevice::new(&options).unwrap()
}

/// Rounds a value to the type of the activations.
fn rounded(activations: CudaActivations, value: f64) -> f64 {
    match activations {
        CudaActivations::Bf16 => bf16::from_f64(value).to_f64(),
        CudaActivations::F16 => f16::from_f64(value.clamp(-65504.0, 65504.0)).to_f64(),
    }
}

/// One matrix of an expert.
struct Matrix {
    dtype: DType,
    columns: usize,
    data: Vec<u8>,
    /// The weights as the device stores them.
    weights: Vec<f64>,
}

impl Matrix {
    fn new(
        random: &mut Random,
        activations: CudaActivations,
        dtype: DType,
        (rows, columns): (usize, usize),
    ) -> Self {
        let data = weights(random, dtype, rows, columns);
        let stored = dequantized(dtype, &data, rows * columns);
        // Weights in block formats are never rounded.
        let exact = dtype.block_elements() > 1;
        let kept = stored.iter().map(|&w| match exact {
            true => w.into(),
            false => rounded(activations, w.into()),
        });
        Self {
            dtype,
            columns,
            weights: kept.collect(),
            data,
        }
    }

    fn spec(&self) -> LinearSpec<'_> {
        let part = WeightRows {
            dtype: self.dtype,
            rows: self.weights.len() / self.columns,
            columns: self.columns,
            data: &self.data,
            order: RowOrder::AsStored,
        };
        LinearSpec {
            parts: vec![part],
            bias: None,
        }
    }

    /// Returns the product, and the largest sum of magnitudes in it.
    fn times(&self, x: &[f64]) -> (Vec<f64>, f64) {
        let mut largest = 0.0f64;
        let product = self.weights.chunks(self.columns).map(|row| {
            let products = row.iter().zip(x).map(|(w, x)| w * x);
            largest = largest.max(products.clone().map(f64::abs).sum());
            products.sum()
        });
        (product.collect(), largest)
    }
}

fn specs(matrices: &[Matrix]) -> Vec<LinearSpec<'_>> {
    matrices.iter().map(Matrix::spec).collect()
}

/// A layer of experts, with the matrices that it consists of.
struct Layer {
    activations: CudaActivations,
    gate_up: Vec<Matrix>,
    down: Vec<Matrix>,
    /// Factors on the experts' outputs.
    scales: Option<Vec<f32>>,
    hidden: usize,
    columns: usize,
}

impl Layer {
    fn new(
        random: &mut Random,
        activations: CudaActivations,
        dtype: DType,
        (experts, hidden, columns): (usize, usize, usize),
    ) -> Self {
        let mut matrices = |rows, columns| -> Vec<Matrix> {
            let make = |_| Matrix::new(random, activations, dtype, (rows, columns));
            (0..experts).map(make).collect()
        };
        Self {
            activations,
            gate_up: matrices(2 * hidden, columns),
            down: matrices(columns, hidden),
            scales: None,
            hidden,
            columns,
        }
    }

    fn load(&self, device: &mut CudaDevice) -> CudaExperts {
        let (gate_up, down) = (specs(&self.gate_up), specs(&self.down));
        let scales = self.scales.as_deref();
        device.load_experts(&gate_up, &down, None, scales).unwrap()
    }

    /// Returns the result for one row, and the largest sum of magnitudes in it.
    fn row(&self, x: &[f32], logits: &[f32], routing: RoutingSpec) -> (Vec<f64>, f64) {
        let round = |value: f64| rounded(self.activations, value);
        let x: Vec<f64> = x.iter().map(|&x| round(x.into())).collect();
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut order: Vec<(usize, f64)> = logits
            .iter()
            .map(|&logit| f64::from(logit - largest).exp())
            .enumerate()
            .collect();
        let total: f64 = order.iter().map(|(_, weight)| weight).sum();
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        order.truncate(routing.top_k);
        let kept: f64 = order.iter().map(|(_, weight)| weight).sum();
        let divisor = if routing.normalize { kept } else { total };
        let (mut out, mut magnitude) = (vec![0.0; self.columns], 0.0f64);
        for (expert, weight) in order {
            let (gate_up, _) = self.gate_up[expert].times(&x);
            let (gate, up) = gate_up.split_at(self.hidden);
            let gated = gate.iter().zip(up).map(|(&gate, &up)| {
                let (gate, up) = (round(gate), round(up));
                let activated = match routing.activation {
                    Activation::Silu => gate / (1.0 + (-gate).exp()),
                    Activation::GeluTanh => {
                        let inner = 0.797_884_560_802_865_4 * (gate + 0.044_715 * gate.powi(3));
                        0.5 * gate * (1.0 + inner.tanh())
                    }
                    Activation::ClampedSwiGlu { .. }
                    | Activation::SquaredRelu
                    | Activation::Gelu => unreachable!(),
                };
                round(activated * up)
            });
            let hidden: Vec<f64> = gated.collect();
            let (down, largest) = self.down[expert].times(&hidden);
            let scale = self
                .scales
                .as_ref()
                .map_or(1.0, |scales| scales[expert].into());
            magnitude = magnitude.max(largest);
            for (out, value) in out.iter_mut().zip(down) {
                *out += weight / divisor * scale * round(value);
            }
        }
        (out, magnitude)
    }
}

/// Returns the layer's result for the first `rows` rows. The row after them is NaN in all
/// operands, and must stay NaN in the output.
fn apply(
    device: &mut CudaDevice,
    experts: &CudaExperts,
    routing: RoutingSpec,
    (x, logits): (&[f32], &[f32]),
    (rows, columns): (usize, usize),
) -> Vec<f32> {
    let poisoned = |values: &[f32]| {
        let columns = values.len() / rows;
        let mut values = values.to_vec();
        values.extend(vec![f32::NAN; columns]);
        (columns, values)
    };
    let (width, values) = poisoned(x);
    let x = device
        .tensor(width, Precision::Activation, &values)
        .unwrap();
    let (count, values) = poisoned(logits);
    let router = device.tensor(count, Precision::Full, &values).unwrap();
    let out = vec![f32::NAN; (rows + 1) * columns];
    let mut out = device.tensor(columns, Precision::Activation, &out).unwrap();
    device
        .experts(&x, &router, routing, experts, rows, &mut out)
        .unwrap();
    let mut values = device.values(&out, rows + 1).unwrap();
    let beyond = values.split_off(rows * columns);
    assert!(
        beyond.iter().all(|value| value.is_nan()),
        "a row beyond the last was written"
    );
    values
}

fn routing(top_k: usize, normalize: bool, activation: Activation) -> RoutingSpec {
    RoutingSpec {
        top_k,
        score: RouterScore::Softmax,
        normalize,
        activation,
    }
}

/// Returns logits with ties, and with experts that are never chosen.
fn logits(random: &mut Random, rows: usize, experts: usize) -> Vec<f32> {
    let logit = |index: usize| {
        let unwanted = index % experts % 3 == 2;
        let steps = (random.number() * 8.0).round() / 4.0;
        if unwanted { steps - 50.0 } else { steps }
    };
    (0..rows * experts).map(logit).collect()
}

#[test]
fn experts_agree_with_float64() {
    let _gpu = gpu::lock();
    let mut random = Random::new(21);
    let silu = |top_k, normalize| routing(top_k, normalize, Activation::Silu);
    let cases = [
        (DType::BF16, (6, 40, 24), silu(2, true), 11),
        // The gate is applied within the product.
        (DType::BF16, (4, 64, 40), silu(2, true), 30),
        (DType::F16, (3, 16, 48), silu(1, false), 5),
        (
            DType::F32,
            (9, 24, 16),
            routing(4, true, Activation::GeluTanh),
            70,
        ),
        (DType::Q8_0, (5, 64, 96), silu(3, false), 8),
        (DType::Q4K, (4, 256, 256), silu(2, true), 40),
        (DType::Q6K, (3, 256, 256), silu(3, true), 2),
    ];
    for activations in [CudaActivations::Bf16, CudaActivations::F16] {
        let step = match activations {
            CudaActivations::Bf16 => 2f64.powi(-8),
            CudaActivations::F16 => 2f64.powi(-11),
        };
        let mut device = device(activations);
        for (dtype, shape, routing, rows) in cases {
            let (experts, _, columns) = shape;
            let mut layer = Layer::new(&mut random, activations, dtype, shape);
            layer.scales = (dtype == DType::BF16).then(|| random.numbers(experts));
            let loaded = layer.load(&mut device);
            let x = random.numbers(rows * columns);
            let logits = logits(&mut random, rows, experts);
            let out = apply(
                &mut device,
                &loaded,
                routing,
                (&x, &logits),
                (rows, columns),
            );
            for row in 0..rows {
                let x = &x[row * columns..][..columns];
                let logits = &logits[row * experts..][..experts];
                let (expected, magnitude) = layer.row(x, logits, routing);
                for (column, expected) in expected.into_iter().enumerate() {
                    let found = f64::from(out[row * columns + column]);
                    // An intermediate result near the midpoint between two values may be
                    // rounded either way.
                    let bound = step * (magnitude + expected.abs()) + 1e-5;
                    let error = (found - expected).abs();
                    assert!(
                        error <= bound,
                        "{activations:?} {dtype} row {row} column {column}: {found}, not {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_kind_of_router_and_expert_agrees_with_float64() {
    let _gpu = gpu::lock();
    let mut random = Random::new(26);
    let rows = 20;
    for activations in [CudaActivations::Bf16, CudaActivations::F16] {
        // Four results are rounded on the way, of sums whose terms are below 1 in magnitude.
        let tolerance = match activations {
            CudaActivations::Bf16 => 0.25,
            CudaActivations::F16 => 0.03,
        };
        let mut device = device(activations);
        for options in experts::options() {
            let mixture = Mixture::new(&mut random);
            let loaded = mixture.load(&mut device, &options);
            let x = experts::exact(&mut random, rows * COLUMNS);
            let logits: Vec<f32> = random.numbers(rows * EXPERTS);
            let logits: Vec<f32> = logits.iter().map(|logit| logit * 3.0).collect();
            let shape = (rows, COLUMNS);
            let out = apply(&mut device, &loaded, options.routing, (&x, &logits), shape);
            for row in 0..rows {
                let of_row = &x[row * COLUMNS..][..COLUMNS];
                let own = &logits[row * EXPERTS..][..EXPERTS];
                let expected = mixture.row(&options, of_row, own);
                let found = &out[row * COLUMNS..][..COLUMNS];
                for (found, expected) in found.iter().zip(expected) {
                    let error = (f64::from(*found) - expected).abs();
                    let what = format!("{activations:?} {options:?} row {row}");
                    assert!(error <= tolerance, "{what}: {found}, not {expected}");
                }
                let alone = (of_row, own);
                let alone = apply(&mut device, &loaded, options.routing, alone, (1, COLUMNS));
                assert_eq!(bits(&alone), bits(found), "row {row}");
            }
        }
    }
}

/// The row is computed alone, with a few others, and with enough others for larger tiles.
#[test]
fn other_rows_change_no_bit_of_a_row() {
    let _gpu = gpu::lock();
    let mut random = Random::new(22);
    let routing = routing(2, true, Activation::Silu);
    for dtype in [DType::BF16, DType::Q4_0] {
        let (experts, hidden, columns) = (3, 64, 64);
        let mut device = device(CudaActivations::Bf16);
        let shape = (experts, hidden, columns);
        let layer = Layer::new(&mut random, CudaActivations::Bf16, dtype, shape);
        let loaded = layer.load(&mut device);
        let x = random.numbers(90 * columns);
        let logits = logits(&mut random, 90, experts);
        let many = apply(&mut device, &loaded, routing, (&x, &logits), (90, columns));
        for (first, rows) in [(0, 1), (89, 1), (7, 5), (30, 40)] {
            let x = &x[first * columns..][..rows * columns];
            let logits = &logits[first * experts..][..rows * experts];
            let few = apply(&mut device, &loaded, routing, (x, logits), (rows, columns));
            let expected = &many[first * columns..][..rows * columns];
            assert_eq!(bits(&few), bits(expected), "{dtype}: {rows} from {first}");
        }
    }
}

/// All rows go to the same two of many experts.
#[test]
fn experts_without_rows_are_skipped() {
    let _gpu = gpu::lock();
    let mut random = Random::new(23);
    let (hidden, columns, rows) = (8, 16, 20);
    let activations = CudaActivations::F16;
    let mut device = device(activations);
    for experts in [200, 512] {
        let shape = (experts, hidden, columns);
        let layer = Layer::new(&mut random, activations, DType::F32, shape);
        let loaded = layer.load(&mut device);
        let routing = routing(2, false, Activation::Silu);
        let x = random.numbers(rows * columns);
        let mut logits = vec![0.0; rows * experts];
        for row in logits.chunks_mut(experts) {
            row[experts - 1] = 3.0;
            row[100] = 2.0;
        }
        let inputs = (&x[..], &logits[..]);
        let out = apply(&mut device, &loaded, routing, inputs, (rows, columns));
        for (row, found) in out.chunks(columns).enumerate() {
            let x = &x[row * columns..][..columns];
            let (expected, magnitude) = layer.row(x, &logits[..experts], routing);
            for (found, expected) in found.iter().zip(expected) {
                let error = (f64::from(*found) - expected).abs();
                let what = format!("{experts} experts, row {row}");
                assert!(
                    error <= 1e-3 * (magnitude + 1.0),
                    "{what}: {found}, not {expected}"
                );
            }
        }
    }
}

/// Most experts get a row or more, in a step of many tokens and in steps of one.
#[test]
fn rows_go_to_most_of_five_hundred_experts() {
    let _gpu = gpu::lock();
    let mut random = Random::new(27);
    let (experts, hidden, columns, rows) = (512, 8, 16, 150);
    let activations = CudaActivations::F16;
    let mut device = device(activations);
    let layer = Layer::new(
        &mut random,
        activations,
        DType::F32,
        (experts, hidden, columns),
    );
    let loaded = layer.load(&mut device);
    let routing = routing(10, true, Activation::Silu);
    let x = random.numbers(rows * columns);
    let logits: Vec<f32> = random.numbers(rows * experts);
    let inputs = (&x[..], &logits[..]);
    let out = apply(&mut device, &loaded, routing, inputs, (rows, columns));
    for (row, found) in out.chunks(columns).enumerate() {
        let (x, logits) = (
            &x[row * columns..][..columns],
            &logits[row * experts..][..experts],
        );
        let (expected, magnitude) = layer.row(x, logits, routing);
        for (&found, expected) in found.iter().zip(expected) {
            let error = (f64::from(found) - expected).abs();
            assert!(
                error <= 1e-3 * (magnitude + 1.0),
                "row {row}: {found}, not {expected}"
            );
        }
        let alone = apply(&mut device, &loaded, routing, (x, logits), (1, columns));
        assert_eq!(bits(&alone), bits(found), "row {row}");
    }
}

/// NaN logits choose some experts, and change no other row.
#[test]
fn a_row_of_nan_changes_no_other_row() {
    let _gpu = gpu::lock();
    let mut random = Random::new(24);
    let (experts, hidden, columns, rows) = (5, 16, 16, 3);
    let mut device = device(CudaActivations::Bf16);
    let shape = (experts, hidden, columns);
    let layer = Layer::new(&mut random, CudaActivations::Bf16, DType::F32, shape);
    let loaded = layer.load(&mut device);
    let routing = routing(2, true, Activation::Silu);
    let x = random.numbers(rows * columns);
    let mut logits = logits(&mut random, rows, experts);
    let whole = apply(
        &mut device,
        &loaded,
        routing,
        (&x, &logits),
        (rows, columns),
    );
    logits[experts..2 * experts].fill(f32::NAN);
    let out = apply(
        &mut device,
        &loaded,
        routing,
        (&x, &logits),
        (rows, columns),
    );
    for row in [0, 2] {
        let range = row * columns..(row + 1) * columns;
        assert_eq!(bits(&out[range.clone()]), bits(&whole[range]), "row {row}");
    }
    assert!(out[columns..2 * columns].iter().all(|value| value.is_nan()));
}

/// A single logit that is NaN or infinite makes its row NaN, whatever is chosen.
#[test]
fn a_logit_that_is_not_finite_shows_in_its_row() {
    let _gpu = gpu::lock();
    let mut random = Random::new(28);
    let (experts, hidden, columns) = (40, 16, 16);
    let mut device = device(CudaActivations::F16);
    let shape = (experts, hidden, columns);
    let layer = Layer::new(&mut random, CudaActivations::F16, DType::F32, shape);
    let loaded = layer.load(&mut device);
    let x = random.numbers(columns);
    for normalize in [true, false] {
        let routing = routing(3, normalize, Activation::Silu);
        for (place, logit) in [(0, f32::NAN), (35, -f32::NAN), (7, f32::INFINITY)] {
            let mut logits = logits(&mut random, 1, experts);
            logits[place] = logit;
            let inputs = (&x[..], &logits[..]);
            let out = apply(&mut device, &loaded, routing, inputs, (1, columns));
            assert!(out.iter().all(|value| value.is_nan()), "{logit}: {out:?}");
        }
    }
}

/// Routers of the sizes that models have, with several experts per lane of a warp.
#[test]
fn routers_with_hundreds_of_experts_agree_with_the_cpu_device() {
    let _gpu = gpu::lock();
    let mut random = Random::new(29);
    let (hidden, columns, rows) = (8, 16, 6);
    let activations = CudaActivations::F16;
    let mut device = device(activations);
    let mut cpu = CpuDevice::new(&CpuOptions::default()).unwrap();
    // Experts, groups, groups that take part, and experts per row.
    for (experts, groups, top_groups, top_k) in [
        (256, 8, 4, 8),
        (512, 32, 8, 32),
        (72, 1, 1, 6),
        (384, 1, 1, 8),
        (160, 8, 3, 6),
    ] {
        let shape = (experts, hidden, columns);
        let layer = Layer::new(&mut random, activations, DType::F32, shape);
        let corrections: Vec<f32> = random.numbers(experts);
        let (gate_up, down) = (specs(&layer.gate_up), specs(&layer.down));
        let sigmoid = SigmoidRouting {
            scale: 2.5,
            groups,
            top_groups,
            scales_input: false,
        };
        let softmax = SoftmaxRouting {
            scale: 1.5,
            groups,
            top_groups,
        };
        for (score, bias) in [
            (RouterScore::Sigmoid(sigmoid), Some(&corrections[..])),
            (RouterScore::Sigmoid(sigmoid), None),
            (RouterScore::GroupedSoftmax(softmax), None),
        ] {
            let routing = RoutingSpec {
                score,
                ..routing(top_k, true, Activation::Silu)
            };
            let own = device.load_experts(&gate_up, &down, bias, None).unwrap();
            let others = cpu.load_experts(&gate_up, &down, bias, None).unwrap();
            let x = random.numbers(rows * columns);
            let logits: Vec<f32> = random.numbers(rows * experts);
            let inputs = (&x[..], &logits[..]);
            let found = apply(&mut device, &own, routing, inputs, (rows, columns));
            let x = common::cpu::tensor(&mut cpu, columns, &x);
            let router = common::cpu::tensor(&mut cpu, experts, &logits);
            let empty = vec![0.0; rows * columns];
            let mut out = common::cpu::tensor(&mut cpu, columns, &empty);
            cpu.experts(&x, &router, routing, &others, rows, &mut out)
                .unwrap();
            let expected = common::cpu::values(&out, rows);
            for (found, expected) in found.iter().zip(&expected) {
                let error = (found - expected).abs();
                let what = format!("{experts} experts, {score:?}");
                assert!(
                    error <= 0.01 * (1.0 + expected.abs()),
                    "{what}: {found}, not {expected}"
                );
            }
        }
    }
}

#[test]
fn invalid_experts_and_routings_are_refused() {
    let _gpu = gpu::lock();
    let mut random = Random::new(25);
    let activations = CudaActivations::Bf16;
    let mut device = device(activations);
    let layer = Layer::new(&mut random, activations, DType::F32, (2, 8, 16));
    let other = Layer::new(&mut random, activations, DType::Q8_0, (2, 32, 32));
    let mixed = [layer.gate_up[0].spec(), other.gate_up[0].spec()];
    let down = [layer.down[0].spec(), layer.down[1].spec()];
    let error = device
        .load_experts(&mixed, &down, None, None)
        .err()
        .unwrap();
    assert!(matches!(
        error,
        DeviceError::Unsupported { .. } | DeviceError::Failed { .. }
    ));
    let error = device
        .load_experts(&mixed[..1], &down, None, None)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("1 gate-and-up projections"),
        "{error}"
    );

    let gate_up = vec![layer.gate_up[0].spec(); 513];
    let down = vec![layer.down[0].spec(); 513];
    let error = device
        .load_experts(&gate_up, &down, None, None)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("513 experts in a layer"),
        "{error}"
    );

    let loaded = layer.load(&mut device);
    let x = device
        .tensor(16, Precision::Activation, &[0.0; 16])
        .unwrap();
    let router = device.tensor(2, Precision::Full, &[0.0; 2]).unwrap();
    let mut out = device.allocate(1, 16, Precision::Activation).unwrap();
    let spec = routing(3, true, Activation::Silu);
    let error = device
        .experts(&x, &router, spec, &loaded, 1, &mut out)
        .unwrap_err();
    assert!(error.to_string().contains("3 of 2 experts"), "{error}");
}
