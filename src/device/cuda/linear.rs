//! Linear layers: chooses the kernel and its tile, and launches it.

use super::CudaDevice;
use super::blas::{Blas, Shape};
use super::context::Context;
use super::error::{require, unsupported};
use super::launch::{Grid, kernels};
use super::load;
use super::memory::Ptr;
use super::options::CudaOptions;
use super::pack::{RECORD_INPUTS, RECORD_OUTPUTS};
use super::scratch::Scratch;
use super::tensor::CudaTensor;
use super::units::{Room, Tiles, round_records, unit_inputs};
use super::weights::{CudaLinear, Kind, Segment};
use crate::device::{Activation, DeviceError, LinearOps, LinearSpec, Precision};
use crate::weights::DType;

kernels! {
    /// Kernels of `kernels/linear.cu`.
    pub(super) struct LinearKernels in "linear" {
        linear_[m16, m64, m128](
            out: Ptr, x: Ptr, weight: Ptr, bias: Ptr, row_index: Ptr, expert_tiles: Ptr,
            sums: Ptr, unit: u32, rows: u32, row_tiles: u32, outputs: u32, inputs: u32,
            out_stride: u32, out_mode: u32
        );
    }
}

kernels! {
    /// Kernels of `kernels/linear_quant.cu`.
    pub(super) struct QuantKernels in "linear_quant" {
        linear_[
            q4_m8, q4_m16, q4_m64, q4m_m8, q4m_m16, q4m_m64, q4k_m8, q4k_m16, q4k_m64,
            q2k_m8, q2k_m16, q2k_m64, q5_m8, q5_m16, q5_m64, q5m_m8, q5m_m16, q5m_m64,
            q5k_m8, q5k_m16, q5k_m64, q6k_m8, q6k_m16, q6k_m64, q8_m8, q8_m16, q8_m64
        ](
            out: Ptr, x: Ptr, weight: Ptr, bias: Ptr, row_index: Ptr, expert_tiles: Ptr,
            sums: Ptr, rows: u32, outputs: u32, inputs: u32, out_stride: u32, out_mode: u32
        );
        embed_[q4, q4m, q4k, q2k, q5, q5m, q5k, q6k, q8](
            out: Ptr, table: Ptr, resolved: Ptr, scale: f32, columns: u32, vocabulary: u32
        );
    }
}

/// State that all matrix products of a device share, in addition to their kernels.
pub(super) struct Products {
    /// Float32 operands, converted to the activation type.
    converted: Scratch,
    /// Sums of units, which pass from block to block, after the counters of the blocks that have
    /// arrived. Each launch leaves the counters at zero.
    sums: Scratch,
    room: Room,
    /// cuBLASLt, if the options request it.
    blas: Option<Blas>,
}

impl Products {
    /// Fails with [`DeviceError::Unavailable`] if the options request cuBLASLt and it is not
    /// installed.
    pub(super) fn new(
        context: &Context,
        options: &CudaOptions,
        room: Room,
    ) -> Result<Self, DeviceError> {
        let blas = || Blas::new(context, options);
        Ok(Self {
            converted: Scratch::default(),
            sums: Scratch::zeroed(),
            room,
            blas: options.blas.then(blas).transpose()?,
        })
    }

    /// Makes room for sums, and to convert `numbers` float32 numbers of an operand.
    pub(super) fn reserve(&mut self, context: &Context, numbers: usize) -> Result<(), DeviceError> {
        self.sums(context)?;
        self.converted(context, numbers).map(|_| ())
    }

    /// Returns the bytes of memory for sums.
    pub(super) fn sum_bytes(&self) -> usize {
        self.room.sum_bytes()
    }

    /// Returns the address of the memory for sums.
    fn sums(&mut self, context: &Context) -> Result<Ptr, DeviceError> {
        self.sums.get(context, self.room.sum_bytes())
    }

    fn converted(&mut self, context: &Context, numbers: usize) -> Result<Ptr, DeviceError> {
        self.converted.get(context, converted_bytes(numbers))
    }

    /// Returns whether the product of `weight` and `rows` rows can be [`Written::Gated`]: one
    /// kernel must have every gate and what it is multiplied with in one of its tiles, and know
    /// the activation.
    pub(super) fn can_gate(
        &self,
        weight: &CudaLinear,
        activation: Activation,
        rows: usize,
    ) -> bool {
        /// Half of the outputs of the largest tile.
        const HALF_TILE: usize = 64;
        let in_blas = self.blas.is_some() && rows >= Blas::LEAST_ROWS;
        let alike = weight.segments.len() == 1 && weight.outputs.is_multiple_of(2 * HALF_TILE);
        let is_known = matches!(activation, Activation::Silu | Activation::GeluTanh);
        alike && is_known && !in_blas
    }
}

