//! Paged attention.
//!
//! Sequences with one row (decode) are spread over the GPU in units of 128 keys, whose partial
//! results the last block of a sequence merges. Sequences with several rows (prefill) have a
//! kernel of their own. Both give a row the same bits; see `kernels/attention.cuh`. In a step that
//! only decodes, the kernel also rotates and stores the rows. A step whose units exceed
//! the limit on scratch memory takes several launches, which reuse that memory one after the
//! other.

use super::CudaDevice;
use super::cache::{CachePlace, CudaCache, require_head_dim, require_heads};
use super::context::Context;
use super::error::{require, unsupported};
use super::images::Modules;
use super::launch::{Grid, kernels};
use super::memory::Ptr;
use super::norm::CudaVector;
use super::rope::RopeParameters;
use super::scratch::Scratch;
#[cfg(test)]
use super::signature::Signature;
use super::step::{Bounds, MOST_UNITS, UNIT, UnitSpread};
use super::tensor::{CudaTensor, require_shape};
use crate::device::attention::rope_then_attend;
use crate::device::{
    AttentionOps, AttentionSpec, CacheLayer, DeviceError, DeviceLimits, HeadShape, ModelShape,
    Precision, RotaryAttention, Values,
};

kernels! {
    /// Kernels of `kernels/attention.cu`.
    pub(super) struct Kernels in "attention" {
        attend_decode_hd[16, 32, 64, 80, 96, 128, 256, 512](
            out: Ptr,
            partial_out: Ptr,
            partial_stats: Ptr,
            arrivals: Ptr,
            qkv: Ptr,
            k_cache: Ptr,
            v_cache: Ptr,
            tables: Ptr,
            sequences: Ptr,
            decode_list: Ptr,
            sinks: Ptr,
            angles: Ptr,
            q_norm: Ptr,
            k_norm: Ptr,
            epsilon: f32,
            norm_mode: u32,
            rotary_dim: u32,
            q_heads: u32,
            kv_heads: u32,
            columns: u32,
            block_tokens: u32,
            block_vectors: u32,
            scale: f32,
            softcap: f32,
            window: u32,
            chunks: u32,
        );
        attend_prefill_hd[16, 32, 64, 80, 96, 128, 256, 512](
            out: Ptr,
            qkv: Ptr,
            k_cache: Ptr,
            v_cache: Ptr,
            tables: Ptr,
            sequences: Ptr,
            prefill_work: Ptr,
            sinks: Ptr,
            q_heads: u32,
            kv_heads: u32,
            columns: u32,
            block_tokens: u32,
            block_vectors: u32,
            scale: f32,
            softcap: f32,
            window: u32,
            chunks: u32,
        );
        attend_both_hd[32, 64, 256](
            out: Ptr,
            qkv: Ptr,
            k_cache: Ptr,
            v_cache: Ptr,
            tables: Ptr,
            sequences: Ptr,
            prefill_work: Ptr,
            sinks: Ptr,
            q_heads: u32,
            kv_heads: u32,
            columns: u32,
            block_tokens: u32,
            block_vectors: u32,
            scale: f32,
            softcap: f32,
            window: u32,
            after: u32,
        );
    }
}

/// Sizes of heads with kernels for attention in both directions: those of encoders.
const BOTH_DIMS: [usize; 3] = [32, 64, 256];

/// Fails unless there is a kernel for attention in both directions with heads of this size.
fn require_both(head_dim: usize) -> Result<(), DeviceError> {
    if BOTH_DIMS.contains(&head_dim) {
        return Ok(());
    }
    let known = BOTH_DIMS.map(|dim| dim.to_string()).join(", ");
    Err(unsupported(
        format!("attention in both directions with heads of {head_dim} elements"),
        format!("supported head sizes are {known}"),
    ))
}

/// Warps per CUDA block.
const WARPS: usize = 4;

/// Packed query rows per warp.
const WARP_ROWS: usize = 16;

/// Maximum number of CUDA blocks to spread a decode launch over. Beyond it, warps process
/// several units each.
const MOST_BLOCKS: usize = 4096;

