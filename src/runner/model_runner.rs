//! [`ModelRunner`]: runs a decoder on a device.

use super::demand::Demand;
use super::inputs::Inputs;
use super::memory::swap_info;
use super::{LoadError, ModelInfo, Pooling, Runner, RunnerInfo, StateInfo, StepOutput};
use crate::cache::{BlockId, CachePlace, StateSlot, Transfers};
use crate::config::EngineConfig;
use crate::device::{CacheLayer, Device, DeviceError, SNAPSHOT_TOKENS};
use crate::model::{Decoder, ModelSource};
use crate::sampling::SamplingDefaults;
use crate::schedule::{Sequences, StepPlan};
use crate::weights::DType;
use std::collections::VecDeque;
use std::time::Instant;

// Included, because the tests' library depends on this crate: as a dependency, it would bring
// along a second copy of this crate, compiled without `cfg(test)`.
#[cfg(all(test, feature = "cuda"))]
#[allow(dead_code)] // the tests in `tests/cuda` use the rest
#[path = "../../tests/common/gpu.rs"]
mod gpu;

/// At least this many tokens are between snapshots of a sequence's state. Those that are kept
/// while tokens are generated take their place, so a smaller number costs only copies; a turn of a
/// conversation computes at most this many tokens again.
const STATE_INTERVAL: usize = 64;

/// Returns the number of tokens between snapshots: a multiple of the tokens per block, and of what
/// devices ask for.
fn state_interval(block_tokens: usize) -> usize {
    let mut unit = block_tokens.max(1);
    while !unit.is_multiple_of(SNAPSHOT_TOKENS) {
        unit *= 2;
    }
    STATE_INTERVAL.next_multiple_of(unit)
}
const _: () = assert!(SNAPSHOT_TOKENS.is_power_of_two());

/// A decoder on a device, with its KV cache.
pub struct ModelRunner<D: Device> {
    device: D,
    decoder: Decoder<D>,
    cache: D::Cache,
    /// Host memory for swapped-out blocks; `None` if swapping is disabled.
    host: Option<D::HostBlocks>,
    block_tokens: usize,
    in_flight: VecDeque<InFlight<D>>,
    inputs: Inputs,
    /// Buffer for a list of transfers in the device's format.
    pairs: Vec<[u32; 2]>,
}

/// Results of a step that are on their way to the host.
///
/// A step without results is collected without waiting for it. This is safe: only device
/// operations touch blocks and host memory, and the device executes in order, so whatever uses
/// them next comes after this step.
struct InFlight<D: Device> {
    samples: Option<D::Pending>,
    sums: Option<D::Pooling>,
}

