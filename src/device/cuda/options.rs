//! What can be chosen about the CUDA device.

use half::{bf16, f16};

/// Which GPU, and how it is used.
#[derive(Clone, Debug, PartialEq)]
pub struct CudaOptions {
    /// Index of the GPU, as the driver counts them.
    pub device: usize,
    /// What activations, cached keys and values, and floating-point weights are kept
    /// as; sums are always float32.
    pub activations: CudaActivations,
    /// Whether decode steps are recorded as graphs and replayed.
    pub graphs: bool,
    /// Share of the GPU's memory that may be used, weights and cache together, from
    /// 0 to 1.
    pub utilisation: f32,
    /// Whether cuBLASLt, which must be installed, multiplies large floating-point
    /// matrices. A row's result may then depend on the rows beside it.
    pub blas: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            device: 0,
            activations: CudaActivations::default(),
            graphs: true,
            utilisation: 0.9,
            blas: false,
        }
    }
}

/// A 16-bit type for activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CudaActivations {
    /// bfloat16: the range of float32, 8 bits of precision. What models are
    /// trained in.
    #[default]
    Bf16,
    /// float16: 11 bits of precision; values beyond 65504 saturate.
    F16,
}

impl CudaActivations {
    /// `bf16` or `f16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// The bits of the nearest number of this type; float16 saturates.
    pub(super) fn encode(self, value: f32) -> u16 {
        match self {
            Self::Bf16 => bf16::from_f32(value).to_bits(),
            Self::F16 if value.is_nan() => f16::NAN.to_bits(),
            Self::F16 => f16::from_f32(value.clamp(-65504.0, 65504.0)).to_bits(),
        }
    }

    /// The number that these bits are.
    pub(super) fn decode(self, bits: u16) -> f32 {
        match self {
            Self::Bf16 => bf16::from_bits(bits).to_f32(),
            Self::F16 => f16::from_bits(bits).to_f32(),
        }
    }
}
