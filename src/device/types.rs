//! The types that several parts of a device share.

/// Types of a device that several of its parts use. A type that only one part uses is declared
/// by that part.
pub trait DeviceTypes: Sized + 'static {
    /// A matrix of activations.
    type Tensor;
    /// A loaded vector of float32 numbers, such as the weight of a norm.
    type Vector;
    /// A loaded [`LinearSpec`](super::LinearSpec).
    type Linear;
    /// The KV cache of all layers.
    type Cache;
}