/// Returns the bytes of `numbers` numbers of an operand in the activation type.
pub(super) fn converted_bytes(numbers: usize) -> usize {
    2 * numbers
}

/// The operands of a product other than the weights.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    /// Rows of `weight.columns()` elements in the activation type.
    pub(super) x: Ptr,
    /// Rows of `weight.rows()` elements, or of half as many if they are `Gated`.
    pub(super) out: Ptr,
    pub(super) written: Written,
    /// Number of rows. Without meaning if there are `experts`.
    pub(super) rows: usize,
    pub(super) experts: Option<Routed>,
}

/// What is written of a product.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Written {
    /// All of it, in this precision.
    All(Precision),
    /// The first half of the outputs are gates: the activation of each, times the output that is
    /// half the outputs later, in the activation type. [`Products::can_gate`] must hold.
    Gated(Activation),
}

impl Written {
    /// Returns the number by which the kernels know it, as in `kernels/linear.cuh`.
    fn mode(self) -> u32 {
        match self {
            Self::All(Precision::Activation) => 0,
            Self::All(Precision::Full) => 1,
            Self::Gated(Activation::Silu) => 2,
            Self::Gated(Activation::GeluTanh) => 3,
            Self::Gated(_) => unreachable!("`can_gate` refuses it"),
        }
    }

    /// Returns how many of `outputs` outputs are written.
    fn outputs(self, outputs: usize) -> usize {
        match self {
            Self::All(_) => outputs,
            Self::Gated(_) => outputs / 2,
        }
    }
}

/// How rows are distributed among experts.
#[derive(Clone, Copy)]
pub(super) struct Routed {
    pub(super) tiles: ExpertTiles,
    /// Row of x of each pair: `u32` per pair. NULL if pair `p` reads row `p`.
    pub(super) row_index: Ptr,
    /// Average number of rows per expert.
    pub(super) average: usize,
}

/// Rows of the tiles that the kernels have, as in `kernels/experts.cu`.
pub(super) const TILE_ROWS: [usize; 4] = [8, 16, 64, 128];

/// Lists of the tiles of rows that the experts' pairs fall into, one list for each of
/// [`TILE_ROWS`]. The device writes them, so only their maximum lengths are known here.
#[derive(Clone, Copy)]
pub(super) struct ExpertTiles {
    start: Ptr,
    places: [usize; 4],
}

impl ExpertTiles {
    /// Bytes of an entry: expert, first pair, end of the expert's pairs, and zero.
    pub(super) const ENTRY_BYTES: usize = 16;

    /// Returns the maximum number of tiles of `rows` rows that `pairs` pairs of `experts`
    /// experts can fall into: each expert that has a pair may have one tile that is not full.
    pub(super) fn most(pairs: usize, experts: usize, rows: usize) -> usize {
        let started = pairs.min(experts);
        started + (pairs - started) / rows
    }

    /// Lists that begin at `start` and have room for `places` entries, one after the other.
    pub(super) fn new(start: Ptr, places: [usize; 4]) -> Self {
        Self { start, places }
    }

    pub(super) fn start(&self) -> Ptr {
        self.start
    }

    pub(super) fn places(&self) -> [usize; 4] {
        self.places
    }

    /// Returns the list of tiles of `rows` rows and its maximum length.
    fn list(&self, rows: usize) -> (Ptr, usize) {
        let sizes = TILE_ROWS.iter().zip(self.places);
        let before = sizes.clone().take_while(|(size, _)| **size < rows);
        let skipped: usize = before.map(|(_, places)| places).sum();
        let places = sizes.filter(|(size, _)| **size == rows);
        let start = self.start.offset_bytes(skipped * Self::ENTRY_BYTES);
        (start, places.map(|(_, places)| places).sum())
    }
}

/// Tile size of a kernel, and the kernel that has it.
struct Tile {
    variant: &'static str,
    rows: usize,
    outputs: usize,
    /// Threads per block.
    threads: u32,
    /// Bytes of dynamic shared memory.
    shared: usize,
    /// Blocks that a multiprocessor should run at once, if it has the shared memory.
    blocks: usize,
    /// Whether blocks go through the tiles, and keep what they have added up in memory.
    in_memory: bool,
}

