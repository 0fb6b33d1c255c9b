//! The CPU device: the embedded default, and the reference that other devices are compared
//! with.
//!
//! Weights are repacked once at load (`packed`) into the layout that the kernels (`integer`,
//! `float`) stream. Kernels are written once against sixteen-lane vectors (`simd`) and run on a
//! few threads with one barrier per operation (`workers`). Operations compute immediately, so
//! [`Device::collect`] has nothing left to wait for.
//!
//! The result of a row does not depend on the other rows. A kernel does the same float
//! operations in the same order for each row and output, however many rows or outputs share its
//! registers, and a sum is never split between threads.

#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod attention;
mod cache;
mod experts;
mod float;
mod integer;
mod layout;
mod linear;
mod memory;
mod options;
mod packed;
mod quantise;
mod rope;
mod rowwise;
mod sampling;
mod simd;
mod softmax;
mod stage;
mod tensor;
mod tile;
mod workers;

pub use cache::{CpuCache, CpuHostBlocks};
pub use experts::CpuExperts;
pub use linear::CpuLinear;
pub use options::{Activations, CpuOptions, KvType, SimdLevel};
pub use rope::CpuRope;
pub use tensor::CpuTensor;

use crate::device::*;
use crate::sampling::{SampleRow, Sampled};
use attention::{Attend, Attention};
use linear::Multiplier;
use memory::{Arena, Disjoint};
use rope::{NormWeights, RopeStore, RopeTables};
use rowwise::{Add, Gate, RmsNorm, RmsNormAdd, Softcap};
use simd::{Isa, Kernel};
use stage::StagedBatch;
use workers::Workers;

/// A vector of float32 numbers.
pub struct CpuVector(Vec<f32>);

impl CpuVector {
    /// Returns the numbers.
    pub fn values(&self) -> &[f32] {
        &self.0
    }
}

/// Samples of a step, already computed.
pub struct CpuPending(Vec<Sampled>);

/// Sums of rows, already computed.
pub struct CpuPooling(Vec<PooledRows>);

/// A device that computes on the CPU.
pub struct CpuDevice {
    workers: Workers,
    multiplier: Multiplier,
    kv_half: bool,
    weights: Arena,
    weight_bytes: usize,
    staged: StagedBatch,
    ropes: RopeTables,
    attention: Attention,
    experts: experts::Scratch,
    /// Tokens that the last step sampled, for rows of the next step that refer to them.
    sampled: Vec<u32>,
    /// Samples that the caller has read, kept to reuse their memory.
    spare_samples: Vec<Sampled>,
}

impl CpuDevice {
    /// Creates the device and starts its worker threads.
    ///
    /// # Errors
    /// Returns [`DeviceError::Unsupported`] if the machine lacks the requested instruction set,
    /// and [`DeviceError::Unavailable`] if a core is not available to the process or if a
    /// thread cannot be started.
    pub fn new(options: &CpuOptions) -> Result<Self, DeviceError> {
        let isa = Isa::choose(options.simd)?;
        let threads = options
            .threads
            .unwrap_or_else(|| match options.cores.len() {
                0 => workers::parallelism(),
                cores => cores,
            });
        let kv_half = match options.kv {
            KvType::F16 => true,
            KvType::F32 => false,
            KvType::Auto => options.activations != Activations::F32,
        };
        Ok(Self {
            workers: Workers::new(threads, &options.cores)?,
            multiplier: Multiplier::new(isa, options.activations),
            kv_half,
            weights: Arena::default(),
            weight_bytes: 0,
            staged: StagedBatch::default(),
            ropes: RopeTables::default(),
            attention: Attention::default(),
            experts: experts::Scratch::default(),
            sampled: Vec::new(),
            spare_samples: Vec::new(),
        })
    }

    /// Runs `kernel(rows, elements)` over the rows of `out` on all threads, where `elements`
    /// are the elements of these rows in `out`. `weight` is the cost of a row in elements.
    fn rowwise<'a, K: Kernel>(
        &mut self,
        operation: &'static str,
        (rows, weight): (usize, usize),
        out: &'a mut [f32],
        kernel: impl Fn(std::ops::Range<usize>, &'a mut [f32]) -> K + Sync,
    ) -> Result<(), DeviceError> {
        let isa = self.multiplier.isa;
        let columns = out.len() / rows.max(1);
        let out = Disjoint::new(out);
        // A small number of rows is done sooner than a second thread could join.
        let grain = (16_384 / weight.max(1)).max(1);
        self.workers.run(operation, rows, grain, |range| {
            // SAFETY: each row belongs to one item, so that no two calls share elements, and
            // `out` stays borrowed for `'a`, the lifetime that the elements get.
            let elements = unsafe {
                let part = out.range(range.start * columns, range.len() * columns);
                std::slice::from_raw_parts_mut(part.as_mut_ptr(), part.len())
            };
            isa.dispatch(kernel(range, elements));
        })
    }
}

