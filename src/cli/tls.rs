//! TLS for the program's own HTTP clients.

/// Installs a cryptography provider for reqwest, which is built without one. A provider
/// that is already installed stays.
pub fn provide() {
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
}
