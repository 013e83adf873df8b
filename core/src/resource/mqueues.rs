//! POSIX message queues (mq_overview(7)), by their descriptors.
//!
//! The kernel has no way to look at a message and leave it there. So all are received and sent again, in one batch of a
//! process of the frozen tree, which it finishes even if we are killed meanwhile: in the order in which they come out, so that
//! those of one priority stay in theirs. No call of it waits. The queue file itself tells who is to be notified (mq_notify(3)),
//! by which signal, but not with which value, and would notify when the first message is sent again. So the process that is to
//! be notified makes that batch: it has itself notified of a message of ours, with all signals blocked, takes the signal with
//! its value, and registers anew. When it is not to be notified by a signal, there is nothing to learn.
//!
//! A process outside of the tree could be waiting for our message, or look at the queue while it is empty. So a queue that one
//! has open, as far as `/proc` tells us, is refused.
//!
//! A queue that has a name stays in the ipc namespace when its tree ends. A restore takes over the one that has the name, if it
//! has the same owner, mode and sizes and nobody uses it: its content becomes what was saved. Else it makes one. Should the
//! restore fail then, the queue stays, and the next restore takes it over. A queue whose name was removed and is in use by
//! another has a name of ours in `/proc/PID/fd`.
//!
//! Refused: notifications by a thread (SIGEV_THREAD), which come through a netlink socket; queues with more messages than one
//! batch holds. Not kept: whose limit of bytes (RLIMIT_MSGQUEUE) a queue counts against; times in its `stat`.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use nix::fcntl::OFlag;
use nix::sys::stat::fstat;

use crate::args;
use crate::batch::{Batch, MAX_BYTES, MAX_CALLS, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::image::Image;
use crate::ourselves::{Capability, ourselves};
use crate::procfs::ProcDir;
use crate::resource::descriptors::{CollectFile, FileId, FileKind, FileResource, OfFile, RebuildFile, Seen};
use crate::resource::{Check, Resource, files};
use crate::target::{Pid, Queue as Signals, RemoteFd, SigInfo, TargetError};

/// An open message queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenMqueue {
    /// The same for all that lead to one queue.
    pub inode: u64,
    /// With the first of these.
    pub queue: Option<Mqueue>,
}

/// A message queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mqueue {
    /// With its slash.
    pub name: OsString,
    /// The name is still there (mq_unlink(3)).
    pub linked: bool,
    /// The lower twelve bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// `mq_maxmsg`.
    pub capacity: u64,
    /// `mq_msgsize`, in bytes.
    pub largest: u64,
    /// In the order in which they will be received.
    pub messages: Vec<Message>,
    pub notification: Option<Notification>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub priority: u32,
    pub data: Vec<u8>,
}

/// Who is told when a message comes to the empty queue, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notification {
    pub process: Pid,
    /// `sigev_notify`: SIGEV_SIGNAL or SIGEV_NONE.
    pub notify: i32,
    pub signal: i32,
    /// `sigev_value`.
    pub value: u64,
}

const SIGEV_SIGNAL: i32 = 0;
const SIGEV_NONE: i32 = 1;
/// `MQ_PRIO_MAX`.
const PRIORITIES: u32 = 32768;
/// `linux/magic.h`.
const MQUEUE_MAGIC: i64 = 0x1980_0202;
/// What `stat` says of every queue file.
const FILE_SIZE: i64 = 80;
/// What a message needs in a batch beside its bytes.
const BESIDE: usize = 48;
const OURS: OFlag = OFlag::O_RDWR.union(OFlag::O_CLOEXEC).union(OFlag::O_NONBLOCK);

/// POSIX message queues.
pub struct Mqueues;

impl Resource for Mqueues {
    const NAME: &'static str = "mqueues";
    type Scope = OfFile;
    type Saved = OpenMqueue;

    fn collect(context: &mut CollectFile<'_>) -> Result<OpenMqueue, DumpError> {
        let inode = context.seen.stat.st_ino;
        if context.census.same_inode(context.seen).iter().min() != Some(&context.id) {
            return Ok(OpenMqueue { inode, queue: None });
        }
        let (name, linked) = match context.seen.link.as_bytes().strip_suffix(b" (deleted)") {
            Some(name) if context.seen.stat.st_nlink == 0 => (name, false),
            _ => (context.seen.link.as_bytes(), true),
        };
        // One that was opened below a mount of the file system (/dev/mqueue) has a longer path.
        let last = name.rsplit(|&byte| byte == b'/').next().unwrap_or(name);
        let name = OsStr::from_bytes(&[b"/", last].concat()).to_owned();
        let stat = context.seen.stat;
        let mut queue = Mqueue {
            name,
            linked,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            capacity: 0,
            largest: 0,
            messages: Vec::new(),
            notification: None,
        };
        if let [one, ..] = &outside_holders(context)[..] {
            context.refuse(
                format!("process {one}, which is not part of the tree, has it open too"),
                format!("end process {one}, or dump a tree that has both"),
            );
            return Ok(OpenMqueue { inode, queue: Some(queue) });
        }
        read(&mut queue, context)?;
        Ok(OpenMqueue { inode, queue: Some(queue) })
    }

