//! cuBLASLt, which multiplies large matrices if the options request it.
//!
//! The virtual GPU brings a stand-in for it. The loader reads the library path when a process
//! starts, so that these tests run themselves again in a process whose path has the stand-in.

use common::cpu::Random;
use common::gpu::{self, Gpu};
use half::bf16;
use quell::internals::device::cuda::CudaDevice;
use quell::internals::device::*;
use quell::internals::weights::DType;
use quell::{CudaActivations, CudaOptions};
use std::process::Command;

const ROWS: usize = 130;
const OUTPUTS: usize = 16;
const INPUTS: usize = 48;

/// Set in the process whose library path has the stand-in.
const CHILD: &str = "QUELL_TEST_CUBLASLT";

/// Functions of cuBLASLt that can fail, in the order in which they are called first.
const FUNCTIONS: [&str; 8] = [
    "cublasLtCreate",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmul",
];
/// `CUBLAS_STATUS_ALLOC_FAILED`.
const ALLOC_FAILED: i32 = 3;

fn options(activations: CudaActivations) -> CudaOptions {
    CudaOptions {
        activations,
        blas: true,
        ..CudaOptions::default()
    }
}

/// Runs a test of this file in a process that finds the stand-in under `name`. Returns false in
/// that process, where the test itself has to run.
fn ran_in_child(test: &str, name: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return false;
    }
    let program = std::env::current_exe().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let library = program.with_file_name("libvirtual_gpu.so");
    std::os::unix::fs::symlink(library, folder.path().join(name)).unwrap();
    let output = Command::new(program)
        .args([&format!("blas::{test}"), "--exact"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env(CHILD, name)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{name}: {text}");
    assert!(text.contains("1 passed"), "{name}: {text}");
    true
}

/// Compares a product of many rows with its float64 value, in the type of the activations and
/// in float32.
fn multiply(device: &mut CudaDevice, activations: CudaActivations) -> Result<(), DeviceError> {
    let mut random = Random::new(31);
    let mut rounded = |count| -> Vec<f32> {
        let round = |number| bf16::from_f32(number).to_f32();
        random.numbers(count).into_iter().map(round).collect()
    };
    // Values that both types of activations can represent.
    let (weights, x) = (rounded(OUTPUTS * INPUTS), rounded(ROWS * INPUTS));
    let data: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
    let part = WeightRows {
        dtype: DType::F32,
        rows: OUTPUTS,
        columns: INPUTS,
        data: &data,
        order: RowOrder::AsStored,
    };
    let weight = device.load_linear(&LinearSpec {
        parts: vec![part],
        bias: None,
    })?;
    let x_tensor = device.tensor(INPUTS, Precision::Activation, &x)?;
    for precision in [Precision::Full, Precision::Activation] {
        let mut out = device.allocate(ROWS, OUTPUTS, precision)?;
        device.linear(&x_tensor, &weight, ROWS, &mut out)?;
        let epsilon = match (precision, activations) {
            (Precision::Full, _) => 1e-6,
            (Precision::Activation, CudaActivations::Bf16) => 2f64.powi(-8),
            (Precision::Activation, CudaActivations::F16) => 2f64.powi(-11),
        };
        let found = device.values(&out, ROWS)?;
        for (row, found) in x.chunks(INPUTS).zip(found.chunks(OUTPUTS)) {
            for (weights, &found) in weights.chunks(INPUTS).zip(found) {
                let products = weights.iter().zip(row).map(|(w, x)| f64::from(w * x));
                let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product| {
                    (sum + product, size + product.abs())
                });
                let error = (f64::from(found) - sum).abs();
                assert!(
                    error <= 2e-6 * size + 1.01 * epsilon * sum.abs(),
                    "{found} is not {sum}"
                );
            }
        }
    }
    Ok(())
}

fn calls(gpu: &Gpu, function: &str) -> u64 {
    let calls = gpu.calls();
    let found = calls.iter().find(|(name, _)| name == function);
    found.map_or(0, |(_, count)| *count)
}

#[test]
fn products_of_many_rows_agree_with_float64() {
    if !gpu::is_real() {
        let names = ["libcublasLt.so", "libcublasLt.so.12", "libcublasLt.so.13"];
        let test = "products_of_many_rows_agree_with_float64";
        if names.iter().all(|name| ran_in_child(test, name)) {
            return;
        }
    }
    let gpu = gpu::lock();
    for activations in [CudaActivations::Bf16, CudaActivations::F16] {
        let mut device = match CudaDevice::new(&options(activations)) {
            Ok(device) => device,
            Err(error) => {
                assert!(gpu::is_real(), "{error}");
                // The library is not installed on this machine.
                assert!(matches!(error, DeviceError::Unavailable { .. }), "{error}");
                assert!(error.to_string().contains("libcublasLt.so.13"), "{error}");
                return;
            }
        };
        multiply(&mut device, activations).unwrap();
    }
    if !gpu::is_real() {
        // A plan for each type of the result, for each type of activations.
        assert_eq!(calls(&gpu, "cublasLtMatmulAlgoGetHeuristic"), 4);
        assert_eq!(calls(&gpu, "cublasLtMatmul"), 4);
        assert_eq!(gpu.leaks(), [""; 0]);
    }
}

/// The virtual GPU reports a descriptor that is left over as a violation.
#[test]
fn a_failure_of_cublaslt_is_an_error_and_leaks_nothing() {
    let test = "a_failure_of_cublaslt_is_an_error_and_leaks_nothing";
    if gpu::is_real() || ran_in_child(test, "libcublasLt.so.13") {
        return; // a real library cannot be made to fail
    }
    let gpu = gpu::lock();
    let activations = CudaActivations::Bf16;
    for function in FUNCTIONS {
        gpu.reset();
        gpu.fail(function, 1, ALLOC_FAILED);
        let made = CudaDevice::new(&options(activations));
        let outcome = made.and_then(|mut device| multiply(&mut device, activations));
        let error = outcome.expect_err(function).to_string();
        assert!(
            error.contains("CUBLAS_STATUS_ALLOC_FAILED"),
            "{function}: {error}"
        );
        assert_eq!(gpu.waiting_failures(), 0, "{function}");
        let (violations, leaks) = (gpu.violations(), gpu.leaks());
        assert!(
            violations.is_empty() && leaks.is_empty(),
            "{function}: {violations:?} {leaks:?}"
        );
    }
}
