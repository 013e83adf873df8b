//! Files that no name leads to any more: saved with their content, their attributes and all that `stat` tells, once for
//! each inode.
//!
//! Not visible to whoever lacks CAP_SYS_ADMIN, and then not kept: extended attributes `trusted.*`. Never kept, as no call
//! sets them: the times of birth and of the last change of the inode.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::File as StdFile;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::{io, iter};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{FileStat, Mode};
use nix::sys::statfs::statfs;
use nix::sys::time::TimeSpec;
use nix::unistd::UnlinkatFlags;
use rustix::fs::{IFlags, XattrFlags};

use super::{
    File, Place, USE_ANOTHER_COPY, named_for_a_moment, nanoseconds, open_directory, reopen_flags, without_deleted,
};
use crate::error::{DumpError, RestoreError};
use crate::image::Image;
use crate::procfs::ProcDir;
use crate::resource::Check;
use crate::resource::descriptors::{FileId, FileKind};
use crate::store::{BlobId, ImageReader, ImageWriter};

/// Index of a [`DeletedFile`] in [`Image::deleted_files`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeletedId(pub u32);

/// A regular file that no name leads to, with all that is kept of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeletedFile {
    /// Where it was: it is made again in the same directory, on the same file system. While nothing else has its name,
    /// the links in `/proc` say again that the file of this name was deleted.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since 1970.
    pub accessed: i64,
    pub modified: i64,
    /// It was opened with `O_TMPFILE`, so that `linkat` may give it a name.
    pub linkable: bool,
    /// All that the file system lists: POSIX ACLs, capabilities and security labels are among them. Sorted by name.
    pub extended_attributes: Vec<ExtendedAttribute>,
    /// Those of `FS_IOC_GETFLAGS` that a program may set (`chattr`); 0 where the file system has none.
    pub inode_flags: u32,
    pub content: BlobId,
}

/// An extended attribute (xattr(7)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtendedAttribute {
    /// With its namespace: `user.comment`.
    pub name: OsString,
    pub value: Vec<u8>,
}

/// `FS_FL_USER_MODIFIABLE` (linux/fs.h) and what single file systems let a program set besides: no copy on write, direct
/// access, projects that are handed down, names without case. The rest says how a file system keeps the file.
const CHOSEN_FLAGS: u32 = 0x0003_80ff | 0x0080_0000 | 0x0200_0000 | 0x2000_0000 | 0x4000_0000;
/// With these, nobody may open the file for writing, or only to append.
const GUARDING_FLAGS: u32 = IFlags::IMMUTABLE.bits() | IFlags::APPEND.bits();
/// `FS_VERITY_FL`.
const VERITY_FLAG: u32 = 0x0010_0000;

/// The deleted files of a tree, as descriptors and mappings lead to them: one for each inode.
///
/// Whoever meets one says so with [`add`](DeletedFiles::add) and saves the [`DeletedId`] it gets. The content is read
/// when everything else is known to be savable ([`write`](DeletedFiles::write)). On restore, [`rebuild_deleted`] makes
/// all of them before anything is mapped or opened; they are then in
/// [`Rebuilt::deleted`](crate::resource::memory::Rebuilt), open for reading and writing: a mapping hands the descriptor
/// to its target (`fds_in`) and maps it, or what `/proc/self/fd` opens of it with less rights.
#[derive(Debug, Default)]
pub struct DeletedFiles {
    known: HashMap<(u64, u64), DeletedId>,
    found: Vec<Found>,
}

#[derive(Debug)]
struct Found {
    content: StdFile,
    stat: FileStat,
    /// Where it was.
    path: PathBuf,
    extended_attributes: Vec<ExtendedAttribute>,
    inode_flags: u32,
}

