//! Shared memory segments: attachments are mappings of a shared memory object ([`ObjectKind::Segment`]).

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Belongs, Collector, IPC_RMID, Kind, Listed, NAME, Permissions, Rebuilder, Segment, Wanted, listed};
use crate::args;
use crate::batch::{Batch, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::image::Image;
use crate::resource::Check;
use crate::resource::memory::{Mapping, ObjectId, ObjectKind, Source};
use crate::target::{PAGE_SIZE, Target, TargetError};

/// Removed, and there only until nobody has it attached (`shm.h`).
const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;
const SHM_LOCK: i32 = 11;
/// As much as one `write` copies.
const MOST_AT_ONCE: u64 = 0x7fff_f000;

/// Bytes of a segment, which need not be whole pages.
pub fn size(id: i32) -> std::io::Result<Option<u64>> {
    let segments = listed(Kind::Segment)?;
    Ok(segments.iter().find(|segment| segment.permissions.id == id).map(|segment| segment.field("size") as u64))
}

pub(super) fn collect(collector: &mut Collector<'_>, listed: Vec<Listed>) -> Result<Vec<Segment>, DumpError> {
    let attached = collector.objects.segments();
    let mut attachments: HashMap<ObjectId, i64> = HashMap::new();
    for process in &collector.image.processes {
        for mapping in &process.memory.mappings {
            if let Source::Object { id, .. } = mapping.source {
                *attachments.entry(id).or_default() += 1;
            }
        }
        if let Some((start, id)) = torn(&process.memory.mappings, |object| {
            attached.iter().find(|(_, known)| **known == object).map(|(id, _)| (*id, size_of_listed(&listed, *id)))
        }) {
            let why = format!("process {} has unmapped a part of it, at {start:#x}", process.task.pid);
            collector.refuse(Kind::Segment, id, why, "have the program detach it (shmdt) before the dump");
        }
    }
    let mut segments = Vec::new();
    for found in listed {
        let permissions = found.permissions;
        let id = permissions.id;
        let (object, name_key) = match attached.get(&id) {
            Some(&object) => {
                let others = found.field("nattch") - attachments.get(&object).copied().unwrap_or(0);
                if others > 0 {
                    let why = "processes that are not part of the tree have it attached, too";
                    collector.refuse(Kind::Segment, id, why, "end these, or dump a tree that has all of them");
                    continue;
                }
                (object, collector.objects.segment_key(object))
            }
            None => {
                let users = [found.pid("cpid"), found.pid("lpid")];
                match collector.tree.belongs(&found, &users) {
                    Belongs::Elsewhere => continue,
                    // Who made it and ended long ago is not a user.
                    Belongs::ToTree | Belongs::ToBoth(_) if found.field("nattch") == 0 => {}
                    Belongs::ToTree | Belongs::ToBoth(_) => {
                        let why = "the tree has made or used it, and processes outside of the tree have it attached";
                        collector.refuse(Kind::Segment, id, why, "end these, or dump a tree that has all of them");
                        continue;
                    }
                }
                match copy_unattached(collector, &found)? {
                    Some(object) => (object, permissions.key),
                    None => continue,
                }
            }
        };
        segments.push(Segment { permissions, creator: found.pid("cpid"), object, name_key });
    }
    Ok(segments)
}

fn size_of_listed(listed: &[Listed], id: i32) -> u64 {
    listed.iter().find(|segment| segment.permissions.id == id).map_or(0, |segment| segment.field("size") as u64)
}

/// The first attachment that is not whole: where, and of which segment. `segment` says what an object is: id and bytes.
fn torn(mappings: &[Mapping], segment: impl Fn(ObjectId) -> Option<(i32, u64)>) -> Option<(u64, i32)> {
    // Where the attachment that was begun goes on: address, offset, object.
    let mut next: Option<(u64, u64, ObjectId)> = None;
    let mut begun = None;
    for mapping in mappings {
        let segment = match mapping.source {
            Source::Object { id, offset, .. } => segment(id).map(|segment| (id, offset, segment)),
            _ => None,
        };
        if let Some((address, offset, object)) = next {
            let goes_on = segment.is_some_and(|(id, at, _)| (mapping.start, at, id) == (address, offset, object));
            if !goes_on {
                return begun;
            }
        }
        let Some((id, offset, (number, size))) = segment else { continue };
        if next.is_none() {
            begun = Some((mapping.start, number));
            if offset != 0 {
                return begun;
            }
        }
        let end = offset + (mapping.end - mapping.start);
        let size = size.next_multiple_of(PAGE_SIZE);
        if end > size {
            return begun;
        }
        next = (end < size).then_some((mapping.end, end, id));
    }
    next.and(begun)
}

/// Has a process attach a segment once more, copy it, and detach it, in one go. `None` if it may not, or if it is too large.
pub fn copy(target: &mut dyn Target, id: i32, size: u64) -> Result<Option<File>, TargetError> {
    if size > MOST_AT_ONCE {
        return Ok(None);
    }
    let pid = target.pid();
    let failed = |errno: Errno| TargetError::Driver { pid, operation: "memfd_create", source: errno.into() };
    let copy = memfd_create(c"segment", MFdFlags::MFD_CLOEXEC).map_err(failed)?;
    nix::unistd::ftruncate(&copy, size as i64).map_err(failed)?;
    let theirs = target.fds_in(&[copy.as_fd()])?[0];
    let mut batch = Batch::new();
    let attached = batch.try_call(Sysno::shmat, args![id, 0, libc::SHM_RDONLY]);
    // If it could not be attached, these are of an address that is none, and fail.
    let wrote = batch.try_call(Sysno::pwrite64, args![theirs, attached, size, 0]);
    batch.try_call(Sysno::shmdt, args![attached]);
    let replies = target.run(&batch)?;
    target.fds_done(&[theirs])?;
    Ok((replies.result(attached).is_ok() && replies.result(wrote) == Ok(size)).then(|| File::from(copy)))
}

/// Has a process of the tree copy a segment that nobody has attached.
fn copy_unattached(collector: &mut Collector<'_>, found: &Listed) -> Result<Option<ObjectId>, DumpError> {
    let (id, size) = (found.permissions.id, found.field("size") as u64);
    for target in &mut *collector.targets {
        let pid = target.pid();
        let copied = copy(&mut **target, id, size);
        if let Some(copy) = copied.map_err(|source| DumpError::Target { resource: NAME, pid, source })? {
            let added = collector.objects.add_copy(id, found.permissions.key, size, copy.into());
            let failed = |source| DumpError::Io { what: format!("{NAME}: copying shared memory segment {id}"), source };
            return added.map(Some).map_err(failed);
        }
    }
    let why = "no process of the tree may read it, or it is larger than 2 GiB and nobody has it attached";
    collector.refuse(Kind::Segment, id, why, "have its owner allow that (shmctl IPC_SET)");
    Ok(None)
}

/// Whether attachments are whole, and their segments there.
pub(super) fn check(image: &Image, context: &mut Check<'_>) {
    let segment = |object: ObjectId| {
        let object = image.memory_objects.get(object.0 as usize)?;
        let ObjectKind::Segment { id, .. } = object.kind else { return None };
        Some((id, object.size))
    };
    for process in &image.processes {
        context.pid = Some(process.task.pid);
        if let Some((start, id)) = torn(&process.memory.mappings, segment) {
            let why = format!("its attachment at {start:#x} is not whole");
            context.refuse(Kind::Segment.subject(id), why, "use another copy of the image");
        }
    }
    context.pid = None;
    for (index, object) in image.memory_objects.iter().enumerate() {
        let ObjectKind::Segment { id, .. } = object.kind else { continue };
        let described = image
            .sysvipc
            .segments
            .iter()
            .any(|segment| segment.permissions.id == id && segment.object == ObjectId(index as u32));
        if !described {
            context.refuse(
                Kind::Segment.subject(id),
                "the image does not describe it",
                "use another copy of the image",
            );
        }
    }
    for segment in &image.sysvipc.segments {
        let id = segment.permissions.id;
        let object = image.memory_objects.get(segment.object.0 as usize);
        if !object.is_some_and(|object| matches!(object.kind, ObjectKind::Segment { id: of, .. } if of == id)) {
            context.refuse(Kind::Segment.subject(id), "its memory is missing", "use another copy of the image");
        }
    }
}

pub(super) fn rebuild(rebuilder: &mut Rebuilder<'_>, wanted: &Wanted, segment: &Segment) -> Result<(), RestoreError> {
    let Permissions { id, key, mode, .. } = segment.permissions;
    let size = wanted.size.map_or(0, |(_, size)| size);
    let process = rebuilder.process(segment.creator);
    // One that was removed keeps its key in its name only, and another segment may have it now.
    let key_is_taken =
        || listed(Kind::Segment).is_ok_and(|all| all.iter().any(|one| one.permissions.key == segment.name_key));
    let key = if mode & SHM_DEST != 0 && !key_is_taken() { segment.name_key } else { key };
    rebuilder.make(wanted, process, |batch, flags| batch.try_call(Sysno::shmget, args![key, size, flags]))?;
    rebuilder.set_owner(Kind::Segment, &Permissions { id, ..segment.permissions }, 0)
}

pub(super) fn finish(rebuilder: &mut Rebuilder<'_>) -> Result<(), RestoreError> {
    let image = rebuilder.image;
    for segment in &image.sysvipc.segments {
        let Permissions { id, mode, .. } = segment.permissions;
        for (flag, command) in [(SHM_LOCKED, SHM_LOCK), (SHM_DEST, IPC_RMID)] {
            if mode & flag == 0 {
                continue;
            }
            let mut batch = Batch::new();
            let done = Kind::Segment.control(&mut batch, id, command, 0.into());
            let process = rebuilder.process(segment.creator);
            let done = rebuilder.run(process, &batch)?.result(done);
            done.map_err(|errno| rebuilder.io_failed(Kind::Segment, id, "removing or locking it again", errno))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, end: u64, object: u32, offset: u64) -> Mapping {
        Mapping {
            start,
            end,
            protection: 3,
            shared: true,
            source: Source::Object { id: ObjectId(object), offset, writable: true },
            flags: Vec::new(),
            anonymous_name: None,
            protection_key: 0,
            pages: Vec::new(),
            guards: Vec::new(),
        }
    }

    #[test]
    fn attachments_that_are_not_whole() {
        let segment = |object: ObjectId| (object.0 < 2).then_some((40 + object.0 as i32, 0x2800));
        let torn = |mappings: &[Mapping]| super::torn(mappings, segment);
        assert_eq!(torn(&[mapping(0x1000, 0x4000, 0, 0)]), None);
        assert_eq!(torn(&[mapping(0x1000, 0x2000, 0, 0), mapping(0x2000, 0x4000, 0, 0x1000)]), None, "mprotect");
        assert_eq!(torn(&[mapping(0x1000, 0x4000, 0, 0), mapping(0x4000, 0x7000, 0, 0)]), None, "twice");
        assert_eq!(torn(&[mapping(0x1000, 0x2000, 5, 0x7000)]), None, "another kind of object");
        assert_eq!(torn(&[mapping(0x1000, 0x3000, 0, 0)]), Some((0x1000, 40)), "its end is missing");
        assert_eq!(torn(&[mapping(0x2000, 0x4000, 1, 0x1000)]), Some((0x2000, 41)), "its beginning");
        assert_eq!(
            torn(&[mapping(0x1000, 0x2000, 0, 0), mapping(0x3000, 0x4000, 0, 0x2000)]),
            Some((0x1000, 40)),
            "its middle"
        );
        assert_eq!(torn(&[mapping(0x1000, 0x2000, 0, 0), mapping(0x2000, 0x4000, 1, 0x1000)]), Some((0x1000, 40)));
        assert_eq!(torn(&[mapping(0x1000, 0x5000, 0, 0)]), Some((0x1000, 40)), "too large");
    }

    #[test]
    fn there_is_no_such_segment() {
        assert_eq!(size(-1).unwrap(), None);
    }
}