    fn check(saved: &OpenMqueue, context: &mut Check<'_>) {
        let Some(queue) = &saved.queue else {
            if first(context.image, saved.inode).is_none() {
                context.refuse("a message queue", "it is not in the image", USE_ANOTHER_COPY);
            }
            return;
        };
        let subject = format!("message queue {}", queue.name.display());
        let name = queue.name.as_bytes();
        let named = name.len() > 1 && name.len() <= 256 && name[0] == b'/' && !name[1..].contains(&b'/');
        let fits = |message: &Message| message.priority < PRIORITIES && message.data.len() as u64 <= queue.largest;
        if !named
            || [&b"/."[..], b"/.."].contains(&name)
            || queue.messages.len() as u64 > queue.capacity
            || !queue.messages.iter().all(fits)
            || queue.largest > MAX_BYTES as u64
        {
            context.refuse(subject.clone(), "it has values that cannot be", USE_ANOTHER_COPY);
        }
        if let Some(notification) = &queue.notification
            && holder_in(context.image, saved.inode, notification.process).is_none()
        {
            context.refuse(subject.clone(), "it notifies a process that does not have it open", USE_ANOTHER_COPY);
        }
        for (file, value) in [("msg_max", queue.capacity), ("msgsize_max", queue.largest)] {
            let limit = std::fs::read_to_string(format!("/proc/sys/fs/mqueue/{file}")).unwrap_or_default();
            match limit.trim().parse() {
                Ok(limit) if value > limit && !ourselves().may(Capability::SYS_RESOURCE) => {
                    let why = format!("it is larger than is allowed here: {value}, and fs.mqueue.{file} is {limit}");
                    context.refuse(subject.clone(), why, format!("sysctl fs.mqueue.{file}={value}"));
                }
                Ok(_) => {}
                Err(_) => context.refuse(subject.clone(), "this kernel has no POSIX message queues", ""),
            }
        }
    }

    fn rebuild(saved: &OpenMqueue, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let process = context.process();
        let flags = files::reopen_flags(context.file().flags);
        let Some(queue) = &saved.queue else {
            let first = first(context.image, saved.inode).expect("was checked");
            context.require(first)?;
            let home = context.process_of(first);
            let place = context.bring(first, home)?;
            let ours = context.fds_out(home, &[place])?;
            let opened =
                files::reopen(ours[0].as_fd(), flags, 0).map_err(|errno| failed(context, "opening it", errno))?;
            return context.give(context.id, process, opened);
        };
        let made = make(queue, context)?;
        send(queue, made, context)?;
        let ours = context.fds_out(process, &[made])?;
        let opened = files::reopen(ours[0].as_fd(), flags, 0).map_err(|errno| failed(context, "opening it", errno))?;
        context.close(process, made)?;
        context.give(context.id, process, opened)
    }
}

impl FileResource for Mqueues {
    fn claims(seen: &Seen) -> bool {
        // Only few others have this size.
        seen.file_type() == libc::S_IFREG
            && seen.stat.st_size == FILE_SIZE
            && seen.info.flags & libc::O_PATH == 0
            && nix::sys::statfs::statfs(format!("/proc/{}/fd/{}", seen.pid, seen.fd).as_str())
                .is_ok_and(|found| found.filesystem_type().0 == MQUEUE_MAGIC)
    }

    /// Who may use it, and who is notified. When a process closes any descriptor of a queue, its notification goes: this is
    /// after the last of these.
    fn finish(saved: &OpenMqueue, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
        let Some(queue) = &saved.queue else { return Ok(()) };
        let process = context.process();
        let fd = context.bring(context.id, process)?;
        let mut batch = Batch::new();
        batch.call(Sysno::fchown, args![fd, queue.uid, queue.gid]);
        batch.call(Sysno::fchmod, args![fd, queue.mode]);
        context.run(process, &batch)?;
        if let Some(notification) = queue.notification {
            let (index, fd) = holder_in(context.image, saved.inode, notification.process).expect("was checked");
            let mut batch = Batch::new();
            let event = event(&mut batch, &notification);
            batch.call(Sysno::mq_notify, args![fd, event]);
            context.run(index, &batch)?;
        }
        Ok(())
    }
}