impl DeletedFiles {
    /// The id of the deleted file that `link` of a process (`fd/5`, `map_files/5500-5600`) leads to. The inner error says
    /// why it cannot be saved.
    ///
    /// `stat` is what the link leads to and `name` is the link's text.
    ///
    /// # Errors
    /// If the file cannot be opened for reading.
    pub fn add(
        &mut self,
        proc: &ProcDir,
        link: &str,
        stat: &FileStat,
        name: &OsStr,
    ) -> io::Result<Result<DeletedId, String>> {
        if let Some(known) = self.known.get(&(stat.st_dev, stat.st_ino)) {
            return Ok(Ok(*known));
        }
        // O_NOATIME is for the owner and the privileged.
        let content = match proc.open_with(link, OFlag::O_RDONLY | OFlag::O_NOATIME) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => proc.open_with(link, OFlag::O_RDONLY)?,
            other => other?,
        };
        let flags = inode_flags(content.as_fd());
        if flags & VERITY_FLAG != 0 {
            return Ok(Err("a deleted file that is sealed with fs-verity cannot be made again".into()));
        }
        let extended_attributes = match read_attributes(content.as_fd()) {
            Ok(attributes) => attributes,
            Err((name, error)) => {
                return Ok(Err(format!("{} of a deleted file cannot be read: {error}", attribute(&name))));
            }
        };
        let path = PathBuf::from(without_deleted(name).unwrap_or(name));
        let id = DeletedId(self.found.len() as u32);
        let inode_flags = flags & CHOSEN_FLAGS;
        self.found.push(Found { content, stat: *stat, path, extended_attributes, inode_flags });
        self.known.insert((stat.st_dev, stat.st_ino), id);
        Ok(Ok(id))
    }

    /// Copies the content of all of them into the image.
    pub fn write(&mut self, store: &mut dyn ImageWriter) -> Result<Vec<DeletedFile>, DumpError> {
        let mut saved = Vec::with_capacity(self.found.len());
        for Found { content, stat, path, extended_attributes, inode_flags } in self.found.drain(..) {
            // How the kernel calls what O_TMPFILE makes.
            let linkable = path.file_name() == Some(OsStr::new(&format!("#{}", stat.st_ino)));
            saved.push(DeletedFile {
                path,
                mode: stat.st_mode & 0o7777,
                uid: stat.st_uid,
                gid: stat.st_gid,
                size: stat.st_size as u64,
                accessed: nanoseconds(stat.st_atime, stat.st_atime_nsec),
                modified: nanoseconds(stat.st_mtime, stat.st_mtime_nsec),
                linkable,
                extended_attributes,
                inode_flags,
                content: store.blob(content.as_fd())?,
            });
        }
        Ok(saved)
    }
}

/// `FS_IOC_GETFLAGS`; 0 where the file system has no such flags.
fn inode_flags(file: BorrowedFd<'_>) -> u32 {
    rustix::fs::ioctl_getflags(file).map_or(0, |flags| flags.bits())
}

/// For messages.
fn attribute(name: &OsStr) -> String {
    match name.as_bytes() {
        b"" => "the list of extended attributes".into(),
        b"system.posix_acl_access" => "the POSIX ACL (system.posix_acl_access)".into(),
        _ => format!("the extended attribute {}", name.display()),
    }
}

/// The names of the extended attributes of a file (flistxattr(2)); none where the file system has none.
pub(crate) fn attribute_names(file: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    // XATTR_LIST_MAX: no list is longer.
    let mut list = vec![0_u8; 65536];
    let length = match rustix::fs::flistxattr(file, &mut list[..]) {
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(Vec::new()),
        other => other?,
    };
    let mut names: Vec<CString> = list[..length]
        .split_inclusive(|&byte| byte == 0)
        .filter_map(|name| CStr::from_bytes_with_nul(name).ok().map(CString::from))
        .collect();
    names.sort_unstable();
    Ok(names)
}

/// All extended attributes of a file; or the name of the one that cannot be read, and why.
fn read_attributes(file: BorrowedFd<'_>) -> Result<Vec<ExtendedAttribute>, (OsString, io::Error)> {
    let names = attribute_names(file).map_err(|error| (OsString::new(), error))?;
    // XATTR_SIZE_MAX: no value is longer.
    let mut value = vec![0_u8; if names.is_empty() { 0 } else { 65536 }];
    let mut attributes = Vec::with_capacity(names.len());
    for name in names {
        let length = rustix::fs::fgetxattr(file, &name, &mut value[..]);
        let name = OsString::from_vec(name.into_bytes());
        match length {
            Ok(length) => attributes.push(ExtendedAttribute { name, value: value[..length].to_vec() }),
            Err(error) => return Err((name, error.into())),
        }
    }
    Ok(attributes)
}

