//! Mixture-of-experts layers: each token is routed first, then each expert multiplies the rows
//! that chose it.

use super::CpuDevice;
use super::activation::Gate;
use super::error::{require, require_ok};
use super::linear::{CpuLinear, Multiplier};
use super::norm::Add;
use super::tensor::{CpuTensor, require_shape};
use super::workers::Workers;
use crate::device::{
    DeviceError, ExpertOps, LinearOps, LinearSpec, RouterScore, RoutingSpec, SigmoidRouting,
};

/// The loaded experts of a layer.
pub struct CpuExperts {
    gate_up: Vec<CpuLinear>,
    down: Vec<CpuLinear>,
    /// What is added to the experts' weights to choose, if anything is.
    corrections: Option<Vec<f32>>,
}

/// Buffers that are reused from call to call.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Rows that chose each expert, with their weights.
    chosen: Vec<Vec<(usize, f32)>>,
    order: Vec<(usize, f32)>,
    /// Groups of experts, with their ranks.
    groups: Vec<(usize, f32)>,
    x: Vec<f32>,
    gate_up: Vec<f32>,
    hidden: Vec<f32>,
    y: Vec<f32>,
}

/// Operands of an experts operation. The caller has checked that their shapes fit together.
struct Operands<'a> {
    /// Activations, one row per token.
    x: &'a [f32],
    /// Router logits: one row per token, one logit per expert.
    router: &'a [f32],
    routing: RoutingSpec,
    rows: usize,
}

impl ExpertOps for CpuDevice {
    type Experts = CpuExperts;

