//! System V shared memory, semaphores and message queues. All are made in the ipc namespace of the trial.

use std::path::Path;

use crate::case::{Case, Checkpoint};
use crate::expect::{Child, done, equal, eventually, in_child, make_sign, that};

/// Objects outlive the tree, and the kernel tells who used them last by real ids, which strangers have now.
const KEPT: &str = "what is still there was used by ids that are others' now";

pub fn cases() -> Vec<Case> {
    const MEMORY: &[&str] = &["sysvipc", "memory"];
    const WITHOUT: &[&str] = &["sysvipc"];
    const CHOSEN: &str = "to choose an id takes CAP_CHECKPOINT_RESTORE";
    vec![
        Case::new("sysvipc/segments", MEMORY, segments).after_dump(disturb).rounds(3).real_ids(KEPT),
        Case::new("sysvipc/segments-gone", MEMORY, segments).after_dump(remove_all).privileged(CHOSEN),
        Case::new("sysvipc/removed-segment", MEMORY, removed_segment).privileged(CHOSEN),
        Case::new("sysvipc/attached-in-parts", MEMORY, attached_in_parts).refused_at_dump("has unmapped a part of it"),
        Case::new("sysvipc/semaphores", WITHOUT, semaphores).after_dump(disturb).rounds(3).real_ids(KEPT),
        Case::new("sysvipc/semaphores-gone", WITHOUT, semaphores).after_dump(remove_all).privileged(CHOSEN),
        Case::new("sysvipc/never-operated", WITHOUT, never_operated).after_dump(remove_all).privileged(CHOSEN),
        Case::new("sysvipc/undo", WITHOUT, undo).after_dump(disturb).rounds(3).real_ids(KEPT),
        Case::new("sysvipc/undo-gone", WITHOUT, undo).after_dump(remove_all).privileged(CHOSEN),
        Case::new("sysvipc/queues", WITHOUT, queues).after_dump(disturb).rounds(3).real_ids(KEPT),
        Case::new("sysvipc/queues-gone", WITHOUT, queues).after_dump(remove_all).privileged(CHOSEN),
        Case::new("sysvipc/other-owner", MEMORY, other_owner)
            .after_dump(remove_all)
            .privileged("it becomes another user"),
        Case::new("sysvipc/waited-for", WITHOUT, waited_for),
        Case::new("sysvipc/attached-elsewhere", MEMORY, attached_elsewhere)
            .refused_at_dump("processes that are not part of the tree have it attached"),
        Case::new("sysvipc/waited-for-elsewhere", WITHOUT, waited_for_elsewhere)
            .refused_at_dump("a process that is not part of the tree waits for it"),
        Case::new("sysvipc/attached-meanwhile", MEMORY, segments)
            .after_dump(attach)
            .refused_at_restore("it is still there, and attached by other processes"),
        Case::new("sysvipc/id-in-use", MEMORY, segments)
            .after_dump(replace)
            .refused_at_restore("its id is in use, by another one"),
    ]
}

type Verdict = Result<(), String>;

const KEY: i32 = 0x51_ab_1e;
const SIZE: usize = 3 * 4096 - 100;

// --- what changes the world between dump and restore ---

/// The ids in a list of `/proc/sysvipc`.
fn ids(list: &str) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/sysvipc/{list}")).unwrap_or_default();
    text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)?.parse().ok()).collect()
}

fn remove_all(_dir: &Path) {
    // SAFETY: these take numbers.
    unsafe {
        ids("shm").into_iter().for_each(|id| _ = libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()));
        ids("sem").into_iter().for_each(|id| _ = libc::semctl(id, 0, libc::IPC_RMID));
        ids("msg").into_iter().for_each(|id| _ = libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()));
    }
}

/// Has a process that ends change all that there is: what is still there at the restore is not as it was.
fn disturb(_dir: &Path) {
    let child = in_child(|| {
        for id in ids("shm") {
            attached(id, 0)?.fill(0xee);
        }
        for id in ids("sem") {
            // SAFETY: takes numbers; a set without this semaphore refuses it.
            (0..10).for_each(|number| _ = unsafe { libc::semctl(id, number, libc::SETVAL, 77) });
        }
        for id in ids("msg") {
            // That nobody has used it could not come back.
            if queue_status(id)?.msg_lspid == 0 {
                continue;
            }
            while receive(id, 0, libc::IPC_NOWAIT).is_ok() {}
            send(id, 9, b"not of the tree")?;
        }
        Ok(())
    });
    if let Ok(child) = child {
        _ = child.passed();
    }
}

