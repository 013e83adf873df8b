//! Semaphore sets. What a process has to undo at its end (`semadj`) the kernel shows nowhere, but a `semop` tells: of
//! several operations all are done or none, and an operation that would bring `semadj` out of its range is an error of its
//! own. So the process is had to ask for operations that lower it by a known sum, leave the value as it is, and end in one
//! that cannot be: it fails either way, nothing has happened, and the error tells whether `semadj` is below a bound.

use std::ops::Range;

use super::{Belongs, Collector, IPC_NOWAIT, Kind, Listed, NAME, Rebuilder, Semaphore, SemaphoreSet, Undo, Wanted};
use crate::args;
use crate::batch::{Arg, Batch, CallId, Slot, Sysno};
use crate::error::{DumpError, RestoreError};
use crate::target::{Kcmp, Pid, RemotePtr, Target};
use nix::errno::Errno;

const GETPID: i32 = 11;
const GETALL: i32 = 13;
const GETNCNT: i32 = 14;
const GETZCNT: i32 = 15;
const SETVAL: i32 = 16;
const SEM_UNDO: i32 = 0x1000;
/// `SEMVMX`, and `SEMAEM`.
const MOST: i32 = 32767;
/// Values and adjustments are moved in steps so large that from each value there is room in one direction.
const STEP: i32 = 16000;
/// Semaphores in one batch.
const AT_ONCE: usize = 100;

/// `struct sembuf`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Operation {
    semaphore: u16,
    change: i32,
    flags: i32,
}

fn semop(batch: &mut Batch, id: i32, operations: &[Operation]) -> CallId {
    let bytes: Vec<u8> = operations
        .iter()
        .flat_map(|operation| [operation.semaphore, operation.change as i16 as u16, operation.flags as u16])
        .flat_map(u16::to_ne_bytes)
        .collect();
    let slot = batch.bytes(&bytes);
    batch.try_call(Sysno::semop, args![id, slot, operations.len()])
}

/// Two changes that leave the value alone: by `change` with `flags`, and back without.
fn there_and_back(semaphore: u16, value: u16, change: i32, flags: i32) -> [Operation; 2] {
    let there = Operation { semaphore, change, flags: flags | IPC_NOWAIT };
    let back = Operation { semaphore, change: -change, flags: IPC_NOWAIT };
    // Upwards first where there is room, else downwards.
    if (change > 0) == (i32::from(value) + change.abs() <= MOST) { [there, back] } else { [back, there] }
}

/// Steps that add up to `sum`.
fn steps(sum: i32) -> impl Iterator<Item = i32> {
    let whole = std::iter::repeat_n(STEP * sum.signum(), (sum / STEP).unsigned_abs() as usize);
    whole.chain(Some(sum % STEP).filter(|rest| *rest != 0))
}

/// Asks whether the adjustment of a semaphore is below `bound - 32768`: then it fails with ERANGE, else with EAGAIN.
fn ask(batch: &mut Batch, id: i32, semaphore: u16, value: u16, bound: i32) -> CallId {
    let mut operations: Vec<Operation> =
        steps(bound).flat_map(|step| there_and_back(semaphore, value, step, SEM_UNDO)).collect();
    operations.extend([Operation { semaphore, change: -MOST, flags: IPC_NOWAIT }; 2]);
    semop(batch, id, &operations)
}

/// Whether it is below; `None` where the process may not change the set, and so cannot have done so.
fn is_below(replies: &crate::Replies, asked: CallId) -> Result<Option<bool>, Errno> {
    match replies.result(asked) {
        Err(Errno::ERANGE) => Ok(Some(true)),
        Err(Errno::EAGAIN) => Ok(Some(false)),
        Err(Errno::EACCES) => Ok(None),
        Err(errno) => Err(errno),
        Ok(_) => Err(Errno::EPROTO),
    }
}