    fn load_experts(
        &mut self,
        gate_up: &[LinearSpec<'_>],
        down: &[LinearSpec<'_>],
        corrections: Option<&[f32]>,
    ) -> Result<CpuExperts, DeviceError> {
        let count = (gate_up.len(), down.len());
        require(count.0 == count.1, "load_experts", || {
            format!(
                "there are {} gate-and-up projections but {} down projections",
                count.0, count.1
            )
        })?;
        let mut load = |specs: &[LinearSpec<'_>]| {
            specs
                .iter()
                .map(|spec| self.load_linear(spec))
                .collect::<Result<Vec<_>, _>>()
        };
        let experts = CpuExperts {
            gate_up: load(gate_up)?,
            down: load(down)?,
            corrections: corrections.map(<[f32]>::to_vec),
        };
        let found = corrections.map_or(count.0, <[f32]>::len);
        require(found == count.0, "load_experts", || {
            format!("there are {found} corrections for {} experts", count.0)
        })?;
        for (gate_up, down) in experts.gate_up.iter().zip(&experts.down) {
            // Without a gate, there is only the up projection.
            let width = down.columns();
            let fits = [width, 2 * width].contains(&gate_up.rows());
            let fits = fits && gate_up.columns() == down.rows();
            let first = &experts.gate_up[0];
            let alike = (first.rows(), first.columns()) == (gate_up.rows(), gate_up.columns());
            require(fits && alike, "load_experts", || {
                let (rows, columns) = (gate_up.rows(), gate_up.columns());
                let (down_rows, down_columns) = (down.rows(), down.columns());
                format!(
                    "gate and up are {rows} × {columns}, down is {down_rows} × {down_columns}; \
                     all experts must fit together"
                )
            })?;
        }
        Ok(experts)
    }

    fn experts(
        &mut self,
        x: &CpuTensor,
        router: &CpuTensor,
        routing: RoutingSpec,
        experts: &CpuExperts,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        let count = experts.gate_up.len();
        let (width, result) = experts
            .gate_up
            .first()
            .zip(experts.down.first())
            .map_or((x.columns(), out.columns()), |(gate_up, down)| {
                (gate_up.columns(), down.rows())
            });
        require_shape("experts", "x", x, (rows, width))?;
        require_shape("experts", "the router", router, (rows, count))?;
        require_shape("experts", "the result", out, (rows, result))?;
        require_ok("experts", routing.check(count))?;
        let first = experts.gate_up.iter().zip(&experts.down).next();
        let fits = first.is_none_or(|(gate_up, down)| {
            gate_up.rows() == routing.activation.gate_up_columns(down.columns())
        });
        require(fits, "experts", || {
            format!("{:?} does not fit the projections", routing.activation)
        })?;
        let (x, router) = (x.leading(rows), router.leading(rows));
        let operands = Operands {
            x,
            router,
            routing,
            rows,
        };
        let (workers, multiplier) = (&mut self.workers, &mut self.multiplier);
        experts.apply(
            workers,
            multiplier,
            &mut self.experts,
            &operands,
            out.leading_mut(rows),
        )
    }
}

impl CpuExperts {
    /// Computes `out = Σ weight · expert(x)` over each row's experts, in the order of their
    /// index.
    fn apply(
        &self,
        workers: &mut Workers,
        multiplier: &mut Multiplier,
        scratch: &mut Scratch,
        operands: &Operands<'_>,
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        let isa = multiplier.isa;
        let columns = out.len() / operands.rows.max(1);
        scratch.choose(operands, self.gate_up.len(), self.corrections.as_deref());
        let scales_input = operands.routing.scales_input();
        out.fill(0.0);
        for (expert, (gate_up, down)) in self.gate_up.iter().zip(&self.down).enumerate() {
            let rows = std::mem::take(&mut scratch.chosen[expert]);
            if rows.is_empty() {
                continue;
            }
            scratch.x.clear();
            for &(row, factor) in &rows {
                let width = gate_up.columns();
                let x = &operands.x[row * width..][..width];
                match scales_input {
                    true => scratch.x.extend(x.iter().map(|x| x * factor)),
                    false => scratch.x.extend_from_slice(x),
                }
            }
            let n = rows.len();
            scratch.gate_up.resize(n * gate_up.rows(), 0.0);
            multiplier.multiply(workers, &scratch.x, gate_up, n, &mut scratch.gate_up)?;
            let width = down.columns();
            scratch.hidden.resize(n * width, 0.0);
            isa.dispatch(Gate {
                gate_up: &scratch.gate_up,
                activation: operands.routing.activation,
                columns: width,
                out: &mut scratch.hidden,
            });
            scratch.y.resize(n * columns, 0.0);
            multiplier.multiply(workers, &scratch.hidden, down, n, &mut scratch.y)?;
            for (&(row, factor), y) in rows.iter().zip(scratch.y.chunks_exact(columns)) {
                isa.dispatch(Add {
                    a: &mut out[row * columns..][..columns],
                    b: y,
                    factor: if scales_input { 1.0 } else { factor },
                });
            }
            scratch.chosen[expert] = rows;
        }
        Ok(())
    }
}

impl Scratch {
    /// Fills `chosen` with the experts of each row.
    fn choose(&mut self, operands: &Operands<'_>, experts: usize, corrections: Option<&[f32]>) {
        let routing = operands.routing;
        self.chosen
            .resize_with(self.chosen.len().max(experts), Vec::new);
        self.chosen.iter_mut().for_each(Vec::clear);
        for (row, logits) in operands.router.chunks_exact(experts).enumerate() {
            let (total, scale) = match routing.score {
                RouterScore::Softmax => (self.order_softmax(logits), 1.0),
                RouterScore::Sigmoid(sigmoid) => {
                    self.order_sigmoid(logits, corrections, sigmoid);
                    (1.0, sigmoid.scale)
                }
            };
            self.order.truncate(routing.top_k);
            let kept: f32 = self.order.iter().map(|(_, weight)| weight).sum();
            let divisor = if routing.normalize { kept } else { total };
            for &(expert, weight) in &self.order {
                self.chosen[expert].push((row, weight / divisor * scale));
            }
        }
    }

    /// Puts the experts in `order`, the best first, with weights that sum up to what is returned.
    fn order_softmax(&mut self, logits: &[f32]) -> f32 {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        self.order.clear();
        self.order.extend(
            logits
                .iter()
                .map(|logit| (logit - largest).exp())
                .enumerate(),
        );
        let total: f32 = self.order.iter().map(|(_, weight)| weight).sum();
        self.order
            .sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        total
    }

    /// Puts the experts that may be chosen in `order`, the best first, with the sigmoids of their
    /// logits.
    fn order_sigmoid(
        &mut self,
        logits: &[f32],
        corrections: Option<&[f32]>,
        routing: SigmoidRouting,
    ) {
        let sigmoid = |logit: f32| 1.0 / (1.0 + (-logit).exp());
        let rank = |expert: usize| match corrections {
            Some(corrections) => sigmoid(logits[expert]) + corrections[expert],
            None => logits[expert],
        };
        let size = logits.len() / routing.groups;
        // Which groups are open, by the sum of their two best experts.
        let of_group = |group: usize| {
            let mut best = [f32::NEG_INFINITY; 2];
            for rank in (group * size..(group + 1) * size).map(rank) {
                best[1] = best[1].max(best[0].min(rank));
                best[0] = best[0].max(rank);
            }
            (group, best[0] + best[1])
        };
        self.groups.clear();
        self.groups.extend((0..routing.groups).map(of_group));
        let by_rank = |a: &(usize, f32), b: &(usize, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        self.groups.sort_by(by_rank);
        self.order.clear();
        for &(group, _) in self.groups.iter().take(routing.top_groups) {
            let experts = group * size..(group + 1) * size;
            self.order
                .extend(experts.map(|expert| (expert, rank(expert))));
        }
        self.order.sort_by(by_rank);
        for (expert, weight) in &mut self.order {
            *weight = sigmoid(logits[*expert]);
        }
    }
}