/// Attaches what is there, for as long as the trial lasts.
fn attach(_dir: &Path) {
    ids("shm").into_iter().for_each(|id| _ = attached(id, 0));
}

/// Puts other segments in the places of those that are there.
fn replace(_dir: &Path) {
    let ids = ids("shm");
    remove_all(_dir);
    for id in ids {
        _ = std::fs::write("/proc/sys/kernel/shm_next_id", id.to_string());
        // SAFETY: takes numbers.
        unsafe { libc::shmget(libc::IPC_PRIVATE, 12345, 0o600) };
    }
}

// --- segments ---

/// Attached where the kernel likes, for good.
fn attached(id: i32, flags: i32) -> Result<&'static mut [u8], String> {
    attached_at(id, std::ptr::null(), flags)
}

fn attached_at(id: i32, address: *const libc::c_void, flags: i32) -> Result<&'static mut [u8], String> {
    let status = status(id)?;
    // SAFETY: maps it where nothing else is; it stays attached as long as anyone uses the slice.
    let start = unsafe { libc::shmat(id, address, flags) };
    done("shmat", start as isize)?;
    // SAFETY: so many bytes were attached; other processes write to it only while this one waits.
    Ok(unsafe { std::slice::from_raw_parts_mut(start.cast(), status.shm_segsz) })
}

fn status(id: i32) -> Result<libc::shmid_ds, String> {
    // SAFETY: plain numbers.
    let mut status: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes to the struct.
    done("shmctl(IPC_STAT)", unsafe { libc::shmctl(id, libc::IPC_STAT, &mut status) })?;
    Ok(status)
}

fn segment(key: i32, size: usize, mode: i32) -> Result<i32, String> {
    // SAFETY: takes numbers.
    done("shmget", unsafe { libc::shmget(key, size, libc::IPC_CREAT | libc::IPC_EXCL | mode) })
}

fn fill(bytes: &mut [u8], seed: u8) {
    bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at as u8).wrapping_mul(7) ^ seed);
}

fn is_filled(bytes: &[u8], seed: u8) -> bool {
    bytes.iter().enumerate().all(|(at, byte)| *byte == (at as u8).wrapping_mul(7) ^ seed)
}

