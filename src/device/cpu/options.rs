//! Options of the CPU device.

/// Options of the CPU device: threads, instruction set and number formats.
///
/// The default is the fastest combination that the machine supports. With every
/// combination, the tokens of a request do not depend on the other requests in the batch.
///
/// Construct it with `..CpuOptions::default()`: fields are added in minor releases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Number of threads that compute, including the calling thread. `None` means one thread
    /// for each of `cores`, or, if `cores` is empty, as many as the process may use.
    pub threads: Option<usize>,
    /// Logical processors to bind the threads to.
    ///
    /// Each thread is bound to one entry; if there are more threads than entries, the
    /// assignment wraps around. The calling thread is bound to the first entry when it runs its
    /// first operation. If the list is empty, the operating system places the threads, and the
    /// engines of a process share the processors. An engine runs best on the cores of one
    /// socket, because its memory is then local to that socket. If cores differ in speed, the
    /// faster ones take more of the work.
    pub cores: Vec<usize>,
    /// Instruction set to compute with.
    pub simd: SimdLevel,
    /// Number format of activations in matrix products.
    pub activations: Activations,
    /// Number format of cached keys and values.
    pub kv: KvType,
}

impl CpuOptions {
    /// Resolves [`KvType::Auto`] for a model: float16 if its weights are quantised and
    /// activations are int8, otherwise float32. The error of a float16 cache is small compared
    /// with that of int8 activations, but large compared with that of float32 activations.
    pub fn for_weights(mut self, quantised: bool) -> Self {
        if self.kv == KvType::Auto {
            let integer = quantised && self.activations != Activations::F32;
            self.kv = if integer { KvType::F16 } else { KvType::F32 };
        }
        self
    }
}

/// Instruction set to compute with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SimdLevel {
    /// The best one that the machine supports.
    #[default]
    Auto,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// AVX2, FMA and F16C. Gives the same results as AVX-512, bit for bit.
    Avx2,
    /// Plain Rust, without explicit vector instructions.
    Portable,
}

/// Number format of activations in matrix products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activations {
    /// Int8 for quantised weights, float32 for floating-point weights.
    #[default]
    Auto,
    /// Float32 for all weights. This is the reference.
    F32,
    /// Same as `Auto`: int8 for quantised weights. Products with floating-point weights are
    /// always computed in float32.
    Int8,
}

/// Number format of cached keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvType {
    /// Float16 if quantised weights are multiplied in int8, otherwise float32. Weights count as
    /// quantised unless [`CpuOptions::for_weights`] resolves this.
    #[default]
    Auto,
    /// Float32.
    F32,
    /// Float16. Values out of range become the nearest finite float16.
    F16,
}
