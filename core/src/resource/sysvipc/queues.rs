//! Message queues: `msgrcv(MSG_COPY)` reads a message by its place and leaves it there.

use super::{Belongs, Collector, IPC_NOWAIT, Kind, Listed, Message, MessageQueue, NAME, Rebuilder, Wanted};
use crate::args;
use crate::batch::{Batch, MAX_BYTES, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::image::Image;
use crate::ourselves::{Capability, ourselves};
use crate::resource::Check;
use crate::target::Pid;

const MSG_NOERROR: i32 = 0o10000;
const MSG_COPY: i32 = 0o40000;
/// Bytes of the messages in one batch.
const AT_ONCE: usize = MAX_BYTES - 4096;
const CAP_SYS_RESOURCE: Capability = Capability(24);

fn kernel_limit(name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default();
    text.trim().parse().unwrap_or(u64::MAX)
}

pub(super) fn collect(collector: &mut Collector<'_>, listed: Vec<Listed>) -> Result<Vec<MessageQueue>, DumpError> {
    let mut queues = Vec::new();
    for found in listed {
        let (id, users) = (found.permissions.id, [found.pid("lspid"), found.pid("lrpid")]);
        match collector.tree.belongs(&found, &users) {
            Belongs::Elsewhere => continue,
            Belongs::ToBoth(stranger) => {
                collector.refuse_shared(Kind::Queue, id, stranger);
                continue;
            }
            Belongs::ToTree => {}
        }
        let Some(capacity) = capacity(collector, id)? else {
            let why = "no process of the tree may read it";
            collector.refuse(Kind::Queue, id, why, "have its owner allow that (msgctl IPC_SET), or remove it");
            continue;
        };
        if let Some(messages) = messages(collector, &found)? {
            let [sender, receiver] = users;
            queues.push(MessageQueue { permissions: found.permissions, capacity, sender, receiver, messages });
        }
    }
    Ok(queues)
}

/// `msg_qbytes`, which is in no list.
fn capacity(collector: &mut Collector<'_>, id: i32) -> Result<Option<u64>, DumpError> {
    const IPC_STAT: i32 = 2;
    let mut batch = Batch::new();
    let status = batch.room(120);
    let asked = Kind::Queue.control(&mut batch, id, IPC_STAT, status.into());
    let replies = collector.run_where_permitted(&batch, |replies| replies.result(asked).is_err())?;
    // At 88 in struct msqid64_ds.
    Ok(replies.map(|replies| replies.u64(status.after(88))))
}

/// All messages; `None` if that was refused.
fn messages(collector: &mut Collector<'_>, found: &Listed) -> Result<Option<Vec<Message>>, DumpError> {
    let (id, count) = (found.permissions.id, found.field("qnum") as usize);
    let largest = (found.field("cbytes") as usize).min(kernel_limit("msgmax") as usize);
    if largest + 64 > AT_ONCE {
        let why = "it may hold messages that are too large";
        collector.refuse(Kind::Queue, id, why, format!("have the program receive those above {AT_ONCE} bytes"));
        return Ok(None);
    }
    let mut messages = Vec::with_capacity(count);
    while messages.len() < count {
        let some = (count - messages.len()).min(AT_ONCE / (largest + 64)).clamp(1, 200);
        let mut batch = Batch::new();
        let copies: Vec<_> = (messages.len()..messages.len() + some)
            .map(|place| {
                let room = batch.room(8 + largest);
                let flags = MSG_COPY | IPC_NOWAIT;
                (batch.try_call(Sysno::msgrcv, args![id, room, largest, place, flags]), room)
            })
            .collect();
        let first = copies[0].0;
        let Some(replies) = collector.run_where_permitted(&batch, |replies| replies.result(first).is_err())? else {
            let why = "no process of the tree may read its messages, or this kernel has no MSG_COPY";
            collector.refuse(Kind::Queue, id, why, "have the program receive them before the dump");
            return Ok(None);
        };
        for (copied, room) in copies {
            let size = replies.result(copied).map_err(|errno| DumpError::Io {
                what: format!("{NAME}: a message of message queue {id}"),
                source: errno.into(),
            })?;
            let kind = replies.u64(room) as i64;
            let data = replies.bytes(room.after(8)).get(..size as usize).unwrap_or_default().to_vec();
            messages.push(Message { kind, data });
        }
    }
    Ok(Some(messages))
}

pub(super) fn check(image: &Image, context: &mut Check<'_>) {
    for queue in &image.sysvipc.queues {
        let subject = Kind::Queue.subject(queue.permissions.id);
        let most = kernel_limit("msgmnb");
        if queue.capacity > most && !ourselves().may(CAP_SYS_RESOURCE) {
            let why = format!("it may hold {} bytes, where {most} are allowed here", queue.capacity);
            context.refuse(subject.clone(), why, format!("sysctl kernel.msgmnb={}", queue.capacity));
        }
        let largest = queue.messages.iter().map(|message| message.data.len()).max().unwrap_or(0);
        if largest as u64 > kernel_limit("msgmax") {
            let why = format!("it has a message of {largest} bytes, which is more than is allowed here");
            context.refuse(subject.clone(), why, format!("sysctl kernel.msgmax={largest}"));
        }
        if largest + 64 > AT_ONCE || queue.messages.iter().any(|message| message.kind < 1) {
            context.refuse(subject, "it has a message that cannot be", "use another copy of the image");
        }
    }
}

pub(super) fn rebuild(
    rebuilder: &mut Rebuilder<'_>,
    wanted: &Wanted,
    queue: &MessageQueue,
) -> Result<(), RestoreError> {
    let (id, key) = (queue.permissions.id, queue.permissions.key);
    let (sender, receiver) = (rebuilder.process(queue.sender), rebuilder.process(queue.receiver));
    let was_there = rebuilder.make(wanted, sender, |batch, flags| batch.try_call(Sysno::msgget, args![key, flags]))?;
    // It may hold more than its capacity, if that was lowered since.
    let roomy = queue.capacity.max(kernel_limit("msgmnb").min(i32::MAX as u64));
    rebuilder.set_owner(Kind::Queue, &queue.permissions, roomy)?;
    if was_there {
        empty(rebuilder, receiver, id)?;
    }
    if queue.receiver != Pid(0) {
        // So that both have been here.
        send(rebuilder, sender, id, &[Message { kind: 1, data: Vec::new() }])?;
        empty(rebuilder, receiver, id)?;
    }
    let mut rest = &queue.messages[..];
    while !rest.is_empty() {
        let mut bytes = 0;
        let fit = rest.iter().take(200).take_while(|message| {
            bytes += message.data.len() + 64;
            bytes <= AT_ONCE
        });
        let fit = fit.count().max(1);
        send(rebuilder, sender, id, &rest[..fit])?;
        rest = &rest[fit..];
    }
    rebuilder.set_owner(Kind::Queue, &queue.permissions, queue.capacity)
}

fn send(rebuilder: &mut Rebuilder<'_>, process: usize, id: i32, messages: &[Message]) -> Result<(), RestoreError> {
    let mut batch = Batch::new();
    let sent: Vec<_> = messages
        .iter()
        .map(|message| {
            let bytes = batch.bytes(&[&message.kind.to_ne_bytes(), &message.data[..]].concat());
            batch.try_call(Sysno::msgsnd, args![id, bytes, message.data.len(), IPC_NOWAIT])
        })
        .collect();
    let replies = rebuilder.run(process, &batch)?;
    for sent in sent {
        let result = replies.result(sent);
        result.map_err(|errno| rebuilder.io_failed(Kind::Queue, id, "a message cannot be sent again", errno))?;
    }
    Ok(())
}

/// Receives whatever is in it.
fn empty(rebuilder: &mut Rebuilder<'_>, process: usize, id: i32) -> Result<(), RestoreError> {
    loop {
        let mut batch = Batch::new();
        let room = batch.room(8);
        let flags = IPC_NOWAIT | MSG_NOERROR;
        let received: Vec<_> = (0..100).map(|_| batch.try_call(Sysno::msgrcv, args![id, room, 0, 0, flags])).collect();
        let replies = rebuilder.run(process, &batch)?;
        for received in received {
            match replies.result(received) {
                Ok(_) => {}
                Err(nix::errno::Errno::ENOMSG) => return Ok(()),
                Err(errno) => return Err(rebuilder.io_failed(Kind::Queue, id, "emptying it", errno)),
            }
        }
    }
}
