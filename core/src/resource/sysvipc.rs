//! System V shared memory, semaphores and message queues (sysvipc(7)), from `/proc/sysvipc`.
//!
//! They belong to no process: they live in an ipc namespace until somebody removes them, and the kernel does not keep who
//! uses which. So it is a rule what is the tree's: a segment that is attached in it; what a process of the tree has made or
//! was the last to use; and what a user of the tree has made since the tree began, and no process outside of it that still
//! lives was the last to use. What is the tree's and is used by a process outside, as far as that can be seen, is refused.
//!
//! A dump removes nothing. At the restore an object that is still there under its id, with the same key, owner and size, and
//! that nobody uses, is taken over: its content becomes what was saved. Else it is made, with its id, which takes
//! CAP_CHECKPOINT_RESTORE (`/proc/sys/kernel/shm_next_id` and its like). An id or key that another object has is refused.
//! Should the restore fail, what it made is removed; should ckpt be killed, the next restore takes it over.
//!
//! Not kept: the times of last use, and last users that are not in the tree.

mod queues;
mod segments;
mod semaphores;

use std::collections::{BTreeMap, HashSet};
use std::io;

use crate::args;
use crate::batch::{Batch, CallId, Sysno};
use crate::error::{DumpError, Refusal, RestoreError};
use crate::image::Image;
use crate::ourselves::{Capability, ourselves};
use crate::procfs::ProcDir;
use crate::resource::Check;
use crate::resource::memory::{self, ObjectId};
use crate::target::{Pid, Target};

pub use segments::{copy as copy_segment, size as segment_size};

/// The section name.
pub const NAME: &str = "sysvipc";

/// The objects of a tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SystemV {
    pub segments: Vec<Segment>,
    pub semaphores: Vec<SemaphoreSet>,
    pub queues: Vec<MessageQueue>,
}

/// What every object has (`struct ipc64_perm`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    pub id: i32,
    /// 0 for `IPC_PRIVATE`.
    pub key: i32,
    /// The lower nine bits; of a segment also `SHM_DEST` and `SHM_LOCKED`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// The user and group that made it.
    pub cuid: u32,
    pub cgid: u32,
}

/// Shared memory (shmget(2)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub permissions: Permissions,
    pub creator: Pid,
    /// Its content and size.
    pub object: ObjectId,
    /// The key in the name of its mappings (`/SYSV0000002a`), which it keeps when it is removed.
    pub name_key: i32,
}

/// A set of semaphores (semget(2)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SemaphoreSet {
    pub permissions: Permissions,
    pub semaphores: Vec<Semaphore>,
    /// There was a `semop`, which `sem_otime` says.
    pub operated: bool,
    /// What becomes of them when processes end (`SEM_UNDO`).
    pub undo: Vec<Undo>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Semaphore {
    pub value: u16,
    /// The last process that changed it; 0 for none.
    pub last: Pid,
}

/// What is added to a semaphore when a process ends (`semadj`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undo {
    pub process: Pid,
    pub semaphore: u16,
    pub adjustment: i16,
}

/// A message queue (msgget(2)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MessageQueue {
    pub permissions: Permissions,
    /// Most bytes in it (`msg_qbytes`).
    pub capacity: u64,
    /// The last processes that sent and received; 0 for none.
    pub sender: Pid,
    pub receiver: Pid,
    /// The oldest first.
    pub messages: Vec<Message>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `mtype`.
    pub kind: i64,
    pub data: Vec<u8>,
}

const IPC_CREAT: i32 = 0o1000;
const IPC_EXCL: i32 = 0o2000;
const IPC_NOWAIT: i32 = 0o4000;
const IPC_RMID: i32 = 0;
const IPC_SET: i32 = 1;

/// The three kinds, and what differs between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Segment,
    Semaphores,
    Queue,
}

