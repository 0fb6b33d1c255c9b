//! TLS for the program's own HTTP clients.

/// Gives reqwest, which comes without one here, its provider of cryptography. Where there
/// is one already, it stays.
pub fn provide() {
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
}
