//! Errors as lines on standard error, exit codes, and what happens on a bug of ours.

use std::io::Write;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use ckpt_core::{DumpError, RestoreError, StoreError};

use crate::output;

/// The exit codes, as [`crate::arguments::EXIT_CODES`] says them.
const FAILED: u8 = 1;
const BAD_USAGE: u8 = 2;
const REFUSED: u8 = 3;

/// An error that is the user's command line.
#[derive(Debug)]
pub struct Usage(pub String);

/// An error that is a missing ability: of ckpt, of a backend, of this host.
#[derive(Debug)]
pub struct Refused(pub String);

macro_rules! plain_error {
    ($($kind:ty),*) => {$(
        impl std::fmt::Display for $kind {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(&self.0) }
        }
        impl std::error::Error for $kind {}
    )*};
}
plain_error!(Usage, Refused);

/// Prints an error, a line for each reason, and gives the exit code that says what kind it is.
pub fn report(error: &anyhow::Error) -> ExitCode {
    line(&in_full(error));
    ExitCode::from(code(error))
}

/// An error and its causes, but those that it has in its own words already.
fn in_full(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text += &format!(": {cause}");
        }
    }
    text
}

/// For what was found wrong in the command line itself.
pub fn bad_usage(message: &str) -> ExitCode {
    line(message);
    ExitCode::from(BAD_USAGE)
}

/// `ckpt: error: ...` on standard error, once for each line of the message.
fn line(message: &str) {
    let mut text = String::new();
    for reason in message.lines() {
        text += &format!("ckpt: error: {}\n", output::plain(reason));
    }
    // Nobody is left to tell if standard error is gone.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        // The phases' errors pass a store's on as their own, without a level between.
        let store = match (cause.downcast_ref(), cause.downcast_ref()) {
            (Some(DumpError::Store(store)), _) | (_, Some(RestoreError::Store(store))) => Some(store),
            _ => cause.downcast_ref(),
        };
        let refused = cause.is::<Refused>()
            || matches!(cause.downcast_ref(), Some(DumpError::Unsupported(_) | DumpError::NotDumpable { .. }))
            || matches!(cause.downcast_ref(), Some(RestoreError::Refused(_)))
            || matches!(store, Some(StoreError::NewerVersion { .. }));
        if refused {
            return REFUSED;
        }
        if cause.is::<Usage>() {
            return BAD_USAGE;
        }
    }
    FAILED
}

/// Has a panic say that it is a bug of ckpt, and what it means for the target.
pub fn catch_bugs() {
    panic::set_hook(Box::new(|info| {
        let place = info.location().map(|at| format!(" at {}:{}", at.file(), at.line())).unwrap_or_default();
        let what = info.payload_as_str().unwrap_or("no message");
        line(&format!("a bug in ckpt{place}: {}; the target goes on; please report it", what.replace('\n', " ")));
        if std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0") {
            eprintln!("{}", std::backtrace::Backtrace::force_capture());
        }
    }));
}

/// Runs a verb so that a panic in it unwinds, which lets the target go, and ends in the exit code of a failure.
pub fn contain(verb: impl FnOnce() -> anyhow::Result<ExitCode>) -> anyhow::Result<ExitCode> {
    panic::catch_unwind(AssertUnwindSafe(verb)).unwrap_or_else(|_| Ok(ExitCode::from(FAILED)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let missing = std::io::Error::from_raw_os_error(libc::ENOENT);
        let store = StoreError::Io { path: "i".into(), what: "cannot be opened", source: missing };
        let error = anyhow::Error::from(store).context("showing it");
        assert_eq!(in_full(&error), "showing it: i: cannot be opened: No such file or directory (os error 2)");
    }

    #[test]
    fn kinds_of_errors_have_their_codes() {
        let refused = RestoreError::Refused(Vec::new());
        assert_eq!(code(&anyhow::Error::from(refused).context("while restoring")), REFUSED);
        assert_eq!(code(&Usage("x".into()).into()), BAD_USAGE);
        assert_eq!(code(&DumpError::Interrupted.into()), FAILED);
        let newer = StoreError::NewerVersion { path: "i".into(), found: 9, newest: 1 };
        assert_eq!(code(&RestoreError::from(newer).into()), REFUSED, "seen through a transparent error");
    }
}
