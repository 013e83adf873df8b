//! A connection between page server and client: TCP, or TLS over it; and what either side shows that it is who it is.

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

use super::Token;
use crate::sys;

/// What the other side is asked for, and what it is shown: one of the two at the least.
#[derive(Clone, Debug)]
pub struct Credentials {
    pub token: Option<Token>,
    pub tls: Option<Tls>,
}

impl From<Token> for Credentials {
    fn from(token: Token) -> Credentials {
        Credentials { token: Some(token), tls: None }
    }
}

impl Credentials {
    /// The token; where there is none, one that everyone has, as TLS says who is who.
    pub(super) fn token(&self) -> Token {
        self.token.clone().unwrap_or(Token(Vec::new()))
    }
}

/// A certificate with its key, and the authority whose certificates are accepted of the other side (TLS 1.3).
#[derive(Clone)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    /// Reads PEM files.
    ///
    /// # Errors
    /// In words: which file cannot be read, or is not what it should be; a key that others may read.
    pub fn read(certificate: &Path, key: &Path, authority: &Path) -> Result<Tls, String> {
        let said = |path: &Path, what: String| format!("{}: {what}", path.display());
        let chain = certificates(certificate)?;
        let found = fs::metadata(key).map_err(|error| said(key, error.to_string()))?;
        if found.is_file() && found.mode() & 0o077 != 0 {
            return Err(said(key, "others may read this key; chmod 600 it".into()));
        }
        let secret =
            PrivateKeyDer::from_pem_file(key).map_err(|error| said(key, format!("no private key: {error}")))?;
        let mut roots = RootCertStore::empty();
        for root in certificates(authority)? {
            roots.add(root).map_err(|error| said(authority, error.to_string()))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = |error: rustls::Error| said(certificate, format!("this certificate with the key {key:?}: {error}"));
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), secret.clone_key())
            .map_err(tls)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
        let verifier = verifier.build().map_err(|error| said(authority, error.to_string()))?;
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, secret)
            .map_err(tls)?;
        Ok(Tls { client: Arc::new(client), server: Arc::new(server) })
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let said = |what: String| format!("{}: {what}", path.display());
    let all = CertificateDer::pem_file_iter(path).map_err(|error| said(error.to_string()))?;
    let all: Vec<_> = all.collect::<Result<_, _>>().map_err(|error| said(error.to_string()))?;
    if all.is_empty() { Err(said("there is no certificate in it".into())) } else { Ok(all) }
}

/// A connection that may be one by TLS.
pub struct Channel {
    socket: TcpStream,
    tls: Option<Box<Connection>>,
}

impl Channel {
    /// To a server at `HOST:PORT`, whose certificate must be for that host.
    pub fn to_server(socket: TcpStream, tls: Option<&Tls>, address: &str, until: Instant) -> io::Result<Channel> {
        let Some(tls) = tls else { return Ok(Channel { socket, tls: None }) };
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']').to_string();
        let host = ServerName::try_from(host).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let connection = ClientConnection::new(tls.client.clone(), host).map_err(trouble)?;
        Channel { socket, tls: Some(Box::new(connection.into())) }.greeted(until)
    }

    pub fn to_client(socket: TcpStream, tls: Option<&Tls>, until: Instant) -> io::Result<Channel> {
        let Some(tls) = tls else { return Ok(Channel { socket, tls: None }) };
        let connection = ServerConnection::new(tls.server.clone()).map_err(trouble)?;
        Channel { socket, tls: Some(Box::new(connection.into())) }.greeted(until)
    }

    /// With the handshake of TLS done, by a time.
    fn greeted(mut self, until: Instant) -> io::Result<Channel> {
        while self.tls.as_ref().is_some_and(|tls| tls.is_handshaking()) {
            self.read_by(until)?;
            self.move_tls()?;
        }
        self.flush()?;
        Ok(self)
    }

    /// Whoever is at the other end has shown a certificate, and what is said is sealed already.
    pub fn is_sealed(&self) -> bool {
        self.tls.is_some()
    }

    /// Reads end by this time.
    pub fn read_by(&self, until: Instant) -> io::Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_read_timeout(Some(left))
    }

    /// Writes end within this time.
    pub fn write_within(&self, time: Duration) -> io::Result<()> {
        self.socket.set_write_timeout(Some(time))
    }

    /// Bytes that the other side has not confirmed yet.
    pub fn unsent(&self) -> usize {
        sys::bytes_unsent(self.socket.as_fd())
    }

    /// What has come, without waiting.
    pub fn read_now(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_nonblocking(true)?;
        let read = self.read(buffer);
        self.socket.set_nonblocking(false)?;
        read
    }

    /// Sends what TLS wants to send, else takes what has come for it.
    fn move_tls(&mut self) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        if tls.wants_write() {
            return tls.write_tls(&mut self.socket).map(drop);
        }
        if tls.read_tls(&mut self.socket)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match tls.process_new_packets() {
            Ok(_) => Ok(()),
            Err(error) => {
                // It is told why.
                let _ = tls.write_tls(&mut self.socket);
                Err(trouble(error))
            }
        }
    }
}

/// Who is not accepted, or cannot be, will not be the next time either.
fn trouble(error: rustls::Error) -> io::Error {
    use rustls::Error::{AlertReceived, InvalidCertificate, NoCertificatesPresented};
    let kind = match error {
        AlertReceived(_) | InvalidCertificate(_) | NoCertificatesPresented => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::InvalidData,
    };
    io::Error::new(kind, format!("TLS: {error}"))
}

impl Read for Channel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let Some(tls) = &mut self.tls else { return self.socket.read(buffer) };
            match tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.move_tls()?,
                read => return read,
            }
        }
    }
}

impl Write for Channel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return self.socket.write(bytes) };
        let wrote = tls.writer().write(bytes)?;
        self.flush()?;
        Ok(wrote)
    }

    fn flush(&mut self) -> io::Result<()> {
        while let Some(tls) = self.tls.as_mut().filter(|tls| tls.wants_write()) {
            tls.write_tls(&mut self.socket)?;
        }
        Ok(())
    }
}
