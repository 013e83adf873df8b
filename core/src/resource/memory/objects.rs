//! Memory that no path leads to and that mappings and descriptors share: `MAP_SHARED | MAP_ANONYMOUS`, memfds, and System V
//! segments.
//!
//! Such an object is saved once for the tree, by its inode, and made again once: a memfd by `memfd_create`, anonymous
//! shared memory by a mapping in the first process, whose file `/proc/PID/map_files` gives to everyone. A segment is there
//! already (see [`sysvipc`]): it is attached in the first process while its content is brought in.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, fchown};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{FileStat, Mode, fchmod};
use nix::unistd::{Whence, ftruncate, lseek};

use crate::args;
use crate::batch::{Batch, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::progress::Meter;
use crate::resource::files::{DeletedFiles, Located, RebuiltDeleted, attribute_names};
use crate::resource::memory::{Filler, NAME, Object, ObjectId, ObjectKind, Pages};
use crate::resource::sysvipc;
use crate::store::{ImageReader, ImageWriter, PageExtent};
use crate::target::{PAGE_SIZE, RemotePtr, Target, TargetError};

/// The objects of a tree, as they are found.
#[derive(Debug, Default)]
pub struct Objects {
    /// Deleted files, of descriptors and mappings.
    pub deleted: DeletedFiles,
    /// Inodes of mappings that were looked at already: a library is mapped in several parts, by many processes.
    pub(super) known: HashMap<(u32, u32, u64), Known>,
    found: Vec<Found>,
    by_inode: HashMap<(u64, u64), ObjectId>,
    /// By their ids.
    segments: HashMap<i32, ObjectId>,
}

/// What a mapped inode is.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub link: OsString,
    pub stat: FileStat,
    pub located: Located,
    /// What of `/proc/PID` leads to it, where the link of the mapping may not be followed.
    pub path: Option<String>,
}

/// How `maps` shows anonymous shared memory that was made again without the right to follow `map_files`: by a memfd.
pub(super) const NAMED_FOR_SHARED: &[u8] = b"/memfd:dev-zero (deleted)";

#[derive(Debug)]
struct Found {
    object: Object,
    content: File,
}

/// The objects of a skeleton, as descriptors of ours.
#[derive(Debug, Default)]
pub struct Rebuilt {
    pub objects: Vec<OwnedFd>,
    pub deleted: RebuiltDeleted,
    /// Which of the objects are System V segments, with their ids: these are attached and not mapped.
    pub segments: HashMap<ObjectId, i32>,
}

/// The name of a memfd, from what its link says.
pub fn memfd_name(link: &OsStr) -> Option<&[u8]> {
    link.as_bytes().strip_prefix(b"/memfd:")?.strip_suffix(b" (deleted)")
}

impl Objects {
    /// Notes an object that a link of `/proc/PID` (`fd/3`, `map_files/..`) leads to. The inner error says why it cannot
    /// be saved.
    pub fn add(
        &mut self,
        target: &dyn Target,
        path: &str,
        link: &OsStr,
        stat: &FileStat,
    ) -> io::Result<Result<ObjectId, String>> {
        let inode = (stat.st_dev, stat.st_ino);
        if let Some(&known) = self.by_inode.get(&inode) {
            return Ok(Ok(known));
        }
        let content = target.proc().open_with(path, OFlag::O_RDONLY)?;
        let kind = match memfd_name(link) {
            None => ObjectKind::Anonymous,
            Some(_) if stat.st_blksize as u64 > PAGE_SIZE => {
                return Ok(Err("huge-page memory (hugetlb) is not supported".into()));
            }
            Some(_) if !attribute_names(content.as_fd())?.is_empty() => {
                return Ok(Err("a memfd with extended attributes is not supported".into()));
            }
            Some(name) => {
                let seals = fcntl(&content, FcntlArg::F_GET_SEALS)? as u32;
                ObjectKind::Memfd {
                    name: name.to_vec(),
                    flags: if seals & libc::F_SEAL_SEAL as u32 == 0 { libc::MFD_ALLOW_SEALING } else { 0 },
                    seals,
                    mode: stat.st_mode & 0o7777,
                    uid: stat.st_uid,
                    gid: stat.st_gid,
                }
            }
        };
        let id = ObjectId(self.found.len() as u32);
        self.by_inode.insert(inode, id);
        self.found.push(Found { object: Object { kind, size: stat.st_size as u64, pages: Vec::new() }, content });
        Ok(Ok(id))
    }

