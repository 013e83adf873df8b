//! Interval timers and POSIX timers.

use crate::error::{DumpError, RestoreError};
use crate::resource::{Check, Collect, OfProcess, Rebuild, Resource};

/// Its saved form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timers {}

/// Interval timers and POSIX timers.
pub struct ProcessTimers;

impl Resource for ProcessTimers {
    const NAME: &'static str = "timers";
    type Scope = OfProcess;
    type Saved = Timers;

    fn collect(_context: &mut Collect<'_>) -> Result<Timers, DumpError> {
        Ok(Timers {})
    }

    fn check(_saved: &Timers, _context: &mut Check<'_>) {}

    fn rebuild(_saved: &Timers, _context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}
