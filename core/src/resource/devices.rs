//! Device nodes without state: /dev/null, zero, full, random, urandom.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::error::{DumpError, RestoreError};
use crate::resource::descriptors::{CollectFile, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::files::{self, Located};
use crate::resource::{Check, Resource};

/// A device by its path and number: the number says what it is, the path where to open it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub path: PathBuf,
    pub major: u32,
    pub minor: u32,
}

/// Major and minor numbers of the character devices that keep nothing for whoever has them open
/// (Documentation/admin-guide/devices.txt).
const STATELESS: [(u32, u32, &str); 5] =
    [(1, 3, "null"), (1, 5, "zero"), (1, 7, "full"), (1, 8, "random"), (1, 9, "urandom")];

fn stateless(major: u32, minor: u32) -> bool {
    STATELESS.iter().any(|&(a, b, _)| (a, b) == (major, minor))
}

/// Device nodes without state: /dev/null, zero, full, random, urandom.
pub struct Devices;

impl Resource for Devices {
    const NAME: &'static str = "devices";
    type Scope = OfFile;
    type Saved = Device;

    fn collect(context: &mut CollectFile<'_>) -> Result<Device, DumpError> {
        let device = context.seen.stat.st_rdev;
        let path = match files::locate(&context.seen.link, &context.seen.stat) {
            Located::Path(path) => path,
            Located::Deleted => {
                context.refuse("the device node was deleted", "");
                PathBuf::new()
            }
            Located::Elsewhere(why) => {
                context.refuse(why, "");
                PathBuf::new()
            }
        };
        Ok(Device { path, major: libc::major(device), minor: libc::minor(device) })
    }

    fn check(saved: &Device, context: &mut Check<'_>) {
        let subject = saved.path.display().to_string();
        let number = (saved.major, saved.minor);
        if !stateless(saved.major, saved.minor) || !saved.path.is_absolute() {
            return context.refuse(subject, "it is no device that an image may hold", "use another copy of the image");
        }
        match nix::sys::stat::stat(&saved.path) {
            Ok(now)
                if now.st_mode & libc::S_IFMT == libc::S_IFCHR
                    && (libc::major(now.st_rdev), libc::minor(now.st_rdev)) == number => {}
            Ok(_) => context.refuse(
                subject,
                format!("it is not the device that it was at the dump ({} {})", saved.major, saved.minor),
                "put the device node back",
            ),
            Err(errno) => context.refuse(subject, format!("the device is gone: {errno}"), "put the device node back"),
        }
    }

    fn rebuild(saved: &Device, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let device = libc::makedev(saved.major, saved.minor);
        let flags = files::reopen_flags(context.file().flags);
        let process = context.process();
        // None of these has an offset that counts.
        files::open(context, process, saved.path.as_os_str(), flags, 0, move |now| {
            (now.device_number != device || now.file_type != libc::S_IFCHR)
                .then(|| "it is not the device that it was at the dump".into())
        })
    }
}

impl FileResource for Devices {
    fn claims(seen: &Seen) -> bool {
        let device = seen.stat.st_rdev;
        seen.file_type() == libc::S_IFCHR
            && seen.info.flags & libc::O_PATH == 0
            && seen.link.as_bytes().starts_with(b"/")
            && stateless(libc::major(device), libc::minor(device))
    }

    fn finish(_saved: &Device, _context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        // All was done when it was opened.
        Ok(())
    }
}