impl Tile {
    /// Chooses the tile for `rows` rows in each of `matrices` products. The choice affects only
    /// the speed; results are bit-identical for every tile.
    fn choose(kind: Kind, rows: usize, outputs: usize, matrices: usize, room: &Room) -> Self {
        // With fewer blocks, too much of a GPU would be idle.
        let enough = room.multiprocessors * 2 / 3;
        match kind {
            Kind::Dense => {
                let large = rows.div_ceil(128) * outputs.div_ceil(128) * matrices;
                let (variant, rows, outputs, depth, stages, blocks) = if rows <= 16 {
                    ("m16", 16, 32, 128, 5, 3)
                } else if rows <= 64 || large < enough {
                    ("m64", 64, 64, 64, 4, 3)
                } else {
                    ("m128", 128, 128, 64, 3, 2)
                };
                Self {
                    variant,
                    rows,
                    outputs,
                    threads: 128,
                    shared: stages * (rows + outputs) * depth * 2,
                    blocks,
                    in_memory: variant == "m128",
                }
            }
            Kind::Quantised(format, _) => {
                let [m8, m16, m64] = format.kernels;
                let many = format.many_outputs();
                // The tile, the number of its warps, and the records in a stage: in a row of x,
                // and of weights.
                let (variant, rows, outputs, warps, depth, records) = match rows {
                    0..=8 => (m8, 8, 32, 8, 4, 8),
                    9..=16 => (m16, 16, 32, 8, 4, 8),
                    _ => (m64, 64, many, 4, 1, many / RECORD_OUTPUTS),
                };
                // With few rows, instructions are the limit, and a second block with half of a
                // tile's inputs would take many for its beginning and its end.
                let blocks = if rows <= 16 { 1 } else { 2 };
                Self {
                    variant,
                    rows,
                    outputs,
                    threads: 32 * warps,
                    shared: format.stages_bytes(rows * depth, records),
                    blocks,
                    in_memory: false,
                }
            }
        }
    }

    /// Returns how many blocks share each of `count` tiles of a product with `inputs` inputs.
    fn sharing(&self, kind: Kind, count: usize, inputs: usize, room: &Room) -> usize {
        if self.in_memory {
            return 1;
        }
        // Parts that blocks can share, and units per part.
        let (parts, units) = match kind {
            Kind::Dense => (inputs.div_ceil(unit_inputs(inputs)), 1),
            Kind::Quantised(..) => {
                // Units of a round.
                const CHAINS: usize = 4;
                let records = inputs.div_ceil(RECORD_INPUTS);
                let round = round_records(records);
                match self.rows {
                    0..=16 => (records.div_ceil(round), CHAINS),
                    _ => (records / round * CHAINS + (records % round).min(CHAINS), 1),
                }
            }
        };
        let tiles = Tiles {
            count,
            size: self.rows * self.outputs,
            parts,
            units,
        };
        tiles.sharing(room.blocks(self.shared, self.blocks), room)
    }
}

impl LinearOps for CudaDevice {
    fn weight_size(&self, dtype: DType, weights: usize) -> usize {
        match Kind::of(dtype) {
            Kind::Dense => weights.saturating_mul(2),
            Kind::Quantised(format, _) => format.bytes_for(weights),
        }
    }

    fn load_linear(&mut self, spec: &LinearSpec<'_>) -> Result<CudaLinear, DeviceError> {
        let activations = self.options.activations;
        self.weights(|context| load::load(context, activations, std::slice::from_ref(spec)))
    }

    fn linear(
        &mut self,
        x: &CudaTensor,
        weight: &CudaLinear,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        let rows = self.step.padded(rows);
        let fits = x.rows() >= rows && x.columns() == weight.inputs;
        let fits = fits && out.rows() >= rows && out.columns() == weight.outputs;
        require(fits && weight.matrices == 1, "linear", || {
            format!(
                "{rows} rows of x {} × {}, weights {} × {} and a result {} × {} do not fit",
                x.rows(),
                x.columns(),
                weight.outputs,
                weight.inputs,
                out.rows(),
                out.columns()
            )
        })?;
        let operands = Operands {
            x: self.as_activations(x, rows)?,
            out: out.ptr(),
            written: Written::All(out.precision()),
            rows,
            experts: None,
        };
        self.multiply(weight, &operands)
    }
}

impl CudaDevice {
    /// Returns the first `rows` rows of `x` in the activation type, converted if they are
    /// float32.
    pub(super) fn as_activations(
        &mut self,
        x: &CudaTensor,
        rows: usize,
    ) -> Result<Ptr, DeviceError> {
        if x.precision() == Precision::Activation {
            return Ok(x.ptr());
        }
        let count = rows * x.columns();
        let converted = self.products.converted(&self.context, count)?;
        // Each thread converts eight numbers.
        let grid = Grid::new([count.div_ceil(8 * 256) as u32, 1, 1], [256, 1, 1]);
        self.norm
            .convert(&self.context, grid, converted, x.ptr(), count as u32)?;
        Ok(converted)
    }

