//! The operations that are counted: a few of each kind, so that all of them take less than a
//! minute on the virtual GPU.

use crate::bench::Bench;
use crate::shapes::{EXPERTS, ExpertShape, MODELS, Shape};
use crate::{attention, linear, recurrent, rows};
use quell::internals::device::{DeviceError, RouterScore, SigmoidRouting};
use quell::internals::weights::DType;

const LLAMA: Shape = Shape {
    rows: &[1, 64],
    decodes: &[(1, 1024), (8, 512)],
    prefills: &[(256, 0), (128, 384)],
    ..MODELS[0]
};

/// Row counts of which each uses another tile for weights of 4 bits.
const FEW_BITS: Shape = Shape {
    rows: &[1, 16, 64],
    ..LLAMA
};

/// Row counts of which each uses another tile.
const TILES: Shape = Shape {
    rows: &[1, 64, 384],
    ..LLAMA
};

const FEWER_EXPERTS: ExpertShape = ExpertShape {
    name: "qwen3-30b-a3b, fewer experts,",
    count: 32,
    top_k: 2,
    ..EXPERTS
};

/// Routers with many experts, which are so small that choosing them takes most of the time.
const MANY_EXPERTS: [ExpertShape; 2] = [
    ExpertShape {
        name: "qwen3-next, small experts,",
        hidden: 64,
        width: 32,
        count: 512,
        top_k: 10,
        score: RouterScore::Softmax,
    },
    ExpertShape {
        name: "deepseek-v3, small experts,",
        hidden: 64,
        width: 32,
        count: 256,
        top_k: 8,
        score: RouterScore::Sigmoid(SigmoidRouting {
            scale: 2.5,
            groups: 8,
            top_groups: 4,
            scales_input: false,
        }),
    },
];

pub fn run(bench: &mut Bench) -> Result<(), DeviceError> {
    let name = "attention out";
    let size = (LLAMA.hidden, LLAMA.heads.q_columns());
    for dtype in [DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4K] {
        let shape = match dtype {
            DType::BF16 => TILES,
            DType::Q4_0 | DType::Q4K => FEW_BITS,
            _ => LLAMA,
        };
        let kernel = format!("linear {}", dtype.name());
        if bench.wants(&kernel) {
            linear::product(bench, &shape, &kernel, name, size, dtype)?;
        }
    }
    rows::run(bench, &LLAMA)?;
    attention::run(bench, &LLAMA)?;
    rows::sampling(bench, &LLAMA, &[1, 4])?;
    linear::experts(bench, &FEWER_EXPERTS, &[1])?;
    for shape in &MANY_EXPERTS {
        linear::experts(bench, shape, &[1])?;
    }
    recurrent::run(bench)
}
