//! Mixture-of-experts layers: rows are routed and grouped by expert on the device, and one
//! launch multiplies for all experts.

use super::CudaDevice;
use super::context::Context;
use super::error::{failed, require, unsupported};
use super::launch::{Grid, kernels, vector_grid};
use super::linear::{ExpertTiles, Operands, Routed, TILE_ROWS, Written};
use super::load;
use super::memory::Ptr;
use super::scratch::Scratch;
use super::tensor::CudaTensor;
use super::weights::CudaLinear;
use crate::device::{
    Activation, DeviceError, ExpertOps, ExpertShape, LinearSpec, Precision, RoutingSpec,
};

kernels! {
    /// Kernels of `kernels/experts.cu`.
    pub(super) struct ExpertKernels in "experts" {
        route(
            pair_expert: Ptr, pair_weight: Ptr, router: Ptr, rows: u32, experts: u32, top_k: u32,
            normalize: u32
        );
        group_pairs(
            tiles: Ptr, row_index: Ptr, pair_slot: Ptr, pair_expert: Ptr, rows: u32, experts: u32,
            top_k: u32, places_8: u32, places_16: u32, places_64: u32, places_128: u32
        );
        combine_experts(
            out: Ptr, pair_out: Ptr, pair_slot: Ptr, pair_weight: Ptr, rows: u32, columns: u32,
            top_k: u32
        );
    }
}

/// Maximum number of experts per layer, as in `kernels/experts.cu`.
const MAX_EXPERTS: usize = 256;
/// Maximum number of experts per row, as in `kernels/experts.cu`.
const MAX_TOP_K: usize = 32;

/// The loaded experts of one layer.
pub struct CudaExperts {
    gate_up: CudaLinear,
    down: CudaLinear,
}

/// Scratch memory for the pairs of rows and experts, kept between calls.
#[derive(Default)]
pub(super) struct ExpertScratch(Scratch);

/// Addresses of the intermediate results. A pair is a row and one of its experts.
struct Pairs {
    expert: Ptr,
    weight: Ptr,
    /// The tiles of the pairs, which are sorted by expert.
    tiles: ExpertTiles,
    /// Row of each sorted pair.
    row_index: Ptr,
    /// Index of each pair among the sorted pairs.
    slot: Ptr,
    gate_up: Ptr,
    hidden: Ptr,
    out: Ptr,
}

/// Returns the maximum number of tiles of each of [`TILE_ROWS`] that the pairs of `rows` rows
/// can fall into.
fn tile_places(rows: usize, shape: ExpertShape) -> [usize; 4] {
    let pairs = rows * shape.top_k;
    TILE_ROWS.map(|rows| ExpertTiles::most(pairs, shape.count, rows))
}

/// Returns the bytes of the intermediate results of `rows` rows, in the order of [`Pairs`].
fn pair_sizes(rows: usize, shape: ExpertShape) -> [usize; 8] {
    let pairs = rows * shape.top_k;
    let tiles: usize = tile_places(rows, shape).iter().sum();
    let sizes = [
        4 * pairs,
        4 * pairs,
        ExpertTiles::ENTRY_BYTES * tiles,
        4 * pairs,
        4 * pairs,
        2 * pairs * 2 * shape.hidden,
        2 * pairs * shape.hidden,
        2 * pairs * shape.columns,
    ];
    sizes.map(|size: usize| size.next_multiple_of(256))
}

/// Returns the bytes of the intermediate results of `rows` rows.
pub(super) fn pair_bytes(rows: usize, shape: ExpertShape) -> usize {
    pair_sizes(rows, shape).iter().sum()
}

impl ExpertScratch {
    /// Makes room for `rows` rows.
    pub(super) fn reserve(
        &mut self,
        context: &Context,
        rows: usize,
        shape: ExpertShape,
    ) -> Result<(), DeviceError> {
        self.pairs(context, rows, shape).map(|_| ())
    }

    fn pairs(
        &mut self,
        context: &Context,
        rows: usize,
        shape: ExpertShape,
    ) -> Result<Pairs, DeviceError> {
        let places = tile_places(rows, shape);
        let sizes = pair_sizes(rows, shape);
        let start = self.0.get(context, sizes.iter().sum())?;
        let mut offset = 0;
        let [expert, weight, tiles, row_index, slot, gate_up, hidden, out] = sizes.map(|size| {
            let ptr = start.offset_bytes(offset);
            offset += size;
            ptr
        });
        Ok(Pairs {
            expert,
            weight,
            tiles: ExpertTiles::new(tiles, places),
            row_index,
            slot,
            gate_up,
            hidden,
            out,
        })
    }
}

impl ExpertOps for CudaDevice {
    type Experts = CudaExperts;

