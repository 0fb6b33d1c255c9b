//! Tensors of random numbers, to measure a model of any size without its weights.

use super::{DType, TensorView, WeightSource, WeightsError};
use half::{bf16, f16};
use std::borrow::Cow;
use std::collections::HashMap;

/// Standard deviation of the weights: a common initialisation of models.
pub const RANDOM_DEVIATION: f32 = 0.02;

/// Number of different offsets in the pool at which tensors begin, so that they differ.
const PLACES: usize = 4096;

/// Bytes that one random number generator fills, rounded up to whole blocks.
const CHUNK: usize = 1 << 20;

/// The contents of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RandomContent {
    /// Weights of mean 0 and standard deviation [`RANDOM_DEVIATION`].
    Weights,
    /// One number for all elements, stored as float32.
    Constant(f32),
}

/// A tensor to create.
#[derive(Clone, Debug)]
pub struct RandomTensor {
    /// Name of the tensor.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Contents of the tensor.
    pub content: RandomContent,
}

/// Tensors that share one pool of random weights, which is about as large as the largest
/// tensor: 16 GB of weights, for example, take 1 GB of memory. The same tensors always have
/// the same numbers.
#[derive(Debug)]
pub struct RandomWeights {
    tensors: Vec<RandomTensor>,
    /// Position in `tensors` by name.
    by_name: HashMap<String, usize>,
    format: DType,
    pool: Vec<u8>,
    /// Bytes of the constant tensors, by position in `tensors`.
    constants: HashMap<usize, Vec<u8>>,
}

impl RandomWeights {
    /// Formats that are available for random weights.
    pub const FORMATS: [DType; 8] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q8_0,
        DType::Q4K,
        DType::Q6K,
    ];

    /// Creates the tensors, with weights in `format`.
    ///
    /// # Errors
    /// Returns the first tensor whose rows are not whole blocks of the format or whose size
    /// overflows. Returns the first weight tensor if the format is not one of
    /// [`RandomWeights::FORMATS`].
    pub fn new(tensors: Vec<RandomTensor>, format: DType) -> Result<Self, UnfitTensor> {
        let mut constants = HashMap::new();
        let mut largest = 0;
        for (index, tensor) in tensors.iter().enumerate() {
            let elements = tensor
                .shape
                .iter()
                .try_fold(1usize, |all, &one| all.checked_mul(one));
            let columns = tensor.shape.last().copied().unwrap_or(0);
            let unfit = || UnfitTensor {
                name: tensor.name.clone(),
                columns,
                format,
            };
            let elements = elements.ok_or_else(unfit)?;
            match tensor.content {
                RandomContent::Constant(value) => {
                    constants.insert(index, value.to_le_bytes().repeat(elements));
                }
                RandomContent::Weights => {
                    if format.bytes_for(columns).is_none() || !Self::FORMATS.contains(&format) {
                        return Err(unfit());
                    }
                    largest = largest.max(format.bytes_for(elements).ok_or_else(unfit)?);
                }
            }
        }
        let names = tensors.iter().enumerate();
        Ok(Self {
            by_name: names
                .map(|(index, tensor)| (tensor.name.clone(), index))
                .collect(),
            pool: pool(format, largest + PLACES * format.block_bytes()),
            tensors,
            format,
            constants,
        })
    }
}

/// A tensor that cannot be stored in the requested format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnfitTensor {
    /// Name of the tensor.
    pub name: String,
    /// Length of the tensor's rows.
    pub columns: usize,
    /// The requested format.
    pub format: DType,
}

impl RandomWeights {
    /// Returns the bytes of the tensor called `name`, if there is one.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        let &index = self.by_name.get(name)?;
        if let Some(bytes) = self.constants.get(&index) {
            return Some(bytes);
        }
        let elements = self.tensors.get(index)?.shape.iter().product();
        let bytes = self.format.bytes_for(elements)?;
        let start = index * 97 % PLACES * self.format.block_bytes();
        self.pool.get(start..start + bytes)
    }
}