/// Checks that a deleted file can be made again.
pub fn check_deleted(id: DeletedId, context: &mut Check<'_>) {
    let Some(deleted) = context.image.deleted_files.get(id.0 as usize) else {
        return context.refuse("", format!("deleted file {} is not in the image", id.0), USE_ANOTHER_COPY);
    };
    let (Some(directory), Some(_), true) =
        (deleted.path.parent(), deleted.path.file_name(), deleted.path.is_absolute())
    else {
        let why = format!("{} is not the full path of a file", deleted.path.display());
        return context.refuse("", why, USE_ANOTHER_COPY);
    };
    let subject = directory.display().to_string();
    if !directory.is_dir() {
        context.refuse(subject, "the directory of a deleted file is gone", "make the directory again");
        return;
    }
    let free = statfs(directory).map(|stat| stat.blocks_available().saturating_mul(stat.block_size() as u64));
    // The saved size may be mostly holes: what does not fit is found when it is written.
    if free == Ok(0) && deleted.size > 0 {
        context.refuse(subject, "the file system of a deleted file is full", "make room on it");
    }
}

/// The deleted files of an image, made again.
#[derive(Debug, Default)]
pub struct RebuiltDeleted {
    /// By [`DeletedId`], open for reading and writing.
    pub files: Vec<OwnedFd>,
    /// What was opened with `O_NOFOLLOW` (as by `shm_open`) has that among its flags, and only an opening by name gives it.
    pub unfollowed: HashMap<FileId, OwnedFd>,
}

/// Makes the deleted files of an image again.
pub fn rebuild_deleted(reader: &dyn ImageReader) -> Result<RebuiltDeleted, RestoreError> {
    let image: &Image = reader.image();
    let mut rebuilt = RebuiltDeleted::default();
    for (id, deleted) in (0..).map(DeletedId).zip(&image.deleted_files) {
        let error = |source: Errno| failed(deleted, "it could not be made again", source.into());
        let directory = deleted.path.parent().unwrap_or(Path::new("/"));
        let parent = open_directory(directory).map_err(error)?;
        let mut file = nameless_file(&parent, directory).map_err(error)?;
        reader.copy_blob(deleted.content, file.as_fd())?;
        if !deleted.linkable
            && let Some(name) = deleted.path.file_name()
        {
            let unfollowed = unfollowed(image, id);
            let flags = iter::once(OFlag::O_RDWR).chain(unfollowed.iter().map(|&(_, flags)| flags));
            let named = named_for_a_moment(&parent, name, &file, &flags.collect::<Vec<_>>()).map_err(error)?;
            let mut named = named.into_iter().flatten();
            file = named.next().unwrap_or(file);
            rebuilt.unfollowed.extend(unfollowed.into_iter().map(|(file, _)| file).zip(named));
        }
        set_owner_and_mode(deleted, file.as_fd()).map_err(error)?;
        // After those two: they take capabilities away and change an ACL.
        set_attributes(deleted, file.as_fd())?;
        set_inode_flags(deleted, file.as_fd(), !GUARDING_FLAGS)?;
        set_times(deleted, file.as_fd()).map_err(error)?;
        rebuilt.files.push(file);
    }
    Ok(rebuilt)
}

/// The open files of a deleted file that were opened with `O_NOFOLLOW`, with all their flags.
fn unfollowed(image: &Image, id: DeletedId) -> Vec<(FileId, OFlag)> {
    let is_of_it =
        |kind: &FileKind| matches!(kind, FileKind::File(File { place: Place::Deleted { id: of }, .. }) if *of == id);
    let files = (0..).map(FileId).zip(&image.files);
    let files = files.filter(|(_, file)| file.flags & libc::O_NOFOLLOW != 0 && is_of_it(&file.kind));
    files.map(|(file, open)| (file, OFlag::from_bits_retain(reopen_flags(open.flags)))).collect()
}