const USE_ANOTHER_COPY: &str = "the image is inconsistent; use another copy of it";

/// `struct sigevent`.
fn event(batch: &mut Batch, notification: &Notification) -> crate::batch::Slot {
    let kind = u64::from(notification.signal as u32) | u64::from(notification.notify as u32) << 32;
    batch.words(&[notification.value, kind, 0, 0, 0, 0, 0, 0])
}

/// The file that has a queue.
fn first(image: &Image, inode: u64) -> Option<FileId> {
    let has = |kind: &FileKind| matches!(kind, FileKind::Mqueue(open) if open.inode == inode && open.queue.is_some());
    image.files.iter().position(|file| has(&file.kind)).map(|index| FileId(index as u32))
}

/// A descriptor of a queue in a process of an image, and the index of that.
fn holder_in(image: &Image, inode: u64, process: Pid) -> Option<(usize, RemoteFd)> {
    let leads_there = |file: FileId| match image.files.get(file.0 as usize).map(|file| &file.kind) {
        Some(FileKind::Mqueue(open)) => open.inode == inode,
        _ => false,
    };
    let index = image.processes.iter().position(|found| found.task.pid == process)?;
    let table = &image.processes[index].descriptors.descriptors;
    table.iter().find(|held| leads_there(held.file)).map(|held| (index, RemoteFd(held.fd)))
}

/// The processes outside of the tree, other than ckpt, that have a queue open.
fn outside_holders(context: &CollectFile<'_>) -> Vec<Pid> {
    let targets: Vec<Pid> = context.targets.iter().map(|target| target.pid()).collect();
    holders(context.seen.stat.st_dev, context.seen.stat.st_ino, &targets)
}

fn holders(device: u64, inode: u64, but: &[Pid]) -> Vec<Pid> {
    let has_it = |pid: &Pid| {
        let Ok(proc) = ProcDir::open(*pid) else { return false };
        let numbers = proc.numbers("fd").unwrap_or_default();
        let mut stats = numbers.into_iter().filter_map(|fd| {
            // Most are of another form.
            proc.link(format!("fd/{fd}")).ok().filter(|link| link.as_bytes().starts_with(b"/"))?;
            proc.stat(format!("fd/{fd}")).ok()
        });
        stats.any(|stat| (stat.st_dev, stat.st_ino) == (device, inode))
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid));
    pids.filter(|pid| pid.0 as u32 != std::process::id() && !but.contains(pid)).filter(has_it).collect()
}

/// What a queue file says: who is to be notified (0 for nobody), how, and by which signal.
fn parse(text: &str) -> Option<(Pid, i32, i32)> {
    let field = |name: &str| {
        let found = text.split_whitespace().find_map(|field| field.strip_prefix(name));
        found.and_then(|number| number.parse::<i32>().ok())
    };
    Some((Pid(field("NOTIFY_PID:")?), field("NOTIFY:")?, field("SIGNO:")?))
}

/// Reads what a queue has.
fn read(queue: &mut Mqueue, context: &mut CollectFile<'_>) -> Result<(), DumpError> {
    let mut batch = Batch::new();
    let attributes = batch.room(64);
    batch.call(Sysno::mq_getsetattr, args![context.seen.fd, 0, attributes]);
    let replies = context.run(&batch)?;
    let [_, capacity, largest, count] = replies.words(attributes)[..4] else { unreachable!("64 bytes") };
    (queue.capacity, queue.largest) = (capacity, largest);
    let mut text = String::new();
    // By us: when the process that is to be notified closes a descriptor, the notification goes.
    let opened = context.reopen(OFlag::O_RDONLY | OFlag::O_CLOEXEC);
    if let Err(error) = opened.and_then(|mut file| {
        file.read_to_string(&mut text).map_err(|source| context.io_error("cannot be read", source))
    }) {
        context.refuse(
            format!("its file cannot be read, which says who is to be notified: {error}"),
            "have the program make it readable for its owner (fchmod)",
        );
        return Ok(());
    }
    let Some((notified, notify, signal)) = parse(&text) else {
        context.refuse(format!("its file has an unknown form: {text:?}"), "");
        return Ok(());
    };
    let room = (32 + largest as usize + BESIDE).saturating_mul(count as usize + 1);
    if 2 * count as usize + 16 > MAX_CALLS || room + 512 > MAX_BYTES {
        context.refuse(
            format!("it has {count} messages of up to {largest} bytes, more than can be taken and put back at once"),
            "have the program receive some, or make the queue with smaller messages",
        );
        return Ok(());
    }
    let notification = (notified.0 != 0).then_some(Notification { process: notified, notify, signal, value: 0 });
    if count == 0 && notification.is_none_or(|found| found.notify != SIGEV_SIGNAL) {
        return accept(queue, notification, context).map(drop);
    }
    if accept(queue, notification, context)? {
        take(queue, count as usize, context)?;
    }
    Ok(())
}

