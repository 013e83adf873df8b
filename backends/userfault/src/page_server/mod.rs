//! Pages over TCP: [`server`] gives out the files of images, [`client`] is where a pager gets its pages from.
//!
//! Both sides hold a token, a file with a secret. It never goes over the wire: each side proves that it has it by an HMAC over
//! two random numbers, and from there on every message is sealed (ChaCha20-Poly1305) with keys made of the token and these
//! numbers. So nobody without the token reads or changes anything. There is no forward secrecy: who learns the token later
//! can read what was recorded before.
//!
//! Or both have a certificate of one authority, and show it by TLS 1.3, which has forward secrecy; with a token or without.

pub mod channel;
pub mod client;
pub mod server;
mod wire;

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// The secret that both sides hold.
#[derive(Clone)]
pub struct Token(Vec<u8>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

/// A token of fewer bytes could be guessed.
const SHORTEST: usize = 16;

impl Token {
    /// Reads it from a file, without white space around it.
    ///
    /// # Errors
    /// In words: where it cannot be read, is too short, or can be read by others.
    pub fn read(path: &Path) -> Result<Token, String> {
        let said = |what: String| format!("the token file {}: {what}", path.display());
        let file = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(|error| said(error.to_string()))?;
        let found = file.metadata().map_err(|error| said(error.to_string()))?;
        if found.is_file() && found.mode() & 0o077 != 0 {
            return Err(said("others may read it; chmod 600 it".into()));
        }
        let mut bytes = Vec::new();
        file.take(4096).read_to_end(&mut bytes).map_err(|error| said(error.to_string()))?;
        let token = bytes.trim_ascii();
        let way_out = "make one with: head -c 32 /dev/urandom | base64 >FILE";
        Token::of(token).ok_or_else(|| said(format!("it has {} bytes, and needs {SHORTEST}; {way_out}", token.len())))
    }

    /// One of these bytes, if they are enough.
    pub fn of(bytes: &[u8]) -> Option<Token> {
        (bytes.len() >= SHORTEST).then(|| Token(bytes.to_vec()))
    }
}

/// Random bytes from the kernel.
fn random() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
