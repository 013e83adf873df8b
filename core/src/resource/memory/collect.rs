//! What is mapped: `/proc/PID/smaps`, `/proc/PID/map_files`, `/proc/PID/auxv`, and the layout in `/proc/PID/stat`.

use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver};

use crate::error::DumpError;
use crate::procfs;
use crate::resource::Collect;
use nix::sys::stat::FileStat;

use crate::resource::files::{DeletedId, Identity, Located, locate, without_deleted};
use crate::resource::memory::objects::{Known, NAMED_FOR_SHARED, memfd_name};
use crate::resource::memory::{Layout, LockFuture, Mapping, Memory, Objects, Source};
use crate::target::Target;

/// `VmFlags` that are brought back, in the order of their `madvise`.
pub(super) const KEPT_FLAGS: &[&str] = &["dc", "dd", "gd", "hg", "lf", "lo", "mg", "nh", "nr", "rr", "sl", "sr", "wf"];

/// `VmFlags` of memory that cannot be brought back: which, what it is, what helps.
const REFUSED_FLAGS: &[(&str, &str, &str)] = &[
    ("ht", "huge-page memory (hugetlb) is not supported", "use transparent huge pages"),
    ("io", "memory of a device is not supported", "have the program release the device before the dump"),
    ("pf", "memory of a device is not supported", "have the program release the device before the dump"),
    (
        "um",
        "memory registered with userfaultfd is not supported",
        "have the program close its userfaultfd; or, if it was restored with its memory to follow, wait until all of its \
         memory is there",
    ),
    ("uw", "memory registered with userfaultfd is not supported", "have the program close its userfaultfd"),
    ("ui", "memory registered with userfaultfd is not supported", "have the program close its userfaultfd"),
    ("ss", "shadow stacks are not supported", "start the program without GLIBC_TUNABLES=glibc.cpu.x86_shstk"),
];

/// What `/proc` shows of the memory of the processes of a tree, one after the other.
pub struct Looks {
    files: std::vec::IntoIter<Files>,
    /// Of a large tree, a thread reads them ahead.
    ahead: Option<Receiver<io::Result<Look>>>,
}

/// `smaps` and `auxv` of a process.
type Files = (File, File);

struct Look {
    mappings: Vec<procfs::Mapping>,
    auxv: Vec<u8>,
}

impl Looks {
    /// From so many processes on it is worth a thread.
    const MANY: usize = 8;

    pub fn at(targets: &[Box<dyn Target>]) -> Result<Looks, DumpError> {
        let open = |target: &dyn Target| {
            let proc = target.proc();
            let files = proc.file("smaps").and_then(|smaps| Ok((smaps, proc.file("auxv")?)));
            files.map_err(|source| DumpError::Io { what: format!("smaps of process {}", target.pid()), source })
        };
        let files = targets.iter().map(|target| open(&**target)).collect::<Result<Vec<_>, _>>()?;
        if files.len() < Looks::MANY {
            return Ok(Looks { files: files.into_iter(), ahead: None });
        }
        let (sender, receiver) = mpsc::channel();
        let (work, accepted) = mpsc::channel::<Vec<Files>>();
        let reading = std::thread::Builder::new().spawn(move || {
            // Nobody listens any more once the dump has failed.
            accepted.into_iter().flatten().try_for_each(|files| sender.send(look(files)))
        });
        if reading.is_err() {
            // No more threads may be started: each is read when it is asked for.
            return Ok(Looks { files: files.into_iter(), ahead: None });
        }
        work.send(files).map_err(|_| DumpError::Io {
            what: "reading smaps ahead".into(),
            source: io::Error::other("the thread that does it has ended"),
        })?;
        Ok(Looks { files: Vec::new().into_iter(), ahead: Some(receiver) })
    }

    fn next(&mut self) -> io::Result<Look> {
        match &self.ahead {
            Some(ahead) => ahead.recv().map_err(io::Error::other)?,
            None => look(self.files.next().expect("one for each process")),
        }
    }
}

