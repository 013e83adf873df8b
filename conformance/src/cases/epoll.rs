//! Event polls.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::case::{Case, Checkpoint};
use crate::cases::eventfd::{eventfd, read, write};
use crate::expect::{done, equal, eventually, in_child, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("epoll/entries", &["epoll", "eventfd", "unix_sockets"], entries),
        Case::new("epoll/many", &["epoll", "eventfd"], many),
        Case::new("epoll/one-shot", &["epoll", "eventfd", "pipes"], one_shot),
        Case::new("epoll/edge-triggered", &["epoll", "eventfd"], edge_triggered),
        Case::new("epoll/closed-numbers", &["epoll", "eventfd"], closed_numbers)
            .needs(&["several entries of an epoll under one closed number"]),
        Case::new("epoll/file-of-a-child", &["epoll", "eventfd"], file_of_a_child),
        Case::new("epoll/shared", &["epoll", "eventfd"], shared),
        Case::new("epoll/nested", &["epoll", "eventfd"], nested),
        Case::new("epoll/waited-for", &["epoll", "eventfd"], waited_for),
        Case::new("epoll/file-in-a-queue", &["epoll", "unix_sockets"], file_in_a_queue)
            .needs(&["entries of an epoll for files that only a queue has"]),
    ]
}

type Verdict = Result<(), String>;

fn epoll() -> Result<File, String> {
    // SAFETY: makes a new descriptor, which the File owns.
    unsafe { Ok(File::from_raw_fd(done("epoll_create1", libc::epoll_create1(libc::EPOLL_CLOEXEC))?)) }
}

fn control(epoll: &File, operation: i32, fd: RawFd, events: i32, data: u64) -> Verdict {
    let mut event = libc::epoll_event { events: events as u32, u64: data };
    // SAFETY: reads a whole event.
    done("epoll_ctl", unsafe { libc::epoll_ctl(epoll.as_raw_fd(), operation, fd, &mut event) }).map(drop)
}

fn add(epoll: &File, file: &impl AsRawFd, events: i32, data: u64) -> Verdict {
    control(epoll, libc::EPOLL_CTL_ADD, file.as_raw_fd(), events, data)
}

/// What is ready now: (data, events), sorted.
fn ready(epoll: &File) -> Result<Vec<(u64, i32)>, String> {
    let mut events = vec![libc::epoll_event { events: 0, u64: 0 }; 1024];
    // SAFETY: room for as many events as it says.
    let count = done("epoll_wait", unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), 1024, 0) })?;
    let mut found: Vec<_> = events[..count as usize].iter().map(|event| (event.u64, event.events as i32)).collect();
    found.sort_unstable();
    Ok(found)
}

fn entries(checkpoint: &Checkpoint) -> Verdict {
    let epoll = epoll()?;
    let (empty, full) = (eventfd(0, 0)?, eventfd(9, 0)?);
    let (mut near, far) = UnixStream::pair().map_err(|error| error.to_string())?;
    add(&epoll, &empty, libc::EPOLLIN, 1)?;
    add(&epoll, &full, libc::EPOLLIN | libc::EPOLLOUT, u64::MAX)?;
    add(&epoll, &far, libc::EPOLLIN | libc::EPOLLRDHUP, 0x1234_5678_9abc_def0)?;
    add(&epoll, &near, libc::EPOLLIN | libc::EPOLLEXCLUSIVE, 4)?;
    checkpoint.wait()?;
    equal("ready at first", vec![(u64::MAX, libc::EPOLLIN | libc::EPOLLOUT)], ready(&epoll)?)?;
    write(&empty, 1)?;
    near.write_all(b"x").map_err(|error| error.to_string())?;
    let now =
        vec![(1, libc::EPOLLIN), (0x1234_5678_9abc_def0, libc::EPOLLIN), (u64::MAX, libc::EPOLLIN | libc::EPOLLOUT)];
    equal("ready then", now, ready(&epoll)?)?;
    control(&epoll, libc::EPOLL_CTL_DEL, full.as_raw_fd(), 0, 0)?;
    control(&epoll, libc::EPOLL_CTL_MOD, empty.as_raw_fd(), libc::EPOLLOUT, 2)?;
    equal("ready at last", vec![(2, libc::EPOLLOUT), (0x1234_5678_9abc_def0, libc::EPOLLIN)], ready(&epoll)?)?;
    let modified = control(&epoll, libc::EPOLL_CTL_MOD, near.as_raw_fd(), libc::EPOLLIN, 4);
    that("an exclusive entry cannot be modified", modified.is_err())
}

