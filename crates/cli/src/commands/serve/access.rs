//! Who may ask a server, and over what: keys, certificates, sites and names.

use std::net::SocketAddr;
use std::path::PathBuf;

use apr_server::{Keys, Server, Tls};

use super::log::LogArgs;
use crate::failure::{Result, usage};

/// Who is answered.
#[derive(clap::Args)]
#[command(next_help_heading = "Access")]
pub struct AccessArgs {
    /// Keys of those who are answered, one a line; SIGHUP reads it again. Only /health and the page's own files need none
    #[arg(long, env = "APR_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Keys of those who may look inside (x-apr-trace), one a line; they may do all else too
    #[arg(long, env = "APR_ADMIN_KEY_FILE", value_name = "FILE")]
    admin_key_file: Option<PathBuf>,
    /// Answer whoever reaches the address, without keys
    #[arg(long, env = "APR_INSECURE_NO_AUTH", conflicts_with = "api_key_file")]
    insecure_no_auth: bool,
    /// Serve HTTPS with this certificate (PEM, those that vouch for it behind it); SIGHUP reads it again
    #[arg(long, env = "APR_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, env = "APR_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Let this site's pages ask and read, as in https://app.example, or * for all; may be given several times
    #[arg(long, env = "APR_CORS_ORIGIN", value_name = "ORIGIN", value_delimiter = ',', value_parser = origin)]
    pub cors_origin: Vec<String>,
    /// Answer to this name in Host too, where the server listens on a loopback address behind a proxy that passes its own
    /// name on; may be given several times
    #[arg(long, env = "APR_ALLOWED_HOST", value_name = "NAME", value_delimiter = ',')]
    pub allowed_host: Vec<String>,
}

impl AccessArgs {
    pub fn keys(&self) -> Result<Keys> {
        Ok(Keys::read(self.api_key_file.as_deref(), self.admin_key_file.as_deref())?)
    }

    pub fn tls(&self) -> Result<Option<Tls>> {
        let files = self.tls_cert.as_ref().zip(self.tls_key.as_ref());
        Ok(files.map(|(cert, key)| Tls::read(cert, key)).transpose()?)
    }

    /// Refuses an address that others reach where nobody asks them for a key.
    pub fn check(&self, addr: SocketAddr) -> Result<()> {
        if addr.ip().to_canonical().is_loopback() || self.api_key_file.is_some() || self.insecure_no_auth {
            return Ok(());
        }
        Err(usage(format_args!(
            "{} can be reached from other machines, and there are no keys; give some with --api-key-file FILE, or answer \
             everybody with --insecure-no-auth",
            addr.ip()
        )))
    }

    /// Reads files of secrets again. Those in use stay where one is no good.
    pub fn reload(&self, server: &Server, log: &LogArgs) {
        match self.keys().and_then(|keys| Ok((keys, self.tls()?))) {
            Ok((keys, tls)) => {
                server.set_keys(keys);
                tls.into_iter().for_each(|tls| server.set_tls(tls));
                log.say(format_args!("read keys and certificate again"));
            }
            Err(e) => log.say(format_args!("warning: keys and certificate stay as they are: {}", e.error)),
        }
    }
}

/// An origin as browsers write it.
fn origin(text: &str) -> std::result::Result<String, String> {
    let is_site = |(scheme, host): (&str, &str)| !scheme.is_empty() && !host.is_empty() && !host.contains('/');
    let is_plain = text.bytes().all(|b| b.is_ascii_graphic());
    match text == "*" || is_plain && text.split_once("://").is_some_and(is_site) {
        true => Ok(text.to_string()),
        false => {
            Err("expected a scheme and a host and nothing behind them, as in https://app.example:8443, or *".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_has_no_path() {
        ["*", "https://app.example", "http://localhost:3000", "vscode-webview://x"]
            .iter()
            .for_each(|text| assert!(origin(text).is_ok(), "{text}"));
        ["", "app.example", "https://", "https://app.example/", "https://a b", "://x", "null"]
            .iter()
            .for_each(|text| assert!(origin(text).is_err(), "{text}"));
    }
}