/// Notes who is to be notified, if that can be saved.
fn accept(
    queue: &mut Mqueue,
    notification: Option<Notification>,
    context: &mut CollectFile<'_>,
) -> Result<bool, DumpError> {
    let Some(found) = notification else { return Ok(true) };
    let Some(index) = context.targets.iter().position(|target| target.pid() == found.process) else {
        let why = format!("it notifies process {}, which is not part of the tree", found.process);
        context.refuse(why, "dump a tree that has both");
        return Ok(false);
    };
    let (why, help) = match (found.notify, found.signal) {
        (SIGEV_NONE, _) => {
            queue.notification = notification;
            return Ok(true);
        }
        (SIGEV_SIGNAL, signal) => match obstacle(index, signal, queue, context)? {
            None => {
                queue.notification = notification;
                return Ok(true);
            }
            Some(why) => (why, "have the program take its signals, or register with another one"),
        },
        _ => {
            ("it notifies by starting a thread (SIGEV_THREAD)".to_string(), "have the program be notified by a signal")
        }
    };
    context.refuse(why, help);
    Ok(false)
}

/// What is in the way of learning the value of a notification.
fn obstacle(
    index: usize,
    signal: i32,
    queue: &Mqueue,
    context: &mut CollectFile<'_>,
) -> Result<Option<String>, DumpError> {
    if signal == libc::SIGKILL || signal == libc::SIGSTOP {
        return Ok(Some(format!("it notifies by signal {signal}, which cannot be blocked")));
    }
    if queue.largest < 8 {
        return Ok(Some("it notifies by a signal, and its messages have less than 8 bytes".into()));
    }
    let target = &mut context.targets[index];
    let pid = target.pid();
    let failed = |source| DumpError::Target { resource: Mqueues::NAME, pid, source };
    let mut pending = target.pending(Signals::Shared).map_err(failed)?;
    for thread in 0..target.threads().len() {
        pending.extend(target.pending(Signals::Thread(thread)).map_err(failed)?);
    }
    let is_pending = |info: &SigInfo| i32::from_ne_bytes([info[0], info[1], info[2], info[3]]) == signal;
    if pending.iter().any(is_pending) {
        return Ok(Some(format!("it notifies by signal {signal}, of which one is pending already")));
    }
    // Where there is no room for one more (RLIMIT_SIGPENDING), it would come without its value.
    let status = target.proc().status().map_err(|source| context.io_error("reading status", source))?;
    let room = status.field("SigQ").and_then(|field| {
        let (queued, limit) = field.split_once('/')?;
        Some(queued.parse::<u64>().ok()?.saturating_add(2) <= limit.parse().ok()?)
    });
    Ok((room != Some(true)).then(|| "its user has too many pending signals (RLIMIT_SIGPENDING)".to_string()))
}

