//! Typed kernel launches.
//!
//! [`kernels!`] declares the kernels of one `.cu` file with their parameters. When
//! they are loaded, number and kinds of the parameters are compared with those of
//! the image, so that a changed kernel is an error at start-up, not a wild read.

use super::context::Context;
use super::error;
use super::images::Module;
use super::memory::Ptr;
use crate::device::DeviceError;
use cudarc::driver::result;
use cudarc::driver::sys;
use std::cell::Cell;
use std::ffi::c_void;
use std::rc::Rc;

/// What a kernel takes in one parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ParameterKind {
    /// A device address.
    Pointer,
    /// A `u32`.
    Unsigned,
    /// A `float`.
    Float,
}

/// A Rust type that can be given to a kernel.
pub(super) trait Argument: Copy {
    /// The kind of the kernel's parameter.
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

/// A kernel as it is declared here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Signature {
    /// The entry's name.
    pub(super) name: &'static str,
    /// Name and kind of each parameter.
    pub(super) parameters: &'static [(&'static str, ParameterKind)],
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    blocks: [u32; 3],
    threads: [u32; 3],
    shared: u32,
}

impl Grid {
    /// `blocks` blocks of `threads` threads. Without blocks nothing is launched.
    pub(super) fn new(blocks: [u32; 3], threads: [u32; 3]) -> Self {
        let shared = 0;
        Self {
            blocks,
            threads,
            shared,
        }
    }

    /// With so many bytes of dynamic shared memory.
    pub(super) fn shared(self, bytes: u32) -> Self {
        let shared = bytes;
        Self { shared, ..self }
    }
}

/// Dynamic shared memory that a kernel has without asking for more.
const DEFAULT_SHARED: u32 = 48 << 10;

/// A kernel that was found in its image, with the parameters that were declared.
pub(super) struct Kernel {
    function: sys::CUfunction,
    name: &'static str,
    /// Dynamic shared memory that the kernel may have by now.
    allowed_shared: Cell<u32>,
    /// Keeps the code loaded.
    _module: Rc<Module>,
}

impl Kernel {
    /// A function of `module`, whose parameters were checked.
    pub(super) fn new(function: sys::CUfunction, name: &'static str, module: Rc<Module>) -> Self {
        Self {
            function,
            name,
            allowed_shared: Cell::new(DEFAULT_SHARED),
            _module: module,
        }
    }

    /// Enqueues the kernel on the compute stream.
    ///
    /// # Safety
    /// `arguments` point at values of the kinds that the kernel was loaded with.
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
            || format!("{blocks:?} blocks are more than a launch can have"),
        )?;
        if shared > self.allowed_shared.get() {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to the module that `self` holds.
            let allow = || unsafe {
                result::function::set_function_attribute(self.function, attribute, shared as i32)
            };
            context.call(self.name, allow)?;
            self.allowed_shared.set(shared);
        }
        let stream = context.compute.raw();
        let [x, y, z] = blocks;
        let [tx, ty, tz] = threads;
        // SAFETY: the function lives as its module; the caller vouches for the arguments, which
        // the driver copies before it returns.
        let launch = || unsafe {
            let (blocks, threads) = ((x, y, z), (tx, ty, tz));
            result::launch_kernel(self.function, blocks, threads, shared, stream, arguments)
        };
        context.call(self.name, launch)
    }
}

/// Which of the kernels of a family is meant: the end of its name.
pub(super) trait Variant: Copy + std::fmt::Display {
    /// Whether the kernel's name ends so.
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

/// Kernels with the same parameters, whose names differ in their end.
pub(super) struct Variants(pub(super) Vec<(&'static str, Kernel)>);

impl Variants {
    /// The kernel whose name ends in `variant`.
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
                format!("there is {family} {}", known.join(", ")),
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
/// makes a struct with `load(&Modules)` and a method a kernel, which takes the
/// context, a [`Grid`] and the arguments. `attend_hd[16, 32]` are two kernels,
/// `attend_hd16` and `attend_hd32`, behind one method whose first argument is the
/// variant: a `usize` or, for `linear_[q4_m16, q8_m16]`, a `&str`.
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
            /// The `.cu` file, and the name of its image.
            pub(super) const FILE: &'static str = $file;

            /// What is declared.
            pub(super) const SIGNATURES: &'static [$crate::device::cuda::launch::Signature] =
                &$crate::device::cuda::launch::kernels!(@signatures [] $(
                    $kernel $([$($variant)*])? ($($parameter: $kind),*)
                )*);

            /// Finds the kernels in their image and compares the parameters.
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
            $crate::device::cuda::launch::Signature {
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
            $crate::device::cuda::launch::Signature {
                name: concat!(stringify!($kernel), stringify!($variant)),
                parameters: &[$((
                    stringify!($parameter),
                    <$kind as $crate::device::cuda::launch::Argument>::KIND,
                )),*],
            },
        ] $kernel [$($more)*] ($($parameter: $kind),*) $($rest)*)
    };

    (@load $module:ident, $kernel:ident) => {
        $module.kernel(stringify!($kernel), Self::SIGNATURES)?
    };
    (@load $module:ident, $kernel:ident [$($variant:tt)*]) => {
        $crate::device::cuda::launch::Variants(vec![$((
            stringify!($variant),
            $module.kernel(concat!(stringify!($kernel), stringify!($variant)), Self::SIGNATURES)?,
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
        linear::LinearKernels, linear::QuantKernels, norm::NormKernels, rope::RopeKernels,
        sampling::SamplingKernels,
    };
    use std::collections::BTreeSet;

    const ALL: &[(&str, &[Signature])] = &[
        (ActivationKernels::FILE, ActivationKernels::SIGNATURES),
        (AttentionKernels::FILE, AttentionKernels::SIGNATURES),
        (CacheKernels::FILE, CacheKernels::SIGNATURES),
        (EmbeddingKernels::FILE, EmbeddingKernels::SIGNATURES),
        (ExpertKernels::FILE, ExpertKernels::SIGNATURES),
        (LinearKernels::FILE, LinearKernels::SIGNATURES),
        (NormKernels::FILE, NormKernels::SIGNATURES),
        (QuantKernels::FILE, QuantKernels::SIGNATURES),
        (RopeKernels::FILE, RopeKernels::SIGNATURES),
        (SamplingKernels::FILE, SamplingKernels::SIGNATURES),
    ];

    /// Names of the parameters of the kernels in a source. A kernel's name may be made
    /// by a macro: its parts are those between `##`, and one in capitals is any text.
    fn sources(text: &str) -> Vec<(Vec<String>, Vec<String>)> {
        let text = text.replace('\\', " ");
        let starts = ["KERNEL ", "__global__ void "];
        let starts = starts.iter().flat_map(|start| {
            let found = text.match_indices(start);
            found.map(|(at, start)| &text[at + start.len()..])
        });
        let mut kernels = Vec::new();
        for rest in starts {
            let mut rest = rest.trim_start();
            if let Some(bounds) = rest.strip_prefix("__launch_bounds__(") {
                rest = bounds.split_once(')').unwrap().1.trim_start();
            }
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

    /// How many characters of `name` a name of a source gives literally; `None` if it
    /// is another one.
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
    fn the_sources_name_the_parameters_as_they_are_declared() {
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
