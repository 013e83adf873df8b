//! `ckpt working-set`: the pages that a program touches first, recorded for the next restore.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::output;

/// End the recording of a working set (restore --record-working-set)
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The working set of an image are the pages that its programs touch first. It is
a file in the image's directory; a restore with --backend userfault brings it in
before the programs run, so that they hardly wait for memory:

  ckpt --backend userfault restore -D image -d --record-working-set
  (let the programs do what they will be asked to do first)
  ckpt working-set stop -D image

Where nothing was recorded, what the dump has guessed is used: the stacks, and
what the registers and the words on the stacks point to.")]
pub struct WorkingSet {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Write what was touched until now, and bring in the rest of the memory
    Stop {
        /// The directory of the image that was restored
        #[arg(short = 'D', long = "dir", value_name = "DIR")]
        directory: PathBuf,
    },
}

pub fn run(verb: &WorkingSet) -> anyhow::Result<ExitCode> {
    let What::Stop { directory } = &verb.what;
    let pages = ckpt_userfault::stop_recording(directory).map_err(anyhow::Error::msg)?;
    let path = directory.display();
    output::tell(&format!("the working set of {path} are {pages} pages ({})", crate::human::size(pages * 4096)));
    Ok(ExitCode::SUCCESS)
}
