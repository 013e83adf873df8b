//! Nice, scheduling policy, affinity, I/O priority, timer slack.

use crate::error::{DumpError, RestoreError};
use crate::resource::{Check, Collect, OfThread, Rebuild, Resource};

/// Its saved form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scheduling {}

/// Nice, scheduling policy, affinity, I/O priority, timer slack.
pub struct ThreadScheduling;

impl Resource for ThreadScheduling {
    const NAME: &'static str = "scheduling";
    type Scope = OfThread;
    type Saved = Scheduling;

    fn collect(_context: &mut Collect<'_>) -> Result<Scheduling, DumpError> {
        Ok(Scheduling {})
    }

    fn check(_saved: &Scheduling, _context: &mut Check<'_>) {}

    fn rebuild(_saved: &Scheduling, _context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}
