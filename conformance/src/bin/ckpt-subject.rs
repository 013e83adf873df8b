//! Runs one subject in the current directory, which is its trial's: `ckpt-subject CASE`.
//!
//! For who writes a subject: `ckpt-subject --dry CASE` runs it in a directory of its own and lets it go on as soon as
//! it is ready, with no dump in between; `ckpt-subject --list` names them all.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use ckpt_conformance::case::{Checkpoint, VERDICT};
use ckpt_conformance::{cases, dry};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--list"] => {
            for case in cases::all() {
                println!("{}", case.name);
            }
            ExitCode::SUCCESS
        }
        ["--dry", name] => {
            match cases::find(name).ok_or(format!("there is no case {name}")).and_then(|case| dry::run(&case)) {
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
        [name] if !name.starts_with('-') => subject(name),
        _ => {
            eprintln!("usage: ckpt-subject CASE | --dry CASE | --list");
            ExitCode::from(2)
        }
    }
}

fn subject(name: &str) -> ExitCode {
    let Some(case) = cases::find(name) else {
        eprintln!("there is no case {name}");
        return ExitCode::from(2);
    };
    // SAFETY: closes what the starter may have left open; nothing here owns a descriptor yet.
    unsafe { libc::close_range(3, u32::MAX, 0) };
    let dir = std::env::current_dir().expect("the trial's directory");
    let checkpoint = Checkpoint::new(&dir);
    let root = std::process::id();
    let result = catch_unwind(AssertUnwindSafe(|| (case.subject)(&checkpoint)));
    if std::process::id() != root {
        eprintln!("a child of the subject returned from it; children must leave by _exit");
        // SAFETY: ends a child without running the parent's exit handlers.
        unsafe { libc::_exit(3) }
    }
    let result = result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(format!("panicked: {}", text.unwrap_or("(no text)")))
    });
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
