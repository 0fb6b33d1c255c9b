//! Whole tokenizers, small ones and hostile ones.
