//! Mixture-of-experts layers: each token is routed first, then each expert multiplies the rows
//! that chose it.

use super::CpuDevice;
use super::activation::Gate;
use super::error::require;
use super::linear::{CpuLinear, Multiplier};
use super::norm::Add;
use super::tensor::{CpuTensor, require_shape};
use super::workers::Workers;
use crate::device::{DeviceError, ExpertOps, LinearOps, LinearSpec, RoutingSpec};

/// The loaded experts of a layer.
pub struct CpuExperts {
    gate_up: Vec<CpuLinear>,
    down: Vec<CpuLinear>,
}

/// Buffers that are reused from call to call.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Rows that chose each expert, with their weights.
    chosen: Vec<Vec<(usize, f32)>>,
    order: Vec<(usize, f32)>,
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
        };
        for (gate_up, down) in experts.gate_up.iter().zip(&experts.down) {
            let fits = gate_up.rows() == 2 * down.columns() && gate_up.columns() == down.rows();
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
        require((1..=count).contains(&routing.top_k), "experts", || {
            format!(
                "cannot choose {} experts per token out of {count}",
                routing.top_k
            )
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
        scratch.choose(operands, self.gate_up.len());
        out.fill(0.0);
        for (expert, (gate_up, down)) in self.gate_up.iter().zip(&self.down).enumerate() {
            let rows = std::mem::take(&mut scratch.chosen[expert]);
            if rows.is_empty() {
                continue;
            }
            scratch.x.clear();
            for &(row, _) in &rows {
                let width = gate_up.columns();
                scratch
                    .x
                    .extend_from_slice(&operands.x[row * width..][..width]);
            }
            let n = rows.len();
            scratch.gate_up.resize(n * gate_up.rows(), 0.0);
            multiplier.multiply(workers, &scratch.x, gate_up, n, &mut scratch.gate_up)?;
            let width = gate_up.rows() / 2;
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
                    factor,
                });
            }
            scratch.chosen[expert] = rows;
        }
        Ok(())
    }
}

impl Scratch {
    /// Fills `chosen` with the experts of each row.
    fn choose(&mut self, operands: &Operands<'_>, experts: usize) {
        let routing = operands.routing;
        self.chosen
            .resize_with(self.chosen.len().max(experts), Vec::new);
        self.chosen.iter_mut().for_each(Vec::clear);
        for (row, logits) in operands.router.chunks_exact(experts).enumerate() {
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
            self.order.truncate(routing.top_k);
            let kept: f32 = self.order.iter().map(|(_, weight)| weight).sum();
            let divisor = if routing.normalize { kept } else { total };
            for &(expert, weight) in &self.order {
                self.chosen[expert].push((row, weight / divisor));
            }
        }
    }
}
