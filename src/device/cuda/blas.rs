//! cuBLASLt for large products, where it is present.
