//! PTX: reading it, and running it with every access checked.