impl Kind {
    /// The file in `/proc/sysvipc`.
    fn list(self) -> &'static str {
        match self {
            Kind::Segment => "shm",
            Kind::Semaphores => "sem",
            Kind::Queue => "msg",
        }
    }

    fn subject(self, id: i32) -> String {
        match self {
            Kind::Segment => format!("shared memory segment {id}"),
            Kind::Semaphores => format!("semaphore set {id}"),
            Kind::Queue => format!("message queue {id}"),
        }
    }

    /// How a user removes one.
    fn remove(self, id: i32) -> String {
        let option = match self {
            Kind::Segment => 'm',
            Kind::Semaphores => 's',
            Kind::Queue => 'q',
        };
        format!("ipcrm -{option} {id}")
    }

    fn control(self, batch: &mut Batch, id: i32, command: i32, argument: crate::batch::Arg) -> CallId {
        match self {
            Kind::Segment => batch.try_call(Sysno::shmctl, &[id.into(), command.into(), argument]),
            Kind::Semaphores => batch.try_call(Sysno::semctl, &[id.into(), 0.into(), command.into(), argument]),
            Kind::Queue => batch.try_call(Sysno::msgctl, &[id.into(), command.into(), argument]),
        }
    }
}

/// A line of `/proc/sysvipc/{shm,sem,msg}`: its fields by the names in the first line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    permissions: Permissions,
    fields: BTreeMap<String, i64>,
}

impl Listed {
    fn field(&self, name: &str) -> i64 {
        self.fields.get(name).copied().unwrap_or(0)
    }

    fn pid(&self, name: &str) -> Pid {
        Pid(self.field(name) as i32)
    }
}

/// All objects of a kind in our ipc namespace, which is that of the tree.
fn listed(kind: Kind) -> io::Result<Vec<Listed>> {
    match std::fs::read_to_string(format!("/proc/sysvipc/{}", kind.list())) {
        Ok(text) => parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into()),
        // A kernel without them.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn parse(text: &str) -> Option<Vec<Listed>> {
    let mut lines = text.lines();
    let names: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    let line = |line: &str| {
        let mut fields = BTreeMap::new();
        for (name, text) in names.iter().zip(line.split_whitespace()) {
            let number = if *name == "perms" { i64::from_str_radix(text, 8) } else { text.parse() };
            fields.insert((*name).to_string(), number.ok()?);
        }
        let id = ["shmid", "semid", "msqid"].iter().find_map(|name| fields.get(*name))?;
        let permissions = Permissions {
            id: i32::try_from(*id).ok()?,
            key: *fields.get("key")? as i32,
            mode: *fields.get("perms")? as u32,
            uid: *fields.get("uid")? as u32,
            gid: *fields.get("gid")? as u32,
            cuid: *fields.get("cuid")? as u32,
            cgid: *fields.get("cgid")? as u32,
        };
        Some(Listed { permissions, fields })
    };
    lines.map(line).collect()
}

fn list_failed(source: io::Error) -> DumpError {
    DumpError::Io { what: format!("{NAME}: reading /proc/sysvipc"), source }
}

/// A tree, as far as it matters whose an object is.
struct Tree {
    pids: HashSet<Pid>,
    users: HashSet<u32>,
    /// When it began, in seconds since 1970.
    began: i64,
}

/// Whose an object is.
enum Belongs {
    ToTree,
    Elsewhere,
    /// Used by the tree and by this process outside of it.
    ToBoth(Pid),
}

impl Tree {
    fn of(image: &Image, root: &ProcDir) -> io::Result<Tree> {
        let live = image.processes.iter().map(|process| process.task.pid);
        let credentials =
            image.processes.iter().flat_map(|process| &process.threads).map(|thread| thread.credentials.uid);
        // starttime counts from boot, in hundredths of a second (USER_HZ).
        let age = (image.host.boottime / 1_000_000_000) as i64 - (root.stat_line()?.starttime / 100) as i64;
        Ok(Tree {
            pids: live.chain(image.zombies.iter().map(|zombie| zombie.task.pid)).collect(),
            users: credentials.flat_map(|ids| [ids.real, ids.effective, ids.saved]).collect(),
            began: image.host.time as i64 - age - 1,
        })
    }

