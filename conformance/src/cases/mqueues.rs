//! POSIX message queues.

use std::ffi::CString;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, eventually, in_child, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("mqueues/messages", &["mqueues"], messages).rounds(2),
        Case::new("mqueues/unlinked", &["mqueues"], unlinked),
        Case::new("mqueues/access", &["mqueues"], access),
        Case::new("mqueues/shared", &["mqueues"], shared),
        Case::new("mqueues/notification", &["mqueues", "signals"], notification).rounds(2),
        Case::new("mqueues/notification-of-a-queue-with-messages", &["mqueues", "signals"], notification_while_full),
        Case::new("mqueues/notification-of-a-child", &["mqueues", "signals"], notification_of_a_child),
        Case::new("mqueues/notification-that-is-pending", &["mqueues", "signals"], notification_pending),
        Case::new("mqueues/notification-without-signal", &["mqueues"], notification_without_signal),
        Case::new("mqueues/notification-by-a-thread", &["mqueues"], notification_by_a_thread)
            .refused_at_dump("SIGEV_THREAD")
            // The C library's thread may still be on its way to where it waits.
            .passing_threads(),
        Case::new("mqueues/waiting", &["mqueues"], waiting),
        Case::new("mqueues/of-a-stranger", &["mqueues"], of_a_stranger).refused_at_dump("has it open too"),
    ]
}

type Verdict = Result<(), String>;

/// A queue of the C library's calls, and the name that it is unlinked by.
struct Queue {
    fd: libc::mqd_t,
    name: CString,
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: a queue of ours; a name that is gone already is an error that does not matter.
        unsafe {
            libc::mq_close(self.fd);
            libc::mq_unlink(self.name.as_ptr());
        }
    }
}

/// The same for the same case, and no other's.
fn name(checkpoint: &Checkpoint, which: &str) -> CString {
    let directory = checkpoint.dir();
    let last: Vec<String> = directory.iter().rev().take(2).map(|part| part.to_string_lossy().into_owned()).collect();
    CString::new(format!("/ckpt-{}-{which}", last.join("-"))).expect("no zero byte")
}

const MODE: libc::mode_t = 0o640;

impl Queue {
    fn new(checkpoint: &Checkpoint, which: &str, capacity: i64, largest: i64) -> Result<Queue, String> {
        let name = name(checkpoint, which);
        // SAFETY: a name and attributes that live for the calls.
        let fd = unsafe {
            libc::mq_unlink(name.as_ptr());
            let mut attributes: libc::mq_attr = zeroed();
            (attributes.mq_maxmsg, attributes.mq_msgsize) = (capacity, largest);
            let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
            done("mq_open", libc::mq_open(name.as_ptr(), flags, MODE, &raw const attributes))?
        };
        Ok(Queue { fd, name })
    }

    /// Another description of it.
    fn open(&self, flags: i32) -> Result<libc::mqd_t, String> {
        // SAFETY: a name that lives for the call.
        done("mq_open", unsafe { libc::mq_open(self.name.as_ptr(), flags) })
    }

    fn send(&self, text: &str, priority: u32) -> Verdict {
        send(self.fd, text, priority)
    }

    fn receive(&self) -> Result<(String, u32), String> {
        receive(self.fd)
    }

    fn attributes(&self) -> libc::mq_attr {
        // SAFETY: attributes of zeros are valid, and the call fills them.
        unsafe {
            let mut attributes = zeroed();
            libc::mq_getattr(self.fd, &mut attributes);
            attributes
        }
    }

    fn count(&self) -> i64 {
        self.attributes().mq_curmsgs
    }
}

fn send(fd: libc::mqd_t, text: &str, priority: u32) -> Verdict {
    // SAFETY: bytes that live for the call.
    done("mq_send", unsafe { libc::mq_send(fd, text.as_ptr().cast(), text.len(), priority) }).map(drop)
}

fn receive(fd: libc::mqd_t) -> Result<(String, u32), String> {
    let (mut text, mut priority) = ([0u8; 8192], 0);
    // SAFETY: room for the largest message.
    let size =
        done("mq_receive", unsafe { libc::mq_receive(fd, text.as_mut_ptr().cast(), text.len(), &mut priority) })?;
    Ok((String::from_utf8_lossy(&text[..size as usize]).into_owned(), priority))
}

