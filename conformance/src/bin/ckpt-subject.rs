//! Runs one subject in the current directory, which is its trial's: `ckpt-subject CASE`.
//!
//! For who writes a subject: `ckpt-subject --dry CASE` runs it in a directory of its own and lets it go on as soon as
//! it is ready, with no dump in between; `ckpt-subject --list` names them all.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use ckpt_conformance::case::{Checkpoint, Root, VERDICT};
use ckpt_conformance::driver::panic_text;
use ckpt_conformance::trial::{self, Way};
use ckpt_conformance::{cases, matrix};

fn main() -> ExitCode {
    trial::be_a_trial_if_asked();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--list"] => {
            for case in cases::all() {
                println!("{}", case.name);
            }
            ExitCode::SUCCESS
        }
        ["--dry", name] => dry(name),
        [name] if !name.starts_with('-') => subject(name),
        _ => {
            eprintln!("usage: ckpt-subject CASE | --dry CASE | --list");
            ExitCode::from(2)
        }
    }
}

fn dry(name: &str) -> ExitCode {
    let case = cases::find(name).ok_or(format!("there is no case {name}"));
    let result = case.and_then(|case| {
        matrix::missing(&case).map_or(Ok(()), Err)?;
        let subject = std::env::current_exe().map_err(|error| error.to_string())?;
        trial::run(&case, &Way::Dry, &subject)
    });
    match result {
        Ok(()) => {
            println!("{name}: passed without a dump");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("{name}: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn subject(name: &str) -> ExitCode {
    let Some(Root::Subject(function)) = cases::find(name).map(|case| case.root) else {
        eprintln!("there is no subject {name}");
        return ExitCode::from(2);
    };
    // SAFETY: closes what the starter may have left open; nothing here owns a descriptor yet.
    unsafe { libc::close_range(3, u32::MAX, 0) };
    let dir = std::env::current_dir().expect("the trial's directory");
    let checkpoint = Checkpoint::new(&dir);
    let root = std::process::id();
    let result = catch_unwind(AssertUnwindSafe(|| function(&checkpoint)));
    if std::process::id() != root {
        eprintln!("a child of the subject returned from it; children must leave by _exit");
        // SAFETY: ends a child without running the parent's exit handlers.
        unsafe { libc::_exit(3) }
    }
    let result = result.unwrap_or_else(|panic| Err(format!("panicked: {}", panic_text(&*panic))));
    let verdict = match &result {
        Ok(()) => "pass",
        Err(failure) => failure,
    };
    println!("{name}: {verdict}");
    if let Err(error) = std::fs::write(checkpoint.dir().join(VERDICT), verdict) {
        eprintln!("writing the verdict failed: {error}");
        return ExitCode::FAILURE;
    }
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
