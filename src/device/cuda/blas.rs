//! cuBLASLt for large dense products, if it is requested and installed.
//!
//! cuBLASLt chooses its own order of addition, depending on the shape. Results may then depend
//! on the batch, and float16 results beyond 65504 become infinite, so it is off by default.

use super::context::Context;
use super::cublaslt::{self, CublasLt, Status};
use super::error::failed;
use super::memory::{Buffer, Ptr};
use super::options::{CudaActivations, CudaOptions};
use crate::device::DeviceError;
use std::collections::HashMap;
use std::ffi::c_void;

/// Shape of a product, for which a plan is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// Distance between rows of the result, in elements.
    pub(super) out_stride: usize,
    /// Whether the result is float32.
    pub(super) out_full: bool,
}

/// An instance of the library, with the plans made so far.
pub(super) struct Blas {
    library: &'static CublasLt,
    handle: *mut cublaslt::Instance,
    activations: CudaActivations,
    workspace: Buffer,
    plans: HashMap<Shape, Plan>,
}

/// Bytes of scratch memory for cuBLASLt: what NVIDIA recommends for Hopper.
static WORKSPACE: usize = 32 << 20;

impl Blas {
    /// Minimum number of rows. Smaller products use quell's own kernels.
    pub(super) const LEAST_ROWS: usize = 128;

    /// Fails with [`DeviceError::Unavailable`] if the library is not installed.
    pub(super) fn new(context: &Context, options: &CudaOptions) -> Result<Self, DeviceError> {
        let library = CublasLt::get().map_err(|reason| DeviceError::Unavailable {
            device: format!("cuda:{}", options.device),
            reason: format!("cuBLASLt was requested, but cannot be loaded: {reason}"),
        })?;
        let workspace = context.allocate(WORKSPACE, "cuBLASLt's workspace")?;
        // SAFETY: the context is current, since memory was just allocated in it.
        let handle = create(|to| unsafe { (library.create)(to) })?;
        Ok(Self {
            library,
            handle,
            activations: options.activations,
            workspace,
            plans: HashMap::new(),
        })
    }

    /// Enqueues `out = x · weightᵀ`, all row-major, on the compute stream.
    pub(super) fn multiply(
        &mut self,
        context: &Context,
        shape: Shape,
        x: Ptr,
        weight: Ptr,
        out: Ptr,
    ) -> Result<(), DeviceError> {
        if !self.plans.contains_key(&shape) {
            let plan = Plan::new(self.library, self.handle, self.activations, shape)?;
            self.plans.insert(shape, plan);
        }
        let Some(plan) = self.plans.get(&shape) else {
            return Err(failed("linear", "cuBLASLt has no plan"));
        };
        let (one, zero) = (1f32, 0f32);
        let pointer = |ptr: Ptr| ptr.raw() as *const c_void;
        // cuBLASLt is column-major: to it, the weights are an `inputs × outputs` matrix to
        // transpose, x is `inputs × rows`, and the result is `outputs × rows`.
        // SAFETY: the handle and the plan's descriptors are alive; the operands are as large as
        // the shape says; only this stream uses the workspace.
        let status = unsafe {
            (self.library.multiply)(
                self.handle,
                plan.product.raw,
                (&raw const one).cast(),
                pointer(weight),
                plan.weight.raw,
                pointer(x),
                plan.x.raw,
                (&raw const zero).cast(),
                pointer(out),
                plan.out.raw,
                pointer(out).cast_mut(),
                plan.out.raw,
                &raw const plan.algorithm,
                pointer(self.workspace.ptr()).cast_mut(),
                WORKSPACE,
                context.stream().cast(),
            )
        };
        check(status)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: the handle was created by `new` and is destroyed once, after everything that
        // was created with it.
        if let Err(error) = unsafe { (self.library.destroy)(self.handle) }.result() {
            tracing::error!(%error, "could not destroy a cuBLASLt handle");
        }
    }
}

/// A descriptor, which is destroyed when this is dropped.
struct Descriptor<T> {
    raw: *mut T,
    destroy: unsafe extern "C" fn(*mut T) -> Status,
}

impl<T> Descriptor<T> {
    /// Creates a descriptor with `make`, to be destroyed with `destroy`.
    fn new(
        make: impl FnOnce(*mut *mut T) -> Status,
        destroy: unsafe extern "C" fn(*mut T) -> Status,
    ) -> Result<Self, DeviceError> {
        let raw = create(make)?;
        Ok(Self { raw, destroy })
    }
}