    /// Notes anonymous shared memory that no link may be followed to. The process copies it for us, as far as it is
    /// mapped. The inner error says why it cannot be saved.
    pub(super) fn copy_shared(
        &mut self,
        target: &mut dyn Target,
        mapping: &crate::procfs::Mapping,
    ) -> Result<Result<ObjectId, String>, TargetError> {
        let end = mapping.offset + mapping.len();
        let inode = (nix::sys::stat::makedev(mapping.major.into(), mapping.minor.into()), mapping.inode);
        if let Some(&known) = self.by_inode.get(&inode) {
            if self.found[known.0 as usize].object.size < end {
                return Ok(Err(
                    "parts of this shared memory are mapped in one process and other parts elsewhere".into()
                ));
            }
            return Ok(Ok(known));
        }
        if mapping.offset != 0 || !mapping.read {
            return Ok(Err("this shared memory is mapped in part, or may not be read".into()));
        }
        let pid = target.pid();
        let failed = |operation| move |source| TargetError::Driver { pid, operation, source };
        let copy = memfd_create(c"dev-zero", MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| failed("memfd_create")(io::Error::from(errno)))?;
        ftruncate(&copy, end as i64).map_err(|errno| failed("ftruncate")(io::Error::from(errno)))?;
        use std::os::fd::AsFd;
        let theirs = target.fds_in(&[copy.as_fd()])?[0];
        let mut at = 0;
        while at < end {
            let size = (end - at).min(64 << 20);
            let mut batch = Batch::new();
            let wrote = batch.try_call(Sysno::pwrite64, args![theirs, mapping.start + at, size, at]);
            match target.run(&batch)?.result(wrote) {
                Ok(wrote) if wrote > 0 => at += wrote,
                _ => {
                    target.fds_done(&[theirs])?;
                    return Ok(Err("it has pages that may not be read (guard pages)".into()));
                }
            }
        }
        target.fds_done(&[theirs])?;
        let content = File::from(copy);
        punch_zeros(&content, end).map_err(failed("copying shared memory"))?;
        let id = ObjectId(self.found.len() as u32);
        self.by_inode.insert(inode, id);
        let object = Object { kind: ObjectKind::Anonymous, size: end, pages: Vec::new() };
        self.found.push(Found { object, content });
        Ok(Ok(id))
    }

    /// Notes a System V segment that is mapped. The inner error says why it cannot be saved.
    pub(super) fn add_segment(
        &mut self,
        target: &mut dyn Target,
        mapping: &crate::procfs::Mapping,
        key: i32,
    ) -> Result<Result<ObjectId, String>, TargetError> {
        let number = mapping.inode as i32;
        if let Some(&known) = self.segments.get(&number) {
            return Ok(Ok(known));
        }
        let pid = target.pid();
        let failed = |source| TargetError::Driver { pid, operation: "looking at a System V segment", source };
        let Some(size) = sysvipc::segment_size(number).map_err(failed)? else {
            return Ok(Err("this System V segment is of another ipc namespace".into()));
        };
        let path = format!("map_files/{:x}-{:x}", mapping.start, mapping.end);
        let content = match target.proc().open_with(path, OFlag::O_RDONLY) {
            Ok(content) => content,
            // To follow these links takes CAP_CHECKPOINT_RESTORE.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                match sysvipc::copy_segment(target, number, size)? {
                    Some(content) => {
                        punch_zeros(&content, size).map_err(failed)?;
                        content
                    }
                    None => return Ok(Err("this System V segment may not be read, or is larger than 2 GiB".into())),
                }
            }
            Err(error) => return Err(failed(error)),
        };
        Ok(Ok(self.push_segment(number, key, size, content)))
    }

    fn push_segment(&mut self, number: i32, key: i32, size: u64, content: File) -> ObjectId {
        let id = ObjectId(self.found.len() as u32);
        self.segments.insert(number, id);
        let object = Object { kind: ObjectKind::Segment { id: number, key }, size, pages: Vec::new() };
        self.found.push(Found { object, content });
        id
    }

    /// Notes a System V segment that nobody has attached, by a copy of it.
    pub fn add_copy(&mut self, number: i32, key: i32, size: u64, copy: OwnedFd) -> io::Result<ObjectId> {
        let content = File::from(copy);
        punch_zeros(&content, size)?;
        Ok(self.push_segment(number, key, size, content))
    }

    /// The System V segments that were found, by their ids.
    pub fn segments(&self) -> HashMap<i32, ObjectId> {
        self.segments.clone()
    }

    /// The key in the name of a segment.
    pub fn segment_key(&self, id: ObjectId) -> i32 {
        match self.found.get(id.0 as usize).map(|found| &found.object.kind) {
            Some(ObjectKind::Segment { key, .. }) => *key,
            _ => 0,
        }
    }

    /// Writes the content of all objects into the image.
    pub fn write(&mut self, store: &mut dyn ImageWriter, meter: &mut Meter<'_>) -> Result<Vec<Object>, DumpError> {
        let mut objects = Vec::with_capacity(self.found.len());
        for found in self.found.drain(..) {
            let mut object = found.object;
            write_object(&mut object, &found.content, store, meter)?;
            objects.push(object);
        }
        Ok(objects)
    }
}