/// The last of the deleted files, once all that has them open or mapped is there: what keeps them from being opened for
/// writing.
pub fn guard_deleted(image: &Image, rebuilt: &RebuiltDeleted) -> Result<(), RestoreError> {
    for (deleted, file) in image.deleted_files.iter().zip(&rebuilt.files) {
        if deleted.inode_flags & GUARDING_FLAGS != 0 {
            set_inode_flags(deleted, file.as_fd(), u32::MAX)?;
        }
    }
    Ok(())
}

fn failed(deleted: &DeletedFile, what: impl std::fmt::Display, source: io::Error) -> RestoreError {
    RestoreError::Io { what: format!("the deleted file {}: {what}", deleted.path.display()), source }
}

fn set_owner_and_mode(deleted: &DeletedFile, file: BorrowedFd<'_>) -> nix::Result<()> {
    let now = nix::sys::stat::fstat(file)?;
    if now.st_size as u64 != deleted.size {
        nix::unistd::ftruncate(file, deleted.size as i64)?;
    }
    if (now.st_uid, now.st_gid) != (deleted.uid, deleted.gid) {
        nix::unistd::fchown(file, Some(deleted.uid.into()), Some(deleted.gid.into()))?;
    }
    nix::sys::stat::fchmod(file, Mode::from_bits_truncate(deleted.mode))
}

fn set_times(deleted: &DeletedFile, file: BorrowedFd<'_>) -> nix::Result<()> {
    let time = |at: i64| TimeSpec::new(at.div_euclid(1_000_000_000), at.rem_euclid(1_000_000_000));
    nix::sys::stat::futimens(file, &time(deleted.accessed), &time(deleted.modified))
}

/// Gives a new file the extended attributes that were saved, and no others: its directory may have handed some down.
fn set_attributes(deleted: &DeletedFile, file: BorrowedFd<'_>) -> Result<(), RestoreError> {
    let failed = |name: &OsStr, done: &str, source: io::Error| {
        failed(deleted, format!("{} cannot be {done}", attribute(name)), source)
    };
    let now = read_attributes(file).map_err(|(name, error)| failed(&name, "read", error))?;
    for saved in &deleted.extended_attributes {
        if !now.contains(saved) {
            rustix::fs::fsetxattr(file, &saved.name, &saved.value, XattrFlags::empty())
                .map_err(|error| failed(&saved.name, "set back", error.into()))?;
        }
    }
    for other in now {
        if !deleted.extended_attributes.iter().any(|saved| saved.name == other.name) {
            rustix::fs::fremovexattr(file, &other.name)
                .map_err(|error| failed(&other.name, "taken away", error.into()))?;
        }
    }
    Ok(())
}

/// Sets the flags that were saved, as far as they are among `these`.
fn set_inode_flags(deleted: &DeletedFile, file: BorrowedFd<'_>, these: u32) -> Result<(), RestoreError> {
    let wanted = deleted.inode_flags & CHOSEN_FLAGS & these;
    let now = inode_flags(file);
    if now & CHOSEN_FLAGS == wanted {
        return Ok(());
    }
    let flags = IFlags::from_bits_retain(now & !CHOSEN_FLAGS | wanted);
    let set = rustix::fs::ioctl_setflags(file, flags);
    set.map_err(|error| failed(deleted, format!("its inode flags {wanted:#x} cannot be set back"), error.into()))
}

/// A new file without a name that `linkat` may give one: `O_TMPFILE` leaves nothing behind however we end. Where the
/// file system has no such thing, a new file under a name that nobody has, removed at once.
fn nameless_file(parent: &OwnedFd, directory: &Path) -> nix::Result<OwnedFd> {
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    match nix::fcntl::open(directory, OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC, mode) {
        Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL) => {}
        other => return other,
    }
    for attempt in 0.. {
        let name = format!(".ckpt-{}-{attempt}", std::process::id());
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(parent, name.as_str(), flags, mode) {
            Err(Errno::EEXIST) => {}
            Ok(file) => {
                nix::unistd::unlinkat(parent, name.as_str(), UnlinkatFlags::NoRemoveDir)?;
                return Ok(file);
            }
            other => return other,
        }
    }
    unreachable!("one of all names is free")
}