/// What a process has to undo in a set.
fn adjustments(target: &mut dyn Target, id: i32, values: &[u16]) -> Result<Vec<Undo>, DumpError> {
    let pid = target.pid();
    let failed = |source| DumpError::Target { resource: NAME, pid, source };
    let unclear = |errno: Errno| DumpError::Io {
        what: format!("{NAME} of process {pid}: what it has to undo in semaphore set {id}"),
        source: errno.into(),
    };
    let numbered: Vec<(u16, u16)> = (0..).zip(values.iter().copied()).collect();
    let mut found = Vec::new();
    for some in numbered.chunks(AT_ONCE) {
        let mut batch = Batch::new();
        // Not below 0, and below 1.
        let asked: Vec<_> = some
            .iter()
            .map(|&(number, value)| [MOST + 1, MOST + 2].map(|bound| ask(&mut batch, id, number, value, bound)))
            .collect();
        let replies = target.run(&batch).map_err(failed)?;
        for (&(number, value), [negative, not_positive]) in some.iter().zip(asked) {
            let (negative, not_positive) = (is_below(&replies, negative), is_below(&replies, not_positive));
            let (Some(negative), Some(not_positive)) = (negative.map_err(unclear)?, not_positive.map_err(unclear)?)
            else {
                return Ok(Vec::new());
            };
            if !negative && not_positive {
                continue;
            }
            // It is below the upper bound, and not below the lower.
            let (mut lower, mut upper) = (0, 2 * MOST + 2);
            while upper - lower > 1 {
                let middle = (lower + upper) / 2;
                let mut batch = Batch::new();
                let asked = ask(&mut batch, id, number, value, middle);
                let replies = target.run(&batch).map_err(failed)?;
                match is_below(&replies, asked).map_err(unclear)? {
                    Some(true) => upper = middle,
                    _ => lower = middle,
                }
            }
            found.push(Undo { process: pid, semaphore: number, adjustment: (lower - MOST - 1) as i16 });
        }
    }
    Ok(found)
}

fn semctl(batch: &mut Batch, id: i32, number: usize, command: i32, argument: impl Into<Arg>) -> CallId {
    batch.try_call(Sysno::semctl, &[id.into(), number.into(), command.into(), argument.into()])
}

/// Who used some semaphores last, and how many wait for each to grow and to be zero.
fn ask_use(batch: &mut Batch, id: i32, numbers: Range<usize>) -> Vec<[CallId; 3]> {
    let commands = [GETPID, GETNCNT, GETZCNT];
    numbers.map(|number| commands.map(|command| semctl(batch, id, number, command, RemotePtr(0)))).collect()
}

/// Values, last processes, and whether anybody waits.
struct Look {
    semaphores: Vec<Semaphore>,
    waited_for: bool,
}

/// `None` where no process of the tree may read the set.
fn look(collector: &mut Collector<'_>, id: i32, count: usize) -> Result<Option<Look>, DumpError> {
    let mut batch = Batch::new();
    let values: Slot = batch.room(2 * count);
    let all = semctl(&mut batch, id, 0, GETALL, values);
    let Some(replies) = collector.run_where_permitted(&batch, |replies| replies.result(all).is_err())? else {
        return Ok(None);
    };
    let values = replies.bytes(values).chunks_exact(2).map(|value| u16::from_ne_bytes([value[0], value[1]]));
    let mut look = Look { semaphores: Vec::with_capacity(count), waited_for: false };
    look.semaphores.extend(values.map(|value| Semaphore { value, last: Pid(0) }));
    for first in (0..count).step_by(AT_ONCE) {
        let mut batch = Batch::new();
        let asked = ask_use(&mut batch, id, first..count.min(first + AT_ONCE));
        let Some(replies) = collector.run_where_permitted(&batch, |replies| replies.result(asked[0][0]).is_err())?
        else {
            return Ok(None);
        };
        for (semaphore, [last, more, zero]) in look.semaphores[first..].iter_mut().zip(asked) {
            semaphore.last = Pid(replies.value(last) as i32);
            look.waited_for |= replies.value(more) != 0 || replies.value(zero) != 0;
        }
    }
    Ok(Some(look))
}