/// Makes holes of pages that hold zeros.
fn punch_zeros(content: &File, size: u64) -> io::Result<()> {
    let mut page = vec![0u8; PAGE_SIZE as usize];
    for at in (0..size).step_by(PAGE_SIZE as usize) {
        let wanted = PAGE_SIZE.min(size - at) as usize;
        content.read_exact_at(&mut page[..wanted], at)?;
        if page[..wanted].iter().all(|&byte| byte == 0) {
            use nix::fcntl::{FallocateFlags, fallocate};
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(content, flags, at as i64, wanted as i64)?;
        }
    }
    Ok(())
}

/// A page-aligned buffer, as `O_DIRECT` wants it.
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    pub const PAGES: u64 = 128;

    pub fn new() -> Buffer {
        let bytes = vec![0; ((Buffer::PAGES + 1) * PAGE_SIZE) as usize];
        let start = bytes.as_ptr().align_offset(PAGE_SIZE as usize);
        Buffer { bytes, start }
    }

    pub fn pages(&mut self, pages: u64) -> &mut [u8] {
        &mut self.bytes[self.start..][..(pages * PAGE_SIZE) as usize]
    }
}

pub(super) fn checksums(pages: &[u8]) -> Vec<u32> {
    pages.chunks_exact(PAGE_SIZE as usize).map(crc32c::crc32c).collect()
}

fn io_failed(what: &str) -> impl Fn(io::Error) -> DumpError {
    move |source| DumpError::Io { what: format!("{NAME}: {what}"), source }
}

/// Copies what is not a hole.
fn write_object(
    object: &mut Object,
    content: &File,
    store: &mut dyn ImageWriter,
    meter: &mut Meter<'_>,
) -> Result<(), DumpError> {
    let failed = io_failed("reading shared memory");
    let mut buffer = Buffer::new();
    let mut at = 0;
    while at < object.size {
        at = match lseek(content, at as i64, Whence::SeekData) {
            Ok(data) => data as u64 / PAGE_SIZE * PAGE_SIZE,
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(failed(errno.into())),
        };
        let hole = lseek(content, at as i64, Whence::SeekHole).map_err(|errno| failed(errno.into()))? as u64;
        let end = hole.next_multiple_of(PAGE_SIZE);
        let extent = store.reserve_pages((end - at) / PAGE_SIZE)?;
        object.pages.push(Pages { start: at, extent });
        let mut done = 0;
        while done < extent.pages {
            let pages = (extent.pages - done).min(Buffer::PAGES);
            let bytes = buffer.pages(pages);
            bytes.fill(0);
            // The last page of an object may reach past its end.
            let wanted = bytes.len().min((object.size - at - done * PAGE_SIZE) as usize);
            content.read_exact_at(&mut bytes[..wanted], at + done * PAGE_SIZE).map_err(&failed)?;
            write_direct(store, extent.first + done, bytes).map_err(io_failed("writing the image"))?;
            store.page_checksums(PageExtent { first: extent.first + done, pages }, &checksums(bytes))?;
            meter.add(pages * PAGE_SIZE);
            done += pages;
        }
        at = end;
    }
    Ok(())
}

