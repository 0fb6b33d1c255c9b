//! What can be chosen about the CPU device.

/// How many threads, which instructions, which number formats.
///
/// The default is the fastest that the machine has; every combination keeps the
/// determinism contract of [`crate::device`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that compute, the calling one included; one for each of `cores` when
    /// `None`, and without these as many as the process may use.
    pub threads: Option<usize>,
    /// Which of the machine's logical processors they run on, the calling thread on the
    /// first from its first operation on: one each, and round again if there are fewer.
    /// The system chooses if it is empty, and the engines of a process then share the
    /// processors. An engine does best on the cores of one socket, which also has its
    /// memory then; of cores that differ in speed, the faster ones take more of the work.
    pub cores: Vec<usize>,
    /// The instruction set.
    pub simd: SimdLevel,
    /// What activations are multiplied as.
    pub activations: Activations,
    /// What cached keys and values are kept as.
    pub kv: KvType,
}

impl CpuOptions {
    /// Settles [`KvType::Auto`] for a model: a cache in float16 adds an error that
    /// is small beside that of int8 activations, and large beside float32's.
    pub fn for_weights(mut self, quantised: bool) -> Self {
        if self.kv == KvType::Auto {
            let integer = quantised && self.activations != Activations::F32;
            self.kv = if integer { KvType::F16 } else { KvType::F32 };
        }
        self
    }
}

/// An instruction set to compute with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SimdLevel {
    /// The best one that the machine has.
    #[default]
    Auto,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// AVX2, FMA and F16C; the same bits as AVX-512.
    Avx2,
    /// Plain Rust.
    Portable,
}

/// What activations are multiplied with weights as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// Int8 for quantised weights, float32 for floating-point weights.
    #[default]
    Auto,
    /// Float32 for all weights: the reference.
    F32,
    /// As `Auto`: int8 wherever the weights are quantised. Floating-point weights
    /// are always multiplied in float32.
    Int8,
}

/// What cached keys and values are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// Float16 where quantised weights are multiplied in int8, float32 otherwise; see
    /// [`CpuOptions::for_weights`].
    #[default]
    Auto,
    /// Float32.
    F32,
    /// Float16; what it cannot hold becomes its largest finite number.
    F16,
}
