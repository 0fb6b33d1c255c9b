//! cuBLASLt for large dense products, if it is requested and installed.
//!
//! cuBLASLt chooses its own order of addition, depending on the shape. Results may then depend
//! on the batch, and float16 results beyond 65504 become infinite, so it is off by default.

use super::context::Context;
use super::error::failed;
use super::memory::{Buffer, Ptr};
use super::options::{CudaActivations, CudaOptions};
use crate::device::DeviceError;
use cudarc::cublaslt::{result, sys};
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

/// The loaded library, with the plans made so far.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    activations: CudaActivations,
    workspace: Buffer,
    plans: HashMap<Shape, Plan>,
}

/// Bytes of scratch memory for cuBLASLt: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

impl Blas {
    /// Minimum number of rows. Smaller products use quell's own kernels.
    pub(super) const LEAST_ROWS: usize = 128;

    /// Fails with [`DeviceError::Unavailable`] if the library is not installed.
    pub(super) fn new(context: &Context, options: &CudaOptions) -> Result<Self, DeviceError> {
        // SAFETY: this only loads the library, if there is one.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::Unavailable {
                device: format!("cuda:{}", options.device),
                reason: "cuBLASLt was requested, but libcublasLt.so.12 is not on the library path"
                    .to_owned(),
            });
        }
        let workspace = context.allocate(WORKSPACE, "cuBLASLt's workspace")?;
        Ok(Self {
            handle: check(result::create_handle())?,
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
            let plan = Plan::new(self.handle, self.activations, shape)?;
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
        let outcome = unsafe {
            result::matmul(
                self.handle,
                plan.product.raw,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                pointer(weight),
                plan.weight.raw,
                pointer(x),
                plan.x.raw,
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
        check(outcome)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: the handle was created by `new` and is destroyed once, after everything that
        // was created with it.
        if let Err(error) = unsafe { result::destroy_handle(self.handle) } {
            tracing::error!(%error, "could not destroy a cuBLASLt handle");
        }
    }
}

/// A descriptor, which is destroyed when this is dropped.
struct Descriptor<T: Copy> {
    raw: T,
    destroy: unsafe fn(T) -> Result<(), result::CublasError>,
}

impl<T: Copy> Descriptor<T> {
    /// Takes over a descriptor that was just created, to be destroyed with `destroy`.
    fn of(
        created: Result<T, result::CublasError>,
        destroy: unsafe fn(T) -> Result<(), result::CublasError>,
    ) -> Result<Self, DeviceError> {
        let raw = check(created)?;
        Ok(Self { raw, destroy })
    }
}

impl<T: Copy> Drop for Descriptor<T> {
    fn drop(&mut self) {
        // SAFETY: `of` has got the descriptor with the function for its kind; it is destroyed
        // once, and the library has copied what work in progress needs.
        if let Err(error) = unsafe { (self.destroy)(self.raw) } {
            tracing::error!(%error, "could not destroy a cuBLASLt descriptor");
        }
    }
}

/// Descriptors for one shape, and the algorithm that the library proposes for it.
struct Plan {
    product: Descriptor<sys::cublasLtMatmulDesc_t>,
    weight: Descriptor<sys::cublasLtMatrixLayout_t>,
    x: Descriptor<sys::cublasLtMatrixLayout_t>,
    out: Descriptor<sys::cublasLtMatrixLayout_t>,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(
        handle: sys::cublasLtHandle_t,
        activations: CudaActivations,
        shape: Shape,
    ) -> Result<Self, DeviceError> {
        let activation = match activations {
            CudaActivations::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            CudaActivations::F16 => sys::cudaDataType_t::CUDA_R_16F,
        };
        let float = sys::cudaDataType_t::CUDA_R_32F;
        let result_type = if shape.out_full { float } else { activation };
        let (rows, outputs, inputs) =
            (shape.rows as u64, shape.outputs as u64, shape.inputs as u64);
        let layout = |kind, rows, columns, stride: usize| {
            let created = result::create_matrix_layout(kind, rows, columns, stride as i64);
            Descriptor::of(created, result::destroy_matrix_layout)
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let product = Descriptor::of(
            result::create_matmul_desc(compute, float),
            result::destroy_matmul_desc,
        )?;
        let weight = layout(activation, inputs, outputs, shape.inputs)?;
        let x = layout(activation, inputs, rows, shape.inputs)?;
        let out = layout(result_type, outputs, rows, shape.out_stride)?;
        // CUBLAS_OP_T, from a header for which cudarc has no bindings here.
        let transposed = 1i32;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the descriptor was just created, and the attribute is a 32-bit integer.
        check(unsafe {
            let value = (&raw const transposed).cast();
            result::set_matmul_desc_attribute(product.raw, attribute, value, size_of::<i32>())
        })?;
        let preference = Descriptor::of(result::create_matmul_pref(), result::destroy_matmul_pref)?;
        let most =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the descriptor was just created, and the attribute is a `size_t`.
        check(unsafe {
            let value = (&raw const WORKSPACE_BYTES).cast();
            result::set_matmul_pref_attribute(preference.raw, most, value, size_of::<usize>())
        })?;
        // SAFETY: the handle and the descriptors are alive.
        let heuristic = check(unsafe {
            result::get_matmul_algo_heuristic(
                handle,
                product.raw,
                weight.raw,
                x.raw,
                out.raw,
                out.raw,
                preference.raw,
            )
        })?;
        Ok(Self {
            product,
            weight,
            x,
            out,
            algorithm: heuristic.algo,
        })
    }
}

static WORKSPACE_BYTES: usize = WORKSPACE;

fn check<T>(outcome: Result<T, result::CublasError>) -> Result<T, DeviceError> {
    outcome.map_err(|error| failed("linear", format!("cuBLASLt: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        static DESTROYED: Cell<u32> = const { Cell::new(0) };
    }

    unsafe fn destroy(number: u32) -> Result<(), result::CublasError> {
        DESTROYED.set(DESTROYED.get() + number);
        Ok(())
    }

    #[test]
    fn descriptors_are_destroyed_once_if_a_later_one_cannot_be_created() {
        let make = |last: Result<u32, result::CublasError>| -> Result<_, DeviceError> {
            let first = Descriptor::of(Ok(1), destroy)?;
            let second = Descriptor::of(Ok(10), destroy)?;
            let last = Descriptor::of(last, destroy)?;
            Ok((first, second, last))
        };
        let failure = result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED);
        let error = make(Err(failure)).err().expect("it is refused");
        assert!(error.to_string().contains("cuBLASLt"), "{error}");
        assert_eq!(DESTROYED.take(), 11);
        let made = make(Ok(100)).expect("it is made");
        assert_eq!(DESTROYED.get(), 0);
        drop(made);
        assert_eq!(DESTROYED.take(), 111);
    }
}
