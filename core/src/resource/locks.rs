//! File locks: POSIX, open-file-description and flock locks, and leases.

/// The section name.
pub const NAME: &str = "locks";

/// A saved lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {}

use crate::error::{DumpError, Refusal, RestoreError};
use crate::image::Image;
use crate::resource::Check;
use crate::resource::descriptors::Census;
use crate::target::Target;

/// Collects the locks of the whole tree.
pub fn collect(
    _targets: &mut [Box<dyn Target>],
    _census: &Census,
    _refusals: &mut Vec<Refusal>,
) -> Result<Vec<Lock>, DumpError> {
    Ok(Vec::new())
}

pub fn check(_image: &Image, _context: &mut Check<'_>) {}

/// Takes the locks again.
pub fn rebuild(_targets: &mut [Box<dyn Target>], _image: &Image) -> Result<(), RestoreError> {
    Ok(())
}