    fn load_experts(
        &mut self,
        gate_up: &[LinearSpec<'_>],
        down: &[LinearSpec<'_>],
    ) -> Result<CudaExperts, DeviceError> {
        let (gates, downs) = (gate_up.len(), down.len());
        if gates != downs {
            let reason =
                format!("there are {gates} gate-and-up projections but {downs} down projections");
            return Err(failed("load_experts", reason));
        }
        if gates > MAX_EXPERTS {
            return Err(unsupported(
                format!("{gates} experts in a layer"),
                format!("at most {MAX_EXPERTS} are supported"),
            ));
        }
        let activations = self.options.activations;
        self.weights(|context| {
            let gate_up = load::load(context, activations, gate_up)?;
            let down = load::load(context, activations, down)?;
            let fits = gate_up.outputs == 2 * down.inputs && gate_up.inputs == down.outputs;
            require(fits, "load_experts", || {
                format!(
                    "gate and up are {} × {}, down is {} × {}; they must fit together",
                    gate_up.outputs, gate_up.inputs, down.outputs, down.inputs
                )
            })?;
            Ok(CudaExperts { gate_up, down })
        })
    }

    fn experts(
        &mut self,
        x: &CudaTensor,
        router: &CudaTensor,
        routing: RoutingSpec,
        experts: &CudaExperts,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        let rows = self.step.padded(rows);
        let (count, top_k) = (experts.gate_up.matrices, routing.top_k);
        let (hidden, columns) = (experts.down.inputs, experts.down.outputs);
        if top_k == 0 || top_k > MAX_TOP_K.min(count) {
            return Err(unsupported(
                format!("{top_k} of {count} experts per row"),
                format!("the number must be 1 to {}", MAX_TOP_K.min(count)),
            ));
        }
        let is = |tensor: &CudaTensor, width: usize, precision: Precision| {
            tensor.rows() >= rows && tensor.columns() == width && tensor.precision() == precision
        };
        let fits = x.rows() >= rows
            && x.columns() == columns
            && is(router, count, Precision::Full)
            && is(out, columns, Precision::Activation);
        require(fits, "experts", || {
            format!(
                "{rows} rows of x, router and result must be {columns}, {count} (float32) and \
                 {columns} wide"
            )
        })?;
        let x = self.as_activations(x, rows)?;
        let pairs = rows * top_k;
        let shape = ExpertShape {
            count,
            top_k,
            columns,
            hidden,
        };
        let places = self.expert_scratch.pairs(&self.context, rows, shape)?;
        self.route(&places, router, routing, (rows, count))?;

        let average = pairs.div_ceil(count);
        let mut product = Operands {
            x,
            out: places.hidden,
            written: Written::Gated(routing.activation),
            rows,
            experts: Some(Routed {
                tiles: places.tiles,
                row_index: places.row_index,
                average,
            }),
        };
        if self.products.can_gate(&experts.gate_up, rows) {
            self.multiply(&experts.gate_up, &product)?;
        } else {
            product.out = places.gate_up;
            product.written = Written::All(Precision::Activation);
            self.multiply(&experts.gate_up, &product)?;
            self.gate(&places, routing, (pairs, hidden))?;
        }
        product.x = places.hidden;
        product.out = places.out;
        product.written = Written::All(Precision::Activation);
        product.experts = Some(Routed {
            tiles: places.tiles,
            row_index: Ptr::NULL,
            average,
        });
        self.multiply(&experts.down, &product)?;

        let grid = Grid::new([columns.div_ceil(256) as u32, rows as u32, 1], [256, 1, 1]);
        self.experts.combine_experts(
            &self.context,
            grid,
            out.ptr(),
            places.out,
            places.slot,
            places.weight,
            rows as u32,
            columns as u32,
            top_k as u32,
        )
    }
}

impl CudaDevice {
    /// Enqueues the gated activation of the pairs.
    fn gate(
        &mut self,
        places: &Pairs,
        routing: RoutingSpec,
        (pairs, hidden): (usize, usize),
    ) -> Result<(), DeviceError> {
        self.activation.gated_activation(
            &self.context,
            vector_grid(pairs * hidden),
            places.hidden,
            places.gate_up,
            pairs as u32,
            hidden as u32,
            u32::from(routing.activation == Activation::GeluTanh),
        )
    }

    /// Enqueues the choice of each row's experts and the sorting of the pairs by expert.
    fn route(
        &mut self,
        places: &Pairs,
        router: &CudaTensor,
        routing: RoutingSpec,
        (rows, count): (usize, usize),
    ) -> Result<(), DeviceError> {
        let (rows, count, top_k) = (rows as u32, count as u32, routing.top_k as u32);
        self.experts.route(
            &self.context,
            Grid::new([rows, 1, 1], [32, 1, 1]),
            places.expert,
            places.weight,
            router.ptr(),
            rows,
            count,
            top_k,
            routing.normalize.into(),
        )?;
        let [places_8, places_16, places_64, places_128] = places.tiles.places();
        self.experts.group_pairs(
            &self.context,
            Grid::new([1, 1, 1], [1024, 1, 1]),
            places.tiles.start(),
            places.row_index,
            places.slot,
            places.expert,
            rows,
            count,
            top_k,
            places_8 as u32,
            places_16 as u32,
            places_64 as u32,
            places_128 as u32,
        )
    }
}