    /// By the processes that made or last used it (0 for none).
    fn belongs(&self, object: &Listed, users: &[Pid]) -> Belongs {
        let ours = users.iter().any(|user| self.pids.contains(user));
        let stranger = users.iter().find(|user| user.0 != 0 && !self.pids.contains(user) && is_alive(**user));
        match (ours, stranger) {
            (true, Some(stranger)) => Belongs::ToBoth(*stranger),
            (true, None) => Belongs::ToTree,
            (false, Some(_)) => Belongs::Elsewhere,
            (false, None) => {
                let since = object.field("ctime") >= self.began && self.users.contains(&object.permissions.cuid);
                if since { Belongs::ToTree } else { Belongs::Elsewhere }
            }
        }
    }
}

fn is_alive(pid: Pid) -> bool {
    ProcDir::open(pid).is_ok()
}

/// A dump of the objects.
struct Collector<'a> {
    targets: &'a mut [Box<dyn Target>],
    tree: Tree,
    image: &'a Image,
    objects: &'a mut memory::Objects,
    refusals: &'a mut Vec<Refusal>,
}

impl Collector<'_> {
    fn refuse(&mut self, kind: Kind, id: i32, why: impl Into<String>, help: impl Into<String>) {
        self.refusals.push(Refusal {
            resource: NAME,
            pid: None,
            subject: kind.subject(id),
            why: why.into(),
            help: help.into(),
        });
    }

    fn refuse_shared(&mut self, kind: Kind, id: i32, stranger: Pid) {
        let why = format!("process {stranger}, which is not part of the tree, uses it too");
        self.refuse(kind, id, why, format!("end process {stranger}, or dump a tree that has both"));
    }

    /// Runs a batch in the first process that may do what it does: what `refused` says of the replies.
    fn run_where_permitted(
        &mut self,
        batch: &Batch,
        refused: impl Fn(&crate::Replies) -> bool,
    ) -> Result<Option<crate::Replies>, DumpError> {
        for target in &mut *self.targets {
            let pid = target.pid();
            let replies = target.run(batch).map_err(|source| DumpError::Target { resource: NAME, pid, source })?;
            if !refused(&replies) {
                return Ok(Some(replies));
            }
        }
        Ok(None)
    }
}

/// Collects the objects of the tree. Their memory goes among the shared memory objects.
pub fn collect(
    targets: &mut [Box<dyn Target>],
    image: &Image,
    objects: &mut memory::Objects,
    refusals: &mut Vec<Refusal>,
) -> Result<SystemV, DumpError> {
    let lists = [listed(Kind::Segment), listed(Kind::Semaphores), listed(Kind::Queue)];
    let [segments, semaphores, queues] = lists.map(|list| list.map_err(list_failed));
    let (segments, semaphores, queues) = (segments?, semaphores?, queues?);
    if segments.is_empty() && semaphores.is_empty() && queues.is_empty() {
        return Ok(SystemV::default());
    }
    let tree = Tree::of(image, targets[0].proc())
        .map_err(|source| DumpError::Io { what: format!("{NAME}: when the tree began"), source })?;
    let mut collector = Collector { targets, tree, image, objects, refusals };
    Ok(SystemV {
        segments: segments::collect(&mut collector, segments)?,
        semaphores: semaphores::collect(&mut collector, semaphores)?,
        queues: queues::collect(&mut collector, queues)?,
    })
}

/// What is looked at of a saved object, whatever its kind.
struct Wanted {
    kind: Kind,
    permissions: Permissions,
    /// Bytes of a segment or semaphores of a set, and the field that says so.
    size: Option<(&'static str, u64)>,
}

impl Wanted {
    fn all(image: &Image) -> Vec<Wanted> {
        let SystemV { segments, semaphores, queues } = &image.sysvipc;
        let segments = segments.iter().map(|segment| Wanted {
            kind: Kind::Segment,
            permissions: segment.permissions,
            size: Some(("size", image.memory_objects.get(segment.object.0 as usize).map_or(0, |object| object.size))),
        });
        let semaphores = semaphores.iter().map(|set| Wanted {
            kind: Kind::Semaphores,
            permissions: set.permissions,
            size: Some(("nsems", set.semaphores.len() as u64)),
        });
        let queues =
            queues.iter().map(|queue| Wanted { kind: Kind::Queue, permissions: queue.permissions, size: None });
        segments.chain(semaphores).chain(queues).collect()
    }