/// The kernels, and scratch memory for partial results until they are merged.
pub(super) struct AttentionKernels {
    kernels: Kernels,
    partial_out: Scratch,
    partial_stats: Scratch,
    /// For each sequence and group of heads, the number of blocks whose partial results are there.
    arrivals: Scratch,
}

impl AttentionKernels {
    #[cfg(test)]
    pub(super) const FILE: &'static str = Kernels::FILE;
    #[cfg(test)]
    pub(super) const SIGNATURES: &'static [Signature] = Kernels::SIGNATURES;

    pub(super) fn load(modules: &Modules) -> Result<Self, DeviceError> {
        Ok(Self {
            kernels: Kernels::load(modules)?,
            partial_out: Scratch::default(),
            partial_stats: Scratch::default(),
            arrivals: Scratch::zeroed(),
        })
    }

    /// Returns the memory for the partial results of this many units of this many sequences.
    pub(super) fn partials(
        &mut self,
        context: &Context,
        heads: HeadShape,
        (units, sequences): (usize, usize),
    ) -> Result<Partials, DeviceError> {
        let [out, stats] = partial_bytes(heads, units);
        let arrivals = arrival_bytes(heads, sequences);
        Ok(Partials {
            out: self.partial_out.get(context, out)?,
            stats: self.partial_stats.get(context, stats)?,
            arrivals: self.arrivals.get(context, arrivals)?,
        })
    }
}

/// Returns the largest of the numbers of bytes of [`partial_bytes`] of a model's layers.
pub(super) fn most_partial_bytes(model: &ModelShape, units: usize) -> [usize; 2] {
    let all = model.all_heads().map(|heads| partial_bytes(heads, units));
    all.fold([0, 0], |[out, stats], [own_out, own_stats]| {
        [out.max(own_out), stats.max(own_stats)]
    })
}

/// Returns the bytes of the counts of blocks of this many sequences.
pub(super) fn arrival_bytes(heads: HeadShape, sequences: usize) -> usize {
    if heads.values != Values::BesideKeys {
        return 0;
    }
    sequences * blocks_of_heads(heads) * size_of::<u32>()
}

/// Returns the bytes of the partial outputs, and of the statistics, of this many units. Latent
/// attention has none.
pub(super) fn partial_bytes(heads: HeadShape, units: usize) -> [usize; 2] {
    if heads.values != Values::BesideKeys {
        return [0, 0];
    }
    let partials = units.saturating_mul(heads.q_heads);
    let out = partials.saturating_mul(heads.head_dim * size_of::<f32>());
    [out, partials.saturating_mul(size_of::<[f32; 2]>())]
}

/// Returns the number of units to have scratch memory for: those of any step within `limits`,
/// but at most [`MOST_UNITS`] and what fits in `bytes`, and at least those of one sequence. Steps
/// with more units take several launches.
pub(super) fn unit_room(limits: &DeviceLimits, bytes: usize) -> usize {
    let longest = limits.sequence_tokens.div_ceil(UNIT).max(1);
    let of_all = limits.sequences.saturating_mul(longest);
    let of_one: usize = most_partial_bytes(&limits.model, 1).iter().sum();
    let fit = bytes.checked_div(of_one).unwrap_or(MOST_UNITS);
    of_all.min(MOST_UNITS).min(fit).max(longest)
}

/// Returns how the units of a step are spread over CUDA blocks, in the layers that spread them the
/// most: the others have the same launches wherever those do.
pub(super) fn unit_spread(model: &ModelShape) -> UnitSpread {
    let fewest = model.all_heads().map(blocks_of_heads).min();
    UnitSpread {
        block_units: WARPS,
        most_blocks: MOST_BLOCKS / fewest.unwrap_or(1).max(1),
    }
}

/// Returns the number of CUDA blocks to spread the units of the longest sequence over, if the
/// launch has `others` blocks for each.
fn blocks_of_units(units: usize, others: usize) -> usize {
    units.div_ceil(WARPS).min((MOST_BLOCKS / others).max(1))
}

