//! Images that are still being written: directories beside their final place, under a name that nobody takes for an image.
//!
//! The writer holds an exclusive `flock(2)` on its directory, which the kernel drops when the writer ends in whatever
//! way. So a directory of this name that can be locked is a leftover, and the next dump beside it removes it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use ckpt_core::StoreError;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

const PREFIX: &str = ".ckpt-partial-";

/// The page file, beside [`MANIFEST`] in the directory.
pub const PAGES: &str = "pages.bin";
/// Header, manifest and page checksums.
pub const MANIFEST: &str = "image.cbor";

/// The name of a blob's file.
pub fn blob_name(number: u32) -> String {
    format!("blob-{number}")
}

/// A name that a writer gives.
fn is_ours(name: &[u8]) -> bool {
    let number = name.strip_prefix(b"blob-");
    name == PAGES.as_bytes() || name == MANIFEST.as_bytes() || number.is_some_and(|n| n.iter().all(u8::is_ascii_digit))
}

/// Where an image shall be, as found before it is written.
#[derive(Debug)]
struct Place {
    /// As the user said it.
    path: PathBuf,
    parent: File,
    name: OsString,
    /// The empty directory that is there.
    existing: Option<fs::Metadata>,
}

/// A directory that becomes an image when it is renamed. Dropped before, it is removed.
#[derive(Debug)]
pub struct Partial {
    place: Place,
    name: OsString,
    /// Locked as long as we are at it.
    directory: Flock<File>,
    published: bool,
}

impl Partial {
    pub fn create(path: &Path) -> Result<Partial, StoreError> {
        let place = Place::find(path)?;
        remove_leftovers(&place.parent);
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let name = OsString::from(format!("{PREFIX}{}-{number}", std::process::id()));
            match mkdirat(&place.parent, &*name, Mode::S_IRWXU) {
                Ok(()) => {}
                Err(Errno::EEXIST) => continue,
                Err(errno) => {
                    let why = format!(
                        "no directory can be made beside it ({}); choose a place that can be written to",
                        errno.desc()
                    );
                    return Err(StoreError::Directory { path: path.to_path_buf(), why });
                }
            }
            match lock(&place.parent, &name, FlockArg::LockExclusive) {
                Ok(directory) => return Ok(Partial { place, name, directory, published: false }),
                // Another dump took it for a leftover, in the instant before it was locked.
                Err(Errno::ENOENT) => continue,
                Err(errno) => {
                    let _ = unlinkat(&place.parent, &*name, UnlinkatFlags::RemoveDir);
                    return Err(place.error("cannot be locked while it is written", errno));
                }
            }
        }
    }

    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// A path in it for messages: under the final name, which is the one that the user knows.
    pub fn path(&self, file: &str) -> PathBuf {
        self.place.path.join(file)
    }

    /// Gives the directory its final name, once everything in it is on disk.
    pub fn publish(mut self) -> Result<(), StoreError> {
        let place = &self.place;
        let directory: &File = &self.directory;
        if let Some(existing) = &place.existing {
            // It takes the place of a directory that the user made: with the same permissions.
            directory
                .set_permissions(existing.permissions())
                .map_err(|source| place.io("cannot be given the permissions of the directory in its place", source))?;
            // For the owner, only root can; then it is ours.
            let _ = std::os::unix::fs::fchown(directory, Some(existing.uid()), Some(existing.gid()));
        }
        directory.sync_all().map_err(|source| place.io("cannot be synced", source))?;
        // Replaces an empty directory, and nothing else.
        match renameat(&place.parent, &*self.name, &place.parent, &*place.name) {
            Ok(()) => {}
            Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR) => {
                let why = "was filled while the image was written; another dump may have gone there".into();
                return Err(StoreError::Directory { path: place.path.clone(), why });
            }
            Err(errno) => return Err(place.error("cannot be given its name", errno)),
        }
        match place.parent.sync_all() {
            Ok(()) => {
                self.published = true;
                Ok(())
            }
            Err(source) => {
                // Not published for sure, so not published.
                let _ = renameat(&place.parent, &*place.name, &place.parent, &*self.name);
                Err(place.io("cannot be synced", source))
            }
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            remove(&self.place.parent, &self.name, &self.directory);
        }
    }
}

