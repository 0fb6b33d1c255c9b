//! Mixture-of-experts layers: rows are routed and grouped by expert on the device, and one
//! launch multiplies for all experts.

use super::CudaDevice;
use super::context::Context;
use super::error::{failed, require, require_ok, unsupported};
use super::launch::{Grid, kernels};
use super::linear::{ExpertTiles, Operands, Routed, TILE_ROWS, Written};
use super::load;
use super::memory::{Buffer, Ptr};
use super::scratch::Scratch;
use super::tensor::CudaTensor;
use super::weights::CudaLinear;
use crate::device::{
    Activation, DeviceError, ExpertOps, ExpertShape, LinearSpec, Precision, RouterScore,
    RoutingSpec, SoftmaxRouting,
};

kernels! {
    /// Kernels of `kernels/experts.cu`.
    pub(super) struct ExpertKernels in "experts" {
        route(
            pair_expert: Ptr, pair_weight: Ptr, router: Ptr, rows: u32, experts: u32, top_k: u32,
            normalize: u32, scale: f32, groups: u32, top_groups: u32
        );
        group_pairs_of[256, 512](
            tiles: Ptr, row_index: Ptr, pair_slot: Ptr, pair_expert: Ptr, rows: u32, experts: u32,
            top_k: u32, places_8: u32, places_16: u32, places_64: u32, places_128: u32
        );
        route_sigmoid(
            pair_expert: Ptr, pair_weight: Ptr, pair_input: Ptr, router: Ptr, bias: Ptr,
            experts: u32, top_k: u32, normalize: u32, scale: f32, groups: u32, top_groups: u32
        );
        gate_pairs(
            out: Ptr, gate_up: Ptr, pair_slot: Ptr, pair_expert: Ptr, pair_input: Ptr, bias: Ptr,
            columns: u32, slope: f32, limit: f32
        );
        add_pair_bias(pair_out: Ptr, pair_slot: Ptr, pair_expert: Ptr, bias: Ptr, columns: u32);
        combine_experts(
            out: Ptr, pair_out: Ptr, pair_slot: Ptr, pair_weight: Ptr, pair_expert: Ptr,
            scales: Ptr, rows: u32, columns: u32, top_k: u32
        );
    }
}

/// Maximum number of experts per layer, as in `kernels/experts.cu`.
const MAX_EXPERTS: usize = 512;
/// Maximum number of experts per row: each lane of a warp has one of them (`kernels/experts.cu`).
const MAX_TOP_K: usize = 32;
/// Maximum number of groups of experts, as in `kernels/experts.cu`.
const MAX_GROUPS: usize = 32;

/// A softmax over all experts.
const PLAIN: SoftmaxRouting = SoftmaxRouting {
    scale: 1.0,
    groups: 1,
    top_groups: 1,
};

/// The loaded experts of one layer.
pub struct CudaExperts {
    gate_up: CudaLinear,
    down: CudaLinear,
    /// The biases of all experts, one after the other, if they have some.
    gate_up_bias: Option<Buffer>,
    down_bias: Option<Buffer>,
    /// What is added to the experts' weights to choose, if anything is.
    corrections: Option<Buffer>,
    /// Factors on the experts' outputs, if there are some.
    scales: Option<Buffer>,
}

/// Gates and ups of pairs that are not gated in the product itself.
pub(super) struct GatedPairs {
    gate_up: Ptr,
    out: Ptr,
    /// NULL if each row is a pair.
    slot: Ptr,
    expert: Ptr,
    /// What the inputs of pairs are multiplied by; NULL for nothing.
    input: Ptr,
    /// NULL if there are none.
    bias: Ptr,
    count: usize,
    columns: usize,
}

impl GatedPairs {
    /// Rows of a dense layer.
    pub(super) fn of_rows(gate_up: Ptr, out: Ptr, (count, columns): (usize, usize)) -> Self {
        Self {
            gate_up,
            out,
            slot: Ptr::NULL,
            expert: Ptr::NULL,
            input: Ptr::NULL,
            bias: Ptr::NULL,
            count,
            columns,
        }
    }
}

/// Returns the address of a buffer, or NULL if there is none.
fn address(buffer: Option<&Buffer>) -> Ptr {
    buffer.map_or(Ptr::NULL, Buffer::ptr)
}

/// Uploads the biases of all experts, if they have some, and returns the experts without.
fn split_biases<'a>(
    context: &Context,
    specs: &[LinearSpec<'a>],
) -> Result<(Option<Buffer>, Vec<LinearSpec<'a>>), DeviceError> {
    let plain = specs.iter().map(|spec| LinearSpec {
        parts: spec.parts.clone(),
        bias: None,
    });
    let biases: Option<Vec<&Vec<f32>>> = specs.iter().map(|spec| spec.bias.as_ref()).collect();
    let some = specs.iter().any(|spec| spec.bias.is_some());
    let bias = match biases {
        None if some => {
            return Err(unsupported(
                "a bias in some experts",
                "all experts of a layer must have one, or none",
            ));
        }
        Some(biases) if some => {
            for (spec, bias) in specs.iter().zip(&biases) {
                let outputs: usize = spec.parts.iter().map(|part| part.rows).sum();
                require(bias.len() == outputs, "load_experts", || {
                    format!("a bias has {} values for {outputs} rows", bias.len())
                })?;
            }
            let all: Vec<f32> = biases.into_iter().flatten().copied().collect();
            Some(context.upload(&all, "a bias")?)
        }
        _ => None,
    };
    Ok((bias, plain.collect()))
}