fn many(checkpoint: &Checkpoint) -> Verdict {
    let epoll = epoll()?;
    let counters = (0..700).map(|_| eventfd(0, 0)).collect::<Result<Vec<_>, _>>()?;
    for (number, counter) in counters.iter().enumerate() {
        add(&epoll, counter, libc::EPOLLIN, number as u64)?;
    }
    checkpoint.wait()?;
    equal("ready at first", vec![], ready(&epoll)?)?;
    for (number, counter) in counters.iter().enumerate() {
        write(counter, 1)?;
        equal("the one", vec![(number as u64, libc::EPOLLIN)], ready(&epoll)?)?;
        equal("its count", Ok(1), read(counter))?;
    }
    Ok(())
}

/// Entries that have fired stay silent until they are armed again, whatever their file may be ready for.
fn one_shot(checkpoint: &Checkpoint) -> Verdict {
    let epoll = epoll()?;
    let once = libc::EPOLLIN | libc::EPOLLONESHOT;
    let (fired, armed) = (eventfd(1, 0)?, eventfd(0, 0)?);
    let (mut reader, mut writer) = std::io::pipe().map_err(|error| error.to_string())?;
    let pipe_error = |error: std::io::Error| error.to_string();
    writer.write_all(b"x").map_err(pipe_error)?;
    add(&epoll, &fired, once, 1)?;
    add(&epoll, &armed, once | libc::EPOLLET, 2)?;
    add(&epoll, &reader, once, 3)?;
    equal("what fires", vec![(1, libc::EPOLLIN), (3, libc::EPOLLIN)], ready(&epoll)?)?;
    reader.read_exact(&mut [0]).map_err(pipe_error)?;
    checkpoint.wait()?;
    equal("ready at first", vec![], ready(&epoll)?)?;
    equal("the count", Ok(1), read(&fired))?;
    for counter in [&fired, &armed] {
        write(counter, 1)?;
    }
    writer.write_all(b"y").map_err(pipe_error)?;
    equal("the armed one fires alone", vec![(2, libc::EPOLLIN)], ready(&epoll)?)?;
    let mut byte = [0];
    reader.read_exact(&mut byte).map_err(pipe_error)?;
    equal("the pipe holds what was written", *b"y", byte)?;
    drop(writer);
    equal("even a hang-up is not told", vec![], ready(&epoll)?)?;
    control(&epoll, libc::EPOLL_CTL_MOD, fired.as_raw_fd(), once, 5)?;
    control(&epoll, libc::EPOLL_CTL_MOD, reader.as_raw_fd(), once, 6)?;
    equal("armed again", vec![(5, libc::EPOLLIN), (6, libc::EPOLLHUP)], ready(&epoll)?)
}

fn edge_triggered(checkpoint: &Checkpoint) -> Verdict {
    let epoll = epoll()?;
    let (waiting, quiet) = (eventfd(0, 0)?, eventfd(0, 0)?);
    add(&epoll, &waiting, libc::EPOLLIN | libc::EPOLLET, 1)?;
    add(&epoll, &quiet, libc::EPOLLIN | libc::EPOLLET, 2)?;
    write(&waiting, 1)?;
    checkpoint.wait()?;
    equal("the edge that waited", vec![(1, libc::EPOLLIN)], ready(&epoll)?)?;
    equal("is told once", vec![], ready(&epoll)?)?;
    write(&quiet, 1)?;
    equal("a new edge", vec![(2, libc::EPOLLIN)], ready(&epoll)?)
}

