//! HTTPS clients that go away, with or without closing the TLS session.

use super::variants::{After, Stage, endless};
use super::{CUTS, Cut, nothing_is_open, options, reset, slow_engine, until};
use common::http::post;
use common::server::TestServer;
use quell::EngineConfig;
use quell::server::TlsFiles;
use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

type Client = StreamOwned<ClientConnection, TcpStream>;

/// Writes a certificate for localhost to `folder`, and returns it with a client configuration
/// that trusts it.
fn certificate(folder: &std::path::Path) -> (TlsFiles, Arc<ClientConfig>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let files = TlsFiles {
        certificate: folder.join("certificate.pem"),
        key: folder.join("key.pem"),
    };
    std::fs::write(&files.certificate, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (files, Arc::new(config))
}

fn open(address: SocketAddr, config: &Arc<ClientConfig>) -> Client {
    let name = ServerName::try_from("localhost").unwrap();
    let client = ClientConnection::new(Arc::clone(config), name).unwrap();
    StreamOwned::new(client, TcpStream::connect(address).unwrap())
}

/// Goes away. Returns the connection if it stays open.
fn leave(mut client: Client, cut: Cut) -> Option<Client> {
    match cut {
        // Without a TLS close, as when a process is killed.
        Cut::Close => None,
        Cut::Reset => {
            let socket = client.sock.try_clone().unwrap();
            drop(client);
            reset(socket);
            None
        }
        Cut::HalfClose => {
            client.conn.send_close_notify();
            client.flush().unwrap();
            client.sock.shutdown(Shutdown::Write).unwrap();
            Some(client)
        }
        Cut::Silence => Some(client),
    }
}

#[test]
fn a_disconnect_over_tls_cancels_the_request() {
    const LABEL: &str = "leave-tls";
    let folder = tempfile::tempdir().unwrap();
    let (files, config) = certificate(folder.path());
    let mut options = options();
    options.tls = Some(files);
    let (engine, slow) = slow_engine(EngineConfig::default(), LABEL);
    let server = TestServer::start(engine.clone(), options);
    let mut clients = Vec::new();
    for cut in CUTS {
        for after in After::ALL {
            // Nothing is written to the client, so the server can notice only the end of the
            // connection.
            let request = post("/v1/completions", endless(&engine, Stage::HeldBack, true));
            let mut client = open(server.address, &config);
            client.write_all(&request).unwrap();
            client.write_all(&after.bytes()).unwrap();
            client.flush().unwrap();
            clients.push((client, cut));
        }
    }
    let gone = clients.len() as u64;
    until(&engine, "all run", |stats| {
        stats.running as u64 == gone && stats.tokens_generated >= 8 * gone
    });
    let leave = |(client, cut)| leave(client, cut);
    let stayed: Vec<_> = clients.into_iter().filter_map(leave).collect();
    assert!(!stayed.is_empty());
    let stats = until(&engine, "no request is open", nothing_is_open);
    assert!(stats.is_idle(), "{stats:?}");
    assert_eq!(stats.outcomes.cancelled, gone, "{stats:?}");
    drop(slow);
}