/// A process uses two at two places, its child one of them for reading alone, and a third nobody has attached.
fn segments(checkpoint: &Checkpoint) -> Verdict {
    let (with_key, private, unattached) =
        (segment(KEY, SIZE, 0o640)?, segment(libc::IPC_PRIVATE, 1 << 20, 0o600)?, segment(KEY + 1, 5000, 0o600)?);
    let memory = attached(with_key, 0)?;
    fill(memory, 1);
    let again = attached(with_key, 0)?;
    // One page of many, and nothing else.
    let sparse = attached(private, 0)?;
    fill(&mut sparse[40960..45056], 2);
    {
        let memory = attached(unattached, 0)?;
        fill(memory, 3);
        // SAFETY: it is not used any more.
        done("shmdt", unsafe { libc::shmdt(memory.as_ptr().cast()) })?;
    }
    // SAFETY: protects a page of a segment, which is read only from now on.
    done("mprotect", unsafe { libc::mprotect(again.as_mut_ptr().add(4096).cast(), 4096, libc::PROT_READ) })?;
    let dir = checkpoint.dir().to_path_buf();
    let (changed, seen, attached_too) = (dir.join("changed"), dir.join("seen"), dir.join("attached-too"));
    let child = in_child(|| {
        let memory = attached(with_key, libc::SHM_RDONLY)?;
        make_sign(&attached_too)?;
        let begin = std::time::Instant::now();
        while !changed.exists() {
            that("the parent goes on", begin.elapsed().as_secs() < 300)?;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        equal("what the parent wrote", 0xab, memory[5])?;
        // SAFETY: changes the protection of a whole attachment.
        let made_writable = unsafe { libc::mprotect(memory.as_mut_ptr().cast(), 4096, libc::PROT_WRITE) };
        equal("making an attachment for reading writable", -1, made_writable)?;
        sparse[0] = 0xcd;
        make_sign(&seen)
    })?;
    eventually("the child has attached it", || attached_too.exists())?;
    let nattch = status(with_key)?.shm_nattch;
    checkpoint.wait()?;
    that("the content of the segment with a key", is_filled(memory, 1))?;
    that("the same at its other place", is_filled(again, 1))?;
    that("the page of the private segment", is_filled(&sparse[40960..45056], 2))?;
    that("zeros around it", sparse[..40960].iter().chain(&sparse[45056..]).all(|byte| *byte == 0))?;
    let found = status(with_key)?;
    equal("its key", KEY, found.shm_perm.__key)?;
    equal("its mode", 0o640, found.shm_perm.mode)?;
    equal("its size", SIZE, found.shm_segsz)?;
    equal("its creator", std::process::id() as i32, found.shm_cpid)?;
    equal("its attachments", nattch, found.shm_nattch)?;
    // SAFETY: takes numbers.
    equal("the id of the key", with_key, unsafe { libc::shmget(KEY, SIZE, 0) })?;
    memory[5] = 0xab;
    make_sign(&changed)?;
    eventually("the child has seen it", || seen.exists())?;
    equal("what the child wrote", 0xcd, sparse[0])?;
    equal("what was written at the first place", 0xab, again[5])?;
    child.passed()?;
    let other = attached(unattached, 0)?;
    that("the content of the one that nobody had attached", is_filled(other, 3))?;
    for start in [memory.as_ptr(), again.as_ptr(), sparse.as_ptr(), other.as_ptr()] {
        // SAFETY: nothing uses them any more.
        done("shmdt", unsafe { libc::shmdt(start.cast()) })?;
    }
    equal("attachments in the end", 0, status(with_key)?.shm_nattch)?;
    remove_all(checkpoint.dir());
    Ok(())
}

/// Its id is gone with the last process that has it attached, and its key is free for another.
fn removed_segment(checkpoint: &Checkpoint) -> Verdict {
    let id = segment(KEY, SIZE, 0o600)?;
    let memory = attached(id, 0)?;
    fill(memory, 4);
    // SAFETY: takes numbers.
    done("shmctl", unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) })?;
    checkpoint.wait()?;
    that("its content", is_filled(memory, 4))?;
    let found = status(id)?;
    equal("its key", libc::IPC_PRIVATE, found.shm_perm.__key)?;
    equal("its mode", 0o1600, found.shm_perm.mode)?;
    let another = segment(KEY, SIZE, 0o600)?;
    // SAFETY: nothing uses it any more.
    done("shmdt", unsafe { libc::shmdt(memory.as_ptr().cast()) })?;
    equal("what is left", vec![another], ids("shm"))?;
    remove_all(checkpoint.dir());
    Ok(())
}

fn attached_in_parts(checkpoint: &Checkpoint) -> Verdict {
    let id = segment(libc::IPC_PRIVATE, SIZE, 0o600)?;
    let memory = attached(id, 0)?;
    memory[0] = 1;
    // SAFETY: unmaps a page that is not used any more.
    done("munmap", unsafe { libc::munmap(memory.as_mut_ptr().add(4096).cast(), 4096) })?;
    checkpoint.wait()?;
    equal("what is left of it", 1, memory[0])?;
    remove_all(checkpoint.dir());
    Ok(())
}

/// Runs something in a process that is not in the tree, and waits until it is ready: it is told how to say so.
fn elsewhere(checkpoint: &Checkpoint, then: impl FnOnce(&dyn Fn() -> Verdict) -> Verdict) -> Verdict {
    let ready = checkpoint.dir().join("elsewhere");
    let middle = in_child(|| {
        // Its own child, which is nobody's when this one has ended.
        in_child(|| then(&|| make_sign(&ready)))?;
        Ok(())
    })?;
    middle.passed()?;
    eventually("the other process is ready", || ready.exists())
}

fn attached_elsewhere(checkpoint: &Checkpoint) -> Verdict {
    let id = segment(libc::IPC_PRIVATE, SIZE, 0o600)?;
    let memory = attached(id, 0)?;
    elsewhere(checkpoint, |ready| {
        // A fork has all that its parent has attached.
        ready()?;
        checkpoint.wait_for_go()
    })?;
    checkpoint.wait()?;
    memory[0] = 1;
    remove_all(checkpoint.dir());
    Ok(())
}

// --- semaphores ---

fn set(key: i32, count: i32, values: &[i32]) -> Result<i32, String> {
    // SAFETY: takes numbers.
    let id = done("semget", unsafe { libc::semget(key, count, libc::IPC_CREAT | libc::IPC_EXCL | 0o600) })?;
    for (number, value) in values.iter().enumerate() {
        // SAFETY: takes numbers.
        done("semctl(SETVAL)", unsafe { libc::semctl(id, number as i32, libc::SETVAL, *value) })?;
    }
    Ok(id)
}