fn look((smaps, auxv): Files) -> io::Result<Look> {
    let mappings = procfs::Mapping::parse_all(&procfs::read_whole(smaps)?);
    Ok(Look { mappings: mappings.ok_or(io::ErrorKind::InvalidData)?, auxv: procfs::read_whole(auxv)? })
}

/// Collects the mappings of a process, without their pages. `looks` are at this process.
pub fn collect(context: &mut Collect<'_>, looks: &mut Looks, objects: &mut Objects) -> Result<Memory, DumpError> {
    let Look { mappings: all, auxv } = looks.next().map_err(|error| context.io_error("smaps", error))?;

    let stat = &context.answers[0].stat;
    let brk = context.asked.replies.value(context.asked.brk);
    let layout = Layout {
        start_code: stat.start_code,
        end_code: stat.end_code,
        start_data: stat.start_data,
        end_data: stat.end_data,
        start_brk: stat.start_brk,
        brk,
        start_stack: stat.start_stack,
        arg_start: stat.arg_start,
        arg_end: stat.arg_end,
        env_start: stat.env_start,
        env_end: stat.env_end,
    };

    let ours = context.target.footprint().mappings;
    let mut mappings = Vec::with_capacity(all.len());
    let mut lock_future = LockFuture::No;
    for found in &all {
        let is_ours = ours.iter().any(|range| range.contains(&found.start));
        if is_ours {
            // The kernel shows nowhere that all that is mapped later gets locked; but ours was mapped later.
            lock_future = match (found.has("lf"), found.has("lo")) {
                (true, _) => LockFuture::OnFault,
                (false, true) => LockFuture::Locked,
                (false, false) => lock_future,
            };
        }
        if is_ours || found.name.as_os_str() == "[vsyscall]" {
            continue;
        }
        mappings.extend(collect_mapping(context, objects, found)?);
    }
    let (exe, exe_identity, exe_deleted) = collect_exe(context, objects)?;
    Ok(Memory { mappings, layout, auxv, exe, exe_identity, exe_deleted, lock_future })
}

fn subject(found: &procfs::Mapping) -> String {
    let name = found.name.display().to_string();
    let name = if name.is_empty() { "anonymous".to_string() } else { name };
    format!("mapping {:x}-{:x} ({name})", found.start, found.end)
}

fn collect_mapping(
    context: &mut Collect<'_>,
    objects: &mut Objects,
    found: &procfs::Mapping,
) -> Result<Option<Mapping>, DumpError> {
    let name = found.name.as_os_str().as_bytes();
    for (flag, why, help) in REFUSED_FLAGS {
        if found.has(flag) && !name.starts_with(b"[v") {
            context.refuse(subject(found), *why, *help);
            return Ok(None);
        }
    }
    if found.protection_key != 0 {
        let help = "start the program without memory protection keys";
        context.refuse(subject(found), "memory protection keys are not supported", help);
        return Ok(None);
    }
    let source = if name == b"[vdso]" {
        Source::Vdso
    } else if name.starts_with(b"[vvar") {
        Source::Vvar
    } else if found.inode != 0 || segment_key(found).is_some() {
        match file_source(context, objects, found)? {
            Some(source) => source,
            None => return Ok(None),
        }
    } else if name.is_empty() || name == b"[heap]" || name.starts_with(b"[stack") || name.starts_with(b"[anon:") {
        Source::Anonymous
    } else {
        context.refuse(subject(found), "this kind of memory is not supported", "have the program unmap it");
        return Ok(None);
    };
    let anonymous_name = name.strip_prefix(b"[anon:").and_then(|name| name.strip_suffix(b"]")).map(<[u8]>::to_vec);
    let mut protection = libc::PROT_NONE;
    for (is_set, bit) in
        [(found.read, libc::PROT_READ), (found.write, libc::PROT_WRITE), (found.execute, libc::PROT_EXEC)]
    {
        protection |= if is_set { bit } else { 0 };
    }
    // Whether it counts towards the commit limit is not only a matter of what it is now: see rebuild.rs.
    let mut flags: Vec<[u8; 2]> = KEPT_FLAGS
        .iter()
        .chain(&["ac"])
        .filter(|flag| found.has(flag))
        .map(|flag| <[u8; 2]>::try_from(flag.as_bytes()).expect("two letters"))
        .collect();
    flags.sort_unstable();
    Ok(Some(Mapping {
        start: found.start,
        end: found.end,
        protection,
        shared: found.shared,
        source,
        flags,
        anonymous_name,
        protection_key: 0,
        pages: Vec::new(),
        guards: Vec::new(),
    }))
}

