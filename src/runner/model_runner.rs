//! [`ModelRunner`]: a decoder on a device.

use super::limits::context_tokens;
use super::memory::{MemoryPlan, cache_shape};
use super::{LoadError, ModelInfo, Runner, RunnerInfo, inputs};
use crate::cache::BlockId;
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
    block_tokens: usize,
    /// Steps in flight; `None` for one without samples.
    in_flight: VecDeque<Option<D::Pending>>,
    batch: Batch,
    samples: Vec<SampleRow>,
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
        let memory = MemoryPlan::new(device.weight_bytes(), &shape, &device);
        let info = RunnerInfo {
            vocabulary: model.vocabulary,
            context_tokens: context,
            end_tokens: model.end_tokens.clone(),
            cache_blocks: shape.blocks,
            block_tokens: shape.block_tokens,
            swap: None,
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
            block_tokens: shape.block_tokens,
            in_flight: VecDeque::new(),
            batch: Batch::default(),
            samples: Vec::new(),
        };
        Ok((runner, info))
    }
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
        let logits = self
            .decoder
            .forward(&mut self.device, &self.batch, &mut self.cache)?;
        let pending = if self.samples.is_empty() {
            None
        } else {
            Some(self.device.sample(logits, &self.samples)?)
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