impl WeightSource for RandomWeights {
    fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let &index = self.by_name.get(name)?;
        let tensor = self.tensors.get(index)?;
        let dtype = match self.constants.contains_key(&index) {
            true => DType::F32,
            false => self.format,
        };
        Some(TensorView {
            name: &tensor.name,
            dtype,
            shape: &tensor.shape,
            bytes: 0..self.bytes(name)?.len(),
        })
    }

    fn names(&self) -> Vec<&str> {
        self.tensors
            .iter()
            .map(|tensor| tensor.name.as_str())
            .collect()
    }

    fn read(&self, tensor: &TensorView<'_>) -> Result<Cow<'_, [u8]>, WeightsError> {
        let bytes = self.bytes(tensor.name);
        let bytes = bytes.and_then(|bytes| bytes.get(tensor.bytes.clone()));
        bytes.map(Cow::Borrowed).ok_or_else(|| WeightsError::Io {
            path: "random weights".into(),
            source: std::io::Error::other(format!("there is no tensor {:?}", tensor.name)),
        })
    }
}

/// Returns at least `bytes` bytes of random weights. They do not depend on the machine's
/// number of threads.
fn pool(format: DType, bytes: usize) -> Vec<u8> {
    let chunk = CHUNK.next_multiple_of(format.block_bytes());
    let mut pool = vec![0; bytes.next_multiple_of(format.block_bytes())];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let fill = Fill::new(format);
    std::thread::scope(|scope| {
        let chunks = pool.len().div_ceil(chunk);
        let share = chunks.div_ceil(threads).max(1);
        for (thread, part) in pool.chunks_mut(share * chunk).enumerate() {
            let fill = &fill;
            scope.spawn(move || {
                for (index, part) in part.chunks_mut(chunk).enumerate() {
                    fill.chunk(part, (thread * share + index) as u64);
                }
            });
        }
    });
    pool
}

/// How random bytes become weights.
enum Fill {
    /// Each random byte selects one of 256 evenly spaced numbers, which take `width` bytes
    /// each.
    Table { numbers: Vec<u8>, width: usize },
    /// Blocks of random codes. `scales` lists the offsets and contents of the scales, which
    /// overwrite the random bytes of each block.
    Block {
        bytes: usize,
        scales: Vec<(usize, Vec<u8>)>,
    },
}

impl Fill {
    fn new(format: DType) -> Self {
        let step = 2.0 * RANDOM_DEVIATION * 3f32.sqrt() / 256.0;
        let numbers = (0..256).map(|index| (index as f32 - 127.5) * step);
        let table = |numbers: Vec<u8>| Self::Table {
            width: numbers.len() / 256,
            numbers,
        };
        // The scale that gives codes the wanted deviation if they are uniform over `codes`
        // values and the block multiplies them by another `factor`.
        let scale = |codes: f32, factor: f32| {
            let deviation = ((codes * codes - 1.0) / 12.0).sqrt();
            RANDOM_DEVIATION / deviation / factor
        };
        let half = |value: f32| f16::from_f32(value).to_le_bytes().to_vec();
        let block = |scales: Vec<(usize, Vec<u8>)>| Self::Block {
            bytes: format.block_bytes(),
            scales,
        };
        match format {
            DType::F16 => table(
                numbers
                    .flat_map(|x| f16::from_f32(x).to_le_bytes())
                    .collect(),
            ),
            DType::BF16 => table(
                numbers
                    .flat_map(|x| bf16::from_f32(x).to_le_bytes())
                    .collect(),
            ),
            DType::Q4_0 => block(vec![(0, half(scale(16.0, 1.0)))]),
            DType::Q4_1 => {
                let scale = scale(16.0, 1.0);
                block(vec![(0, half(scale)), (2, half(-7.5 * scale))])
            }
            DType::Q8_0 => block(vec![(0, half(scale(256.0, 1.0)))]),
            DType::Q4K => {
                // All inner scales and minimums are 32, in 6 bits each, packed as in ggml.
                let scale = scale(16.0, 32.0);
                let inner = [[0xa0; 4], [0xa0; 4], [0; 4]].concat();
                block(vec![(0, half(scale)), (2, half(7.5 * scale)), (4, inner)])
            }
            DType::Q6K => block(vec![(192, vec![16; 16]), (208, half(scale(64.0, 16.0)))]),
            // F32. `RandomWeights::new` refuses the formats that are not in its list.
            _ => table(numbers.flat_map(f32::to_le_bytes).collect()),
        }
    }