    /// The object that is there under its id, if it is the same; an error says what is in the way. Processes of the image
    /// are no strangers.
    fn find<'a>(&self, listed: &'a [Listed], image: Option<&Image>) -> Result<Option<&'a Listed>, (String, String)> {
        let saved = &self.permissions;
        let Some(found) = listed.iter().find(|found| found.permissions.id == saved.id) else {
            let holder = listed.iter().find(|found| saved.key != 0 && found.permissions.key == saved.key);
            return match holder {
                None => Ok(None),
                Some(holder) => {
                    let id = holder.permissions.id;
                    let why = format!("its key {:#x} is in use, by the one with the id {id}", saved.key);
                    Err((why, format!("remove that ({}), or {OWN_NAMESPACE}", self.kind.remove(id))))
                }
            };
        };
        let same_size = self.size.is_none_or(|(name, size)| found.field(name) as u64 == size);
        // Locked or not, it is the same.
        let plain = |permissions: &Permissions| Permissions { mode: permissions.mode & 0o1777, ..*permissions };
        if plain(&found.permissions) != plain(saved) || !same_size {
            let why = "its id is in use, by another one".to_string();
            return Err((why, format!("remove that ({}), or {OWN_NAMESPACE}", self.kind.remove(saved.id))));
        }
        let users = ["lspid", "lrpid"].map(|name| found.pid(name));
        let is_ours = |user| image.is_some_and(|image| image.process(user).is_some());
        let user = users.into_iter().find(|&user| user.0 != 0 && !is_ours(user) && is_alive(user));
        let used = match user {
            Some(user) => Some(format!("it is still there, and process {user} uses it")),
            None if found.field("nattch") > 0 => Some("it is still there, and attached by other processes".into()),
            None => None,
        };
        match used {
            Some(why) => Err((why, format!("end what uses it, or {OWN_NAMESPACE}"))),
            None => Ok(Some(found)),
        }
    }
}

const OWN_NAMESPACE: &str = "restore in an ipc namespace of its own (unshare --ipc)";
const CAP_SETUID: Capability = Capability(7);

/// Whether every id and key is free, or what has it can be taken over.
pub fn check(image: &Image, context: &mut Check<'_>) {
    context.resource = NAME;
    context.pid = None;
    let wanted = Wanted::all(image);
    let mut ids = HashSet::new();
    for wanted in &wanted {
        let subject = wanted.kind.subject(wanted.permissions.id);
        if !ids.insert((wanted.kind.list(), wanted.permissions.id)) {
            context.refuse(subject, "it is there twice", "use another copy of the image");
            continue;
        }
        let listed = match listed(wanted.kind) {
            Ok(listed) => listed,
            Err(error) => {
                context.refuse(subject, format!("/proc/sysvipc cannot be read: {error}"), "mount /proc");
                continue;
            }
        };
        match wanted.find(&listed, Some(image)) {
            Err((why, help)) => context.refuse(subject, why, help),
            Ok(Some(_)) => {}
            Ok(None) => {
                if let Err(error) = std::fs::OpenOptions::new().write(true).open(next_id(wanted.kind)) {
                    let help = "restore with CAP_CHECKPOINT_RESTORE, or in a user and ipc namespace of your own \
                                (unshare --user --ipc --keep-caps)";
                    let why = format!("it is gone, and its id cannot be chosen: {}: {error}", next_id(wanted.kind));
                    context.refuse(subject.clone(), why, help);
                }
                let maker = maker();
                if (wanted.permissions.cuid, wanted.permissions.cgid) != maker && !ourselves().may(CAP_SETUID) {
                    let why = format!("user {} has made it, and ckpt cannot be that user", wanted.permissions.cuid);
                    context.refuse(subject, why, "restore it as that user, or with CAP_SETUID and CAP_SETGID");
                }
            }
        }
    }
    segments::check(image, context);
    queues::check(image, context);
}