fn error_of(result: Result<(String, u32), String>) -> i32 {
    if result.is_ok() { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(0) }
}

fn messages(checkpoint: &Checkpoint) -> Verdict {
    let queue = Queue::new(checkpoint, "messages", 9, 64)?;
    let sent =
        [("b", 3), ("a first", 7), ("", 0), ("a second", 7), ("last", 0), ("a third", 7), ("x", 32767), ("c", 1)];
    for (text, priority) in sent {
        queue.send(text, priority)?;
    }
    let empty = Queue::new(checkpoint, "empty", 2, 16)?;
    checkpoint.wait()?;
    let attributes = queue.attributes();
    equal("mq_maxmsg and mq_msgsize", (9, 64), (attributes.mq_maxmsg, attributes.mq_msgsize))?;
    // SAFETY: a structure of zeros that the call fills.
    let status = unsafe {
        let mut status: libc::stat = zeroed();
        done("fstat", libc::fstat(queue.fd, &mut status))?;
        status
    };
    equal("mode", libc::S_IFREG | MODE, status.st_mode)?;
    let mut expected = sent;
    expected.sort_by_key(|&(_, priority)| std::cmp::Reverse(priority));
    for (text, priority) in expected {
        equal("message", Ok((text.to_string(), priority)), queue.receive())?;
    }
    equal("what is left", 0, queue.count())?;
    equal("messages in the other", 0, empty.count())?;
    // It is the queue of that name.
    let other = queue.open(libc::O_WRONLY)?;
    send(other, "by name", 5)?;
    equal("message sent by name", Ok(("by name".to_string(), 5)), queue.receive())
}

fn unlinked(checkpoint: &Checkpoint) -> Verdict {
    let queue = Queue::new(checkpoint, "queue", 4, 32)?;
    queue.send("of the first", 2)?;
    // SAFETY: a name that lives for the call.
    done("mq_unlink", unsafe { libc::mq_unlink(queue.name.as_ptr()) })?;
    // SAFETY: as above.
    let opened = unsafe { libc::mq_open(queue.name.as_ptr(), libc::O_RDWR) };
    that("its name is gone", opened < 0)?;
    checkpoint.wait()?;
    // SAFETY: as above.
    let opened = unsafe { libc::mq_open(queue.name.as_ptr(), libc::O_RDWR) };
    that("its name is still gone", opened < 0)?;
    equal("message", Ok(("of the first".to_string(), 2)), queue.receive())?;
    queue.send("more", 1)?;
    equal("messages", 1, queue.count())
}

fn access(checkpoint: &Checkpoint) -> Verdict {
    let queue = Queue::new(checkpoint, "queue", 1, 32)?;
    let (reader, writer) = (queue.open(libc::O_RDONLY | libc::O_NONBLOCK)?, queue.open(libc::O_WRONLY)?);
    // SAFETY: takes no memory.
    let duplicate = done("dup", unsafe { libc::dup(reader) })?;
    send(writer, "one", 1)?;
    checkpoint.wait()?;
    // SAFETY: takes no memory.
    let flags = |fd, command| unsafe { libc::fcntl(fd, command) };
    equal(
        "flags of the reader",
        libc::O_NONBLOCK,
        flags(reader, libc::F_GETFL) & (libc::O_NONBLOCK | libc::O_ACCMODE),
    )?;
    equal("access of the writer", libc::O_WRONLY, flags(writer, libc::F_GETFL) & libc::O_ACCMODE)?;
    equal("close-on-exec of the reader", libc::FD_CLOEXEC, flags(reader, libc::F_GETFD))?;
    equal("close-on-exec of its duplicate", 0, flags(duplicate, libc::F_GETFD))?;
    that("the reader cannot send", send(reader, "x", 1).is_err())?;
    that("the writer cannot receive", receive(writer).is_err())?;
    equal("message", Ok(("one".to_string(), 1)), receive(duplicate))?;
    equal("a read of the empty queue", libc::EAGAIN, error_of(receive(reader)))
}