/// Writes pages of a [`Buffer`] to the page file.
pub(super) fn write_direct(store: &dyn ImageWriter, first: u64, bytes: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let at = (first * PAGE_SIZE + done as u64) as i64;
        match nix::sys::uio::pwrite(store.pages(), &bytes[done..], at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(wrote) => done += wrote,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Makes the objects of an image, with their content where the filler does not bring that.
pub(super) fn rebuild(
    targets: &mut [Box<dyn Target>],
    reader: &dyn ImageReader,
    deleted: RebuiltDeleted,
    filler: &dyn Filler,
) -> Result<Rebuilt, RestoreError> {
    let image = reader.image();
    let (mut objects, mut segments) = (Vec::new(), HashMap::new());
    for (index, object) in image.memory_objects.iter().enumerate() {
        let fd = match &object.kind {
            ObjectKind::Anonymous => make_anonymous(&mut *targets[0], object.size)?,
            ObjectKind::Segment { id, .. } => {
                segments.insert(ObjectId(objects.len() as u32), *id);
                objects.push(fill_segment(&mut *targets[0], *id, object, reader)?);
                continue;
            }
            ObjectKind::Memfd { name, flags, mode, uid, gid, .. } => {
                make_memfd(name, *flags, *mode, *uid, *gid, object.size).map_err(rebuild_failed)?
            }
        };
        if !filler.brings_object(image, ObjectId(index as u32)) {
            read_object(object, &fd, reader)?;
        }
        if let ObjectKind::Memfd { seals, .. } = &object.kind {
            add_seals(&fd, seals & !LATE_SEALS).map_err(rebuild_failed)?;
        }
        objects.push(fd);
    }
    Ok(Rebuilt { objects, deleted, segments })
}

/// Seals that would keep the mappings from being made: of future writable ones, and the seal on seals.
const LATE_SEALS: u32 = (libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL) as u32;

/// Once all mappings are there.
pub(super) fn seal(objects: &[Object], fds: &[OwnedFd]) -> Result<(), RestoreError> {
    for (object, fd) in objects.iter().zip(fds) {
        if let ObjectKind::Memfd { seals, .. } = &object.kind {
            add_seals(fd, seals & LATE_SEALS).map_err(rebuild_failed)?;
        }
    }
    Ok(())
}

fn add_seals(fd: &OwnedFd, seals: u32) -> io::Result<()> {
    if seals != 0 {
        fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(seals as i32)))?;
    }
    Ok(())
}

fn rebuild_failed(source: io::Error) -> RestoreError {
    RestoreError::Io { what: format!("{NAME}: making shared memory"), source }
}

fn make_memfd(name: &[u8], flags: u32, mode: u32, uid: u32, gid: u32, size: u64) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(name)?;
    // Without MFD_ALLOW_SEALING a memfd has the seal on seals from the start, and the others could not be added.
    let _ = flags;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = memfd_create(name.as_c_str(), flags)?;
    ftruncate(&fd, size as i64)?;
    fchown(&fd, Some(uid), Some(gid))?;
    fchmod(&fd, Mode::from_bits_truncate(mode))?;
    Ok(fd)
}

/// `MAP_SHARED | MAP_ANONYMOUS` in the first process; the file behind it is what all share.
fn make_anonymous(target: &mut dyn Target, size: u64) -> Result<OwnedFd, RestoreError> {
    let pid = target.pid();
    let failed = |source: TargetError| RestoreError::Target { resource: NAME, pid, source };
    let mut batch = Batch::new();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let mapped = batch.call(Sysno::mmap, args![0, size, protection, flags, -1, 0]);
    let mapped = target.run(&batch).map_err(failed)?.value(mapped);
    let end = mapped + size.next_multiple_of(PAGE_SIZE);
    let file = target.proc().open_with(format!("map_files/{mapped:x}-{end:x}"), OFlag::O_RDWR);
    let file = match file {
        // Without CAP_CHECKPOINT_RESTORE the link may not be followed. A memfd is the same but for its name in maps.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => memfd_create(c"dev-zero", MFdFlags::MFD_CLOEXEC)
            .and_then(|memfd| ftruncate(&memfd, size as i64).map(|()| File::from(memfd)))
            .map_err(io::Error::from),
        other => other,
    };
    let mut batch = Batch::new();
    batch.call(Sysno::munmap, args![RemotePtr(mapped), size]);
    target.run(&batch).map_err(failed)?;
    Ok(file.map_err(rebuild_failed)?.into())
}