/// Who makes an object: the effective user and group of ckpt, which a skeleton has too.
fn maker() -> (u32, u32) {
    (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw())
}

fn next_id(kind: Kind) -> String {
    format!("/proc/sys/kernel/{}_next_id", kind.list())
}

/// What a restore has made, to be removed should it fail.
#[derive(Debug, Default)]
pub struct Made(Vec<(Kind, i32)>);

impl Made {
    /// Removes it again.
    pub fn remove(self, targets: &mut [Box<dyn Target>]) {
        let mut batch = Batch::new();
        for (kind, id) in self.0 {
            kind.control(&mut batch, id, IPC_RMID, 0.into());
        }
        // Of several processes one may be left.
        for target in targets.iter_mut().filter(|_| !batch.is_empty()) {
            if target.run(&batch).is_ok() {
                return;
            }
        }
    }
}

/// The rebuilding of the objects.
struct Rebuilder<'a> {
    targets: &'a mut [Box<dyn Target>],
    image: &'a Image,
    made: &'a mut Made,
}

impl Rebuilder<'_> {
    /// The index of a process of the tree; the root where it is none.
    fn process(&self, pid: Pid) -> usize {
        self.image.process(pid).unwrap_or(0)
    }

    fn run(&mut self, process: usize, batch: &Batch) -> Result<crate::Replies, RestoreError> {
        let target = &mut self.targets[process];
        let pid = target.pid();
        target.run(batch).map_err(|source| RestoreError::Target { resource: NAME, pid, source })
    }

    fn mismatch(&self, kind: Kind, id: i32, what: &str) -> RestoreError {
        RestoreError::Mismatch {
            resource: NAME,
            pid: self.targets[0].pid(),
            what: format!("{}: {what}", kind.subject(id)),
        }
    }

    fn io_failed(&self, kind: Kind, id: i32, what: &str, source: impl Into<io::Error>) -> RestoreError {
        RestoreError::Io { what: format!("{NAME}: {}: {what}", kind.subject(id)), source: source.into() }
    }

    /// Makes an object with its id by one call, which `create` adds, in a process and as the user that made it; or finds it
    /// still there. Says whether it was.
    fn make(
        &mut self,
        wanted: &Wanted,
        process: usize,
        create: impl Fn(&mut Batch, i32) -> CallId,
    ) -> Result<bool, RestoreError> {
        let (kind, saved) = (wanted.kind, &wanted.permissions);
        let listed = listed(kind).map_err(|error| self.io_failed(kind, saved.id, "reading /proc/sysvipc", error))?;
        match wanted.find(&listed, Some(self.image)) {
            Ok(Some(_)) => return Ok(true),
            Ok(None) => {}
            Err((why, _)) => return Err(self.mismatch(kind, saved.id, &why)),
        }
        let (uid, gid) = maker();
        let other_user = (uid, gid) != (saved.cuid, saved.cgid);
        let mut batch = Batch::new();
        if other_user {
            batch.call(Sysno::setresgid, args![-1, saved.cgid, -1]);
            batch.call(Sysno::setresuid, args![-1, saved.cuid, -1]);
        }
        let made = create(&mut batch, IPC_CREAT | IPC_EXCL | (saved.mode & 0o777) as i32);
        if other_user {
            batch.call(Sysno::setresuid, args![-1, uid, -1]);
            batch.call(Sysno::setresgid, args![-1, gid, -1]);
        }
        let next = next_id(kind);
        std::fs::write(&next, saved.id.to_string())
            .map_err(|error| self.io_failed(kind, saved.id, &format!("choosing its id: {next}"), error))?;
        let made = self.run(process, &batch)?.result(made);
        let made = made.map_err(|errno| self.io_failed(kind, saved.id, "it cannot be made", errno))? as i32;
        self.made.0.push((kind, made));
        if made != saved.id {
            return Err(self.mismatch(kind, saved.id, "its id was taken at this moment; restore again"));
        }
        Ok(false)
    }

    /// Owner and mode, and of a queue its capacity. It also tells the kernel's `ctime` that the object is one of this tree,
    /// which began only now.
    fn set_owner(&mut self, kind: Kind, saved: &Permissions, capacity: u64) -> Result<(), RestoreError> {
        let mut batch = Batch::new();
        // struct shmid64_ds, semid64_ds, msqid64_ds: the permissions first.
        let mut words = [0_u64; 15];
        words[0] = u64::from(saved.uid) << 32;
        words[1] = u64::from(saved.gid);
        words[2] = u64::from(saved.mode & 0o777) << 32;
        words[11] = capacity;
        let argument = batch.words(&words);
        let set = kind.control(&mut batch, saved.id, IPC_SET, argument.into());
        let set = self.run(0, &batch)?.result(set);
        set.map(drop).map_err(|errno| self.io_failed(kind, saved.id, "its owner cannot be set", errno))
    }
}

