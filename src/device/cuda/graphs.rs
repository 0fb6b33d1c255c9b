//! Decode steps recorded as CUDA graphs, one a size, and replayed.
