//! Mixtures of experts with every option of their routers and of their experts, on any device and
//! in float64.

use crate::cpu::Random;
use half::bf16;
use quell::internals::device::*;
use quell::internals::weights::DType;

pub const EXPERTS: usize = 8;
pub const HIDDEN: usize = 24;
pub const COLUMNS: usize = 16;

/// How a layer is computed.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub routing: RoutingSpec,
    pub has_corrections: bool,
    pub has_biases: bool,
}

/// Returns routers of each kind.
pub fn options() -> Vec<Options> {
    let routing = |top_k, normalize, sigmoid| RoutingSpec {
        top_k,
        score: RouterScore::Sigmoid(sigmoid),
        normalize,
        activation: Activation::Silu,
    };
    let sigmoid = SigmoidRouting {
        scale: 1.5,
        groups: 1,
        top_groups: 1,
        scales_input: false,
    };
    let options = |routing, has_corrections, has_biases| Options {
        routing,
        has_corrections,
        has_biases,
    };
    let grouped = SigmoidRouting {
        groups: 4,
        top_groups: 2,
        ..sigmoid
    };
    let of_inputs = SigmoidRouting {
        scale: 1.0,
        scales_input: true,
        ..sigmoid
    };
    let clamped = RoutingSpec {
        top_k: 2,
        score: RouterScore::Softmax,
        normalize: true,
        activation: Activation::ClampedSwiGlu {
            slope: 1.702,
            limit: 0.75,
        },
    };
    let softmax = |top_k, normalize, groups, top_groups| RoutingSpec {
        top_k,
        score: RouterScore::GroupedSoftmax(SoftmaxRouting {
            scale: 2.5,
            groups,
            top_groups,
        }),
        normalize,
        activation: Activation::Silu,
    };
    vec![
        options(routing(3, true, sigmoid), true, false),
        options(routing(2, false, sigmoid), false, false),
        options(routing(3, true, grouped), true, false),
        options(routing(1, false, of_inputs), false, false),
        options(routing(2, true, of_inputs), true, true),
        options(clamped, false, true),
        options(softmax(3, false, 4, 2), false, false),
        options(softmax(1, true, 8, 1), false, false),
        options(softmax(2, false, 1, 1), false, false),
    ]
}

/// The weights of a layer, exact in every type of activations.
pub struct Mixture {
    gate_up: Vec<Matrix>,
    down: Vec<Matrix>,
    pub corrections: Vec<f32>,
}

struct Matrix {
    rows: usize,
    columns: usize,
    weights: Vec<f32>,
    data: Vec<u8>,
    bias: Vec<f32>,
}

impl Matrix {
    fn new(random: &mut Random, rows: usize, columns: usize) -> Self {
        let weights = exact(random, rows * columns);
        Self {
            rows,
            columns,
            data: weights.iter().flat_map(|w| w.to_le_bytes()).collect(),
            weights,
            bias: exact(random, rows),
        }
    }

    fn spec(&self, has_bias: bool) -> LinearSpec<'_> {
        let part = WeightRows {
            dtype: DType::F32,
            rows: self.rows,
            columns: self.columns,
            data: &self.data,
            order: RowOrder::AsStored,
        };
        LinearSpec {
            parts: vec![part],
            bias: has_bias.then(|| self.bias.clone()),
        }
    }

    fn times(&self, x: &[f64], has_bias: bool) -> Vec<f64> {
        let rows = self.weights.chunks(self.columns).zip(&self.bias);
        let dot = |row: &[f32]| -> f64 { row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum() };
        rows.map(|(row, &bias)| dot(row) + if has_bias { f64::from(bias) } else { 0.0 })
            .collect()
    }
}

/// Returns random numbers that are exact in bfloat16 and float16.
pub fn exact(random: &mut Random, count: usize) -> Vec<f32> {
    let numbers = random.numbers(count).into_iter();
    numbers
        .map(|number| bf16::from_f32((number * 64.0).round() / 64.0).to_f32())
        .collect()
}