/// What a mapping with an inode is of.
fn file_source(
    context: &mut Collect<'_>,
    objects: &mut Objects,
    found: &procfs::Mapping,
) -> Result<Option<Source>, DumpError> {
    // Its inode number is its id, which an inode of another kind may have as well.
    if let Some(key) = segment_key(found) {
        return match objects.add_segment(context.target, found, key) {
            Ok(Ok(id)) => Ok(Some(Source::Object { id, offset: found.offset, writable: found.has("mw") })),
            Ok(Err(why)) => {
                context.refuse(subject(found), why, "have the program detach it (shmdt) before the dump");
                Ok(None)
            }
            Err(source) => Err(context.target_error(source)),
        };
    }
    let path = format!("map_files/{:x}-{:x}", found.start, found.end);
    let proc = context.target.proc();
    let key = (found.major, found.minor, found.inode);
    let known = match objects.known.entry(key) {
        Entry::Occupied(known) => Some(known.get().clone()),
        Entry::Vacant(unknown) => {
            let looked = proc.link(&path).and_then(|link| {
                let stat = match proc.stat(&path) {
                    Ok(stat) => stat,
                    // To follow these links takes CAP_CHECKPOINT_RESTORE.
                    Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                        let Some((path, stat)) = find_mapped(proc, &link, found)? else { return Ok(None) };
                        return Ok(Some(Known { located: locate(&link, &stat), link, stat, path: Some(path) }));
                    }
                    Err(error) => return Err(error),
                };
                Ok(Some(Known { located: locate(&link, &stat), link, stat, path: None }))
            });
            let looked = looked.map_err(|error| context.io_error(&path, error))?;
            looked.map(|known| unknown.insert(known).clone())
        }
    };
    let Some(Known { link, stat, located, path: other_path }) = known else {
        return nameless(context, objects, found);
    };
    let path = other_path.unwrap_or(path);
    let (link, stat) = (&link, &stat);
    // Only a shared mapping of a file that was opened for writing may be made writable.
    let writable = found.shared && found.has("mw");
    let offset = found.offset;
    let text = link.as_bytes();
    if text.starts_with(b"/memfd:") || (text == b"/dev/zero (deleted)" && stat.st_mode & libc::S_IFMT == libc::S_IFREG)
    {
        return match objects.add(context.target, &path, link, stat) {
            Ok(Ok(id)) => Ok(Some(Source::Object { id, offset, writable })),
            Ok(Err(why)) => {
                context.refuse(subject(found), why, "have the program unmap it");
                Ok(None)
            }
            Err(error) => Err(context.io_error(&path, error)),
        };
    }
    if text.starts_with(b"/[aio]") || text.starts_with(b"anon_inode:") {
        let why = "memory of asynchronous I/O and the like is not supported";
        context.refuse(subject(found), why, "have the program release it before the dump");
        return Ok(None);
    }
    match located {
        Located::Path(path) => match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG => Ok(Some(Source::File { path, identity: Identity::of(stat), offset, writable })),
            libc::S_IFCHR if path.as_os_str() == "/dev/zero" && !found.shared => Ok(Some(Source::Anonymous)),
            _ => {
                let why = "memory of a device is not supported";
                context.refuse(subject(found), why, "have the program release the device before the dump");
                Ok(None)
            }
        },
        Located::Deleted => match objects.deleted.add(context.target.proc(), &path, stat, link) {
            Ok(Ok(id)) => Ok(Some(Source::Deleted { id, offset, writable })),
            Ok(Err(why)) => {
                context.refuse(subject(found), why, "have the program unmap it");
                Ok(None)
            }
            Err(error) => Err(context.io_error(&path, error)),
        },
        Located::Elsewhere(why) => {
            context.refuse(subject(found), why, "");
            Ok(None)
        }
    }
}

