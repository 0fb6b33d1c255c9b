//! Typed kernel launches.
//!
//! [`kernels!`] declares the kernels of one `.cu` file with their parameters. On loading, the
//! number and kinds of the parameters are compared with those in the image, so that a changed
//! kernel fails at start-up instead of reading arbitrary memory.

use super::context::Context;
use super::error;
use super::images::Module;
use super::memory::Ptr;
use super::signature::{ParameterKind, Signature};
use crate::device::DeviceError;
use cudarc::driver::result;
use cudarc::driver::sys;
use std::cell::Cell;
use std::ffi::c_void;
use std::rc::Rc;

/// A Rust type that can be passed to a kernel.
pub(super) trait Argument: Copy {
    /// Kind of the kernel parameter that takes this type.
    const KIND: ParameterKind;
}

impl Argument for Ptr {
    const KIND: ParameterKind = ParameterKind::Pointer;
}
impl Argument for u32 {
    const KIND: ParameterKind = ParameterKind::Unsigned;
}
impl Argument for f32 {
    const KIND: ParameterKind = ParameterKind::Float;
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    blocks: [u32; 3],
    threads: [u32; 3],
    shared: u32,
}

impl Grid {
    /// Returns a grid of `blocks` blocks with `threads` threads each. A launch with 0 blocks
    /// does nothing.
    pub(super) fn new(blocks: [u32; 3], threads: [u32; 3]) -> Self {
        let shared = 0;
        Self {
            blocks,
            threads,
            shared,
        }
    }

    /// Sets the bytes of dynamic shared memory per block.
    pub(super) fn shared(self, bytes: u32) -> Self {
        let shared = bytes;
        Self { shared, ..self }
    }
}

/// Returns a grid with one CUDA block per row.
pub(super) fn row_grid(rows: usize) -> Grid {
    Grid::new([rows as u32, 1, 1], [256, 1, 1])
}

/// Returns a grid with one thread per eight numbers.
pub(super) fn vector_grid(count: usize) -> Grid {
    Grid::new([count.div_ceil(8 * 256) as u32, 1, 1], [256, 1, 1])
}

/// Bytes of dynamic shared memory that a kernel may use without opting in to more.
const DEFAULT_SHARED: u32 = 48 << 10;

/// A loaded kernel, whose parameters match its declaration.
pub(super) struct Kernel {
    function: sys::CUfunction,
    name: &'static str,
    /// Bytes of dynamic shared memory that the kernel currently may use.
    allowed_shared: Cell<u32>,
    /// Keeps the code loaded.
    _module: Rc<Module>,
}

impl Kernel {
    /// Loads kernel `name` of `module`, which is one of `signatures`.
    pub(super) fn load(
        module: &Rc<Module>,
        name: &'static str,
        signatures: &[Signature],
    ) -> Result<Self, DeviceError> {
        Ok(Self {
            function: module.function(name, signatures)?,
            name,
            allowed_shared: Cell::new(DEFAULT_SHARED),
            _module: Rc::clone(module),
        })
    }

    /// Enqueues the kernel on the compute stream.
    ///
    /// # Safety
    /// `arguments` must point to values of the kinds that the kernel was loaded with.
    pub(super) unsafe fn launch(
        &self,
        context: &Context,
        grid: Grid,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DeviceError> {
        let Grid {
            blocks,
            threads,
            shared,
        } = grid;
        if blocks.contains(&0) {
            return Ok(());
        }
        error::require(
            blocks[1] <= 65_535 && blocks[2] <= 65_535,
            self.name,
            || format!("a grid of {blocks:?} blocks exceeds the limits of a launch"),
        )?;
        if shared > self.allowed_shared.get() {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to the module that `self` keeps loaded.
            let allow = || unsafe {
                result::function::set_function_attribute(self.function, attribute, shared as i32)
            };
            context.call(self.name, allow)?;
            self.allowed_shared.set(shared);
        }
        let stream = context.compute.raw();
        let [x, y, z] = blocks;
        let [tx, ty, tz] = threads;
        if !context.overlaps {
            // SAFETY: the function is valid as long as its module, which `self` keeps loaded; the
            // caller vouches for the arguments, which the driver copies before it returns.
            let launch = || unsafe {
                let (blocks, threads) = ((x, y, z), (tx, ty, tz));
                result::launch_kernel(self.function, blocks, threads, shared, stream, arguments)
            };
            return context.call(self.name, launch);
        }
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let configuration = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: tx,
            blockDimY: ty,
            blockDimZ: tz,
            sharedMemBytes: shared,
            hStream: stream,
            attrs: &raw mut overlap,
            numAttrs: 1,
        };
        let (function, arguments) = (self.function, arguments.as_mut_ptr());
        // SAFETY: as above; the configuration and its attribute outlive the call, and every kernel
        // waits for the kernels before it before it touches what they touch.
        let launch = || unsafe {
            sys::cuLaunchKernelEx(&configuration, function, arguments, std::ptr::null_mut())
                .result()
        };
        context.call(self.name, launch)
    }
}