impl Mixture {
    pub fn new(random: &mut Random) -> Self {
        let mut matrices = |rows, columns| -> Vec<Matrix> {
            let make = |_| Matrix::new(random, rows, columns);
            (0..EXPERTS).map(make).collect()
        };
        Self {
            gate_up: matrices(2 * HIDDEN, COLUMNS),
            down: matrices(COLUMNS, HIDDEN),
            corrections: exact(random, EXPERTS),
        }
    }

    pub fn load<D: Device>(&self, device: &mut D, options: &Options) -> D::Experts {
        fn specs(matrices: &[Matrix], has_biases: bool) -> Vec<LinearSpec<'_>> {
            matrices
                .iter()
                .map(|matrix| matrix.spec(has_biases))
                .collect()
        }
        let corrections = options.has_corrections.then_some(&self.corrections[..]);
        let gate_up = specs(&self.gate_up, options.has_biases);
        let down = specs(&self.down, options.has_biases);
        device
            .load_experts(&gate_up, &down, corrections, None)
            .unwrap()
    }

    /// Computes one row in float64.
    pub fn row(&self, options: &Options, x: &[f32], logits: &[f32]) -> Vec<f64> {
        let RoutingSpec {
            top_k,
            score,
            normalize,
            activation,
        } = options.routing;
        let logits: Vec<f64> = logits.iter().map(|&logit| logit.into()).collect();
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let (weights, scale, scales_input): (Vec<f64>, f64, bool) = match score {
            RouterScore::Softmax | RouterScore::GroupedSoftmax(_) => {
                let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
                let weights = logits.iter().map(|logit| logit.exp() / total);
                let scale = match score {
                    RouterScore::GroupedSoftmax(own) => own.scale.into(),
                    _ => 1.0,
                };
                (weights.collect(), scale, false)
            }
            RouterScore::Sigmoid(own) => {
                let weights = logits.iter().map(|&logit| sigmoid(logit));
                (weights.collect(), own.scale.into(), own.scales_input)
            }
        };
        let rank = |expert: usize| match options.has_corrections {
            true => weights[expert] + f64::from(self.corrections[expert]),
            false => weights[expert],
        };
        let mut open: Vec<usize> = (0..EXPERTS).collect();
        // The groups, of how many experts are chosen, and how many of its best ones rank a group.
        let groups = match score {
            RouterScore::Softmax => None,
            RouterScore::GroupedSoftmax(own) => Some((own.groups, own.top_groups, 1)),
            RouterScore::Sigmoid(own) => Some((own.groups, own.top_groups, 2)),
        };
        if let Some((count, top_groups, best)) = groups {
            let size = EXPERTS / count;
            let of_group = |group: usize| {
                let mut ranks: Vec<f64> = (group * size..(group + 1) * size).map(rank).collect();
                ranks.sort_by(|a, b| b.total_cmp(a));
                ranks[..best].iter().sum::<f64>()
            };
            let mut groups: Vec<usize> = (0..count).collect();
            groups.sort_by(|&a, &b| of_group(b).total_cmp(&of_group(a)));
            groups.truncate(top_groups);
            open.retain(|expert| groups.contains(&(expert / size)));
        }
        open.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)));
        open.truncate(top_k);
        let kept: f64 = open.iter().map(|&expert| weights[expert]).sum();
        let mut out = vec![0.0; COLUMNS];
        for expert in open {
            let weight = scale * weights[expert] / if normalize { kept } else { 1.0 };
            let (of_input, of_output) = match scales_input {
                true => (weight, 1.0),
                false => (1.0, weight),
            };
            let x: Vec<f64> = x.iter().map(|&x| f64::from(x) * of_input).collect();
            let gate_up = self.gate_up[expert].times(&x, options.has_biases);
            let (gate, up) = gate_up.split_at(HIDDEN);
            let gated = gate.iter().zip(up).map(|(&gate, &up)| match activation {
                Activation::ClampedSwiGlu { slope, limit } => {
                    let limit = f64::from(limit);
                    let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
                    gate * sigmoid(f64::from(slope) * gate) * (up + 1.0)
                }
                _ => gate * sigmoid(gate) * up,
            });
            let hidden: Vec<f64> = gated.collect();
            let down = self.down[expert].times(&hidden, options.has_biases);
            out.iter_mut()
                .zip(down)
                .for_each(|(out, y)| *out += of_output * y);
        }
        out
    }
}
