//! `ckpt page-server`: gives out images over TCP, for restores on other hosts.

use std::path::PathBuf;
use std::process::ExitCode;

use ckpt_userfault::Token;

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
outside of DIR is served. It runs until it is ended by a signal.")]
pub struct PageServer {
    /// The directory with the images
    #[arg(short = 'D', long = "dir", value_name = "DIR")]
    directory: PathBuf,

    /// Where to listen; port 0 has the system choose one
    #[arg(long, value_name = "HOST:PORT")]
    listen: String,

    /// The file with the secret that clients must have, too
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
}

pub fn run(verb: &PageServer) -> anyhow::Result<ExitCode> {
    let token = Token::read(&verb.token_file).map_err(anyhow::Error::msg)?;
    let server =
        ckpt_userfault::PageServer::listen(&verb.directory, &verb.listen, token).map_err(anyhow::Error::msg)?;
    output::tell(&format!("serving the images in {} at {}", verb.directory.display(), server.address()?));
    server.serve(|trouble| output::tell_aside(&output::plain(&trouble)))
}
