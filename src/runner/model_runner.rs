//! [`ModelRunner`]: a decoder on a device.

use super::limits::context_tokens;
use super::memory::{MemoryPlan, cache_shape, swap_info};
use super::{LoadError, ModelInfo, Runner, RunnerInfo, inputs};
use crate::cache::{BlockId, Transfers};
use crate::config::EngineConfig;
use crate::device::{Batch, Device, DeviceError, DeviceLimits};
use crate::model::{Decoder, ModelSource, StepLimits};
use crate::sampling::{SampleRow, Sampled};
use crate::schedule::{Sequences, StepPlan};
use std::collections::VecDeque;

/// A decoder on a device, with the key-value cache.
pub struct ModelRunner<D: Device> {
    device: D,
    decoder: Decoder<D>,
    cache: D::Cache,
    /// Where blocks are swapped out to; `None` if they are not.
    host: Option<D::HostBlocks>,
    block_tokens: usize,
    /// Steps in flight; `None` for one without samples, which is collected without a wait,
    /// done or not. That is enough of a fence: blocks and host memory are touched by what
    /// the device is given only, and whoever is given them next comes after it in the
    /// device's order.
    in_flight: VecDeque<Option<D::Pending>>,
    batch: Batch,
    samples: Vec<SampleRow>,
    /// A list of transfers as the device takes it.
    pairs: Vec<[u32; 2]>,
}

impl<D: Device> ModelRunner<D> {
    /// Loads `source` onto `device` and allocates the cache.
    pub fn load(
        mut device: D,
        source: &ModelSource,
        config: &EngineConfig,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(Self, RunnerInfo), LoadError> {
        let model = source.config();
        let context = context_tokens(model, config);
        let limits = StepLimits {
            rows: config.max_batch_tokens,
            samples: config.max_sequences.min(config.max_batch_tokens),
            positions: context,
        };
        device.reserve(&DeviceLimits {
            rows: limits.rows,
            sequences: limits.samples,
            sequence_tokens: context,
            block_tokens: config.block_tokens,
            vocabulary: model.vocabulary,
        })?;
        let decoder = Decoder::load(source, &mut device, limits, progress)?;
        let budget = match config.kv_cache_bytes {
            Some(bytes) => bytes,
            None => device.cache_budget()?,
        };
        let shape = cache_shape(model, config, budget, &device)?;
        let cache = device.allocate_cache(&shape)?;
        let swap = swap_info(config, &shape, &device);
        let host = match swap {
            Some(swap) => Some(device.allocate_host_blocks(&shape, swap.blocks)?),
            None => None,
        };
        let memory = MemoryPlan::new(device.weight_bytes(), &shape, &device);
        let info = RunnerInfo {
            vocabulary: model.vocabulary,
            context_tokens: context,
            end_tokens: model.end_tokens.clone(),
            cache_blocks: shape.blocks,
            block_tokens: shape.block_tokens,
            swap,
            model: Some(ModelInfo {
                config: model.clone(),
                parameters: source.parameters(),
                device: device.info(),
                memory,
            }),
        };
        let runner = Self {
            device,
            decoder,
            cache,
            host,
            block_tokens: shape.block_tokens,
            in_flight: VecDeque::new(),
            batch: Batch::default(),
            samples: Vec::new(),
            pairs: Vec::new(),
        };
        Ok((runner, info))
    }

    /// Enqueues the copies of a step. After an error some of them may have been enqueued:
    /// what they wrote counts as lost, and the device's order still holds.
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

/// The pairs of a list of transfers, in memory that is used again.
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
        inputs::fill(
            plan,
            sequences,
            self.block_tokens,
            &mut self.batch,
            &mut self.samples,
        );
        self.transfer(&plan.transfers)?;
        let pending = if self.batch.rows() == 0 {
            None
        } else {
            let logits = self
                .decoder
                .forward(&mut self.device, &self.batch, &mut self.cache)?;
            match self.samples.is_empty() {
                true => None,
                false => Some(self.device.sample(logits, &self.samples)?),
            }
        };
        self.in_flight.push_back(pending);
        Ok(())
    }

    fn poison(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        let blocks: Vec<u32> = blocks.iter().map(|block| block.index() as u32).collect();
        self.device.poison(&mut self.cache, &blocks)
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, DeviceError> {
        match self.in_flight.pop_front().flatten() {
            Some(pending) => self.device.collect(pending),
            None => Ok(Vec::new()),
        }
    }
}
