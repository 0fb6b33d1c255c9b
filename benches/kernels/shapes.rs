//! Model shapes whose operations are measured.

use quell::internals::device::{HeadShape, RouterScore, Values};

/// Tokens per KV cache block.
pub const BLOCK: usize = 16;

/// A model's dimensions, and the batch sizes at which its operations are measured.
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub inner: usize,
    pub heads: HeadShape,
    pub vocabulary: usize,
    /// Row counts: decode steps, and a prefill as the last entry.
    pub rows: &'static [usize],
    /// Decode steps, as pairs of the number of sequences and the cached tokens per sequence.
    pub decodes: &'static [(usize, usize)],
    /// Prefills of one sequence, as pairs of new tokens and cached tokens.
    pub prefills: &'static [(usize, usize)],
}

const ROWS: &[usize] = &[1, 8, 64, 256, 2048];
const DECODES: &[(usize, usize)] = &[(1, 1024), (1, 8192), (8, 1024), (64, 1024), (256, 512)];
const PREFILLS: &[(usize, usize)] = &[(2048, 0), (512, 7680)];

pub const MODELS: &[Shape] = &[
    Shape {
        name: "llama-3.1-8b",
        hidden: 4096,
        inner: 14336,
        heads: HeadShape {
            q_heads: 32,
            kv_heads: 8,
            head_dim: 128,
            values: Values::BesideKeys,
        },
        vocabulary: 128_256,
        rows: ROWS,
        decodes: DECODES,
        prefills: PREFILLS,
    },
    Shape {
        name: "llama-3.2-1b",
        hidden: 2048,
        inner: 8192,
        heads: HeadShape {
            q_heads: 32,
            kv_heads: 8,
            head_dim: 64,
            values: Values::BesideKeys,
        },
        vocabulary: 128_256,
        rows: ROWS,
        decodes: DECODES,
        prefills: PREFILLS,
    },
];

/// The model and the batches that matter most, for a minute on a GPU.
pub const SHORT: &[Shape] = &[Shape {
    rows: &[1, 64, 2048],
    decodes: &[(1, 8192), (64, 1024)],
    prefills: &[(2048, 0)],
    ..MODELS[0]
}];

/// Shapes that are small enough for an interpreter.
pub const SMALL: &[Shape] = &[Shape {
    name: "small",
    hidden: 256,
    inner: 256,
    heads: HeadShape {
        q_heads: 4,
        kv_heads: 2,
        head_dim: 64,
        values: Values::BesideKeys,
    },
    vocabulary: 512,
    rows: &[1, 4, 20],
    decodes: &[(1, 24), (4, 40)],
    prefills: &[(24, 0), (8, 24)],
}];

/// Dimensions of a layer of experts.
pub struct ExpertShape {
    pub name: &'static str,
    pub hidden: usize,
    /// Width of an expert.
    pub width: usize,
    /// Number of experts.
    pub count: usize,
    /// Number of experts per row.
    pub top_k: usize,
    /// How experts are weighted.
    pub score: RouterScore,
}

pub const EXPERTS: ExpertShape = ExpertShape {
    name: "qwen3-30b-a3b",
    hidden: 2048,
    width: 768,
    count: 128,
    top_k: 8,
    score: RouterScore::Softmax,
};

pub const SMALL_EXPERTS: ExpertShape = ExpertShape {
    name: "small",
    hidden: 64,
    width: 32,
    count: 4,
    top_k: 2,
    score: RouterScore::Softmax,
};