fn shared(checkpoint: &Checkpoint) -> Verdict {
    let (there, back) = (Queue::new(checkpoint, "there", 4, 64)?, Queue::new(checkpoint, "back", 4, 64)?);
    there.send("before", 4)?;
    let child = in_child(|| {
        loop {
            let (text, priority) = there.receive()?;
            back.send(&text.to_uppercase(), priority)?;
            if text == "end" {
                return Ok(());
            }
        }
    })?;
    equal("the child's answer", Ok(("BEFORE".to_string(), 4)), back.receive())?;
    checkpoint.wait()?;
    for (text, answer) in [("after", "AFTER"), ("end", "END")] {
        there.send(text, 6)?;
        equal("the child's answer", Ok((answer.to_string(), 6)), back.receive())?;
    }
    child.passed()
}

static CAUGHT: AtomicI32 = AtomicI32::new(0);
static VALUE: AtomicU64 = AtomicU64::new(0);

extern "C" fn catch(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid siginfo.
    unsafe {
        if (*info).si_code == libc::SI_MESGQ {
            VALUE.store((*info).si_value().sival_ptr as u64, SeqCst);
            CAUGHT.fetch_add(1, SeqCst);
        }
    }
}

fn handle(signal: i32) -> Verdict {
    // SAFETY: the handler only uses atomics.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = catch as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        done("sigaction", libc::sigaction(signal, &action, null_mut())).map(drop)
    }
}

/// `mq_notify` by a signal (`notify` 0) or not at all (1). An error is that of the call.
fn notify(fd: libc::mqd_t, notify: i32, signal: i32, value: u64) -> Result<(), i32> {
    let event = [value, u64::from(signal as u32) | u64::from(notify as u32) << 32, 0, 0, 0, 0, 0, 0];
    // SAFETY: a sigevent of the kernel's form. Raw, because the C library looks at some of these itself.
    match unsafe { libc::syscall(libc::SYS_mq_notify, fd, &event) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
    }
}

const VALUE_OF_OURS: u64 = 0x1234_5678_9abc_def1;

fn notification(checkpoint: &Checkpoint) -> Verdict {
    let queue = Queue::new(checkpoint, "queue", 4, 64)?;
    handle(libc::SIGUSR1)?;
    equal("mq_notify", Ok(()), notify(queue.fd, 0, libc::SIGUSR1, VALUE_OF_OURS))?;
    checkpoint.wait()?;
    equal("notifications so far", 0, CAUGHT.load(SeqCst))?;
    equal("messages", 0, queue.count())?;
    equal("a second registration", Err(libc::EBUSY), notify(queue.fd, 0, libc::SIGUSR1, 1))?;
    queue.send("wake up", 1)?;
    eventually("the notification", || CAUGHT.load(SeqCst) == 1)?;
    equal("its value", VALUE_OF_OURS, VALUE.load(SeqCst))?;
    equal("it came once, and may be registered anew", Ok(()), notify(queue.fd, 0, libc::SIGUSR1, 2))
}

/// It comes when the queue was empty. That the dump empties and fills it is not to be noticed.
fn notification_while_full(checkpoint: &Checkpoint) -> Verdict {
    let queue = Queue::new(checkpoint, "queue", 2, 64)?;
    let reader = queue.open(libc::O_RDONLY)?;
    handle(40)?;
    queue.send("one", 1)?;
    queue.send("two", 1)?;
    equal("mq_notify", Ok(()), notify(reader, 0, 40, 77))?;
    checkpoint.wait()?;
    equal("notifications so far", 0, CAUGHT.load(SeqCst))?;
    for text in ["one", "two"] {
        equal("message", Ok((text.to_string(), 1)), receive(reader))?;
    }
    equal("notifications of the dump", 0, CAUGHT.load(SeqCst))?;
    queue.send("three", 1)?;
    eventually("the notification", || CAUGHT.load(SeqCst) == 1)?;
    equal("its value", 77, VALUE.load(SeqCst))
}

fn notification_of_a_child(checkpoint: &Checkpoint) -> Verdict {
    let (queue, words) = (Queue::new(checkpoint, "queue", 2, 64)?, Queue::new(checkpoint, "words", 2, 64)?);
    let orders = Queue::new(checkpoint, "orders", 2, 64)?;
    let child = in_child(|| {
        handle(41)?;
        equal("mq_notify", Ok(()), notify(queue.fd, 0, 41, 9))?;
        words.send("registered", 1)?;
        equal("what the child is told", Ok(("look".to_string(), 2)), orders.receive())?;
        eventually("the child's notification", || CAUGHT.load(SeqCst) == 1)?;
        equal("its value", 9, VALUE.load(SeqCst))
    })?;
    equal("what the child says", Ok(("registered".to_string(), 1)), words.receive())?;
    checkpoint.wait()?;
    queue.send("wake up", 1)?;
    orders.send("look", 2)?;
    child.passed()
}