/// Returns the number of CUDA blocks of a decode launch per row and group of units.
fn blocks_of_heads(heads: HeadShape) -> usize {
    let group = heads.q_heads.checked_div(heads.kv_heads).unwrap_or(0);
    heads.kv_heads * group.div_ceil(WARP_ROWS) * pieces(heads.head_dim)
}

/// The largest number of columns of results that a CUDA block computes.
const MOST_COLUMNS: usize = 256;

/// Returns the number of pieces that heads are computed in: each by a CUDA block of its own.
fn pieces(head_dim: usize) -> usize {
    head_dim.div_ceil(MOST_COLUMNS)
}

/// Returns the bytes of dynamic shared memory of a decode block: 16 queries, and a ring of slots per
/// warp, each slot for a piece of 16 keys or values; all of them are padded by 16 bytes.
fn decode_shared(head_dim: usize) -> usize {
    let slots = match head_dim {
        0..=64 => 8,
        65..=128 => 4,
        _ => 2,
    };
    let slots = WARPS * slots * (2 * head_dim.min(MOST_COLUMNS) + 16);
    WARP_ROWS * (2 * head_dim + 16 + slots)
}

/// Returns the bytes of dynamic shared memory of a prefill block: a ring of slots, each for a piece
/// of 32 keys or values padded by 16 bytes, and for large heads the float32 sums of all rows.
fn prefill_shared(head_dim: usize) -> usize {
    let columns = head_dim.min(MOST_COLUMNS);
    let (slots, sums) = match columns {
        0..=128 => (4, 0),
        _ => (2, WARPS * WARP_ROWS * columns * 4),
    };
    slots * 32 * (2 * columns + 16) + sums
}

/// Returns the maximum number of units that a window of this many keys overlaps, where 0 stands
/// for no window.
fn most_units(window: u32) -> usize {
    match window as usize {
        0 => usize::MAX,
        window => (window - 1).div_ceil(UNIT) + 1,
    }
}

/// Scalar parameters of a layer's attention, as the kernels take them.
struct ScalarParameters {
    q_heads: u32,
    kv_heads: u32,
    /// Elements of a row of queries, or of queries, keys and values.
    columns: u32,
    block_tokens: u32,
    block_vectors: u32,
    scale: f32,
    softcap: f32,
    window: u32,
    /// What of a position is the beginning of its chunk, as a mask.
    chunks: u32,
    /// Number of keys after its own that a row attends to, if there are so many; `None` for causal
    /// attention.
    after: Option<u32>,
}

impl ScalarParameters {
    fn new(spec: &AttentionSpec, columns: usize, block_tokens: usize, place: &CachePlace) -> Self {
        // A window that exceeds `u32` covers all positions, so it is no window.
        let window = spec.window.map_or(0, |window| {
            u32::try_from(window).map_or(0, |window| window.max(1))
        });
        Self {
            q_heads: spec.heads.q_heads as u32,
            kv_heads: spec.heads.kv_heads as u32,
            columns: columns as u32,
            block_tokens: block_tokens as u32,
            block_vectors: place.block_vectors,
            scale: spec.scale,
            softcap: spec.softcap.unwrap_or(0.0),
            window,
            chunks: match (spec.window, spec.chunked) {
                // A chunk that exceeds `u32` is the only one.
                (Some(chunk), true) => u32::try_from(chunk).map_or(0, |chunk| !(chunk - 1)),
                _ => 0,
            },
            // Without a window, all of them. The sum of this and a position fits in `u32`.
            after: (!spec.causal).then(|| window.wrapping_sub(1).min(u32::MAX / 2)),
        }
    }
}

impl AttentionOps for CudaDevice {
    fn check_heads(&self, heads: HeadShape, causal: bool) -> Result<(), DeviceError> {
        match heads.values {
            Values::BesideKeys if !causal => require_both(heads.head_dim),
            Values::BesideKeys => require_head_dim(heads.head_dim),
            Values::InKeys(_) => Ok(()),
        }
    }

