//! Device nodes without state: /dev/null, zero, full, random, urandom.

use crate::error::{DumpError, RestoreError};
use crate::resource::descriptors::{CollectFile, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::{Check, Resource};

/// Its saved form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {}

/// Device nodes without state: /dev/null, zero, full, random, urandom.
pub struct Devices;

impl Resource for Devices {
    const NAME: &'static str = "devices";
    type Scope = OfFile;
    type Saved = Device;

    fn collect(_context: &mut CollectFile<'_>) -> Result<Device, DumpError> {
        Ok(Device {})
    }

    fn check(_saved: &Device, _context: &mut Check<'_>) {}

    fn rebuild(_saved: &Device, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl FileResource for Devices {
    fn claims(_seen: &Seen) -> bool {
        false
    }

    fn finish(_saved: &Device, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}