    /// Fills a whole number of blocks. The same `index` always gives the same bytes.
    fn chunk(&self, out: &mut [u8], index: u64) {
        let mut state = index.wrapping_mul(0xd134_2543_de82_ef95);
        let mut next = move || {
            // SplitMix64 (Steele, Lea & Flood, *Fast splittable pseudorandom number
            // generators*, 2014).
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = state;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (word ^ (word >> 31)).to_le_bytes()
        };
        match self {
            Self::Table { numbers, width } => {
                for group in out.chunks_mut(8 * width) {
                    for (number, byte) in group.chunks_mut(*width).zip(next()) {
                        let start = usize::from(byte) * width;
                        number.copy_from_slice(&numbers[start..start + number.len()]);
                    }
                }
            }
            Self::Block { bytes, scales } => {
                for group in out.chunks_mut(8) {
                    let random = next();
                    group.copy_from_slice(&random[..group.len()]);
                }
                for block in out.chunks_exact_mut(*bytes) {
                    for (start, scale) in scales {
                        block[*start..start + scale.len()].copy_from_slice(scale);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::quant::dequantize;

    fn weights(format: DType) -> RandomWeights {
        let tensor = |name: &str, content| RandomTensor {
            name: name.to_owned(),
            shape: vec![64, 512],
            content,
        };
        let tensors = vec![
            tensor("a", RandomContent::Weights),
            tensor("b", RandomContent::Weights),
            tensor("c", RandomContent::Constant(1.0)),
        ];
        RandomWeights::new(tensors, format).unwrap()
    }

    #[test]
    fn weights_of_every_format_have_the_standard_deviation() {
        for format in RandomWeights::FORMATS {
            let source = weights(format);
            let tensor = source.tensor("b").unwrap();
            assert_eq!(tensor.dtype, format);
            let data = source.read(&tensor).unwrap();
            assert_eq!(Some(data.len()), format.bytes_for(64 * 512));
            let mut values = vec![0.0; 64 * 512];
            dequantize(format, &data, &mut values);
            let count = values.len() as f32;
            let mean = values.iter().sum::<f32>() / count;
            let square = values.iter().map(|x| x * x).sum::<f32>() / count;
            // The codes of Q4_0 range from -8 to 7, so the mean is not exactly 0.
            assert!(mean.abs() < 0.0025, "{format}: mean {mean}");
            let deviation = square.sqrt();
            assert!((deviation - 0.02).abs() < 0.001, "{format}: {deviation}");
        }
    }

    #[test]
    fn tensors_differ_from_each_other_and_are_alike_each_time() {
        for format in [DType::BF16, DType::Q4K] {
            let (first, second) = (weights(format), weights(format));
            let data = |source: &RandomWeights, name| source.bytes(name).unwrap().to_vec();
            assert_eq!(data(&first, "a"), data(&second, "a"));
            assert_ne!(data(&first, "a"), data(&first, "b"));
        }
    }

    #[test]
    fn constants_are_float32_whatever_the_format() {
        let source = weights(DType::Q8_0);
        let tensor = source.tensor("c").unwrap();
        assert_eq!(tensor.dtype, DType::F32);
        assert_eq!(
            source.bytes("c").unwrap(),
            1f32.to_le_bytes().repeat(64 * 512)
        );
    }

    #[test]
    fn rows_that_are_not_whole_blocks_are_refused_by_name() {
        let tensor = RandomTensor {
            name: "odd".to_owned(),
            shape: vec![256, 33],
            content: RandomContent::Weights,
        };
        let error = RandomWeights::new(vec![tensor.clone()], DType::Q4_0).unwrap_err();
        assert_eq!((error.name.as_str(), error.columns), ("odd", 33));
        assert!(RandomWeights::new(vec![tensor], DType::BF16).is_ok());
    }
}
