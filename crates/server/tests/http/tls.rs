//! The server over TLS, with certificates that are made here.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::support::*;
use apr_server::{Settings, Tls};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

struct Certificate {
    folder: tempfile::TempDir,
    der: CertificateDer<'static>,
}

impl Certificate {
    fn new() -> Certificate {
        let folder = tempfile::tempdir().unwrap();
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_string()]).unwrap();
        std::fs::write(folder.path().join("cert"), made.cert.pem()).unwrap();
        std::fs::write(folder.path().join("key"), made.signing_key.serialize_pem()).unwrap();
        Certificate { folder, der: made.cert.der().clone() }
    }

    fn read(&self) -> Tls {
        Tls::read(&self.path("cert"), &self.path("key")).unwrap()
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// A client that trusts this certificate and no other.
    fn connect(&self, addr: SocketAddr) -> StreamOwned<ClientConnection, TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), stream)
    }
}

/// All that comes until the server ends the connection.
fn exchange(client: &mut (impl Read + Write), path: &str, body: &[u8]) -> std::io::Result<String> {
    let head =
        format!("POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}", body.len());
    client.write_all(&[head.as_bytes(), b"\r\n\r\n", body].concat())?;
    let mut text = String::new();
    client.read_to_string(&mut text)?;
    Ok(text)
}

const BODY: &[u8] = br#"{"prompt":"x","max_tokens":3,"ignore_eos":true,"stream":true}"#;

#[test]
fn answers_come_over_tls_and_connections_end_in_order() {
    let certificate = Certificate::new();
    let tls = Some(certificate.read());
    let server = start_with(Settings { tls, body_bytes: 1 << 20, ..Settings::default() }, |_| ());
    let mut client = certificate.connect(server.addr());
    let text = exchange(&mut client, "/v1/completions", BODY).expect("the stream is closed as TLS wants it");
    assert!(text.starts_with("HTTP/1.1 200") && text.contains("data: [DONE]"), "{text}");
    assert_eq!(client.conn.alpn_protocol(), Some(&b"http/1.1"[..]));
    // A body that nobody reads: the client gets to know why all the same.
    let text = exchange(&mut certificate.connect(server.addr()), "/v1/completions", &[b' '; 3 << 20]).unwrap();
    assert!(text.starts_with("HTTP/1.1 413"), "{text}");
    let stranger = Certificate::new();
    exchange(&mut stranger.connect(server.addr()), "/v1/completions", BODY).expect_err("it is another's certificate");
    server.set_tls(stranger.read());
    let text = exchange(&mut stranger.connect(server.addr()), "/v1/completions", BODY).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
}

#[test]
fn who_does_not_greet_is_cut_off() {
    let certificate = Certificate::new();
    let tls = Some(certificate.read());
    let settings = Settings { tls, head_time: Duration::from_millis(300), ..Settings::default() };
    let server = start_with(settings, |_| ());
    let mut silent = Client::connect(server.addr());
    assert_eq!(silent.line(), None, "who says nothing is told nothing");
    let mut noise = TcpStream::connect(server.addr()).unwrap();
    noise.write_all(b"\0\0\0 no greeting of TLS, and no method").unwrap();
    let mut answer = Vec::new();
    // Where the rest of what was sent is not read, the connection may end in a reset.
    _ = noise.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    // A head that is late is told so, over TLS.
    let mut late = certificate.connect(server.addr());
    late.write_all(b"GET /health HTTP/1.1\r\nhost: loc").unwrap();
    let mut text = String::new();
    late.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 408"), "{text}");
}

#[test]
fn who_speaks_plain_http_is_told_so() {
    let certificate = Certificate::new();
    let server = start_with(Settings { tls: Some(certificate.read()), ..Settings::default() }, |_| ());
    for method in ["GET", "POST"] {
        let mut client = Client::connect(server.addr());
        client.request(method, "/v1/completions", &[], BODY);
        let reply = client.reply();
        assert_eq!((reply.status, reply.header("connection")), (400, Some("close")), "{method}");
        assert_eq!(reply.text(), "Client sent an HTTP request to an HTTPS server.\n");
        assert_eq!(client.line(), None, "the connection ends");
    }
    let text = exchange(&mut certificate.connect(server.addr()), "/v1/completions", BODY).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
}

#[test]
fn files_that_are_no_certificate_are_named() {
    let (one, other) = (Certificate::new(), Certificate::new());
    let error = |cert: &Path, key: &Path| Tls::read(cert, key).unwrap_err().to_string();
    let e = error(&one.path("key"), &one.path("key"));
    assert!(e.contains("holds no certificate in PEM form"), "{e}");
    let e = error(&one.path("cert"), &one.path("cert"));
    assert!(e.contains("holds no private key in PEM form"), "{e}");
    let e = error(&one.path("cert"), &other.path("key"));
    assert!(e.contains("cannot be used"), "{e}");
    assert!(error(&one.path("nothing"), &one.path("key")).contains("nothing: "));
}