impl Place {
    fn find(path: &Path) -> Result<Place, StoreError> {
        let refuse = |why: String| StoreError::Directory { path: path.to_path_buf(), why };
        let io = |what| move |source| StoreError::Io { path: path.to_path_buf(), what, source };
        // What is there decides, not how it is spelt: `.`, a symbolic link, `a/../b`.
        let (parent, name, existing) = match fs::canonicalize(path) {
            Ok(found) => {
                let metadata = fs::metadata(&found).map_err(io("cannot be looked at"))?;
                if !metadata.is_dir() {
                    return Err(refuse("is there and not a directory; name a new or empty directory".into()));
                }
                if fs::read_dir(&found).map_err(io("cannot be read"))?.next().is_some() {
                    return Err(refuse("is not empty; name a new or empty directory".into()));
                }
                if std::env::current_dir().is_ok_and(|current| current == found) {
                    return Err(refuse(
                        "is the current directory, which an image cannot replace; name a directory in it".into(),
                    ));
                }
                match (found.parent(), found.file_name(), is_mount_point(&found)) {
                    (Some(parent), Some(name), false) => (parent.to_path_buf(), name.to_owned(), Some(metadata)),
                    _ => {
                        return Err(refuse(
                            "is a mount point, which an image cannot replace; name a directory in it".into(),
                        ));
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if fs::symlink_metadata(path).is_ok() {
                    return Err(refuse("is a symbolic link that leads nowhere".into()));
                }
                let name = path.file_name().ok_or_else(|| refuse("does not name a directory".into()))?;
                let parent = match path.parent() {
                    Some(parent) if parent != Path::new("") => parent,
                    _ => Path::new("."),
                };
                (parent.to_path_buf(), name.to_owned(), None)
            }
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                return Err(refuse("a part of its path is not a directory".into()));
            }
            Err(source) => return Err(io("cannot be looked at")(source)),
        };
        match File::open(&parent).and_then(|opened| Ok((opened.metadata()?.is_dir(), opened))) {
            Ok((true, parent)) => Ok(Place { path: path.to_path_buf(), parent, name, existing }),
            Ok((false, _)) => Err(refuse(format!("{} is not a directory", parent.display()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(refuse(format!("there is no directory {}; make it first", parent.display())))
            }
            Err(source) => Err(StoreError::Io { path: parent, what: "cannot be opened", source }),
        }
    }

    fn io(&self, what: &'static str, source: io::Error) -> StoreError {
        StoreError::Io { path: self.path.clone(), what, source }
    }

    fn error(&self, what: &'static str, errno: Errno) -> StoreError {
        self.io(what, errno.into())
    }
}

/// Whether something is mounted there: then it can neither be renamed nor replaced. (`/proc/self/mountinfo`, proc(5))
fn is_mount_point(path: &Path) -> bool {
    let Ok(mounts) = fs::read("/proc/self/mountinfo") else { return false };
    mounts.split(|&byte| byte == b'\n').any(|line| {
        let point = line.split(|&byte| byte == b' ').nth(4).unwrap_or_default();
        unescape(point) == path.as_os_str().as_bytes()
    })
}

/// `\040` and the like.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if byte == b'\\' => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => plain.push(byte),
        }
    }
    plain
}

/// Opens and locks a directory. ENOENT says that it is gone, or went while we waited.
fn lock(parent: &File, name: &OsStr, how: FlockArg) -> Result<Flock<File>, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let opened = File::from(openat(parent, name, flags, Mode::empty())?);
    let locked = Flock::lock(opened, how).map_err(|(_, errno)| errno)?;
    let there = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    match locked.metadata() {
        Ok(ours) if (ours.dev(), ours.ino()) == (there.st_dev, there.st_ino) => Ok(locked),
        _ => Err(Errno::ENOENT),
    }
}

/// Removes a directory of ours with the files that a writer makes. Should it hold anything else, it stays.
fn remove(parent: &File, name: &OsStr, directory: &File) {
    let Ok(opened) = openat(directory, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
    else {
        return;
    };
    let Ok(entries) = Dir::from_fd(opened) else { return };
    for entry in entries {
        let Ok(entry) = entry else { break };
        if is_ours(entry.file_name().to_bytes()) {
            let _ = unlinkat(directory, entry.file_name(), UnlinkatFlags::NoRemoveDir);
        }
    }
    let _ = unlinkat(parent, name, UnlinkatFlags::RemoveDir);
}

/// Removes what dumps that were killed left here. What cannot be removed does no harm.
fn remove_leftovers(parent: &File) {
    let Ok(opened) = openat(parent, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()) else {
        return;
    };
    let Ok(entries) = Dir::from_fd(opened) else { return };
    for entry in entries {
        let Ok(entry) = entry else { break };
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if !name.as_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        // Somebody else's are theirs to remove, in whatever state.
        if let Ok(leftover) = lock(parent, name, FlockArg::LockExclusiveNonblock)
            && leftover.metadata().is_ok_and(|metadata| metadata.uid() == geteuid().as_raw())
        {
            remove(parent, name, &leftover);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_known_by_their_escaped_names() {
        assert_eq!(unescape(br"/a\040b\134c\12"), br"/a b\c\12");
        assert!(is_mount_point(Path::new("/proc")));
        assert!(!is_mount_point(Path::new("/proc/self")));
    }
}