impl<D: Device> ModelRunner<D> {
    /// Loads `source` onto `device`, allocates the cache, and runs the steps that make later
    /// ones fast. `progress` is called with the number of parts of the model and of those steps
    /// that are done, and the number of all.
    ///
    /// # Errors
    /// Returns an error if the device cannot hold or run the model, or if a weight cannot be
    /// read.
    pub fn load(
        mut device: D,
        source: &ModelSource,
        config: &EngineConfig,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(Self, RunnerInfo), LoadError> {
        let begin = Instant::now();
        let model = source.config();
        let demand = Demand::new(source, config, &device)?;
        demand.plan(&device)?;
        device.reserve(demand.limits())?;
        let layout = demand.layout().clone();
        let place = |layer| {
            let CachePlace { group, index, part } = layout.place(layer);
            CacheLayer { group, index, part }
        };
        let steps = device.warm_up_steps();
        let mut parts = 0;
        let mut loaded = |done, total| {
            parts = total;
            progress(done, total + steps);
        };
        let limits = demand.step_limits();
        let mut decoder = Decoder::load(source, &mut device, limits, place, &mut loaded)?;
        let (memory, shapes) = demand.plan_loaded(&device)?;
        let (shape, states) = (shapes.cache, shapes.states);
        let mut cache = device.allocate_cache(&shape)?;
        if states.slots > 0 {
            device.allocate_states(&mut cache, &states)?;
        }
        decoder.warm_up(&mut device, &mut cache, &mut |done| {
            progress(parts + done, parts + steps);
        })?;
        let load_time = begin.elapsed();
        let swap = swap_info(config, &shape, &device);
        let host = match swap {
            Some(swap) => Some(device.allocate_host_blocks(&shape, swap.blocks)?),
            None => None,
        };
        let context = memory.context_tokens;
        tracing::debug!(
            blocks = shape.blocks,
            bytes = memory.cache(),
            groups = memory.describe_memory().join("; "),
            bytes_per_sequence = memory.sequence_bytes(context),
            step_tokens = memory.batch_tokens,
            recorded_steps = steps,
            "allocated the KV cache"
        );
        let groups = layout.groups().len();
        let parameters = source.parameters();
        let info = RunnerInfo {
            vocabulary: model.vocabulary,
            context_tokens: context,
            max_batch_tokens: memory.batch_tokens,
            embedding: Some(model.hidden),
            pooling: Pooling::default(),
            generates: source.generates(),
            segments: model.learned_positions.map_or(1, |own| own.segments),
            whole_prompts: !model.is_causal(),
            end_tokens: model.end_tokens.clone(),
            cache_blocks: shape.blocks,
            block_tokens: shape.block_tokens,
            layout,
            states: (states.slots > 0).then(|| StateInfo {
                slots: states.slots,
                interval: state_interval(shape.block_tokens),
            }),
            swap,
            model: Some(ModelInfo {
                architecture: model.architecture.name(),
                parameters: parameters.total,
                weights_format: parameters.main_format().map(DType::name),
                device: device.info(),
                memory,
                sampling: SamplingDefaults::default(),
                load_time,
            }),
        };
        let runner = Self {
            device,
            decoder,
            cache,
            host,
            block_tokens: shape.block_tokens,
            in_flight: VecDeque::new(),
            inputs: Inputs::new(groups, shape.blocks),
            pairs: Vec::new(),
        };
        Ok((runner, info))
    }

    /// Enqueues the copies of a step. After an error, some of them may have been enqueued. What
    /// they write counts as lost, and later operations still come after them in the device's
    /// order.
    fn transfer(&mut self, transfers: &Transfers) -> Result<(), DeviceError> {
        let Transfers {
            swap_out,
            copies,
            swap_in,
        } = transfers;
        let (device, pairs) = (&mut self.device, &mut self.pairs);
        let no_host = || DeviceError::Failed {
            device: "runner",
            operation: "swap",
            reason: "there is no host memory for swapping".to_owned(),
        };
        if !swap_out.is_empty() {
            let host = self.host.as_mut().ok_or_else(no_host)?;
            let each = swap_out.iter().map(|(from, to)| (from.index(), to.index()));
            device.swap_out(&self.cache, host, fill(pairs, each))?;
        }
        if !copies.is_empty() {
            let each = copies.iter().map(|(from, to)| (from.index(), to.index()));
            device.copy_blocks(&mut self.cache, fill(pairs, each))?;
        }
        if !swap_in.is_empty() {
            let host = self.host.as_ref().ok_or_else(no_host)?;
            let each = swap_in.iter().map(|(from, to)| (from.index(), to.index()));
            device.swap_in(&mut self.cache, host, fill(pairs, each))?;
        }
        Ok(())
    }
}

/// Converts a list of transfers into the device's format, in the allocation of `pairs`.
fn fill(pairs: &mut Vec<[u32; 2]>, each: impl Iterator<Item = (usize, usize)>) -> &[[u32; 2]] {
    pairs.clear();
    pairs.extend(each.map(|(from, to)| [from as u32, to as u32]));
    pairs
}

impl<D: Device> Runner for ModelRunner<D> {
    fn depth(&self) -> usize {
        self.device.depth()
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        self.inputs.fill(plan, sequences, self.block_tokens);
        self.transfer(&plan.transfers)?;
        let Inputs {
            batch,
            samples,
            pooled,
            ..
        } = &self.inputs;
        let (device, decoder) = (&mut self.device, &mut self.decoder);
        let mut step = InFlight {
            samples: None,
            sums: None,
        };
        if batch.rows() > 0 {
            let logits = decoder.forward(device, batch, &mut self.cache)?;
            if !samples.is_empty() {
                step.samples = Some(device.sample(logits, samples)?);
            }
            if !pooled.is_empty() {
                step.sums = Some(decoder.pool(device, batch.rows(), pooled)?);
            }
        }
        self.in_flight.push_back(step);
        self.inputs.clear();
        Ok(())
    }