/// Scratch memory for the pairs of rows and experts, kept between calls.
#[derive(Default)]
pub(super) struct ExpertScratch(Scratch);

/// Addresses of the intermediate results. A pair is a row and one of its experts.
struct Pairs {
    expert: Ptr,
    weight: Ptr,
    /// Place for what the inputs of pairs are multiplied by.
    input: Ptr,
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

impl Pairs {
    /// Returns the address of what the inputs of pairs are multiplied by, or NULL for nothing.
    fn input_factors(&self, routing: RoutingSpec) -> Ptr {
        match routing.scales_input() {
            true => self.input,
            false => Ptr::NULL,
        }
    }
}

/// Returns the maximum number of tiles of each of [`TILE_ROWS`] that the pairs of `rows` rows
/// can fall into.
fn tile_places(rows: usize, shape: ExpertShape) -> [usize; 4] {
    let pairs = rows * shape.top_k;
    TILE_ROWS.map(|rows| ExpertTiles::most(pairs, shape.count, rows))
}

/// Returns the bytes of the intermediate results of `rows` rows, in the order of [`Pairs`].
fn pair_sizes(rows: usize, shape: ExpertShape) -> [usize; 9] {
    let pairs = rows * shape.top_k;
    let tiles: usize = tile_places(rows, shape).iter().sum();
    let sizes = [
        4 * pairs,
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
        let [
            expert,
            weight,
            input,
            tiles,
            row_index,
            slot,
            gate_up,
            hidden,
            out,
        ] = sizes.map(|size| {
            let ptr = start.offset_bytes(offset);
            offset += size;
            ptr
        });
        Ok(Pairs {
            expert,
            weight,
            input,
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
        corrections: Option<&[f32]>,
        scales: Option<&[f32]>,
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
        let found = corrections.map_or(gates, <[f32]>::len);
        require(found == gates, "load_experts", || {
            format!("there are {found} corrections for {gates} experts")
        })?;
        let found = scales.map_or(gates, <[f32]>::len);
        require(found == gates, "load_experts", || {
            format!("there are {found} scales for {gates} experts")
        })?;
        let activations = self.options.activations;
        self.weights(|context| {
            let (gate_up_bias, gate_up) = split_biases(context, gate_up)?;
            let (down_bias, down) = split_biases(context, down)?;
            let gate_up = load::load(context, activations, &gate_up)?;
            let down = load::load(context, activations, &down)?;
            let upload = |values: Option<&[f32]>, what: &str| {
                values
                    .map(|values| context.upload(values, what))
                    .transpose()
            };
            let corrections = upload(corrections, "corrections")?;
            let scales = upload(scales, "the scales of experts")?;
            // Without a gate, there is only the up projection.
            let width = down.inputs;
            let fits = [width, 2 * width].contains(&gate_up.outputs);
            let fits = fits && gate_up.inputs == down.outputs;
            require(fits, "load_experts", || {
                format!(
                    "gate and up are {} × {}, down is {} × {}; they must fit together",
                    gate_up.outputs, gate_up.inputs, down.outputs, down.inputs
                )
            })?;
            Ok(CudaExperts {
                gate_up,
                down,
                gate_up_bias,
                down_bias,
                corrections,
                scales,
            })
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
        require_ok("experts", routing.check(count))?;
        let is = |tensor: &CudaTensor, width: usize, precision: Precision| {
            tensor.rows() >= rows && tensor.columns() == width && tensor.precision() == precision
        };
        let fits = x.rows() >= rows
            && x.columns() == columns
            && experts.gate_up.outputs == routing.activation.gate_up_columns(hidden)
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
        self.route(&places, router, routing, experts, (rows, count))?;
        let scales_input = routing.scales_input();
        let is_plain = experts.gate_up_bias.is_none() && !scales_input;

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
        let activation = routing.activation;
        if is_plain && self.products.can_gate(&experts.gate_up, activation, rows) {
            self.multiply(&experts.gate_up, &product)?;
        } else {
            product.out = places.gate_up;
            product.written = Written::All(Precision::Activation);
            self.multiply(&experts.gate_up, &product)?;
            let of_pairs = GatedPairs {
                gate_up: places.gate_up,
                out: places.hidden,
                slot: places.slot,
                expert: places.expert,
                input: places.input_factors(routing),
                bias: address(experts.gate_up_bias.as_ref()),
                count: pairs,
                columns: hidden,
            };
            match activation {
                Activation::ClampedSwiGlu { slope, limit } => {
                    self.gate_pairs(&of_pairs, slope, limit)?;
                }
                _ if is_plain => self.gate(&places, routing, (pairs, hidden))?,
                Activation::Silu => self.gate_pairs(&of_pairs, 1.0, 0.0)?,
                Activation::GeluTanh | Activation::SquaredRelu | Activation::Gelu => {
                    return Err(unsupported(
                        format!("{activation:?} in experts with biases or scaled inputs"),
                        "the activation must be another one",
                    ));
                }
            }
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
        if let Some(bias) = &experts.down_bias {
            self.experts.add_pair_bias(
                &self.context,
                element_grid(pairs, columns),
                places.out,
                places.slot,
                places.expert,
                bias.ptr(),
                columns as u32,
            )?;
        }

        self.experts.combine_experts(
            &self.context,
            element_grid(rows, columns),
            out.ptr(),
            places.out,
            places.slot,
            places.weight,
            places.expert,
            address(experts.scales.as_ref()),
            rows as u32,
            columns as u32,
            top_k as u32,
        )
    }
}

/// Returns a grid with one thread per element of each row. The rows come first, because there may
/// be more of them than a grid has places in its second dimension.
fn element_grid(rows: usize, columns: usize) -> Grid {
    Grid::new([rows as u32, columns.div_ceil(256) as u32, 1], [256, 1, 1])
}

impl CudaDevice {
    /// Enqueues the gated activation of pairs, with what the other kernels cannot add to it. A
    /// `limit` of 0 stands for SiLU.
    pub(super) fn gate_pairs(
        &mut self,
        pairs: &GatedPairs,
        slope: f32,
        limit: f32,
    ) -> Result<(), DeviceError> {
        self.experts.gate_pairs(
            &self.context,
            element_grid(pairs.count, pairs.columns),
            pairs.out,
            pairs.gate_up,
            pairs.slot,
            pairs.expert,
            pairs.input,
            pairs.bias,
            pairs.columns as u32,
            slope,
            limit,
        )
    }

    /// Enqueues the gated activation of the pairs.
    fn gate(
        &mut self,
        places: &Pairs,
        routing: RoutingSpec,
        (pairs, hidden): (usize, usize),
    ) -> Result<(), DeviceError> {
        let (gate_up, out) = (places.gate_up, places.hidden);
        self.plain_activation(gate_up, out, routing.activation, (pairs, hidden))
    }

    /// Enqueues the choice of each row's experts by a softmax.
    fn route_softmax(
        &mut self,
        places: &Pairs,
        router: &CudaTensor,
        routing: RoutingSpec,
        softmax: SoftmaxRouting,
        (rows, count): (u32, u32),
    ) -> Result<(), DeviceError> {
        self.experts.route(
            &self.context,
            Grid::new([rows, 1, 1], [32, 1, 1]),
            places.expert,
            places.weight,
            router.ptr(),
            rows,
            count,
            routing.top_k as u32,
            routing.normalize.into(),
            softmax.scale,
            softmax.groups as u32,
            softmax.top_groups as u32,
        )
    }

    /// Enqueues the choice of each row's experts and the sorting of the pairs by expert.
    fn route(
        &mut self,
        places: &Pairs,
        router: &CudaTensor,
        routing: RoutingSpec,
        experts: &CudaExperts,
        (rows, count): (usize, usize),
    ) -> Result<(), DeviceError> {
        let (rows, count, top_k) = (rows as u32, count as u32, routing.top_k as u32);
        let grid = Grid::new([rows, 1, 1], [32, 1, 1]);
        let groups = match routing.score {
            RouterScore::Softmax => 1,
            RouterScore::GroupedSoftmax(softmax) => softmax.groups,
            RouterScore::Sigmoid(sigmoid) => sigmoid.groups,
        };
        if groups > MAX_GROUPS {
            return Err(unsupported(
                format!("{groups} groups of experts"),
                format!("at most {MAX_GROUPS} are supported"),
            ));
        }
        match routing.score {
            RouterScore::Softmax => {
                self.route_softmax(places, router, routing, PLAIN, (rows, count))?
            }
            RouterScore::GroupedSoftmax(softmax) => {
                self.route_softmax(places, router, routing, softmax, (rows, count))?;
            }
            RouterScore::Sigmoid(sigmoid) => self.experts.route_sigmoid(
                &self.context,
                grid,
                places.expert,
                places.weight,
                places.input_factors(routing),
                router.ptr(),
                address(experts.corrections.as_ref()),
                count,
                top_k,
                routing.normalize.into(),
                sigmoid.scale,
                sigmoid.groups as u32,
                sigmoid.top_groups as u32,
            )?,
        }
        let [places_8, places_16, places_64, places_128] = places.tiles.places();
        // As in `kernels/experts.cu`: 32 and 16 warps.
        let (most, threads) = if count <= 256 {
            (256, 1024)
        } else {
            (512, 512)
        };
        self.experts.group_pairs_of(
            most,
            &self.context,
            Grid::new([1, 1, 1], [threads, 1, 1]),
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