/// Makes all objects with what is in them, but for what is in the memory of segments.
pub fn rebuild(targets: &mut [Box<dyn Target>], image: &Image, made: &mut Made) -> Result<(), RestoreError> {
    let mut rebuilder = Rebuilder { targets, image, made };
    for wanted in Wanted::all(image) {
        let id = wanted.permissions.id;
        match wanted.kind {
            Kind::Segment => {
                if let Some(segment) = image.sysvipc.segments.iter().find(|segment| segment.permissions.id == id) {
                    segments::rebuild(&mut rebuilder, &wanted, segment)?;
                }
            }
            Kind::Semaphores => {
                if let Some(set) = image.sysvipc.semaphores.iter().find(|set| set.permissions.id == id) {
                    semaphores::rebuild(&mut rebuilder, &wanted, set)?;
                }
            }
            Kind::Queue => {
                if let Some(queue) = image.sysvipc.queues.iter().find(|queue| queue.permissions.id == id) {
                    queues::rebuild(&mut rebuilder, &wanted, queue)?;
                }
            }
        }
    }
    Ok(())
}

/// Once everything is attached: what was removed is removed again, and what was locked is locked.
pub fn finish(targets: &mut [Box<dyn Target>], image: &Image) -> Result<(), RestoreError> {
    segments::finish(&mut Rebuilder { targets, image, made: &mut Made::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHM: &str = "       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap
 943420851          5  1644                   100 11767     0      2     7     8     9    10          0          0 1795555045                     0                     0
-667575755          6   600                 4096 11767     0      0     7     8     9    10          0          0 1795555045                     0                     0
";

    #[test]
    fn lines_of_the_lists() {
        let list = parse(SHM).unwrap();
        let expected = Permissions { id: 5, key: 943420851, mode: 0o1644, uid: 7, gid: 8, cuid: 9, cgid: 10 };
        assert_eq!(list[0].permissions, expected);
        assert_eq!((list[0].field("size"), list[0].pid("cpid"), list[0].field("nattch")), (100, Pid(11767), 2));
        assert_eq!(list[1].permissions.key, -667575755);
        assert_eq!(parse("       key      semid perms      nsems\n"), Some(Vec::new()));
        assert_eq!(parse("       key      semid perms      nsems\n 1 x 1 1\n"), None, "no number");
        assert_eq!(parse("       key perms\n 1 1\n"), None, "no id");
    }

    #[test]
    fn what_is_in_the_way() {
        let list = parse(SHM).unwrap();
        let wanted =
            |permissions: Permissions, size| Wanted { kind: Kind::Segment, permissions, size: Some(("size", size)) };
        let free = list[1].permissions;
        assert!(matches!(wanted(free, 4096).find(&list, None), Ok(Some(_))), "it is the same, and nobody uses it");
        assert!(wanted(free, 100).find(&list, None).is_err(), "another size");
        assert!(wanted(list[0].permissions, 100).find(&list, None).is_err(), "attached by others");
        assert!(wanted(Permissions { uid: 1, ..free }, 4096).find(&list, None).is_err(), "another owner");
        assert!(wanted(Permissions { id: 9, ..free }, 4096).find(&list, None).is_err(), "its key has another id");
        assert!(matches!(wanted(Permissions { id: 9, key: 0, ..free }, 4096).find(&list, None), Ok(None)));
    }
}