    fn poison_states(&mut self, slots: &[StateSlot]) -> Result<(), DeviceError> {
        let slots: Vec<u32> = slots.iter().map(|slot| slot.index() as u32).collect();
        self.device.poison_states(&mut self.cache, &slots)
    }

    fn poison(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        let blocks: Vec<u32> = blocks.iter().map(|block| block.index() as u32).collect();
        self.device.poison(&mut self.cache, &blocks)
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        let mut output = StepOutput::default();
        let Some(step) = self.in_flight.pop_front() else {
            return Ok(output);
        };
        if let Some(pending) = step.samples {
            output.samples = self.device.collect(pending)?;
        }
        if let Some(pooling) = step.sums {
            output.sums = self.device.collect_pooled(pooling)?;
        }
        Ok(output)
    }

    fn recycle(&mut self, output: StepOutput) {
        self.device.recycle(output.samples);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{BlockCache, HostBlockId};
    use crate::device::cpu::{CpuDevice, CpuOptions};
    use crate::device::{CacheShape, Values};
    use crate::id::RequestId;
    use crate::schedule::{Policy, Scheduler, SequenceKey, SequenceSpec};
    use crate::weights::DType;

    const BLOCKS: usize = 8;
    const LAYERS: usize = 2;

    fn load<D: Device>(device: D, swap_blocks: usize) -> (ModelRunner<D>, RunnerInfo) {
        let settings = serde_json::json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": LAYERS,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "vocab_size": 128,
            "tie_word_embeddings": true,
            "eos_token_id": 2
        });
        let source = ModelSource::random(&settings, DType::BF16).unwrap();
        let block = CacheShape {
            layers: LAYERS,
            kv_heads: 2,
            head_dim: 16,
            blocks: 1,
            block_tokens: 16,
            values: Values::BesideKeys,
        };
        let block = device.cache_bytes(&block);
        let config = EngineConfig {
            max_batch_tokens: Some(64),
            max_sequences: 4,
            kv_cache_bytes: Some(BLOCKS * block),
            swap_bytes: swap_blocks * block,
            ..EngineConfig::default()
        };
        ModelRunner::load(device, &source, &config, &mut |_, _| {}).unwrap()
    }

    /// Returns a scheduler with one sequence, whose prompt fills two blocks and half of a
    /// third.
    fn scheduler() -> (Scheduler, SequenceKey) {
        let policy = Policy {
            max_batch_tokens: 64,
            max_sequences: 4,
            ..Policy::default()
        };
        let mut scheduler = Scheduler::new(policy, BlockCache::new(BLOCKS, 16, true));
        let spec = SequenceSpec::new((3..43).collect(), 60);
        let key = scheduler.add(RequestId(1), spec);
        (scheduler, key)
    }

    fn tokens<D: Device>(runner: &mut ModelRunner<D>) -> Vec<u32> {
        let output = runner.collect().unwrap();
        output.samples.tokens.iter().map(|token| token.id).collect()
    }

    /// Returns the tokens of the prompt's step and of the step after it, without any swapping.
    fn undisturbed<D: Device>(device: D) -> [Vec<u32>; 2] {
        let (mut runner, _) = load(device, 0);
        let (mut scheduler, _) = scheduler();
        for _ in 0..2 {
            let plan = scheduler.plan().unwrap();
            runner.launch(&plan, scheduler.sequences()).unwrap();
        }
        [tokens(&mut runner), tokens(&mut runner)]
    }

