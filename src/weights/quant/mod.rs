//! ggml's quantised block formats, one file each, seen as integers with scales.
//!
//! Every format is read as groups of 16 or 32 consecutive weights of one row:
//! `weight = scale · (code − zero) + min`, where `code` is an unsigned integer of
//! at most 4 or 8 bits, `zero` is the format's constant, and `scale` and `min`
//! belong to the group. Devices repack from this form; [`dequantize`] is its
//! definition in float32.
