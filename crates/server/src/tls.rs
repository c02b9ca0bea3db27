//! TLS: a certificate and its key out of files, and how a connection is greeted with them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

use crate::keys::warn_of_readers;

/// What a server shows of itself, and what it takes: TLS 1.2 and 1.3 with rustls' own choices, and HTTP/1.1.
#[derive(Clone)]
pub struct Tls(Arc<ServerConfig>);

/// Why there is no certificate to show.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} holds no {what} in PEM form: {source}")]
    Pem { path: PathBuf, what: &'static str, source: pem::Error },
    #[error("the certificate in {cert} with the key in {key} cannot be used: {source}")]
    Unusable { cert: PathBuf, key: PathBuf, source: rustls::Error },
}

impl Tls {
    /// Reads a certificate with those that vouch for it, and its private key.
    ///
    /// # Errors
    /// A file that cannot be read or holds something else, and a key that belongs to another certificate.
    pub fn read(cert: &Path, key: &Path) -> Result<Tls, TlsError> {
        let no = |path: &Path, what| {
            let path = path.to_path_buf();
            move |source| TlsError::Pem { path, what, source }
        };
        let text = bytes(cert)?;
        let chain: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(no(cert, "certificate"))?;
        if chain.is_empty() {
            return Err(no(cert, "certificate")(pem::Error::NoItemsFound));
        }
        let private = PrivateKeyDer::from_pem_slice(&bytes(key)?).map_err(no(key, "private key"))?;
        warn_of_readers(key);
        let unusable = |source| TlsError::Unusable { cert: cert.to_path_buf(), key: key.to_path_buf(), source };
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_no_client_auth()
            .with_single_cert(chain, private)
            .map_err(unusable)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Tls(Arc::new(config)))
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.0.clone())
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

fn bytes(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Io { path: path.to_path_buf(), source })
}