impl<T> Drop for Descriptor<T> {
    fn drop(&mut self) {
        // SAFETY: `new` was given the function for this kind of descriptor; it is destroyed
        // once, and the library has copied what work in progress needs.
        if let Err(error) = unsafe { (self.destroy)(self.raw) }.result() {
            tracing::error!(%error, "could not destroy a cuBLASLt descriptor");
        }
    }
}

/// Descriptors for one shape, and the algorithm that the library proposes for it.
struct Plan {
    product: Descriptor<cublaslt::Product>,
    weight: Descriptor<cublaslt::Layout>,
    x: Descriptor<cublaslt::Layout>,
    out: Descriptor<cublaslt::Layout>,
    algorithm: cublaslt::Algorithm,
}

impl Plan {
    fn new(
        library: &CublasLt,
        handle: *mut cublaslt::Instance,
        activations: CudaActivations,
        shape: Shape,
    ) -> Result<Self, DeviceError> {
        let activation = match activations {
            CudaActivations::Bf16 => cublaslt::BFLOAT16,
            CudaActivations::F16 => cublaslt::FLOAT16,
        };
        let float = cublaslt::FLOAT32;
        let result_type = if shape.out_full { float } else { activation };
        let (rows, outputs, inputs) =
            (shape.rows as u64, shape.outputs as u64, shape.inputs as u64);
        let layout = |kind, rows, columns, stride: usize| {
            // SAFETY: the pointer is valid.
            let make =
                |to| unsafe { (library.create_layout)(to, kind, rows, columns, stride as i64) };
            Descriptor::new(make, library.destroy_layout)
        };
        let product = product(library)?;
        let weight = layout(activation, inputs, outputs, shape.inputs)?;
        let x = layout(activation, inputs, rows, shape.inputs)?;
        let out = layout(result_type, outputs, rows, shape.out_stride)?;
        let preference = preference(library)?;
        let (mut proposal, mut proposals) = (cublaslt::Proposal::EMPTY, 0);
        // SAFETY: the handle and the descriptors are alive, and there is room for one result.
        check(unsafe {
            (library.propose)(
                handle,
                product.raw,
                weight.raw,
                x.raw,
                out.raw,
                out.raw,
                preference.raw,
                1,
                &raw mut proposal,
                &raw mut proposals,
            )
        })?;
        if proposals == 0 {
            proposal.state = Status::NOT_SUPPORTED;
        }
        check(proposal.state)?;
        Ok(Self {
            product,
            weight,
            x,
            out,
            algorithm: proposal.algorithm,
        })
    }
}

/// Describes a product in float32 whose first matrix is transposed.
fn product(library: &CublasLt) -> Result<Descriptor<cublaslt::Product>, DeviceError> {
    let (compute, float) = (cublaslt::COMPUTE_FLOAT32, cublaslt::FLOAT32);
    // SAFETY: the pointer is valid.
    let make = |to| unsafe { (library.create_product)(to, compute, float) };
    let product = Descriptor::new(make, library.destroy_product)?;
    let value = &raw const cublaslt::TRANSPOSED;
    let (attribute, size) = (cublaslt::TRANSPOSE_FIRST, size_of::<i32>());
    // SAFETY: the descriptor was just created, and the attribute is a 32-bit integer.
    check(unsafe { (library.set_product)(product.raw, attribute, value.cast(), size) })?;
    Ok(product)
}

/// Describes which algorithms may be proposed: those for which the workspace is large enough.
fn preference(library: &CublasLt) -> Result<Descriptor<cublaslt::Preference>, DeviceError> {
    // SAFETY: the pointer is valid.
    let make = |to| unsafe { (library.create_preference)(to) };
    let preference = Descriptor::new(make, library.destroy_preference)?;
    let value = &raw const WORKSPACE;
    let (attribute, size) = (cublaslt::MOST_WORKSPACE, size_of::<usize>());
    // SAFETY: the descriptor was just created, and the attribute is a `size_t`.
    check(unsafe { (library.set_preference)(preference.raw, attribute, value.cast(), size) })?;
    Ok(preference)
}

/// Creates an object of the library, which `make` stores through the pointer.
fn create<T>(make: impl FnOnce(*mut *mut T) -> Status) -> Result<*mut T, DeviceError> {
    let mut made = std::ptr::null_mut();
    check(make(&raw mut made))?;
    Ok(made)
}

fn check(status: Status) -> Result<(), DeviceError> {
    let refused = |status| failed("linear", format!("cuBLASLt: {status}"));
    status.result().map_err(refused)
}