    fn attend(
        &mut self,
        qkv: &CudaTensor,
        spec: &AttentionSpec,
        sinks: Option<&CudaVector>,
        cache: &CudaCache,
        layer: CacheLayer,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        if spec.heads.values != Values::BesideKeys {
            return self.attend_latents(qkv, spec, sinks, (cache, layer), out);
        }
        let rows = Rows {
            qkv,
            rotary: RopeParameters::default(),
            sinks,
        };
        self.attend_rows(rows, spec, cache, layer, out)
    }

    fn rope_attend(
        &mut self,
        qkv: &mut CudaTensor,
        attention: &RotaryAttention<'_, Self>,
        cache: &mut CudaCache,
        layer: CacheLayer,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        let RotaryAttention {
            rotary,
            spec,
            sinks,
        } = attention;
        let norm = rotary.norm.as_ref();
        // A norm over a whole row needs all of its heads in one block.
        let per_head = norm.is_none_or(|norm| norm.per_head);
        let is_latent = spec.heads.values != Values::BesideKeys;
        let is_scaled = rotary.query_scale.is_some();
        if self.step.has_prefills() || !per_head || is_scaled || is_latent {
            return rope_then_attend(self, qkv, attention, cache, layer, out);
        }
        let rows = Rows {
            qkv,
            rotary: self.rope_parameters(spec.heads, norm, rotary.rope, cache, layer)?,
            sinks: *sinks,
        };
        self.attend_rows(rows, spec, cache, layer, out)
    }
}

/// The rows that attend, and what their attention takes besides the cache.
struct Rows<'a> {
    qkv: &'a CudaTensor,
    /// How the rows are rotated and stored before, unless the angles are null. Otherwise every
    /// sequence must have one row.
    rotary: RopeParameters,
    sinks: Option<&'a CudaVector>,
}

impl CudaDevice {
    /// Enqueues attention for all rows.
    fn attend_rows(
        &mut self,
        rows: Rows<'_>,
        spec: &AttentionSpec,
        cache: &CudaCache,
        layer: CacheLayer,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "attend";
        let Rows { qkv, rotary, sinks } = rows;
        let (heads, shape) = (spec.heads, *cache.shape());
        match spec.causal {
            true => require_head_dim(heads.head_dim)?,
            false => require_both(heads.head_dim)?,
        }
        require_heads(NAME, heads, cache, layer)?;
        let known = self.limits.map(|limits| limits.block_tokens);
        require(known == Some(shape.block_tokens), NAME, || {
            format!(
                "the cache is {shape:?}, but the device was reserved for blocks of {known:?} tokens"
            )
        })?;
        if let (Some(chunk), true) = (spec.window, spec.chunked)
            && !chunk.is_power_of_two()
        {
            return Err(unsupported(
                format!("attention in chunks of {chunk} tokens"),
                "the number must be a power of two",
            ));
        }
        let count = sinks.map_or(heads.q_heads, CudaVector::length);
        require(count == heads.q_heads, NAME, || {
            format!("there are {count} sinks for {} heads", heads.q_heads)
        })?;
        let rows = self.step.padded(self.step.rows());
        let activation = Precision::Activation;
        let columns = match qkv.columns() == heads.q_columns() {
            true => heads.q_columns(),
            false => heads.qkv_columns(),
        };
        require_shape(NAME, "qkv", qkv, (rows, columns), activation)?;
        require_shape(
            NAME,
            "the result",
            out,
            (rows, heads.q_columns()),
            activation,
        )?;
        let bounds = Bounds {
            blocks: shape.blocks,
            ..Bounds::UNLIMITED
        };
        self.step.require_within(bounds, NAME)?;
        self.graphs.limit(bounds);
        let window = spec.window.unwrap_or(usize::MAX);
        self.step.require_window(layer.group, window, NAME)?;
        self.graphs.limit_window(layer.group, window);
        let place = cache.place(heads, layer);
        let scalars = ScalarParameters::new(spec, columns, shape.block_tokens, &place);
        let operands = Operands {
            qkv: qkv.ptr(),
            keys: place.keys,
            values: place.values,
            sequences: self.step.sequences(layer.group),
            sinks: sinks.map_or(Ptr::NULL, CudaVector::ptr),
            out: out.ptr(),
        };
        self.attend_single_rows(&operands, &rotary, heads, &scalars)?;
        self.attend_many_rows(&operands, heads, &scalars)
    }

