//! Resource limits.

use crate::error::{DumpError, RestoreError};
use crate::resource::{Check, Collect, OfProcess, Rebuild, Resource};

/// Its saved form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {}

/// Resource limits.
pub struct ResourceLimits;

impl Resource for ResourceLimits {
    const NAME: &'static str = "limits";
    type Scope = OfProcess;
    type Saved = Limits;

    fn collect(_context: &mut Collect<'_>) -> Result<Limits, DumpError> {
        Ok(Limits {})
    }

    fn check(_saved: &Limits, _context: &mut Check<'_>) {}

    fn rebuild(_saved: &Limits, _context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}
