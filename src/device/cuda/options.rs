//! Options of the CUDA device.

/// Which GPU to use, and how.
///
/// Construct it with `..CudaOptions::default()`: fields are added in minor releases.
#[derive(Clone, Debug, PartialEq)]
pub struct CudaOptions {
    /// Index of the GPU in the driver's enumeration, from 0.
    pub device: usize,
    /// Storage type of activations, cached keys and values, and floating-point weights. Sums
    /// are always float32.
    pub activations: CudaActivations,
    /// Maximum number of decode steps, of different sizes, that are kept as CUDA graphs and
    /// replayed; 0 for none. Fewer are kept if the steps within the engine's limits have fewer
    /// sizes, or if so many would take more than 1/32 of the GPU's memory. The least recently
    /// used one makes way for a new one.
    pub max_graphs: usize,
    /// The largest number of sequences for whose decode steps graphs are recorded while a model
    /// is loaded, so that the first steps are as fast as later ones; 0 records none before they
    /// are needed. Loading takes a moment longer for each graph. Numbers beyond the engine's
    /// limits have no further effect.
    pub warm_up: usize,
    /// Whether a kernel may begin while the one before it still runs (programmatic dependent
    /// launch). It saves time between kernels and changes no result. GPUs below compute
    /// capability 9.0 cannot do so, and ignore it.
    pub overlap: bool,
    /// Share of the GPU's memory that may be used: above 0, at most 1. The KV cache takes what
    /// everything else in the memory plan leaves of it.
    pub utilisation: f32,
    /// Whether to multiply large floating-point matrices with cuBLASLt, which must be
    /// installed. A row's result may then depend on the other rows of the batch.
    pub blas: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            device: 0,
            activations: CudaActivations::default(),
            max_graphs: 128,
            warm_up: usize::MAX,
            overlap: true,
            utilisation: 0.9,
            blas: false,
        }
    }
}

/// A 16-bit floating-point type for activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CudaActivations {
    /// bfloat16: the range of float32 with 8 bits of precision. Most models are trained in it.
    #[default]
    Bf16,
    /// float16: 11 bits of precision; values beyond 65504 saturate.
    F16,
}

impl CudaActivations {
    /// Returns the type's name: `bf16` or `f16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

#[cfg(any(test, feature = "internals"))]
impl CudaActivations {
    /// Returns the bits of the nearest number of this type. float16 saturates.
    pub(super) fn encode(self, value: f32) -> u16 {
        match self {
            Self::Bf16 => half::bf16::from_f32(value).to_bits(),
            Self::F16 if value.is_nan() => half::f16::NAN.to_bits(),
            Self::F16 => half::f16::from_f32(value.clamp(-65504.0, 65504.0)).to_bits(),
        }
    }

    /// Returns the number that `bits` encode.
    pub(super) fn decode(self, bits: u16) -> f32 {
        match self {
            Self::Bf16 => half::bf16::from_bits(bits).to_f32(),
            Self::F16 => half::f16::from_bits(bits).to_f32(),
        }
    }
}
