//! `ckpt page-server`: gives out images over TCP, for restores on other hosts.

use std::path::PathBuf;
use std::process::ExitCode;

use ckpt_userfault::{Credentials, Tls, Token};

use crate::failure::Usage;
use crate::output;

/// Serve the images of a directory to restores on other hosts (restore --pages-from)
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Whoever restores needs the same token, a file with a secret:

  head -c 32 /dev/urandom | base64 >token; chmod 600 token
  ckpt page-server -D images --listen 10.0.0.1:7070 --token-file token

and on the other host, for the image images/redis:

  ckpt --backend userfault restore -D redis -d \\
      --pages-from 10.0.0.1:7070 --token-file token

All that goes over the wire is sealed with keys made of the token. Nothing
outside of DIR is served. It runs until it is ended by a signal.

Instead of a token, or beside it, both sides can have a certificate of one
authority (--tls-certificate, --tls-key, --tls-ca): then who learns a secret
later cannot read what went over the wire before. That of the server must be
for the HOST that clients name.")]
pub struct PageServer {
    /// The directory with the images
    #[arg(short = 'D', long = "dir", value_name = "DIR")]
    directory: PathBuf,

    /// Where to listen; port 0 has the system choose one
    #[arg(long, value_name = "HOST:PORT")]
    listen: String,

    #[command(flatten)]
    shown: Shown,
}

/// What both sides of a connection show each other.
#[derive(Debug, clap::Args)]
pub struct Shown {
    /// The file with the secret that both sides must have
    #[arg(long, value_name = "FILE", help_heading = SHOWN)]
    token_file: Option<PathBuf>,

    /// The certificate to show by TLS (PEM)
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_ca"], help_heading = SHOWN)]
    tls_certificate: Option<PathBuf>,

    /// The key of that certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_certificate", help_heading = SHOWN)]
    tls_key: Option<PathBuf>,

    /// The authority whose certificates are accepted of the other side (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_certificate", help_heading = SHOWN)]
    tls_ca: Option<PathBuf>,
}

const SHOWN: &str = "Who is served, and by whom";

impl Shown {
    pub fn is_given(&self) -> bool {
        self.token_file.is_some() || self.tls_certificate.is_some()
    }

    pub fn read(&self) -> anyhow::Result<Credentials> {
        let token = self.token_file.as_deref().map(Token::read).transpose().map_err(anyhow::Error::msg)?;
        let tls = match (&self.tls_certificate, &self.tls_key, &self.tls_ca) {
            (Some(certificate), Some(key), Some(ca)) => {
                Some(Tls::read(certificate, key, ca).map_err(anyhow::Error::msg)?)
            }
            _ => None,
        };
        if token.is_none() && tls.is_none() {
            let text = "a page server wants --token-file, or --tls-certificate with --tls-key and --tls-ca, or both";
            return Err(Usage(text.into()).into());
        }
        Ok(Credentials { token, tls })
    }
}

pub fn run(verb: &PageServer) -> anyhow::Result<ExitCode> {
    let credentials = verb.shown.read()?;
    let server =
        ckpt_userfault::PageServer::listen(&verb.directory, &verb.listen, credentials).map_err(anyhow::Error::msg)?;
    output::tell(&format!("serving the images in {} at {}", verb.directory.display(), server.address()?));
    server.serve(|trouble| output::tell_aside(&output::plain(&trouble)))
}
