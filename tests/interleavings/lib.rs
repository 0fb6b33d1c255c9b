//! Intentionally empty: the contents of this package are in its `tests/` directory.
