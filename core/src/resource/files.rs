//! Regular files and directories, deleted files with their content, O_PATH descriptors.

use crate::error::{DumpError, RestoreError};
use crate::resource::descriptors::{CollectFile, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::{Check, Resource};

/// Which file a path led to, so that a restore can tell whether it still does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    pub device: u64,
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since 1970.
    pub modified: i64,
}

impl Identity {
    pub fn of(stat: &nix::sys::stat::FileStat) -> Identity {
        Identity {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size as u64,
            modified: stat.st_mtime * 1_000_000_000 + stat.st_mtime_nsec,
        }
    }
}

/// Its saved form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {}

/// Regular files and directories, deleted files with their content, O_PATH descriptors.
pub struct Files;

impl Resource for Files {
    const NAME: &'static str = "files";
    type Scope = OfFile;
    type Saved = File;

    fn collect(_context: &mut CollectFile<'_>) -> Result<File, DumpError> {
        Ok(File {})
    }

    fn check(_saved: &File, _context: &mut Check<'_>) {}

    fn rebuild(_saved: &File, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl FileResource for Files {
    fn claims(_seen: &Seen) -> bool {
        false
    }

    fn finish(_saved: &File, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}
