//! Root, current directory and umask.

use crate::error::{DumpError, RestoreError};
use crate::resource::{Check, Collect, OfProcess, Rebuild, Resource};

/// Its saved form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filesystem {}

/// Root, current directory and umask.
pub struct ProcessFilesystem;

impl Resource for ProcessFilesystem {
    const NAME: &'static str = "filesystem";
    type Scope = OfProcess;
    type Saved = Filesystem;

    fn collect(_context: &mut Collect<'_>) -> Result<Filesystem, DumpError> {
        Ok(Filesystem {})
    }

    fn check(_saved: &Filesystem, _context: &mut Check<'_>) {}

    fn rebuild(_saved: &Filesystem, _context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}
