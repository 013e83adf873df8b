//! The suite itself: every case with every dumper and restorer that is linked in.

use std::path::Path;
use std::process::ExitCode;

use ckpt_conformance::{cases, suite, trial};

fn main() -> ExitCode {
    trial::be_a_trial_if_asked();
    let files = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("conformance-matrix");
    let subject = Path::new(env!("CARGO_BIN_EXE_ckpt-subject"));
    suite::main(&cases::all(), &ckpt_core::registry::backends(), subject, Some(&files))
}