pub(super) fn collect(collector: &mut Collector<'_>, listed: Vec<Listed>) -> Result<Vec<SemaphoreSet>, DumpError> {
    let mut sets = Vec::new();
    for found in listed {
        let permissions = found.permissions;
        let id = permissions.id;
        let Some(look) = look(collector, id, found.field("nsems") as usize)? else {
            if let Belongs::ToTree = collector.tree.belongs(&found, &[]) {
                let why = "a user of the tree has made it since the tree began, and no process of the tree may read it";
                collector.refuse(Kind::Semaphores, id, why, "have its owner allow that (semctl IPC_SET), or remove it");
            }
            continue;
        };
        let values: Vec<u16> = look.semaphores.iter().map(|semaphore| semaphore.value).collect();
        let mut undo = Vec::new();
        if found.field("otime") != 0 {
            for target in &mut *collector.targets {
                undo.extend(adjustments(&mut **target, id, &values)?);
            }
        }
        let mut users: Vec<Pid> = look.semaphores.iter().map(|semaphore| semaphore.last).collect();
        users.extend(undo.iter().map(|undo| undo.process));
        match collector.tree.belongs(&found, &users) {
            Belongs::Elsewhere => continue,
            Belongs::ToBoth(stranger) => {
                collector.refuse_shared(Kind::Semaphores, id, stranger);
                continue;
            }
            Belongs::ToTree if look.waited_for => {
                let why = "a process that is not part of the tree waits for it";
                collector.refuse(Kind::Semaphores, id, why, "end that process, or dump a tree that has both");
                continue;
            }
            Belongs::ToTree => {}
        }
        refuse_shared_undo(collector, id, &undo);
        sets.push(SemaphoreSet { permissions, semaphores: look.semaphores, operated: found.field("otime") != 0, undo });
    }
    Ok(sets)
}

/// Processes that were cloned with `CLONE_SYSVSEM` share what is undone when the last of them ends.
fn refuse_shared_undo(collector: &mut Collector<'_>, id: i32, undo: &[Undo]) {
    let mut processes: Vec<Pid> = undo.iter().map(|undo| undo.process).collect();
    processes.dedup();
    for (index, &process) in processes.iter().enumerate() {
        let Some(target) = collector.targets.iter().find(|target| target.pid() == process) else { continue };
        let sharer = processes[index + 1..].iter().find(|&&other| {
            // A backend that cannot compare them cannot tell.
            target.compare(Kcmp::Sysvsem, 0, other, 0).is_ok_and(std::cmp::Ordering::is_eq)
        });
        if let Some(sharer) = sharer {
            let why = format!("processes {process} and {sharer} share what is undone at their end");
            collector.refuse(Kind::Semaphores, id, why, "have the program use fork, not clone(CLONE_SYSVSEM)");
        }
    }
}

pub(super) fn rebuild(rebuilder: &mut Rebuilder<'_>, wanted: &Wanted, set: &SemaphoreSet) -> Result<(), RestoreError> {
    let (id, key) = (set.permissions.id, set.permissions.key);
    let count = set.semaphores.len();
    let maker =
        set.semaphores.iter().map(|semaphore| semaphore.last).find(|last| rebuilder.image.process(*last).is_some());
    let maker = maker.map_or(0, |maker| rebuilder.process(maker));
    let was_there =
        rebuilder.make(wanted, maker, |batch, flags| batch.try_call(Sysno::semget, args![key, count, flags]))?;
    if was_there {
        refuse_used(rebuilder, id, count)?;
    }
    rebuilder.set_owner(Kind::Semaphores, &set.permissions, 0)?;
    // To set a value clears what others have to undo, so all values come first.
    let by_process = |rebuilder: &Rebuilder<'_>| {
        let mut numbers: Vec<Vec<usize>> = vec![Vec::new(); rebuilder.targets.len()];
        for (number, semaphore) in set.semaphores.iter().enumerate() {
            if was_there || semaphore.value != 0 || rebuilder.image.process(semaphore.last).is_some() {
                numbers[rebuilder.process(semaphore.last)].push(number);
            }
        }
        numbers
    };
    for (process, numbers) in by_process(rebuilder).into_iter().enumerate() {
        for numbers in numbers.chunks(AT_ONCE) {
            run_all(rebuilder, process, id, "setting a value", |batch| {
                let set = |&number: &usize| semctl(batch, id, number, SETVAL, i32::from(set.semaphores[number].value));
                numbers.iter().map(set).collect()
            })?;
        }
    }
    if !set.operated {
        return Ok(());
    }
    let value = |semaphore: u16| set.semaphores.get(usize::from(semaphore)).map_or(0, |semaphore| semaphore.value);
    for undo in &set.undo {
        let process = rebuilder.process(undo.process);
        run_all(rebuilder, process, id, "what is undone when the process ends", |batch| {
            // An operation is undone by its opposite.
            let steps = steps(-i32::from(undo.adjustment));
            let operate =
                |step| semop(batch, id, &there_and_back(undo.semaphore, value(undo.semaphore), step, SEM_UNDO));
            steps.map(operate).collect()
        })?;
    }
    // And who was the last, which also says that there was a semop.
    let mut operated = false;
    for (process, numbers) in by_process(rebuilder).into_iter().enumerate() {
        for numbers in numbers.chunks(AT_ONCE) {
            operated = true;
            operate_as_last(rebuilder, process, id, numbers, &value)?;
        }
    }
    if !operated && count != 0 {
        operate_as_last(rebuilder, maker, id, &[0], &value)?;
    }
    Ok(())
}

