//! Signal actions, the shared pending queue.

use crate::error::{DumpError, RestoreError};
use crate::resource::{Check, Collect, OfProcess, OfThread, Rebuild, Resource};

/// Its saved form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {}

/// Signal actions, the shared pending queue.
pub struct ProcessSignals;

impl Resource for ProcessSignals {
    const NAME: &'static str = "signals";
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

/// Mask, alternate stack and private pending queue.
pub struct ThreadSignals;

impl Resource for ThreadSignals {
    const NAME: &'static str = "thread-signals";
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