fn notification_pending(checkpoint: &Checkpoint) -> Verdict {
    let queue = Queue::new(checkpoint, "queue", 2, 64)?;
    handle(42)?;
    let set = 1u64 << 41;
    // SAFETY: a set of the kernel's size.
    let mask = |how: i32| done("rt_sigprocmask", unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &set, 0, 8) });
    mask(libc::SIG_BLOCK)?;
    equal("mq_notify", Ok(()), notify(queue.fd, 0, 42, 5))?;
    queue.send("a message", 1)?;
    checkpoint.wait()?;
    equal("notifications so far", 0, CAUGHT.load(SeqCst))?;
    equal("nobody is registered any more", Ok(()), notify(queue.fd, 0, 42, 6))?;
    mask(libc::SIG_UNBLOCK)?;
    equal("notifications", 1, CAUGHT.load(SeqCst))?;
    equal("its value", 5, VALUE.load(SeqCst))?;
    equal("message", Ok(("a message".to_string(), 1)), queue.receive())
}

fn notification_without_signal(checkpoint: &Checkpoint) -> Verdict {
    let queue = Queue::new(checkpoint, "queue", 2, 64)?;
    queue.send("one", 1)?;
    equal("mq_notify", Ok(()), notify(queue.fd, 1, 0, 0))?;
    checkpoint.wait()?;
    equal("a second registration", Err(libc::EBUSY), notify(queue.fd, 1, 0, 0))?;
    equal("message", Ok(("one".to_string(), 1)), queue.receive())?;
    queue.send("two", 1)?;
    equal("it is over with the next message", Ok(()), notify(queue.fd, 1, 0, 0))
}

extern "C" fn no_thread(_value: libc::sigval) {}

/// The C library has a netlink socket and a thread for them.
fn notification_by_a_thread(checkpoint: &Checkpoint) -> Verdict {
    unsafe extern "C" {
        fn mq_notify(fd: libc::mqd_t, event: *const u64) -> i32;
    }
    const SIGEV_THREAD: u64 = 2;
    let queue = Queue::new(checkpoint, "queue", 2, 64)?;
    let event = [0, SIGEV_THREAD << 32, no_thread as *const () as u64, 0, 0, 0, 0, 0];
    // SAFETY: a sigevent.
    done("mq_notify", unsafe { mq_notify(queue.fd, event.as_ptr()) })?;
    checkpoint.wait()?;
    equal("messages", 0, queue.count())
}

fn sleeps(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") S "))
}

/// A child waits for a message, and another for room for its own.
fn waiting(checkpoint: &Checkpoint) -> Verdict {
    let (empty, full) = (Queue::new(checkpoint, "empty", 2, 64)?, Queue::new(checkpoint, "full", 1, 64)?);
    full.send("in the way", 9)?;
    let receiver = in_child(|| equal("what the child received", Ok(("news".to_string(), 3)), empty.receive()))?;
    let sender = in_child(|| full.send("waited", 8))?;
    eventually("both wait", || sleeps(receiver.0) && sleeps(sender.0))?;
    checkpoint.wait()?;
    that("both wait still", sleeps(receiver.0) && sleeps(sender.0))?;
    empty.send("news", 3)?;
    receiver.passed()?;
    equal("the message that was in the way", Ok(("in the way".to_string(), 9)), full.receive())?;
    sender.passed()?;
    equal("the message that had to wait", Ok(("waited".to_string(), 8)), full.receive())
}

/// A grandchild whose parent has ended is no part of the tree any more.
fn of_a_stranger(checkpoint: &Checkpoint) -> Verdict {
    let (queue, words) = (Queue::new(checkpoint, "queue", 2, 64)?, Queue::new(checkpoint, "words", 2, 64)?);
    let child = in_child(|| {
        let _grandchild = in_child(|| {
            let (text, priority) = queue.receive()?;
            words.send(&text, priority)
        })?;
        Ok(())
    })?;
    child.passed()?;
    checkpoint.wait()?;
    queue.send("for the stranger", 2)?;
    equal("the stranger's answer", Ok(("for the stranger".to_string(), 2)), words.receive())
}
