//! cuBLASLt for large dense products, where it is asked for and installed.
//!
//! It chooses its own order of addition, which depends on the shape: with it, results
//! may depend on the batch, and float16 results beyond 65504 become infinite. Hence it
//! is an option, off by default.

use super::context::Context;
use super::error::failed;
use super::memory::{Buffer, Ptr};
use super::options::{CudaActivations, CudaOptions};
use crate::device::DeviceError;
use cudarc::cublaslt::{result, sys};
use std::collections::HashMap;
use std::ffi::c_void;

/// What a plan is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// Elements from one row of the result to the next.
    pub(super) out_stride: usize,
    /// Whether the result is float32.
    pub(super) out_full: bool,
}

/// The library, with the plans that were made so far.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    activations: CudaActivations,
    workspace: Buffer,
    plans: HashMap<Shape, Plan>,
}

/// Bytes that cuBLASLt may use beside the operands, as NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

impl Blas {
    /// Products of fewer rows are left to the kernels.
    pub(super) const LEAST_ROWS: usize = 128;

    /// `Unavailable` when the library is not there.
    pub(super) fn new(context: &Context, options: &CudaOptions) -> Result<Self, DeviceError> {
        // SAFETY: loads the library if there is one; that has no other effect.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::Unavailable {
                device: format!("cuda:{}", options.device),
                reason: "cuBLASLt was asked for, but libcublasLt.so.12 is not on the loader's path"
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

    /// `out = x · weightᵀ`, row-major, on the compute stream.
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
        // To the library, which is column-major, the weights are an `inputs × outputs` matrix to
        // be transposed, x is `inputs × rows` and the result `outputs × rows`.
        // SAFETY: the handle and the plan's descriptors live; the operands are as large as the
        // shape says; the workspace is used by this stream only.
        let outcome = unsafe {
            result::matmul(
                self.handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                pointer(weight),
                plan.weight,
                pointer(x),
                plan.x,
                pointer(out),
                plan.out,
                pointer(out).cast_mut(),
                plan.out,
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
        // SAFETY: made by `new`, destroyed once, after all that was made with it.
        if let Err(error) = unsafe { result::destroy_handle(self.handle) } {
            tracing::error!(%error, "a cuBLASLt handle could not be given back");
        }
    }
}

/// Descriptors of one shape, and the algorithm that the library proposes for it.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
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
            check(result::create_matrix_layout(
                kind,
                rows,
                columns,
                stride as i64,
            ))
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // Descriptors leak only if a later one cannot be made, and then the step fails.
        let product = check(result::create_matmul_desc(compute, float))?;
        let weight = layout(activation, inputs, outputs, shape.inputs)?;
        let x = layout(activation, inputs, rows, shape.inputs)?;
        let out = layout(result_type, outputs, rows, shape.out_stride)?;
        // CUBLAS_OP_T, of a header that cudarc has no part of here.
        let transposed = 1i32;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the descriptor was just made; the attribute is a 32-bit integer.
        check(unsafe {
            let value = (&raw const transposed).cast();
            result::set_matmul_desc_attribute(product, attribute, value, size_of::<i32>())
        })?;
        let preference = check(result::create_matmul_pref())?;
        let most =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the descriptors were just made; the preference's attribute is a `size_t`, and
        // the preference is destroyed once.
        let heuristic = unsafe {
            let value = (&raw const WORKSPACE_BYTES).cast();
            result::set_matmul_pref_attribute(preference, most, value, size_of::<usize>())
                .and_then(|()| {
                    result::get_matmul_algo_heuristic(
                        handle, product, weight, x, out, out, preference,
                    )
                })
                .and_then(|found| result::destroy_matmul_pref(preference).map(|()| found))
        };
        Ok(Self {
            product,
            weight,
            x,
            out,
            algorithm: check(heuristic)?.algo,
        })
    }
}

static WORKSPACE_BYTES: usize = WORKSPACE;

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; the library has copied what running work needs.
        let outcomes = unsafe {
            [
                result::destroy_matmul_desc(self.product),
                result::destroy_matrix_layout(self.weight),
                result::destroy_matrix_layout(self.x),
                result::destroy_matrix_layout(self.out),
            ]
        };
        for error in outcomes.into_iter().filter_map(Result::err) {
            tracing::error!(%error, "a cuBLASLt descriptor could not be given back");
        }
    }
}

fn check<T>(outcome: Result<T, result::CublasError>) -> Result<T, DeviceError> {
    outcome.map_err(|error| failed("linear", format!("cuBLASLt: {error}")))
}
