//! `ckpt api`: what programs that want to know include or import.

use std::process::ExitCode;

use ckpt_preload::interface::{C_HEADER, PYTHON_MODULE};

use crate::output;

/// Print the header or module by which programs talk to ckpt
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ckpt api c > ckpt.h                     for C and C++: nothing to link
  ckpt api python > ckpt.py               for Python: one file, nothing to compile
  ckpt --backend preload run -D saved -- ./program
                                          the program may save itself: ckpt_now()

With it a program has itself saved, keeps checkpoints out of regions of its code, runs
hooks before and after each, and asks whether it was restored. It is heard if it was
started by ckpt --backend preload run; without ckpt it works as well. The files explain
the rest.")]
pub struct Api {
    language: Language,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Language {
    C,
    Python,
}

pub fn run(verb: &Api) -> anyhow::Result<ExitCode> {
    output::print(match verb.language {
        Language::C => C_HEADER,
        Language::Python => PYTHON_MODULE,
    });
    Ok(ExitCode::SUCCESS)
}