    /// Enqueues `out = W x + b`.
    pub(super) fn multiply(
        &mut self,
        weight: &CudaLinear,
        operands: &Operands,
    ) -> Result<(), DeviceError> {
        for segment in &weight.segments {
            self.multiply_segment(weight, segment, operands)?;
        }
        Ok(())
    }

    fn multiply_segment(
        &mut self,
        weight: &CudaLinear,
        segment: &Segment,
        operands: &Operands,
    ) -> Result<(), DeviceError> {
        let full = operands.written == Written::All(Precision::Full);
        let size = if full { 4 } else { 2 };
        let out = operands.out.offset_bytes(segment.first_output * size);
        let bias = weight.bias.as_ref();
        if let (Kind::Dense, None, None, Some(blas)) = (
            segment.kind,
            operands.experts,
            bias,
            &mut self.products.blas,
        ) && operands.rows >= Blas::LEAST_ROWS
        {
            let shape = Shape {
                rows: operands.rows,
                outputs: segment.outputs,
                inputs: weight.inputs,
                out_stride: weight.outputs,
                out_full: full,
            };
            return blas.multiply(&self.context, shape, operands.x, segment.weights.ptr(), out);
        }
        let bias = bias.map_or(Ptr::NULL, |bias| {
            bias.ptr().offset_bytes(segment.first_output * 4)
        });
        let average = match operands.experts {
            Some(routed) => routed.average,
            None => operands.rows,
        };
        let tile = Tile::choose(
            segment.kind,
            average,
            segment.outputs,
            weight.matrices,
            &self.products.room,
        );
        let (row_index, (tiles, row_tiles)) = match operands.experts {
            Some(routed) => (routed.row_index, routed.tiles.list(tile.rows)),
            None => (Ptr::NULL, (Ptr::NULL, operands.rows.div_ceil(tile.rows))),
        };
        let column_tiles = segment.outputs.div_ceil(tile.outputs);
        let sums = self.products.sums(&self.context)?;
        let room = &self.products.room;
        let count = column_tiles * row_tiles;
        let sharing = tile.sharing(segment.kind, count, weight.inputs, room) as u32;
        let blocks = match segment.kind {
            Kind::Dense if tile.in_memory => [count.min(room.large_blocks()) as u32, 1, 1],
            Kind::Dense => [count as u32, 1, sharing],
            Kind::Quantised(..) => [column_tiles as u32, row_tiles as u32, sharing],
        };
        let grid = Grid::new(blocks, [tile.threads, 1, 1]).shared(tile.shared as u32);
        let written = operands.written;
        let outputs = written.outputs(segment.outputs) as u32;
        let stride = written.outputs(weight.outputs) as u32;
        let (rows, inputs) = (operands.rows as u32, weight.inputs as u32);
        let (context, weights) = (&self.context, segment.weights.ptr());
        match segment.kind {
            Kind::Dense => self.linear.linear_(
                tile.variant,
                context,
                grid,
                out,
                operands.x,
                weights,
                bias,
                row_index,
                tiles,
                sums,
                unit_inputs(weight.inputs) as u32,
                rows,
                row_tiles as u32,
                outputs,
                inputs,
                stride,
                written.mode(),
            ),
            Kind::Quantised(..) => self.quant.linear_(
                tile.variant,
                context,
                grid,
                out,
                operands.x,
                weights,
                bias,
                row_index,
                tiles,
                sums,
                rows,
                outputs,
                inputs,
                stride,
                written.mode(),
            ),
        }
    }

    /// Enqueues `out[row] = scale · table[token of the row]` for a table in a block format. The
    /// step's tokens must be resolved.
    pub(super) fn embed_quant(
        &mut self,
        table: &CudaLinear,
        scale: f32,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        let [segment] = &table.segments[..] else {
            return Err(unsupported(
                "an embedding that is stored in parts",
                "it must be one matrix in one format",
            ));
        };
        let Kind::Quantised(format, _) = segment.kind else {
            return Err(unsupported(
                "a floating-point table",
                "it must have a block format",
            ));
        };
        let rows = self.step.padded(self.step.rows());
        let fits = out.rows() >= rows && out.columns() == table.inputs;
        require(fits && out.precision() == Precision::Full, "embed", || {
            format!("the result must be {rows} × {} of float32", table.inputs)
        })?;
        let grid = Grid::new([rows as u32, 1, 1], [128, 1, 1]);
        let (resolved, columns) = (self.step.resolved(), table.inputs as u32);
        let (context, weights) = (&self.context, segment.weights.ptr());
        self.quant.embed_(
            format.name,
            context,
            grid,
            out.ptr(),
            weights,
            resolved,
            scale,
            columns,
            table.outputs as u32,
        )
    }
}