    /// Enqueues attention for the sequences with one row.
    fn attend_single_rows(
        &mut self,
        operands: &Operands,
        rotary: &RopeParameters,
        heads: HeadShape,
        scalars: &ScalarParameters,
    ) -> Result<(), DeviceError> {
        let Some(most) = self.step.decodes().map(|(_, sequences)| sequences).max() else {
            return Ok(());
        };
        let sequences = self.limits.map_or(0, |limits| limits.sequences).max(most);
        let room = (self.step.unit_room(), sequences);
        let partials = self.attention.partials(&self.context, heads, room)?;
        for launch in self.step.decodes() {
            self.launch_single_rows(operands, rotary, &partials, heads, scalars, launch)?;
        }
        Ok(())
    }

    /// Enqueues one launch of attention for sequences with one row, given by the address and
    /// the number of their entries in the decode list.
    fn launch_single_rows(
        &self,
        operands: &Operands,
        rotary: &RopeParameters,
        partials: &Partials,
        heads: HeadShape,
        scalars: &ScalarParameters,
        (decode_list, decodes): (Ptr, usize),
    ) -> Result<(), DeviceError> {
        let (y, z) = (blocks_of_heads(heads), decodes);
        let units = self.step.max_units().min(most_units(scalars.window));
        let x = blocks_of_units(units, y * z);
        let threads = [32 * WARPS as u32, 1, 1];
        let grid = Grid::new([x as u32, y as u32, z as u32], threads)
            .shared(decode_shared(heads.head_dim) as u32);
        self.attention.kernels.attend_decode_hd(
            heads.head_dim,
            &self.context,
            grid,
            operands.out,
            partials.out,
            partials.stats,
            partials.arrivals,
            operands.qkv,
            operands.keys,
            operands.values,
            self.step.tables(),
            operands.sequences,
            decode_list,
            operands.sinks,
            rotary.angles,
            rotary.q_norm,
            rotary.k_norm,
            rotary.epsilon,
            rotary.norm_mode,
            rotary.rotary_dim,
            scalars.q_heads,
            scalars.kv_heads,
            scalars.columns,
            scalars.block_tokens,
            scalars.block_vectors,
            scalars.scale,
            scalars.softcap,
            scalars.window,
            scalars.chunks,
        )
    }

    /// Enqueues attention for the sequences with several rows.
    fn attend_many_rows(
        &mut self,
        operands: &Operands,
        heads: HeadShape,
        scalars: &ScalarParameters,
    ) -> Result<(), DeviceError> {
        let group = heads.q_heads / heads.kv_heads;
        let context: &Context = &self.context;
        let (work, items) = self.step.prefill_work(context, group)?;
        let blocks = [
            items as u32,
            (heads.kv_heads * pieces(heads.head_dim)) as u32,
            1,
        ];
        let grid = Grid::new(blocks, [32 * WARPS as u32, 1, 1])
            .shared(prefill_shared(heads.head_dim) as u32);
        let launch = match scalars.after {
            Some(_) => Kernels::attend_both_hd,
            None => Kernels::attend_prefill_hd,
        };
        launch(
            &self.attention.kernels,
            heads.head_dim,
            context,
            grid,
            operands.out,
            operands.qkv,
            operands.keys,
            operands.values,
            self.step.tables(),
            operands.sequences,
            work,
            operands.sinks,
            scalars.q_heads,
            scalars.kv_heads,
            scalars.columns,
            scalars.block_tokens,
            scalars.block_vectors,
            scalars.scale,
            scalars.softcap,
            scalars.window,
            // Encoders have no chunks.
            scalars.after.unwrap_or(scalars.chunks),
        )
    }
}

