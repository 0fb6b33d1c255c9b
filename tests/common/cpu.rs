//! Helpers for the tests of the CPU device: random numbers, operands and options.

use quell::internals::device::cpu::{CpuDevice, CpuLinear, CpuTensor};
use quell::internals::device::*;
use quell::internals::weights::{DType, quant};
use quell::{Activations, CpuOptions, KvType, SimdLevel};

/// A xorshift generator, which gives the same numbers on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() >> 33) as usize % end
    }

    /// Returns a number between −1 and 1.
    pub fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }
}

/// Returns the instruction sets that this machine supports, best first.
pub fn levels() -> Vec<SimdLevel> {
    let all = [SimdLevel::Avx512, SimdLevel::Avx2, SimdLevel::Portable];
    let present = |level: &SimdLevel| {
        CpuDevice::new(&CpuOptions {
            simd: *level,
            threads: Some(1),
            ..Default::default()
        })
        .is_ok()
    };
    all.into_iter().filter(present).collect()
}

pub fn device(simd: SimdLevel, threads: usize, activations: Activations) -> CpuDevice {
    let options = CpuOptions {
        threads: Some(threads),
        simd,
        activations,
        kv: KvType::Auto,
        ..CpuOptions::default()
    };
    CpuDevice::new(&options).unwrap()
}

pub fn tensor(device: &mut CpuDevice, columns: usize, values: &[f32]) -> CpuTensor {
    let rows = values.len() / columns;
    let mut tensor = device.allocate(rows, columns, Precision::Full).unwrap();
    for (row, values) in values.chunks_exact(columns).enumerate() {
        tensor.row_mut(row).copy_from_slice(values);
    }
    tensor
}

pub fn values(tensor: &CpuTensor, rows: usize) -> Vec<f32> {
    (0..rows).flat_map(|row| tensor.row(row).to_vec()).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Returns random weights in a file's format, with scales of a sensible size.
pub fn weights(random: &mut Random, dtype: DType, rows: usize, columns: usize) -> Vec<u8> {
    let count = dtype.bytes_for(columns).unwrap() * rows;
    let half = |value: f32| half::f16::from_f32(value).to_le_bytes();
    match dtype {
        DType::F32 => random
            .numbers(rows * columns)
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect(),
        DType::F16 => random
            .numbers(rows * columns)
            .iter()
            .flat_map(|v| half(*v))
            .collect(),
        DType::BF16 => random
            .numbers(rows * columns)
            .iter()
            .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
            .collect(),
        _ => {
            let mut data: Vec<u8> = (0..count).map(|_| random.bits() as u8).collect();
            let scales: &[usize] = match dtype {
                DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
                DType::Q2K => &[80, 82],
                DType::Q3K => &[108],
                DType::Q6K => &[208],
                DType::Tq1_0 => &[52],
                DType::Tq2_0 => &[64],
                DType::Mxfp4 => &[],
                _ => &[0],
            };
            for block in data.chunks_exact_mut(dtype.block_bytes()) {
                for &at in scales {
                    block[at..at + 2].copy_from_slice(&half(random.number() * 0.01));
                }
                if dtype == DType::Mxfp4 {
                    // Scales between 2 to the power of -12 and of -5.
                    block[0] = 116 + block[0] % 8;
                }
            }
            data
        }
    }
}

pub fn dequantized(dtype: DType, data: &[u8], elements: usize) -> Vec<f32> {
    let mut out = vec![0.0; elements];
    quant::dequantize(dtype, data, &mut out);
    out
}

pub fn linear(
    device: &mut CpuDevice,
    dtype: DType,
    rows: usize,
    columns: usize,
    data: &[u8],
) -> CpuLinear {
    let part = WeightRows {
        dtype,
        rows,
        columns,
        data,
        order: RowOrder::AsStored,
    };
    device
        .load_linear(&LinearSpec {
            parts: vec![part],
            bias: None,
        })
        .unwrap()
}

/// Computes `W x` for each row of `x`.
pub fn multiply(device: &mut CpuDevice, weight: &CpuLinear, x: &[f32]) -> Vec<f32> {
    let x = tensor(device, weight.columns(), x);
    let rows = x.rows();
    let mut out = device
        .allocate(rows, weight.rows(), Precision::Full)
        .unwrap();
    device.linear(&x, weight, rows, &mut out).unwrap();
    values(&out, rows)
}

/// Computes the exact GELU, with the series of the error function all of whose terms are positive.
pub fn gelu(x: f64) -> f64 {
    let z = x.abs() / 2f64.sqrt();
    let (mut term, mut sum) = (z, z);
    for n in 1..400 {
        term *= 2.0 * z * z / f64::from(2 * n + 1);
        sum += term;
    }
    let erf = match z < 6.0 {
        true => 2.0 / std::f64::consts::PI.sqrt() * (-z * z).exp() * sum,
        false => 1.0,
    };
    x / 2.0 * (1.0 + erf.copysign(x))
}