fn operate(id: i32, operations: &[(u16, i16, i32)]) -> Result<i32, String> {
    let mut operations: Vec<libc::sembuf> = operations
        .iter()
        .map(|&(sem_num, sem_op, flags)| libc::sembuf { sem_num, sem_op, sem_flg: flags as i16 })
        .collect();
    // SAFETY: reads so many structs.
    done("semop", unsafe { libc::semop(id, operations.as_mut_ptr(), operations.len()) })
}

fn values(id: i32, count: i32) -> Vec<i32> {
    // SAFETY: takes numbers.
    (0..count).map(|number| unsafe { libc::semctl(id, number, libc::GETVAL) }).collect()
}

fn last(id: i32, number: i32) -> i32 {
    // SAFETY: takes numbers.
    unsafe { libc::semctl(id, number, libc::GETPID) }
}

/// `sem_otime`.
fn operated(id: i32) -> Result<i64, String> {
    // SAFETY: plain numbers.
    let mut status: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes to the struct.
    done("semctl(IPC_STAT)", unsafe { libc::semctl(id, 0, libc::IPC_STAT, &mut status) })?;
    Ok(status.sem_otime)
}

const MANY: i32 = 250;

fn semaphores(checkpoint: &Checkpoint) -> Verdict {
    let some = set(KEY, 4, &[0, 3, 32767, 1])?;
    let many: Vec<i32> = (0..MANY).collect();
    let large = set(libc::IPC_PRIVATE, MANY, &many)?;
    operate(some, &[(1, 2, 0), (3, -1, 0)])?;
    let (go, done_it) = (checkpoint.dir().join("go-on"), checkpoint.dir().join("operated"));
    let child = in_child(|| {
        operate(some, &[(2, -7, 0)])?;
        make_sign(&done_it)?;
        let begin = std::time::Instant::now();
        while !go.exists() {
            that("the parent goes on", begin.elapsed().as_secs() < 300)?;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        operate(some, &[(0, 1, 0)]).map(drop)
    })?;
    eventually("the child has operated", || done_it.exists())?;
    checkpoint.wait()?;
    equal("the values", vec![0, 5, 32760, 0], values(some, 4))?;
    equal("those of a large set", many, values(large, MANY))?;
    let pid = std::process::id() as i32;
    equal("the last processes", [pid, child.0, pid], [last(some, 1), last(some, 2), last(some, 3)])?;
    that("there was a semop", operated(some)? != 0)?;
    // SAFETY: takes numbers.
    equal("the id of the key", some, unsafe { libc::semget(KEY, 0, 0) })?;
    make_sign(&go)?;
    child.passed()?;
    equal("what the child did", 1, values(some, 1)[0])?;
    remove_all(checkpoint.dir());
    Ok(())
}

/// Programs wait for the first semop to know that a set is initialised.
fn never_operated(checkpoint: &Checkpoint) -> Verdict {
    let id = set(KEY, 3, &[5])?;
    checkpoint.wait()?;
    equal("sem_otime", 0, operated(id)?)?;
    equal("the values", vec![5, 0, 0], values(id, 3))?;
    equal("the last processes", [std::process::id() as i32, 0], [last(id, 0), last(id, 1)])?;
    remove_all(checkpoint.dir());
    Ok(())
}

/// What two processes have done is undone when they end, and only then.
fn undo(checkpoint: &Checkpoint) -> Verdict {
    let id = set(KEY, 5, &[10, 0, 30000, 1, 32767])?;
    let (go, done_it) = (checkpoint.dir().join("go-on"), checkpoint.dir().join("operated"));
    let operations =
        [(0, -4, libc::SEM_UNDO), (1, 3, libc::SEM_UNDO), (2, -30000, libc::SEM_UNDO), (4, -32767, libc::SEM_UNDO)];
    let child = in_child(|| {
        operate(id, &operations)?;
        operate(id, &[(0, 1, libc::SEM_UNDO)])?;
        make_sign(&done_it)?;
        let begin = std::time::Instant::now();
        while !go.exists() {
            that("the parent goes on", begin.elapsed().as_secs() < 300)?;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Ok(())
    })?;
    eventually("the child has operated", || done_it.exists())?;
    operate(id, &[(0, -1, libc::SEM_UNDO), (3, -1, 0)])?;
    checkpoint.wait()?;
    equal("the values while both live", vec![6, 3, 0, 0, 0], values(id, 5))?;
    make_sign(&go)?;
    child.passed()?;
    equal("the values when the child has ended", vec![9, 0, 30000, 0, 32767], values(id, 5))?;
    // What this process has to undo: a grandchild cannot look after its end, so the adjustment is made to show itself. It
    // is 1 now, and may grow to 32767: by 32766 more, which takes a value of that, and by no more.
    operate(id, &[(4, -32767, 0), (0, -9, 0), (0, 32767, 0)])?;
    operate(id, &[(0, -32766, libc::SEM_UNDO)])?;
    let more = operate(id, &[(0, -1, libc::SEM_UNDO)]);
    equal("an adjustment beyond its range", Some(libc::ERANGE), std::io::Error::last_os_error().raw_os_error())?;
    that("it failed", more.is_err())?;
    remove_all(checkpoint.dir());
    Ok(())
}

/// Children sleep in calls of each kind when they are dumped.
fn waited_for(checkpoint: &Checkpoint) -> Verdict {
    let semaphores = set(libc::IPC_PRIVATE, 1, &[])?;
    let messages = queue(libc::IPC_PRIVATE)?;
    let children: [Child; 2] = [
        in_child(|| operate(semaphores, &[(0, -1, 0)]).map(drop))?,
        in_child(|| equal("what the child received", Ok((4, b"four".to_vec())), receive(messages, 4, 0)))?,
    ];
    let asleep = |child: &Child| {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", child.0)).unwrap_or_default();
        read("stat").contains(") S ")
            && ["semop", "semtimedop", "msgrcv"].iter().any(|call| is_in(&read("syscall"), call))
    };
    eventually("the children wait", || children.iter().all(asleep))?;
    checkpoint.wait()?;
    operate(semaphores, &[(0, 1, 0)])?;
    send(messages, 3, b"three")?;
    send(messages, 4, b"four")?;
    children.into_iter().try_for_each(Child::passed)?;
    equal("what is left", Ok((3, b"three".to_vec())), receive(messages, 0, libc::IPC_NOWAIT))?;
    remove_all(checkpoint.dir());
    Ok(())
}

/// Whether a line of `/proc/PID/syscall` is of this call.
fn is_in(line: &str, call: &str) -> bool {
    let number = match call {
        "semop" => libc::SYS_semop,
        "semtimedop" => libc::SYS_semtimedop,
        _ => libc::SYS_msgrcv,
    };
    line.split_whitespace().next().is_some_and(|found| found == number.to_string())
}

fn waited_for_elsewhere(checkpoint: &Checkpoint) -> Verdict {
    let id = set(libc::IPC_PRIVATE, 1, &[])?;
    elsewhere(checkpoint, |ready| {
        ready()?;
        operate(id, &[(0, -1, 0)]).map(drop)
    })?;
    // SAFETY: takes numbers.
    eventually("it waits", || unsafe { libc::semctl(id, 0, libc::GETNCNT) } == 1)?;
    checkpoint.wait()?;
    operate(id, &[(0, 1, 0)])?;
    // SAFETY: takes numbers.
    eventually("it waits no more", || unsafe { libc::semctl(id, 0, libc::GETNCNT) } == 0)?;
    remove_all(checkpoint.dir());
    Ok(())
}

// --- message queues ---

fn queue(key: i32) -> Result<i32, String> {
    // SAFETY: takes numbers.
    done("msgget", unsafe { libc::msgget(key, libc::IPC_CREAT | libc::IPC_EXCL | 0o600) })
}

fn send(id: i32, kind: i64, data: &[u8]) -> Verdict {
    let message = [&kind.to_ne_bytes()[..], data].concat();
    // SAFETY: reads the kind and so many bytes.
    done("msgsnd", unsafe { libc::msgsnd(id, message.as_ptr().cast(), data.len(), libc::IPC_NOWAIT) }).map(drop)
}

fn receive(id: i32, kind: i64, flags: i32) -> Result<(i64, Vec<u8>), String> {
    let mut message = vec![0; 8 + 8192];
    // SAFETY: writes the kind and up to so many bytes.
    let size = done("msgrcv", unsafe { libc::msgrcv(id, message.as_mut_ptr().cast(), 8192, kind, flags) })?;
    let (kind, data) = message.split_at(8);
    let kind = i64::from_ne_bytes(kind.try_into().map_err(|_| "a short message")?);
    Ok((kind, data[..size as usize].to_vec()))
}

fn queue_status(id: i32) -> Result<libc::msqid_ds, String> {
    // SAFETY: plain numbers.
    let mut status: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes to the struct.
    done("msgctl(IPC_STAT)", unsafe { libc::msgctl(id, libc::IPC_STAT, &mut status) })?;
    Ok(status)
}

fn queues(checkpoint: &Checkpoint) -> Verdict {
    let id = queue(KEY)?;
    let empty = queue(libc::IPC_PRIVATE)?;
    send(id, 5, b"received before")?;
    let received = in_child(|| receive(id, 5, 0).map(drop))?;
    let receiver = received.0;
    received.passed()?;
    let large = vec![0xa5; 8000];
    send(id, 2, b"first")?;
    send(id, 1 << 40, &large)?;
    (0..300).try_for_each(|number: i64| send(id, 10 + number, &number.to_ne_bytes()))?;
    send(id, 2, b"")?;
    let mut lowered = queue_status(id)?;
    // Less than there is in it.
    lowered.msg_qbytes = 100;
    // SAFETY: reads the struct.
    done("msgctl(IPC_SET)", unsafe { libc::msgctl(id, libc::IPC_SET, &mut lowered) })?;
    let before = queue_status(id)?;
    checkpoint.wait()?;
    let after = queue_status(id)?;
    equal("messages in it", 303, after.msg_qnum)?;
    equal("its capacity", 100, after.msg_qbytes)?;
    equal("its bytes", before.__msg_cbytes, after.__msg_cbytes)?;
    equal("its last sender", std::process::id() as i32, after.msg_lspid)?;
    that("it had a receiver", before.msg_lrpid == receiver && after.msg_lrpid != 0)?;
    equal("the oldest", Ok((2, b"first".to_vec())), receive(id, 0, libc::IPC_NOWAIT))?;
    equal("one of its kind", Ok((2, Vec::new())), receive(id, 2, libc::IPC_NOWAIT))?;
    equal("the large one", Ok((1 << 40, large)), receive(id, 0, libc::IPC_NOWAIT))?;
    for number in 0..300_i64 {
        let expected = Ok((10 + number, number.to_ne_bytes().to_vec()));
        equal("the next", expected, receive(id, 0, libc::IPC_NOWAIT))?;
    }
    that("no more", receive(id, 0, libc::IPC_NOWAIT).is_err())?;
    that("nothing in the other", receive(empty, 0, libc::IPC_NOWAIT).is_err())?;
    let status = queue_status(empty)?;
    equal("nobody has used the other", (0, 0), (status.msg_lspid, status.msg_lrpid))?;
    remove_all(checkpoint.dir());
    Ok(())
}

/// Made by one user, given to another.
fn other_owner(checkpoint: &Checkpoint) -> Verdict {
    let child = in_child(|| {
        // SAFETY: this process has one thread.
        done("setegid", unsafe { libc::setegid(54) })?;
        // SAFETY: this process has one thread.
        done("seteuid", unsafe { libc::seteuid(55) })?;
        let (id, messages) = (segment(KEY, SIZE, 0o604)?, queue(KEY)?);
        attached(id, 0)?[7] = 7;
        send(messages, 1, b"so that it is known whose it is")?;
        // SAFETY: this process has one thread.
        done("seteuid", unsafe { libc::seteuid(0) })?;
        let mut changed = status(id)?;
        (changed.shm_perm.uid, changed.shm_perm.gid) = (66, 67);
        // SAFETY: reads the struct.
        done("shmctl(IPC_SET)", unsafe { libc::shmctl(id, libc::IPC_SET, &mut changed) })?;
        checkpoint.ready()?;
        checkpoint.wait_for_go()?;
        let found = status(id)?.shm_perm;
        equal("owner and creator", (66, 67, 55, 54), (found.uid, found.gid, found.cuid, found.cgid))?;
        equal("mode", 0o604, found.mode)?;
        let found = queue_status(messages)?.msg_perm;
        equal("owner and creator of the queue", (55, 54, 55, 54), (found.uid, found.gid, found.cuid, found.cgid))?;
        equal("content", 7, attached(id, libc::SHM_RDONLY)?[7])
    })?;
    child.passed()?;
    remove_all(checkpoint.dir());
    Ok(())
}
