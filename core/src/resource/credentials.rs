//! User and group ids, capabilities, securebits, no_new_privs.

use crate::error::{DumpError, RestoreError};
use crate::resource::{Check, Collect, OfThread, Rebuild, Resource};

/// Its saved form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {}

/// User and group ids, capabilities, securebits, no_new_privs.
pub struct ThreadCredentials;

impl Resource for ThreadCredentials {
    const NAME: &'static str = "credentials";
    type Scope = OfThread;
    type Saved = Credentials;

    fn collect(_context: &mut Collect<'_>) -> Result<Credentials, DumpError> {
        Ok(Credentials {})
    }

    fn check(_saved: &Credentials, _context: &mut Check<'_>) {}

    fn rebuild(_saved: &Credentials, _context: &mut Rebuild<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}
