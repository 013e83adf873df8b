//! Every subject passes without a dump: one that does not is broken itself.

use std::process::Command;

#[test]
fn every_subject_passes_without_a_dump() {
    let cases = ckpt_conformance::cases::all();
    assert!(!cases.is_empty());
    let mut failures = Vec::new();
    for case in &cases {
        let run = Command::new(env!("CARGO_BIN_EXE_ckpt-subject")).args(["--dry", case.name]).output().unwrap();
        if !run.status.success() {
            failures.push(String::from_utf8_lossy(&run.stderr).into_owned());
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.join("\n"));
}