/// Entries whose number was closed, or leads to another file, while a duplicate keeps them alive.
fn closed_numbers(checkpoint: &Checkpoint) -> Verdict {
    let epoll = epoll()?;
    let (closed, reused) = (eventfd(0, 0)?, eventfd(0, 0)?);
    add(&epoll, &closed, libc::EPOLLIN, 1)?;
    add(&epoll, &reused, libc::EPOLLIN, 2)?;
    let clone = |file: &File| file.try_clone().map_err(|error| error.to_string());
    let (closed_again, reused_again) = (clone(&closed)?, clone(&reused)?);
    let other = eventfd(0, 0)?;
    let closed_number = closed.as_raw_fd();
    drop(closed);
    // SAFETY: both descriptors are ours; `reused` then leads to the other file.
    done("dup2", unsafe { libc::dup2(other.as_raw_fd(), reused.as_raw_fd()) })?;
    add(&epoll, &reused, libc::EPOLLIN, 3)?;
    checkpoint.wait()?;
    // SAFETY: takes no argument.
    equal("the closed number", -1, unsafe { libc::fcntl(closed_number, libc::F_GETFD) })?;
    equal("ready at first", vec![], ready(&epoll)?)?;
    for (counter, data) in [(&closed_again, 1), (&reused_again, 2), (&other, 3)] {
        write(counter, 1)?;
        equal("the one that was written to", vec![(data, libc::EPOLLIN)], ready(&epoll)?)?;
        equal("its count", Ok(1), read(counter))?;
    }
    // The number belongs to the entry: it can be removed by it once it leads there again.
    // SAFETY: as above.
    done("dup2", unsafe { libc::dup2(reused_again.as_raw_fd(), reused.as_raw_fd()) })?;
    control(&epoll, libc::EPOLL_CTL_DEL, reused.as_raw_fd(), 0, 0)
}

/// Only a child still has the file that is watched.
fn file_of_a_child(checkpoint: &Checkpoint) -> Verdict {
    let epoll = epoll()?;
    let (counter, reply) = (eventfd(0, 0)?, eventfd(0, 0)?);
    add(&epoll, &counter, libc::EPOLLIN, 1)?;
    let child = in_child(|| {
        checkpoint.wait_for_go()?;
        write(&counter, 1)?;
        equal("the reply", Ok(1), read(&reply))
    })?;
    drop(counter);
    checkpoint.wait()?;
    eventually("the child's counter is ready", || ready(&epoll).is_ok_and(|ready| ready == [(1, libc::EPOLLIN)]))?;
    write(&reply, 1)?;
    child.passed()
}

fn shared(checkpoint: &Checkpoint) -> Verdict {
    let epoll = epoll()?;
    let counter = eventfd(0, 0)?;
    let child = in_child(|| {
        checkpoint.wait_for_go()?;
        add(&epoll, &counter, libc::EPOLLIN, 77)
    })?;
    checkpoint.wait()?;
    child.passed()?;
    write(&counter, 1)?;
    equal("what the child has added", vec![(77, libc::EPOLLIN)], ready(&epoll)?)
}

fn nested(checkpoint: &Checkpoint) -> Verdict {
    let (outer, inner) = (epoll()?, epoll()?);
    let counter = eventfd(0, 0)?;
    add(&outer, &inner, libc::EPOLLIN, 1)?;
    add(&inner, &counter, libc::EPOLLIN, 2)?;
    checkpoint.wait()?;
    equal("ready at first", vec![], ready(&outer)?)?;
    write(&counter, 1)?;
    equal("the outer one", vec![(1, libc::EPOLLIN)], ready(&outer)?)?;
    equal("the inner one", vec![(2, libc::EPOLLIN)], ready(&inner)?)
}

/// A child sleeps in `epoll_wait` when it is dumped.
fn waited_for(checkpoint: &Checkpoint) -> Verdict {
    let epoll = epoll()?;
    let counter = eventfd(0, 0)?;
    add(&epoll, &counter, libc::EPOLLIN, 1)?;
    let child = in_child(|| {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: room for one event.
        let count = done("epoll_wait", unsafe { libc::epoll_wait(epoll.as_raw_fd(), &mut event, 1, -1) })?;
        equal("events", (1, 1), (count, { event.u64 }))
    })?;
    let asleep = || std::fs::read_to_string(format!("/proc/{}/stat", child.0)).is_ok_and(|stat| stat.contains(") S "));
    eventually("the child waits", asleep)?;
    checkpoint.wait()?;
    write(&counter, 1)?;
    child.passed()
}

/// The file that is watched is in the queue of a socket, and in no table.
fn file_in_a_queue(checkpoint: &Checkpoint) -> Verdict {
    let epoll = epoll()?;
    let (near, far) = UnixStream::pair().map_err(|error| error.to_string())?;
    let counter = eventfd(0, 0)?;
    add(&epoll, &counter, libc::EPOLLIN, 1)?;
    super::unix_sockets::pass(&near, counter.as_raw_fd())?;
    drop(counter);
    checkpoint.wait()?;
    let counter = super::unix_sockets::receive(&far)?;
    write(&counter, 1)?;
    equal("what only a queue had", vec![(1, libc::EPOLLIN)], ready(&epoll)?)
}