/// Returns [`DeviceError::Failed`] unless `holds`.
fn require(
    holds: bool,
    operation: &'static str,
    reason: impl FnOnce() -> String,
) -> Result<(), DeviceError> {
    if holds {
        return Ok(());
    }
    Err(DeviceError::Failed {
        device: "cpu",
        operation,
        reason: reason(),
    })
}

/// Turns the reason of a failed check into [`DeviceError::Failed`].
fn require_ok(operation: &'static str, checked: Result<(), String>) -> Result<(), DeviceError> {
    checked.or_else(|reason| require(false, operation, || reason))
}

/// Requires a matrix of exactly `columns` columns and at least `rows` rows.
fn require_shape(
    operation: &'static str,
    name: &str,
    tensor: &CpuTensor,
    (rows, columns): (usize, usize),
) -> Result<(), DeviceError> {
    require(
        tensor.rows() >= rows && tensor.columns() == columns,
        operation,
        || {
            let (has_rows, has_columns) = (tensor.rows(), tensor.columns());
            format!("{name} is {has_rows} × {has_columns}, but {rows} × {columns} is needed")
        },
    )
}

fn require_cache(
    operation: &'static str,
    cache: &CpuCache,
    layer: usize,
    heads: HeadShape,
) -> Result<(), DeviceError> {
    let shape = cache.shape();
    let fits = layer < shape.layers
        && heads.kv_heads == shape.kv_heads
        && heads.head_dim == shape.head_dim
        && heads.kv_heads > 0
        && heads.q_heads > 0
        && heads.q_heads.is_multiple_of(heads.kv_heads);
    require(fits, operation, || {
        format!("{heads:?} of layer {layer} do not fit the cache, {shape:?}")
    })
}

impl Device for CpuDevice {
    type Linear = CpuLinear;
    type Vector = CpuVector;
    type Rope = CpuRope;
    type Experts = CpuExperts;
    type Tensor = CpuTensor;
    type Cache = CpuCache;
    type HostBlocks = CpuHostBlocks;
    type Pending = CpuPending;
    type Pooling = CpuPooling;

    fn info(&self) -> DeviceInfo {
        let (isa, threads) = (self.multiplier.isa.name(), self.workers.count());
        let activations = match self.multiplier.activations {
            Activations::F32 => "float32",
            Activations::Auto | Activations::Int8 => "int8 for quantised weights",
        };
        let kv = if self.kv_half { "float16" } else { "float32" };
        DeviceInfo {
            name: "cpu".to_owned(),
            description: format!(
                "{isa}, {threads} threads, activations in {activations}, keys and values in {kv}"
            ),
            details: Vec::new(),
        }
    }

    fn cache_bytes(&self, shape: &CacheShape) -> usize {
        cache::block_bytes(shape, self.kv_half).saturating_mul(shape.blocks)
    }