/// Addresses of the partial results of units, until they are merged, and of the counts of the
/// blocks that have written theirs.
pub(super) struct Partials {
    out: Ptr,
    stats: Ptr,
    arrivals: Ptr,
}

/// Addresses of the operands of a layer's attention.
struct Operands {
    qkv: Ptr,
    keys: Ptr,
    values: Ptr,
    /// The sequences as the layer's group sees them.
    sequences: Ptr,
    /// NULL if there are none.
    sinks: Ptr,
    out: Ptr,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::cache::HEAD_DIMS;

    #[test]
    fn a_window_overlaps_no_more_units_than_are_launched() {
        for window in [1, 2, 127, 128, 129, 130, 255, 256, 257, 258, 512, 1024] {
            let begins = 0..2 * UNIT;
            let units = begins.map(|begin| (begin + window - 1) / UNIT - begin / UNIT + 1);
            assert_eq!(units.max(), Some(most_units(window as u32)), "{window}");
        }
        assert_eq!(most_units(0), usize::MAX);
    }

    #[test]
    fn launches_do_not_depend_on_how_units_are_rounded() {
        let of = |(q_heads, kv_heads, head_dim)| HeadShape {
            q_heads,
            kv_heads,
            head_dim,
            values: Values::BesideKeys,
        };
        for (heads, narrow) in [
            ((32, 8, 64), None),
            ((9, 3, 64), None),
            ((64, 1, 64), None),
            ((16, 16, 64), None),
            ((32, 16, 256), Some((32, 4, 512))),
            ((8, 2, 512), Some((8, 1, 256))),
        ] {
            let model = ModelShape {
                heads: of(heads),
                narrow_heads: narrow.map(of),
                ..ModelShape::default()
            };
            let spread = unit_spread(&model);
            for (heads, rows) in [1, 2, 7, 24, 100, 256, 5000]
                .into_iter()
                .flat_map(|rows| model.all_heads().map(move |heads| (heads, rows)))
            {
                let others = blocks_of_heads(heads) * rows;
                for (power, window) in (0..14).flat_map(|power| [(power, 0), (power, 700)]) {
                    let units = 1 << power;
                    let most = most_units(window);
                    let rounded = spread.rounded(units, rows).min(most);
                    assert_eq!(
                        blocks_of_units(rounded, others),
                        blocks_of_units(units.min(most), others),
                        "{rows} rows, {units} units, window {window}"
                    );
                }
            }
        }
    }

    #[test]
    fn scratch_memory_has_room_for_a_longest_sequence_and_is_limited_otherwise() {
        let limits = |sequences, sequence_tokens| DeviceLimits {
            sequences,
            sequence_tokens,
            model: ModelShape {
                heads: HeadShape {
                    q_heads: 32,
                    kv_heads: 8,
                    head_dim: 128,
                    values: Values::BesideKeys,
                },
                ..ModelShape::default()
            },
            ..DeviceLimits::default()
        };
        let of_one: usize = partial_bytes(limits(1, 1).model.heads, 1).iter().sum();
        assert_eq!(unit_room(&limits(4, 1000), usize::MAX), 4 * 8);
        assert_eq!(unit_room(&limits(256, 131_072), usize::MAX), MOST_UNITS);
        assert_eq!(unit_room(&limits(256, 131_072), 3000 * of_one), 3000);
        assert_eq!(unit_room(&limits(256, 131_072), 0), 1024);
        assert_eq!(unit_room(&limits(1, 1 << 22), usize::MAX), 1 << 15);
    }

    #[test]
    fn blocks_fit_the_shared_memory_of_every_supported_gpu() {
        for head_dim in HEAD_DIMS {
            assert!(decode_shared(head_dim) <= 99 << 10, "{head_dim}");
            assert!(prefill_shared(head_dim) <= 99 << 10, "{head_dim}");
        }
    }
}