/// Takes all messages and puts them back, and learns the value of the notification.
fn take(queue: &mut Mqueue, count: usize, context: &mut CollectFile<'_>) -> Result<(), DumpError> {
    // In the process that is to be notified, if there is one, as nobody else can register it again.
    let all = context.census.same_inode(context.seen);
    let mut holders = all.iter().flat_map(|file| &context.census.holders[file.0 as usize]);
    let holder = match queue.notification {
        Some(notification) => holders.find(|(process, _)| context.targets[*process].pid() == notification.process),
        None => holders.next(),
    };
    let Some(&(process, held)) = holder else {
        context.refuse("it notifies a process that does not have it open", "");
        return Ok(());
    };
    let largest = queue.largest as usize;
    let mut batch = Batch::new();
    let no_time = batch.words(&[0, 0]);
    let path = batch.string(format!("/proc/self/fd/{held}").as_bytes());
    let fd = batch.call(Sysno::openat, args![libc::AT_FDCWD, path, OURS.bits()]);
    let quiet = queue.notification.filter(|found| found.notify == SIGEV_NONE);
    let loud = queue.notification.filter(|found| found.notify == SIGEV_SIGNAL);
    if quiet.is_some() {
        batch.call(Sysno::mq_notify, args![held, 0]);
    }
    let received: Vec<_> = (0..count)
        .map(|_| {
            let room = batch.room(16 + largest);
            let length = batch.try_call(Sysno::mq_timedreceive, args![fd, room.after(16), largest, room, no_time]);
            (room, length)
        })
        .collect();
    // What is received is the other half of the structure that the value becomes part of (struct sigevent).
    let heard = loud.map(|notification| {
        let rest = [notification.signal.to_ne_bytes(), SIGEV_SIGNAL.to_ne_bytes()].concat();
        let message = batch.bytes(&rest);
        let info = batch.room(size_of::<SigInfo>().max(VALUE_AT + 8 + largest));
        let set = batch.words(&[if notification.signal == 0 { 0 } else { 1 << (notification.signal - 1) }]);
        batch.try_call(Sysno::mq_timedsend, args![fd, message, rest.len(), 0, no_time]);
        let taken = batch.try_call(Sysno::rt_sigtimedwait, args![set, info, no_time, 8]);
        batch.try_call(Sysno::mq_timedreceive, args![fd, info.after(VALUE_AT + 8), largest, 0, no_time]);
        (info, taken)
    });
    let sent: Vec<_> = received
        .iter()
        .map(|&(room, length)| {
            let priority = crate::batch::Arg::Loaded(room);
            batch.try_call(
                Sysno::mq_timedsend,
                &[fd.into(), room.after(16).into(), length.into(), priority, no_time.into()],
            )
        })
        .collect();
    batch.try_call(Sysno::close, args![fd]);
    let registered = match (quiet, heard) {
        (Some(notification), _) => {
            let event = event(&mut batch, &notification);
            Some(batch.try_call(Sysno::mq_notify, args![held, event]))
        }
        (None, Some((info, _))) => Some(batch.try_call(Sysno::mq_notify, args![held, info.after(VALUE_AT)])),
        (None, None) => None,
    };
    let target = &mut context.targets[process];
    let pid = target.pid();
    let replies = match target.run(&batch) {
        Ok(replies) => replies,
        // Nothing was done after it.
        Err(TargetError::Call { index: 0, errno, .. }) => {
            context.refuse(
                format!("its messages can only be looked at by who may receive and send: {}", errno.desc()),
                "have the program receive them before the dump, or make the queue readable and writable for its owner",
            );
            return Ok(());
        }
        Err(source) => return Err(DumpError::Target { resource: Mqueues::NAME, pid, source }),
    };
    for ((room, length), sent) in received.into_iter().zip(sent) {
        let length = replies
            .result(length)
            .map_err(|errno| context.io_error("a message could not be received", errno.into()))?;
        replies.result(sent).map_err(|errno| context.io_error("a message could not be sent again", errno.into()))?;
        let data = replies.bytes(room.after(16)).get(..length as usize).unwrap_or_default().to_vec();
        queue.messages.push(Message { priority: replies.u32(room), data });
    }
    if let Some(registered) = registered {
        let registered = replies.result(registered);
        registered.map_err(|errno| context.io_error("the notification could not be registered again", errno.into()))?;
    }
    if let (Some((info, taken)), Some(notification)) = (heard, &mut queue.notification)
        && notification.signal != 0
    {
        replies
            .result(taken)
            .map_err(|errno| context.io_error("the signal of its notification did not come", errno.into()))?;
        notification.value = replies.u64(info.after(VALUE_AT));
    }
    Ok(())
}

/// Where a `siginfo_t` has the value.
const VALUE_AT: usize = 24;

fn failed(context: &RebuildFile<'_>, what: &str, errno: nix::errno::Errno) -> RestoreError {
    let pid = context.targets[context.process()].pid();
    RestoreError::Io { what: format!("{} of process {pid}: {what}", Mqueues::NAME), source: errno.into() }
}