fn operate_as_last(
    rebuilder: &mut Rebuilder<'_>,
    process: usize,
    id: i32,
    numbers: &[usize],
    value: &impl Fn(u16) -> u16,
) -> Result<(), RestoreError> {
    run_all(rebuilder, process, id, "being the last to use it", |batch| {
        let operate = |&number: &usize| {
            let number = number as u16;
            semop(batch, id, &there_and_back(number, value(number), 1, 0))
        };
        numbers.iter().map(operate).collect()
    })
}

/// Runs calls in a process, all of which must succeed.
fn run_all(
    rebuilder: &mut Rebuilder<'_>,
    process: usize,
    id: i32,
    what: &str,
    add: impl FnOnce(&mut Batch) -> Vec<CallId>,
) -> Result<(), RestoreError> {
    let mut batch = Batch::new();
    let calls = add(&mut batch);
    let replies = rebuilder.run(process, &batch)?;
    for call in calls {
        replies.result(call).map_err(|errno| rebuilder.io_failed(Kind::Semaphores, id, what, errno))?;
    }
    Ok(())
}

/// A set that is still there must not be in use by others.
fn refuse_used(rebuilder: &mut Rebuilder<'_>, id: i32, count: usize) -> Result<(), RestoreError> {
    for first in (0..count).step_by(AT_ONCE) {
        let mut batch = Batch::new();
        let asked = ask_use(&mut batch, id, first..count.min(first + AT_ONCE));
        let replies = rebuilder.run(0, &batch)?;
        for [last, more, zero] in asked {
            let last = Pid(replies.result(last).unwrap_or(0) as i32);
            let in_tree = rebuilder.image.process(last).is_some();
            let waited_for = [more, zero].iter().any(|&call| replies.result(call).unwrap_or(0) != 0);
            if waited_for || (last.0 != 0 && !in_tree && super::is_alive(last)) {
                let what = "it is still there, and another process uses it; end that, or restore in an ipc namespace of \
                            its own (unshare --ipc)";
                return Err(rebuilder.mismatch(Kind::Semaphores, id, what));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_step_leaves_the_range_of_values() {
        for value in [0, 1, 16000, 16384, 16768, 32766, 32767] {
            for change in [1, -1, 16000, -16000] {
                let [first, second] = there_and_back(3, value, change, SEM_UNDO);
                assert_eq!(first.change + second.change, 0);
                assert!((0..=MOST).contains(&(i32::from(value) + first.change)), "{value} {change}");
                let with_undo = if first.flags & SEM_UNDO != 0 { first } else { second };
                assert_eq!(with_undo.change, change);
            }
        }
    }

    #[test]
    fn steps_add_up() {
        for sum in [0, 1, -1, 15999, 16000, 16001, -32768, 32767, 65536] {
            assert_eq!(steps(sum).sum::<i32>(), sum);
            assert!(steps(sum).all(|step| step != 0 && step.abs() <= STEP));
        }
    }
}