/// Selects one kernel of a family by the suffix of its name.
pub(super) trait Variant: Copy + std::fmt::Display {
    /// Returns whether this variant selects the suffix `name`.
    fn is(self, name: &str) -> bool;
}

impl Variant for &str {
    fn is(self, name: &str) -> bool {
        self == name
    }
}

impl Variant for usize {
    fn is(self, name: &str) -> bool {
        name.parse() == Ok(self)
    }
}

/// A family of kernels with the same parameters, by the suffix of their names.
pub(super) struct Variants(pub(super) Vec<(&'static str, Kernel)>);

impl Variants {
    /// Returns the kernel whose name ends in `variant`. `family` is the common part of the
    /// names, for the error if there is no such kernel.
    pub(super) fn get(
        &self,
        family: &'static str,
        variant: impl Variant,
    ) -> Result<&Kernel, DeviceError> {
        let found = self.0.iter().find(|(name, _)| variant.is(name));
        found.map(|(_, kernel)| kernel).ok_or_else(|| {
            let known: Vec<&str> = self.0.iter().map(|(name, _)| *name).collect();
            error::unsupported(
                format!("{family}{variant}"),
                format!("the variants of {family} are {}", known.join(", ")),
            )
        })
    }
}

/// Declares the kernels of `kernels/FILE.cu`: their names and parameters.
///
/// ```text
/// kernels! {
///     /// Kernels of `kernels/norm.cu`.
///     pub(super) struct NormKernels in "norm" {
///         rms_norm(out: Ptr, x: Ptr, weight: Ptr, epsilon: f32, columns: u32);
///         attend_hd[16, 32](out: Ptr);
///     }
/// }
/// ```
///
/// This makes a struct with a function `load(&Modules)` and one method per kernel, which takes
/// the context, a [`Grid`] and the kernel's arguments. `attend_hd[16, 32]` declares two
/// kernels, `attend_hd16` and `attend_hd32`, behind one method whose first argument is the
/// variant: a `usize`, or a `&str` for names such as `linear_[q4_m16, q8_m16]`.
macro_rules! kernels {
    (
        $(#[$meta:meta])*
        $visibility:vis struct $name:ident in $file:literal {
            $(
                $kernel:ident $([$($variant:tt),* $(,)?])?
                ($($parameter:ident: $kind:ty),* $(,)?);
            )*
        }
    ) => {
        $(#[$meta])*
        $visibility struct $name {
            $($kernel: $crate::device::cuda::launch::kernels!(@field $([$($variant)*])?),)*
        }

        impl $name {
            /// Name of the `.cu` file and of its image.
            pub(super) const FILE: &'static str = $file;

            /// The declared kernels.
            pub(super) const SIGNATURES: &'static [$crate::device::cuda::signature::Signature] =
                &$crate::device::cuda::launch::kernels!(@signatures [] $(
                    $kernel $([$($variant)*])? ($($parameter: $kind),*)
                )*);

            /// Loads the kernels from their image and checks their parameters.
            pub(super) fn load(
                modules: &$crate::device::cuda::images::Modules,
            ) -> Result<Self, $crate::device::DeviceError> {
                let module = modules.file(Self::FILE)?;
                Ok(Self {
                    $($kernel: $crate::device::cuda::launch::kernels!(
                        @load module, $kernel $([$($variant)*])?
                    ),)*
                })
            }

            $($crate::device::cuda::launch::kernels!(
                @method $kernel $([$($variant)*])? ($($parameter: $kind),*)
            );)*
        }
    };

    (@field) => { $crate::device::cuda::launch::Kernel };
    (@field [$($variant:tt)*]) => { $crate::device::cuda::launch::Variants };

    (@signatures [$($done:expr,)*]) => { [$($done),*] };
    (@signatures [$($done:expr,)*] $kernel:ident [$($variant:tt)*] $parameters:tt $($rest:tt)*) => {
        $crate::device::cuda::launch::kernels!(@variants
            [$($done,)*] $kernel [$($variant)*] $parameters $($rest)*)
    };
    (@signatures [$($done:expr,)*] $kernel:ident ($($parameter:ident: $kind:ty),*) $($rest:tt)*) => {
        $crate::device::cuda::launch::kernels!(@signatures [
            $($done,)*
            $crate::device::cuda::signature::Signature {
                name: stringify!($kernel),
                parameters: &[$((
                    stringify!($parameter),
                    <$kind as $crate::device::cuda::launch::Argument>::KIND,
                )),*],
            },
        ] $($rest)*)
    };
    (@variants [$($done:expr,)*] $kernel:ident [] $parameters:tt $($rest:tt)*) => {
        $crate::device::cuda::launch::kernels!(@signatures [$($done,)*] $($rest)*)
    };
    (@variants [$($done:expr,)*] $kernel:ident [$variant:tt $($more:tt)*]
        ($($parameter:ident: $kind:ty),*) $($rest:tt)*) => {
        $crate::device::cuda::launch::kernels!(@variants [
            $($done,)*
            $crate::device::cuda::signature::Signature {
                name: concat!(stringify!($kernel), stringify!($variant)),
                parameters: &[$((
                    stringify!($parameter),
                    <$kind as $crate::device::cuda::launch::Argument>::KIND,
                )),*],
            },
        ] $kernel [$($more)*] ($($parameter: $kind),*) $($rest)*)
    };

    (@load $module:ident, $kernel:ident) => {
        $crate::device::cuda::launch::Kernel::load(
            &$module, stringify!($kernel), Self::SIGNATURES
        )?
    };
    (@load $module:ident, $kernel:ident [$($variant:tt)*]) => {
        $crate::device::cuda::launch::Variants(vec![$((
            stringify!($variant),
            $crate::device::cuda::launch::Kernel::load(
                &$module, concat!(stringify!($kernel), stringify!($variant)), Self::SIGNATURES
            )?,
        )),*])
    };

    (@method $kernel:ident ($($parameter:ident: $kind:ty),*)) => {
        #[allow(clippy::too_many_arguments, reason = "the kernel's own parameters")]
        pub(super) fn $kernel(
            &self,
            context: &$crate::device::cuda::context::Context,
            grid: $crate::device::cuda::launch::Grid,
            $($parameter: $kind),*
        ) -> Result<(), $crate::device::DeviceError> {
            let mut arguments = [$((&raw const $parameter).cast_mut().cast()),*];
            // SAFETY: the kinds of the parameters were compared when the kernel was loaded.
            unsafe { self.$kernel.launch(context, grid, &mut arguments) }
        }
    };
    (@method $kernel:ident [$($variant:tt)*] ($($parameter:ident: $kind:ty),*)) => {
        #[allow(clippy::too_many_arguments, reason = "the kernel's own parameters")]
        pub(super) fn $kernel(
            &self,
            variant: impl $crate::device::cuda::launch::Variant,
            context: &$crate::device::cuda::context::Context,
            grid: $crate::device::cuda::launch::Grid,
            $($parameter: $kind),*
        ) -> Result<(), $crate::device::DeviceError> {
            let kernel = self.$kernel.get(stringify!($kernel), variant)?;
            let mut arguments = [$((&raw const $parameter).cast_mut().cast()),*];
            // SAFETY: the kinds of the parameters were compared when the kernel was loaded.
            unsafe { kernel.launch(context, grid, &mut arguments) }
        }
    };
}
pub(super) use kernels;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::{
        CudaActivations, activation::ActivationKernels, attention::AttentionKernels,
        cache::CacheKernels, embedding::EmbeddingKernels, experts::ExpertKernels, images,
        latent::LatentKernels, linear::LinearKernels, linear::QuantKernels, norm::NormKernels,
        recurrent::RecurrentKernels, residual::ResidualKernels, rope::RopeKernels,
        sampling::SamplingKernels,
    };
    use std::collections::BTreeSet;

    const ALL: &[(&str, &[Signature])] = &[
        (ActivationKernels::FILE, ActivationKernels::SIGNATURES),
        (AttentionKernels::FILE, AttentionKernels::SIGNATURES),
        (CacheKernels::FILE, CacheKernels::SIGNATURES),
        (EmbeddingKernels::FILE, EmbeddingKernels::SIGNATURES),
        (ExpertKernels::FILE, ExpertKernels::SIGNATURES),
        (LatentKernels::FILE, LatentKernels::SIGNATURES),
        (LinearKernels::FILE, LinearKernels::SIGNATURES),
        (NormKernels::FILE, NormKernels::SIGNATURES),
        (QuantKernels::FILE, QuantKernels::SIGNATURES),
        (RecurrentKernels::FILE, RecurrentKernels::SIGNATURES),
        (ResidualKernels::FILE, ResidualKernels::SIGNATURES),
        (RopeKernels::FILE, RopeKernels::SIGNATURES),
        (SamplingKernels::FILE, SamplingKernels::SIGNATURES),
    ];

    /// Returns the name and the parameter names of each kernel in a source file. A macro may
    /// build the name with `##`, so it is a list of parts; a part in capitals stands for any
    /// text.
    fn sources(text: &str) -> Vec<(Vec<String>, Vec<String>)> {
        let text = text.replace('\\', " ");
        let starts = ["KERNEL(", "__global__ void __launch_bounds__("];
        let starts = starts.iter().flat_map(|start| {
            let found = text.match_indices(start);
            found.map(|(at, start)| &text[at + start.len()..])
        });
        let mut kernels = Vec::new();
        for rest in starts {
            let (_bounds, rest) = rest.split_once(')').unwrap();
            let Some((name, rest)) = rest.split_once('(') else {
                continue;
            };
            let list = rest.split_once(')').unwrap().0;
            let is_name = |c: char| c.is_alphanumeric() || c == '_' || c == '#';
            if !name.trim().chars().all(is_name) {
                continue;
            }
            let last_word = |parameter: &str| {
                let mut words = parameter.split(|c: char| !is_name(c));
                words.rfind(|word| !word.is_empty()).unwrap().to_owned()
            };
            let parts = name.trim().split("##").map(str::to_owned).collect();
            kernels.push((parts, list.split(',').map(last_word).collect()));
        }
        kernels
    }

    /// Matches `name` against the parts of a kernel's name and returns the number of characters
    /// that match literally, or `None` if the name does not match.
    fn matches(parts: &[String], name: &str) -> Option<usize> {
        let (part, others) = match parts {
            [] => return name.is_empty().then_some(0),
            [part, others @ ..] => (part, others),
        };
        if part.chars().all(|c| c.is_ascii_uppercase() || c == '_') {
            let ends = (0..=name.len()).rev();
            return ends.filter_map(|end| matches(others, &name[end..])).max();
        }
        let rest = matches(others, name.strip_prefix(part.as_str())?)?;
        Some(rest + part.len())
    }

    #[test]
    fn declared_parameters_match_the_sources() {
        for (file, signatures) in ALL {
            let path = format!("{}/kernels/{file}.cu", env!("CARGO_MANIFEST_DIR"));
            let text = std::fs::read_to_string(&path).unwrap();
            let kernels = sources(&text);
            assert!(!signatures.is_empty(), "{file} declares no kernel");
            for signature in *signatures {
                let found = kernels
                    .iter()
                    .filter_map(|(parts, names)| Some((matches(parts, signature.name)?, names)))
                    .max_by_key(|(literal, _)| *literal);
                let (_, names) = found.unwrap_or_else(|| panic!("{path}: no {}", signature.name));
                let declared: Vec<&str> =
                    signature.parameters.iter().map(|(name, _)| *name).collect();
                assert_eq!(*names, declared, "{path}: {}", signature.name);
            }
        }
    }

    #[test]
    fn the_images_hold_exactly_the_declared_kernels() {
        for activations in [CudaActivations::Bf16, CudaActivations::F16] {
            for (file, signatures) in ALL {
                let text = images::portable(file, activations.name());
                let text = text.unwrap_or_else(|| panic!("no image of {file}"));
                let text = std::str::from_utf8(text.strip_suffix(&[0]).unwrap()).unwrap();
                for signature in *signatures {
                    let kinds: Vec<_> =
                        signature.parameters.iter().map(|(_, kind)| *kind).collect();
                    assert_eq!(
                        images::parameters(text, signature.name),
                        Some(kinds),
                        "{file}: {}",
                        signature.name
                    );
                }
                let entries: BTreeSet<&str> = text
                    .split(".entry")
                    .skip(1)
                    .map(|rest| rest.trim_start().split('(').next().unwrap().trim())
                    .collect();
                let declared: BTreeSet<&str> = signatures.iter().map(|one| one.name).collect();
                assert_eq!(entries, declared, "{file}");
            }
        }
    }

    #[test]
    fn parameters_are_read_from_the_image() {
        use ParameterKind::*;
        let text = ".visible .entry first(\n.param .u64 .ptr .align 1 first_param_0,\n\
                    .param .f32 first_param_1)\n.maxntid 128\n{}\n.visible .entry second()\n\
                    .visible .entry third(.param .align 8 .b8 third_param_0[16])";
        assert_eq!(
            images::parameters(text, "first"),
            Some(vec![Pointer, Float])
        );
        assert_eq!(images::parameters(text, "second"), Some(vec![]));
        assert_eq!(images::parameters(text, "third"), None);
        assert_eq!(images::parameters(text, "fir"), None);
    }
}
