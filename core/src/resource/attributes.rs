//! Small per-process settings (`prctl`, `/proc/PID`).

use crate::error::{DumpError, RestoreError};
use crate::resource::{Check, Collect, OfProcess, OfThread, Rebuild, Resource};

/// Its saved form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {}

/// Small per-process settings (`prctl`, `/proc/PID`).
pub struct Attributes;

impl Resource for Attributes {
    const NAME: &'static str = "attributes";
    type Scope = OfProcess;
    type Saved = Process;

    fn collect(_context: &mut Collect<'_>) -> Result<Process, DumpError> {
        Ok(Process {})
    }

    fn check(_saved: &Process, _context: &mut Check<'_>) {}

    fn rebuild(_saved: &Process, _context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// Its saved form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thread {}

/// Small per-thread settings.
pub struct ThreadAttributes;

impl Resource for ThreadAttributes {
    const NAME: &'static str = "thread-attributes";
    type Scope = OfThread;
    type Saved = Thread;

    fn collect(_context: &mut Collect<'_>) -> Result<Thread, DumpError> {
        Ok(Thread {})
    }

    fn check(_saved: &Thread, _context: &mut Check<'_>) {}

    fn rebuild(_saved: &Thread, _context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}
