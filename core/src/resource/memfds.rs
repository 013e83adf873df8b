//! Descriptors of memory files (`memfd_create`). The file itself is a memory object, which mappings share.

use std::os::fd::AsFd;

use crate::error::{DumpError, RestoreError};
use crate::resource::descriptors::{CollectFile, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::files;
use crate::resource::memory::{ObjectId, memfd_name};
use crate::resource::{Check, Resource};

/// An open memory file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memfd {
    pub object: ObjectId,
    /// Where the next `read` or `write` is, in bytes.
    pub position: i64,
}

/// Descriptors of memory files.
pub struct Memfds;

impl Resource for Memfds {
    const NAME: &'static str = "memfds";
    type Scope = OfFile;
    type Saved = Memfd;

    fn collect(context: &mut CollectFile<'_>) -> Result<Memfd, DumpError> {
        let seen = context.seen;
        let target = &*context.targets[seen.process];
        let added = context.objects.add(target, &format!("fd/{}", seen.fd), &seen.link, &seen.stat);
        let object = match added.map_err(|source| context.io_error("cannot be opened to read it", source))? {
            Ok(object) => object,
            Err(why) => {
                context.refuse(why, "have the program close it before the dump");
                ObjectId(0)
            }
        };
        Ok(Memfd { object, position: seen.info.position })
    }

    fn check(saved: &Memfd, context: &mut Check<'_>) {
        if context.image.memory_objects.get(saved.object.0 as usize).is_none() {
            context.refuse("", "a memory file is not in the image", "the image is damaged; use another copy of it");
        }
    }

    fn rebuild(saved: &Memfd, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let object = context.objects.objects[saved.object.0 as usize].as_fd();
        let opened = files::reopen(object, files::reopen_flags(context.file().flags), saved.position);
        let file = opened.map_err(|errno| RestoreError::Io {
            what: "a memory file could not be opened again".into(),
            source: errno.into(),
        })?;
        context.give(context.id, context.process(), file)
    }
}

impl FileResource for Memfds {
    fn claims(seen: &Seen) -> bool {
        // A file in the root directory may have such a name, but has a link.
        seen.file_type() == libc::S_IFREG && seen.stat.st_nlink == 0 && memfd_name(&seen.link).is_some()
    }

    fn finish(_saved: &Memfd, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        // All was done when it was opened.
        Ok(())
    }
}
