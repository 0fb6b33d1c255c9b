//! The declared parameters of a kernel.

/// Kind of a kernel parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ParameterKind {
    /// A device address.
    Pointer,
    /// A `u32`.
    Unsigned,
    /// A `float`.
    Float,
}

/// A kernel declared with [`kernels!`](super::launch::kernels).
#[derive(Clone, Copy, Debug)]
pub(super) struct Signature {
    /// Name of the kernel's entry point in the image.
    pub(super) name: &'static str,
    /// Name and kind of each parameter.
    pub(super) parameters: &'static [(&'static str, ParameterKind)],
}
