//! Begins and ends steps, records their graphs in advance, and reserves their memory.
//!
//! All memory that a step within the limits needs is reserved before anything else is allocated,
//! so that it does not run out during service, and graphs stay valid. There are two kinds of
//! exceptions. Lists of blocks to copy, sums of embeddings, and long lists of sampling parameters
//! are small and in no graph; they come out of the share of the GPU's memory that stays unused.
//! When block tables of more than eight megabytes grow, all graphs are recorded again.

use super::CudaDevice;
use super::attention::{arrival_bytes, most_partial_bytes, unit_room, unit_spread};
use super::error::unsupported;
use super::experts::pair_bytes;
use super::linear::converted_bytes;
use super::memory::UPLOADER_BYTES;
use super::residual::check_streams;
use super::sampling::SamplerSizes;
use super::scratch::rounded;
use super::step::{StepKey, bucket_within, input_words, keys_within, token_bytes, work_words};
use super::transfer::{download_bytes, upload_bytes};
use crate::device::{
    Batch, DeviceError, DeviceLimits, Finished, ModelShape, Staged, StepMemory, StepOps,
};

/// Share of the GPU's memory that partial results of attention may take, and another one for
/// graphs, as divisors. A sequence of the maximum length may take more.
const SHARE: usize = 32;

/// Maximum number of sequences per step, the limit of the second and third dimension of a grid.
const MOST_SEQUENCES: usize = 65_535;

/// Kernels per layer of a decode step, rounded up, those that a layer takes for several residual
/// streams, and kernels outside of the layers.
const LAYER_NODES: usize = 24;
const STREAM_NODES: usize = 20;
const OTHER_NODES: usize = 8;

/// Device memory per kernel of a graph. Not measured; other engines report 5 to 8 MB for graphs
/// of 300 to 500 kernels.
const NODE_BYTES: usize = 16 << 10;

/// Returns the approximate size of the graph of a decode step.
fn graph_bytes(model: ModelShape) -> usize {
    let of_layer = match model.streams {
        0 => LAYER_NODES,
        _ => LAYER_NODES + STREAM_NODES,
    };
    (model.layers * of_layer + OTHER_NODES) * NODE_BYTES
}

impl CudaDevice {
    /// Returns the number of units that attention has scratch memory for.
    fn unit_room(&self, limits: &DeviceLimits) -> usize {
        unit_room(limits, self.memory / SHARE)
    }

    /// Returns how many graphs are kept at most; 0 if steps are not recorded.
    fn most_graphs(&self, limits: &DeviceLimits) -> usize {
        let sizes = keys_within(limits, unit_spread(&limits.model)).len();
        let fit = (self.memory / SHARE / graph_bytes(limits.model)).max(1);
        self.options.max_graphs.min(sizes).min(fit)
    }

    /// Returns the sizes of the steps to record in advance. All of them fit.
    fn warm_up_keys(&self) -> Vec<StepKey> {
        let Some(limits) = &self.limits else {
            return Vec::new();
        };
        let sequences = self.options.warm_up.min(limits.sequences);
        let Some(rows) = bucket_within(limits, sequences.min(limits.rows)) else {
            return Vec::new();
        };
        let keys = keys_within(limits, unit_spread(&limits.model)).into_iter();
        let most = self.most_graphs(limits);
        keys.filter(|key| key.rows <= rows).take(most).collect()
    }
}

impl StepOps for CudaDevice {
    fn step_memory(&self, limits: &DeviceLimits) -> StepMemory {
        let DeviceLimits { rows, model, .. } = *limits;
        let partials = most_partial_bytes(&model, self.unit_room(limits));
        let arrivals = model.all_heads();
        let arrivals = arrivals.map(|heads| arrival_bytes(heads, limits.sequences));
        let sampler = SamplerSizes::new(limits.sequences, limits.vocabulary);
        let work = work_words(limits).into_iter().map(|(_, words)| words);
        let uploads = [input_words(limits), sampler.parameters].into_iter();
        let uploads: Vec<_> = uploads.chain(work).map(upload_bytes).collect();
        let downloads = download_bytes(sampler.results);
        let scratch = [
            converted_bytes(rows * model.full_columns),
            self.products.sum_bytes(),
            model.experts.map_or(0, |shape| pair_bytes(rows, shape)),
            token_bytes(limits),
            downloads.0,
            arrivals.max().unwrap_or(0),
        ];
        let scratch = scratch.into_iter().chain(partials).chain(sampler.scratch);
        let scratch = scratch
            .map(rounded)
            .chain(uploads.iter().map(|(device, _)| *device));
        let most_graphs = self.most_graphs(limits);
        let pinned = uploads.iter().map(|(_, pinned)| pinned).sum::<usize>();
        StepMemory {
            scratch: scratch.fold(0, usize::saturating_add),
            most_graphs,
            graphs: most_graphs * graph_bytes(model),
            pinned: pinned + downloads.1 + UPLOADER_BYTES,
        }
    }

    fn reserve(&mut self, limits: &DeviceLimits) -> Result<(), DeviceError> {
        let DeviceLimits { rows, model, .. } = *limits;
        check_streams(model.streams)?;
        if limits.sequences > MOST_SEQUENCES {
            return Err(unsupported(
                format!("{} sequences per step", limits.sequences),
                format!("at most {MOST_SEQUENCES}"),
            ));
        }
        let units = self.unit_room(limits);
        self.limits = Some(*limits);
        self.graphs.set_most(self.most_graphs(limits));
        let context = &self.context;
        let spread = unit_spread(&model);
        self.step.reserve(context, limits, (spread, units))?;
        for heads in model.all_heads() {
            self.attention
                .partials(context, heads, (units, limits.sequences))?;
        }
        self.products.reserve(context, rows * model.full_columns)?;
        if let Some(shape) = model.experts {
            self.expert_scratch.reserve(context, rows, shape)?;
        }
        let sizes = SamplerSizes::new(limits.sequences, limits.vocabulary);
        self.sampler.reserve(context, &sizes)
    }

    /// Returns what is enough to fill the tensor cores of a data centre GPU.
    fn default_step_tokens(&self) -> usize {
        8192
    }

    fn warm_up_steps(&self) -> usize {
        self.warm_up_keys().len()
    }

    fn warm_up(
        &mut self,
        index: usize,
        enqueue: &mut dyn FnMut(&mut Self, usize) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Some(&key) = self.warm_up_keys().get(index) else {
            return Ok(());
        };
        // The first one is enqueued, and the second one is recorded.
        for _ in 0..2 {
            self.graphs.abandon(&self.context);
            self.step.take_padding(&self.context, key)?;
            if self.graphs.begin(&self.context, &self.step)? == Staged::Replayed {
                break;
            }
            loop {
                let outcome = enqueue(self, key.rows);
                if self.finish(outcome)? == Finished::Done {
                    break;
                }
            }
        }
        // A failure belongs to this step, not to the first one of a request.
        self.context.compute.synchronize("warming up")
    }

    fn depth(&self) -> usize {
        2
    }

    fn stage(&mut self, batch: &Batch) -> Result<Staged, DeviceError> {
        self.graphs.abandon(&self.context);
        let pad = self.options.max_graphs > 0;
        self.step.take(&self.context, batch, pad)?;
        self.graphs.begin(&self.context, &self.step)
    }

    fn finish(&mut self, outcome: Result<(), DeviceError>) -> Result<Finished, DeviceError> {
        self.graphs.finish(&self.context, outcome)
    }
}