/// The key in the name of a System V segment: `/SYSV0000002a (deleted)`, on no device.
fn segment_key(found: &procfs::Mapping) -> Option<i32> {
    let key = found.name.to_str()?.strip_prefix("/SYSV")?.strip_suffix(" (deleted)")?;
    let key = u32::from_str_radix(key, 16).ok()?;
    (found.major == 0 && found.shared).then_some(key as i32)
}

/// Whether a `stat` is of what is mapped, by what `maps` shows.
fn is_mapped(found: &procfs::Mapping, stat: &FileStat) -> bool {
    let device = (libc::major(stat.st_dev), libc::minor(stat.st_dev));
    (device, stat.st_ino) == ((found.major, found.minor), found.inode)
}

/// Finds a mapped file without the right to follow `map_files`: by its path, or by a descriptor of the process that leads
/// to it. Gives what of `/proc/PID` leads there; for a path, that is not looked at again.
fn find_mapped(
    proc: &procfs::ProcDir,
    link: &std::ffi::OsStr,
    found: &procfs::Mapping,
) -> std::io::Result<Option<(String, FileStat)>> {
    if let Ok(stat) = nix::sys::stat::lstat(std::path::Path::new(link))
        && is_mapped(found, &stat)
    {
        return Ok(Some((String::new(), stat)));
    }
    for number in proc.numbers("fd")? {
        let path = format!("fd/{number}");
        if let Ok(stat) = proc.stat(&path)
            && is_mapped(found, &stat)
        {
            return Ok(Some((path, stat)));
        }
    }
    Ok(None)
}

/// Memory that nothing leads to that we may follow: shared memory is copied by the process itself.
fn nameless(
    context: &mut Collect<'_>,
    objects: &mut Objects,
    found: &procfs::Mapping,
) -> Result<Option<Source>, DumpError> {
    let name = found.name.as_os_str().as_bytes();
    let is_shared_memory = name == b"/dev/zero (deleted)" || name == NAMED_FOR_SHARED;
    if !is_shared_memory || !found.shared {
        let why = "its file has no path and no descriptor leads to it";
        context.refuse(subject(found), why, "restore the file's name, or dump with CAP_CHECKPOINT_RESTORE");
        return Ok(None);
    }
    match objects.copy_shared(context.target, found) {
        Ok(Ok(id)) => Ok(Some(Source::Object { id, offset: found.offset, writable: found.has("mw") })),
        Ok(Err(why)) => {
            context.refuse(subject(found), why, "dump with CAP_CHECKPOINT_RESTORE");
            Ok(None)
        }
        Err(source) => Err(context.target_error(source)),
    }
}

/// The program's own file: path, identity, and its id where it was deleted.
fn collect_exe(
    context: &mut Collect<'_>,
    objects: &mut Objects,
) -> Result<(PathBuf, Identity, Option<DeletedId>), DumpError> {
    let proc = context.target.proc();
    let looked = proc.link("exe").and_then(|link| Ok((link, proc.stat("exe")?)));
    let (link, stat) = looked.map_err(|error| context.io_error("exe", error))?;
    let (mut path, identity, mut deleted) = (PathBuf::from(&link), Identity::of(&stat), None);
    let refusal = match locate(&link, &stat) {
        _ if memfd_name(&link).is_some() => Some("a program that was started from a memfd is not supported".into()),
        Located::Path(found) => {
            path = found;
            None
        }
        Located::Deleted => {
            let added =
                objects.deleted.add(proc, "exe", &stat, &link).map_err(|error| context.io_error("exe", error))?;
            path = PathBuf::from(without_deleted(&link).unwrap_or(&link));
            added.map(|id| deleted = Some(id)).err()
        }
        Located::Elsewhere(why) => Some(why),
    };
    if let Some(why) = refusal {
        context.refuse(format!("executable {}", link.display()), why, "restart the program from a file");
    }
    Ok((path, identity, deleted))
}