/// Makes a queue, or takes over the one that has its name. A lifted descriptor of the first process that has it.
fn make(queue: &Mqueue, context: &mut RebuildFile<'_>) -> Result<RemoteFd, RestoreError> {
    let process = context.process();
    let open = |context: &mut RebuildFile<'_>, name: &[u8], flags: i32| {
        let mut batch = Batch::new();
        let attributes = batch.words(&[0, queue.capacity, queue.largest, 0, 0, 0, 0, 0]);
        let name = batch.string(name);
        let opened = batch.try_call(Sysno::mq_open, args![name, OURS.bits() | flags, 0o600, attributes]);
        context.run(process, &batch).map(|replies| replies.result(opened))
    };
    // The kernel wants it without the slash.
    let mut name = queue.name.as_bytes()[1..].to_vec();
    let new = libc::O_CREAT | libc::O_EXCL;
    let mut was_there = false;
    let mut opened = open(context, &name, new)?;
    if opened == Err(nix::errno::Errno::EEXIST) {
        if queue.linked {
            was_there = true;
            opened = open(context, &name, 0)?;
        } else {
            name = format!("ckpt-{}-{}", context.targets[process].pid(), context.id.0).into_bytes();
            opened = open(context, &name, new)?;
        }
    }
    let what = format!("message queue {} cannot be made", queue.name.display());
    let fd = opened.map_err(|errno| failed(context, &what, errno))?;
    let spare = context.targets[process].footprint().spare_fds;
    let mut batch = Batch::new();
    let lifted = batch.call(Sysno::fcntl, args![fd, libc::F_DUPFD_CLOEXEC, spare]);
    batch.call(Sysno::close, args![fd]);
    if !queue.linked {
        let name = batch.string(&name);
        batch.call(Sysno::mq_unlink, args![name]);
    }
    let lifted = context.run(process, &batch)?.fd(lifted);
    if was_there {
        take_over(queue, lifted, context)?;
    }
    Ok(lifted)
}

/// Empties a queue that was there, if it is the one that was saved.
fn take_over(queue: &Mqueue, fd: RemoteFd, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let process = context.process();
    let name = queue.name.display();
    let mut batch = Batch::new();
    let attributes = batch.room(64);
    batch.call(Sysno::mq_getsetattr, args![fd, 0, attributes]);
    let replies = context.run(process, &batch)?;
    let [_, capacity, largest, count] = replies.words(attributes)[..4] else { unreachable!("64 bytes") };
    let ours = context.fds_out(process, &[fd])?;
    let stat = fstat(&ours[0]).map_err(|errno| failed(context, "stat of a message queue", errno))?;
    let found = (capacity, largest, stat.st_uid, stat.st_gid, stat.st_mode & 0o7777);
    let help = "remove it (mq_unlink), or restore in an ipc namespace of its own (unshare --ipc)";
    if found != (queue.capacity, queue.largest, queue.uid, queue.gid, queue.mode) {
        return Err(context.mismatch(format!("another message queue has the name {name}: {help}")));
    }
    let skeleton: Vec<Pid> = context.targets.iter().map(|target| target.pid()).collect();
    if let [user, ..] = holders(stat.st_dev, stat.st_ino, &skeleton)[..] {
        return Err(context.mismatch(format!("message queue {name} is there, and process {user} uses it: {help}")));
    }
    let mut left = count as usize;
    while left > 0 {
        let mut batch = Batch::new();
        let some = left.min(200);
        let (no_time, room) = (batch.words(&[0, 0]), batch.room(largest as usize));
        for _ in 0..some {
            batch.call(Sysno::mq_timedreceive, args![fd, room, largest, 0, no_time]);
        }
        context.run(process, &batch)?;
        left -= some;
    }
    Ok(())
}

/// Fills a queue that is empty.
fn send(queue: &Mqueue, fd: RemoteFd, context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let process = context.process();
    let mut rest = &queue.messages[..];
    while !rest.is_empty() {
        let mut batch = Batch::new();
        let no_time = batch.words(&[0, 0]);
        while let [message, others @ ..] = rest
            && batch.has_room(1, message.data.len() + BESIDE)
        {
            let data = batch.bytes(&message.data);
            batch.call(Sysno::mq_timedsend, args![fd, data, message.data.len(), message.priority, no_time]);
            rest = others;
        }
        context.run(process, &batch)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_file_says_who_is_notified() {
        let text = "QSIZE:129        NOTIFY:0     SIGNO:10    NOTIFY_PID:8260  \n";
        assert_eq!(parse(text), Some((Pid(8260), SIGEV_SIGNAL, 10)));
        assert_eq!(parse("QSIZE:0          NOTIFY:0     SIGNO:0     NOTIFY_PID:0     \n"), Some((Pid(0), 0, 0)));
        assert_eq!(parse("QSIZE:0\n"), None);
    }
}
