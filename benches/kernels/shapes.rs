//! The models whose operations are measured.

use quell::device::HeadShape;

/// Tokens a block of the cache.
pub const BLOCK: usize = 16;

/// A model's sizes, and in how many rows its operations are measured.
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub inner: usize,
    pub heads: HeadShape,
    pub vocabulary: usize,
    /// Rows of a decode step, and of a prefill last.
    pub rows: &'static [usize],
    /// Sequences and cached tokens of each in a decode step.
    pub decodes: &'static [(usize, usize)],
    /// New tokens and cached tokens of a sequence in prefill.
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
        },
        vocabulary: 128_256,
        rows: ROWS,
        decodes: DECODES,
        prefills: PREFILLS,
    },
];

/// What an interpreter gets through.
pub const SMALL: &[Shape] = &[Shape {
    name: "small",
    hidden: 256,
    inner: 256,
    heads: HeadShape {
        q_heads: 4,
        kv_heads: 2,
        head_dim: 64,
    },
    vocabulary: 512,
    rows: &[1, 4, 20],
    decodes: &[(1, 24), (4, 40)],
    prefills: &[(24, 0), (8, 24)],
}];
