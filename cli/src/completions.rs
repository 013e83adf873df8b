//! `ckpt completions SHELL`: the completions of a shell, generated from the command line's own description.

use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::arguments::Arguments;
use crate::output;

/// Print the completions for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  ckpt completions bash > /etc/bash_completion.d/ckpt")]
pub struct Completions {
    shell: Shell,
}

pub fn run(verb: &Completions) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(verb.shell, &mut Arguments::command(), "ckpt", &mut script);
    output::pass(&script);
    Ok(ExitCode::SUCCESS)
}