    fn load_linear(&mut self, spec: &LinearSpec<'_>) -> Result<CpuLinear, DeviceError> {
        let linear = CpuLinear::load(&mut self.workers, &mut self.weights, spec)?;
        self.weight_bytes += linear.bytes();
        Ok(linear)
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<CpuVector, DeviceError> {
        self.weight_bytes += size_of_val(values);
        Ok(CpuVector(values.to_vec()))
    }

    fn load_rope(&mut self, spec: &RopeSpec) -> Result<CpuRope, DeviceError> {
        Ok(CpuRope {
            spec: spec.clone(),
            index: self.ropes.add(),
        })
    }

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

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// Ignores the precision, because all activations are float32 on this device.
    fn allocate(
        &mut self,
        rows: usize,
        columns: usize,
        _: Precision,
    ) -> Result<CpuTensor, DeviceError> {
        CpuTensor::zeroed(rows, columns)
    }

    fn cache_budget(&self) -> Result<usize, DeviceError> {
        Ok(512 << 20)
    }

    fn allocate_cache(&mut self, shape: &CacheShape) -> Result<CpuCache, DeviceError> {
        CpuCache::new(*shape, self.kv_half)
    }

    fn allocate_host_blocks(
        &mut self,
        shape: &CacheShape,
        blocks: usize,
    ) -> Result<CpuHostBlocks, DeviceError> {
        CpuHostBlocks::new(cache::block_bytes(shape, self.kv_half), blocks)
    }

    /// Returns the rate at which one thread copies memory, for sizes that do not fit in a CPU
    /// cache.
    fn swap_bandwidth(&self) -> f64 {
        5e9
    }

    fn stage(&mut self, batch: &Batch) -> Result<Staged, DeviceError> {
        self.staged.take(batch, &self.sampled)?;
        self.workers.begin_step();
        Ok(Staged::Enqueue)
    }

    fn finish(&mut self, outcome: Result<(), DeviceError>) -> Result<Finished, DeviceError> {
        self.workers.end_step();
        outcome.map(|()| Finished::Done)
    }

    fn embed(
        &mut self,
        table: &CpuLinear,
        scale: f32,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        let (rows, columns) = (self.staged.rows(), table.columns());
        require_shape("embed", "the result", out, (rows, columns))?;
        let vocabulary = table.rows();
        let beyond = self
            .staged
            .tokens
            .iter()
            .find(|&&token| token as usize >= vocabulary);
        require(beyond.is_none(), "embed", || {
            format!(
                "token {} is outside the vocabulary of {vocabulary} tokens",
                beyond.copied().unwrap_or_default()
            )
        })?;
        let tokens = &self.staged.tokens;
        let out = Disjoint::new(out.leading_mut(rows));
        self.workers
            .run("embed", rows, (4096 / columns.max(1)).max(1), |range| {
                for row in range {
                    // SAFETY: each row belongs to one item.
                    let out = unsafe { out.range(row * columns, columns) };
                    table.read_row(tokens[row] as usize, out);
                    if scale != 1.0 {
                        out.iter_mut().for_each(|value| *value *= scale);
                    }
                }
            })
    }

    fn rms_norm(
        &mut self,
        x: &CpuTensor,
        weight: &CpuVector,
        epsilon: f32,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        let columns = weight.0.len();
        require_shape("rms_norm", "x", x, (rows, columns))?;
        require_shape("rms_norm", "the result", out, (rows, columns))?;
        let (x, weight) = (x.leading(rows), &weight.0[..]);
        self.rowwise(
            "rms_norm",
            (rows, columns),
            out.leading_mut(rows),
            |range, out| {
                let x = &x[range.start * columns..range.end * columns];
                RmsNorm {
                    x,
                    weight,
                    epsilon,
                    out,
                }
            },
        )
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut CpuTensor,
        x: &CpuTensor,
        weight: &CpuVector,
        epsilon: f32,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        self.add(residual, x, rows)?;
        self.rms_norm(residual, weight, epsilon, rows, out)
    }

    fn rms_norm_add(
        &mut self,
        x: &CpuTensor,
        weight: &CpuVector,
        epsilon: f32,
        rows: usize,
        residual: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        let columns = weight.0.len();
        require_shape("rms_norm_add", "x", x, (rows, columns))?;
        require_shape("rms_norm_add", "the residual", residual, (rows, columns))?;
        let (x, weight) = (x.leading(rows), &weight.0[..]);
        let residual = residual.leading_mut(rows);
        self.rowwise(
            "rms_norm_add",
            (rows, columns),
            residual,
            |range, residual| {
                let x = &x[range.start * columns..range.end * columns];
                RmsNormAdd {
                    x,
                    weight,
                    epsilon,
                    residual,
                }
            },
        )
    }

    fn add(
        &mut self,
        residual: &mut CpuTensor,
        x: &CpuTensor,
        rows: usize,
    ) -> Result<(), DeviceError> {
        let columns = x.columns();
        require_shape("add", "x", x, (rows, columns))?;
        require_shape("add", "the residual", residual, (rows, columns))?;
        let x = x.leading(rows);
        self.rowwise(
            "add",
            (rows, columns),
            residual.leading_mut(rows),
            |range, a| Add {
                a,
                b: &x[range.start * columns..range.end * columns],
                factor: 1.0,
            },
        )
    }

    fn linear(
        &mut self,
        x: &CpuTensor,
        weight: &CpuLinear,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        require_shape("linear", "x", x, (rows, weight.columns()))?;
        require_shape("linear", "the result", out, (rows, weight.rows()))?;
        let (x, out) = (x.leading(rows), out.leading_mut(rows));
        self.multiplier
            .multiply(&mut self.workers, x, weight, rows, out)
    }

    fn rope_store(
        &mut self,
        qkv: &mut CpuTensor,
        heads: HeadShape,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &CpuRope,
        cache: &mut CpuCache,
        layer: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "rope_store";
        let rows = self.staged.rows();
        require_shape(NAME, "qkv", qkv, (rows, heads.qkv_columns()))?;
        require_cache(NAME, cache, layer, heads)?;
        let slots = cache.shape().blocks * cache.shape().block_tokens;
        require(self.staged.slot_end <= slots, NAME, || {
            format!(
                "slot {} is out of range: the cache has {slots} slots",
                self.staged.slot_end - 1
            )
        })?;
        let positions = rope.spec.max_positions;
        require(self.staged.position_end <= positions, NAME, || {
            format!(
                "position {} is out of range: the model has {positions} positions",
                self.staged.position_end - 1
            )
        })?;
        let half = rope.spec.inverse_frequencies.len();
        require(2 * half <= heads.head_dim, NAME, || {
            format!(
                "{half} rotated pairs do not fit in a head of {} elements",
                heads.head_dim
            )
        })?;
        if let Some(norm) = norm {
            let size =
                |heads_in_row: usize| heads.head_dim * if norm.per_head { 1 } else { heads_in_row };
            let fits =
                norm.q.0.len() == size(heads.q_heads) && norm.k.0.len() == size(heads.kv_heads);
            require(fits, NAME, || {
                format!(
                    "norms of {} and {} do not fit {heads:?}",
                    norm.q.0.len(),
                    norm.k.0.len()
                )
            })?;
        }
        if rows == 0 {
            return Ok(());
        }
        let norm = norm.map(|norm| NormWeights {
            q: &norm.q.0,
            k: &norm.k.0,
            epsilon: norm.epsilon,
            per_head: norm.per_head,
        });
        let angles = self.ropes.angles(&mut self.workers, rope, &self.staged)?;
        let store = RopeStore {
            heads,
            norm,
            half,
            angles,
            batch: &self.staged,
        };
        let isa = self.multiplier.isa;
        store.all_rows(&mut self.workers, isa, qkv.leading_mut(rows), cache, layer)
    }

    fn attend(
        &mut self,
        qkv: &CpuTensor,
        spec: &AttentionSpec,
        cache: &CpuCache,
        layer: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "attend";
        let rows = self.staged.rows();
        require_shape(NAME, "qkv", qkv, (rows, spec.heads.qkv_columns()))?;
        require_shape(NAME, "the result", out, (rows, spec.heads.q_columns()))?;
        require_cache(NAME, cache, layer, spec.heads)?;
        require(spec.window != Some(0), NAME, || {
            "the attention window must be at least 1 token".to_owned()
        })?;
        let blocks = cache.shape().blocks;
        require(self.staged.block_end <= blocks, NAME, || {
            format!(
                "block {} is out of range: the cache has {blocks} blocks",
                self.staged.block_end - 1
            )
        })?;
        for (index, sequence) in self.staged.sequences.iter().enumerate() {
            let Some(last) = sequence.rows.clone().last() else {
                continue;
            };
            let position = self.staged.positions[last] as usize;
            let tokens = sequence.table.len() * cache.shape().block_tokens;
            require(position < tokens, NAME, || {
                format!(
                    "the block table of sequence {index} covers {tokens} tokens, but position \
                     {position} is needed"
                )
            })?;
        }
        let (qkv, out) = (qkv.leading(rows), out.leading_mut(rows));
        let attend = Attend {
            qkv,
            spec,
            cache,
            layer,
            batch: &self.staged,
        };
        self.attention
            .all_rows(&mut self.workers, self.multiplier.isa, &attend, out)
    }

    fn gated_activation(
        &mut self,
        gate_up: &CpuTensor,
        activation: Activation,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        let columns = out.columns();
        require_shape(
            "gated_activation",
            "gate and up",
            gate_up,
            (rows, 2 * columns),
        )?;
        require_shape("gated_activation", "the result", out, (rows, columns))?;
        let gate_up = gate_up.leading(rows);
        let weight = 4 * columns;
        self.rowwise(
            "gated_activation",
            (rows, weight),
            out.leading_mut(rows),
            |range, out| {
                let gate_up = &gate_up[range.start * 2 * columns..range.end * 2 * columns];
                Gate {
                    gate_up,
                    activation,
                    columns,
                    out,
                }
            },
        )
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
        let operands = experts::Operands {
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

    fn gather_samples(&mut self, x: &CpuTensor, out: &mut CpuTensor) -> Result<(), DeviceError> {
        let (rows, samples) = (self.staged.rows(), self.staged.sample_rows.len());
        require_shape("gather_samples", "x", x, (rows, x.columns()))?;
        require_shape("gather_samples", "the result", out, (samples, x.columns()))?;
        for (to, &from) in self.staged.sample_rows.iter().enumerate() {
            out.row_mut(to).copy_from_slice(x.row(from));
        }
        Ok(())
    }

    fn softcap(&mut self, x: &mut CpuTensor, cap: f32, rows: usize) -> Result<(), DeviceError> {
        let columns = x.columns();
        require_shape("softcap", "x", x, (rows, columns))?;
        let weight = 4 * columns;
        self.rowwise("softcap", (rows, weight), x.leading_mut(rows), |_, x| {
            Softcap { x, cap }
        })
    }

    fn sample(
        &mut self,
        logits: &CpuTensor,
        rows: &[SampleRow],
    ) -> Result<CpuPending, DeviceError> {
        require_shape("sample", "logits", logits, (rows.len(), logits.columns()))?;
        require(logits.columns() > 0, "sample", || {
            "there are no logits".to_owned()
        })?;
        let isa = self.multiplier.isa;
        let nothing = Sampled {
            token: 0,
            logprob: 0.0,
            top: Vec::new(),
            is_finite: true,
        };
        let mut samples = std::mem::take(&mut self.spare_samples);
        samples.clear();
        samples.resize(rows.len(), nothing);
        let out = Disjoint::new(&mut samples);
        self.workers.begin_step();
        let chosen = self.workers.run("sample", rows.len(), 1, |range| {
            for row in range {
                // SAFETY: each row belongs to one item.
                let out = unsafe { &mut out.range(row, 1)[0] };
                *out = sampling::choose(isa, logits.row(row), &rows[row]);
            }
        });
        self.workers.end_step();
        chosen?;
        self.sampled.clear();
        self.sampled
            .extend(samples.iter().map(|sample| sample.token));
        Ok(CpuPending(samples))
    }

    fn collect(&mut self, pending: CpuPending) -> Result<Vec<Sampled>, DeviceError> {
        Ok(pending.0)
    }

    fn recycle(&mut self, samples: Vec<Sampled>) {
        if samples.capacity() > self.spare_samples.capacity() {
            self.spare_samples = samples;
        }
    }

    fn pool(
        &mut self,
        x: &CpuTensor,
        ranges: &[std::ops::Range<usize>],
    ) -> Result<CpuPooling, DeviceError> {
        let rows = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        require_shape("pool", "x", x, (rows, x.columns()))?;
        let sum = |range: &std::ops::Range<usize>| {
            let mut sum = PooledRows::new(x.columns());
            range.clone().for_each(|row| sum.add_row(x.row(row)));
            sum
        };
        // Summing costs little compared with the products that made the rows, so that waking
        // other threads is not worthwhile.
        Ok(CpuPooling(ranges.iter().map(sum).collect()))
    }

    fn collect_pooled(&mut self, pooling: CpuPooling) -> Result<Vec<PooledRows>, DeviceError> {
        Ok(pooling.0)
    }

    fn copy_blocks(&mut self, cache: &mut CpuCache, pairs: &[[u32; 2]]) -> Result<(), DeviceError> {
        let checked = blocks::check_copies(pairs, cache.shape().blocks);
        require_ok("copy_blocks", checked)?;
        pairs.iter().for_each(|&pair| cache.copy(pair));
        Ok(())
    }

    fn swap_out(
        &mut self,
        cache: &CpuCache,
        host: &mut CpuHostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        require_ok("swap_out", host.slots.check_out(pairs, cache.blocks()))?;
        pairs.iter().for_each(|&pair| cache.swap_out(host, pair));
        Ok(())
    }

    fn swap_in(
        &mut self,
        cache: &mut CpuCache,
        host: &CpuHostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        require_ok("swap_in", host.slots.check_in(pairs, cache.blocks()))?;
        pairs.iter().for_each(|&pair| cache.swap_in(host, pair));
        Ok(())
    }

    fn poison(&mut self, cache: &mut CpuCache, blocks: &[u32]) -> Result<(), DeviceError> {
        let checked = blocks::check_blocks(blocks.iter().copied(), cache.shape().blocks);
        require_ok("poison", checked)?;
        cache.poison(blocks);
        Ok(())
    }
}