/// Brings in the content of a System V segment, in the place of what may be in it.
fn fill_segment(
    target: &mut dyn Target,
    id: i32,
    object: &Object,
    reader: &dyn ImageReader,
) -> Result<OwnedFd, RestoreError> {
    let pid = target.pid();
    let failed = |source: TargetError| RestoreError::Target { resource: NAME, pid, source };
    let size = object.size.next_multiple_of(PAGE_SIZE);
    let mut batch = Batch::new();
    let attached = batch.call(Sysno::shmat, args![id, 0, 0]);
    batch.call(Sysno::madvise, args![attached, size, libc::MADV_REMOVE]);
    let start = target.run(&batch).map_err(failed)?.value(attached);
    let link = format!("map_files/{start:x}-{:x}", start + size);
    let file = match target.proc().open_with(link, OFlag::O_RDWR) {
        Ok(file) => {
            let file = OwnedFd::from(file);
            read_object(object, &file, reader)?;
            file
        }
        // Without CAP_CHECKPOINT_RESTORE the link may not be followed: the process reads a copy into its own memory.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            let copy = memfd_create(c"segment", MFdFlags::MFD_CLOEXEC).map_err(|errno| rebuild_failed(errno.into()))?;
            ftruncate(&copy, object.size as i64).map_err(|errno| rebuild_failed(errno.into()))?;
            read_object(object, &copy, reader)?;
            let theirs = target.fds_in(&[copy.as_fd()]).map_err(failed)?[0];
            for run in &object.pages {
                let (mut at, end) = (run.start, (run.start + run.extent.pages * PAGE_SIZE).min(object.size));
                while at < end {
                    let mut batch = Batch::new();
                    let read = batch.call(Sysno::pread64, args![theirs, start + at, end - at, at]);
                    match target.run(&batch).map_err(failed)?.value(read) {
                        0 => return Err(rebuild_failed(io::ErrorKind::UnexpectedEof.into())),
                        read => at += read,
                    }
                }
            }
            target.fds_done(&[theirs]).map_err(failed)?;
            copy
        }
        Err(error) => return Err(rebuild_failed(error)),
    };
    let mut batch = Batch::new();
    batch.call(Sysno::shmdt, args![RemotePtr(start)]);
    target.run(&batch).map_err(failed)?;
    Ok(file)
}

fn read_object(object: &Object, fd: &OwnedFd, reader: &dyn ImageReader) -> Result<(), RestoreError> {
    let mut buffer = Buffer::new();
    for run in &object.pages {
        let mut done = 0;
        while done < run.extent.pages {
            let pages = (run.extent.pages - done).min(Buffer::PAGES);
            let first = run.extent.first + done;
            let bytes = buffer.pages(pages);
            let mut read = 0;
            while read < bytes.len() {
                let at = (first * PAGE_SIZE) as i64 + read as i64;
                match nix::sys::uio::pread(reader.pages(), &mut bytes[read..], at) {
                    Ok(0) => return Err(reader.damaged_page(first).into()),
                    Ok(got) => read += got,
                    Err(Errno::EINTR) => {}
                    Err(errno) => return Err(rebuild_failed(errno.into())),
                }
            }
            let saved = reader.page_checksums(PageExtent { first, pages })?;
            if let Some(bad) = checksums(bytes).iter().zip(&saved).position(|(found, saved)| found != saved) {
                return Err(reader.damaged_page(first + bad as u64).into());
            }
            let at = run.start + done * PAGE_SIZE;
            let len = bytes.len().min((object.size - at) as usize);
            File::from(fd.try_clone().map_err(rebuild_failed)?)
                .write_all_at(&bytes[..len], at)
                .map_err(rebuild_failed)?;
            done += pages;
        }
    }
    Ok(())
}