    /// Returns the same tokens as [`undisturbed`]. Between the two steps, a step without items
    /// swaps out all complete blocks of the sequence. They come back in the step that reads
    /// them.
    fn swap_out_and_in<D: Device>(
        device: D,
        read: impl Fn(&ModelRunner<D>, BlockId) -> Vec<u8>,
    ) -> [Vec<u32>; 2] {
        let (mut runner, info) = load(device, 3);
        let swap = info.swap.unwrap();
        assert_eq!(swap.blocks, 3);
        assert!(swap.seconds_per_block > 0.0 && swap.seconds_per_block < 1.0);
        let (mut scheduler, key) = scheduler();
        let prompt = scheduler.plan().unwrap();
        runner.launch(&prompt, scheduler.sequences()).unwrap();
        let blocks: Vec<BlockId> = scheduler.sequences()[key].table.blocks().collect();
        let (first, second) = (blocks[0], blocks[1]);
        let mut spare = (0..BLOCKS as u32).map(BlockId);
        let mut spare = || spare.find(|block| !blocks.contains(block)).unwrap();
        let (copied, other) = (spare(), spare());
        let host = |slot| HostBlockId(slot);
        let away = StepPlan {
            transfers: Transfers {
                swap_out: vec![(first, host(2)), (second, host(0))],
                copies: vec![(second, copied)],
                swap_in: vec![(host(2), other)],
            },
            ..StepPlan::default()
        };
        runner.launch(&away, scheduler.sequences()).unwrap();
        runner.poison(&[first, second]).unwrap();
        let mut next = scheduler.plan().unwrap();
        assert_eq!(next.items.len(), 1);
        next.transfers.swap_in = vec![(host(0), second), (host(2), first)];
        runner.launch(&next, scheduler.sequences()).unwrap();
        let prompt = tokens(&mut runner);
        assert_eq!(tokens(&mut runner), [0u32; 0], "nothing was computed");
        let next = tokens(&mut runner);
        assert!(runner.in_flight.is_empty());
        let block = |block| read(&runner, block);
        assert!(block(first) == block(other) && block(second) == block(copied));
        assert!(block(first) != block(second));
        [prompt, next]
    }

    fn cpu() -> CpuDevice {
        CpuDevice::new(&CpuOptions {
            threads: Some(1),
            ..CpuOptions::default()
        })
        .unwrap()
    }

    #[test]
    fn blocks_swapped_out_and_in_again_change_no_token() {
        let swapped = swap_out_and_in(cpu(), |runner, block| {
            let layer = |layer| runner.cache.read(layer, block.index()).unwrap();
            (0..LAYERS).flat_map(layer).copied().collect()
        });
        assert_eq!(swapped, undisturbed(cpu()));
        assert_eq!(swapped.map(|tokens| tokens.len()), [1, 1]);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn blocks_swapped_out_and_in_again_change_no_token_on_cuda() {
        use crate::device::cuda::{CudaDevice, CudaOptions};
        let gpu = gpu::lock();
        let cuda = || CudaDevice::new(&CudaOptions::default()).unwrap();
        let expected = undisturbed(cuda());
        for schedule in ["", "shuffle:1", "shuffle:2"] {
            if !gpu::is_real() && !schedule.is_empty() {
                gpu.set("schedule", schedule);
            }
            let swapped = swap_out_and_in(cuda(), |runner, block| {
                let layer = |layer| {
                    let (cache, device) = (&runner.cache, &runner.device);
                    let (keys, values) = cache.read(device, layer, block.index()).unwrap();
                    [keys, values].concat()
                };
                let words = (0..LAYERS).flat_map(layer);
                words.flat_map(u16::to_ne_bytes).collect()
            });
            assert_eq!(swapped, expected);
        }
        if !gpu::is_real() {
            assert_eq!(gpu.leaks(), [""; 0]);
        }
    }

    #[test]
    fn a_step_whose_transfers_fail_is_not_in_flight_and_the_next_one_goes_on() {
        for swap_blocks in [0, 2] {
            let (mut runner, info) = load(cpu(), swap_blocks);
            assert_eq!(info.swap.is_some(), swap_blocks > 0);
            let (mut scheduler, _) = scheduler();
            let mut plan = scheduler.plan().unwrap();
            let transfers = std::mem::take(&mut plan.transfers);
            let slot = HostBlockId(1);
            plan.transfers.swap_in = vec![(slot, BlockId(7))];
            let error = runner.launch(&plan, scheduler.sequences()).unwrap_err();
            let expected = if swap_blocks > 0 {
                "slot 1 holds no block"
            } else {
                "no host memory"
            };
            assert!(error.to_string().contains(expected), "{error}");
            assert!(runner.in_flight.is_empty());
            plan.transfers = transfers;
            runner.launch(&plan, scheduler.sequences()).unwrap();
            assert_eq!(tokens(&mut runner), undisturbed(cpu())[0]);
        }
    }
}
