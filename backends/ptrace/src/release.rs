//! The release: the whole tree goes on at once, and nothing of us stays in it.
//!
//! Every thread of the tree is brought to a ptrace stop inside its agent, and finds its way to the program below its
//! stack. Should we be lost until then, the agents end. One store commits: from there on an agent that loses us hands its
//! thread to the program, and the last takes the region away. Then each thread gets its registers, the agents' mapping is
//! removed, and all are let go.

use std::os::fd::AsFd;
use std::time::Duration;

use ckpt_agent::process::Process;
use ckpt_core::Target;
use ckpt_core::error::RestoreError;
use ckpt_core::procfs::Mapping;

use crate::entrance::{self, Entrance, Search};
use crate::skeleton::{SkeletonTarget, SkeletonTree};
use crate::sys;
use crate::tracee::{self, TraceError, Tracee};

pub fn release(mut tree: SkeletonTree) -> Result<(), RestoreError> {
    let mut stopped = Vec::new();
    for target in tree.each() {
        stopped.push(stop(target)?);
    }
    let mut search = Search::default();
    let mut entrances = Vec::new();
    for (target, tracees) in tree.each().zip(&mut stopped) {
        entrances.push(prepare(target, tracees, &mut search).map_err(|error| failed(target, error))?);
    }
    tree.region.commit();
    tree.released = true;
    let mut first_error = None;
    for ((target, tracees), (entrance, mappings)) in tree.each().zip(&mut stopped).zip(&entrances) {
        if let Err(error) = hand_over(target, tracees, entrance, mappings) {
            // The tree is committed: what is left to do, the agents do themselves when we let go of them.
            first_error.get_or_insert(failed(target, error));
        }
    }
    for (target, tracees) in tree.each().zip(&stopped) {
        if target.stopped {
            let _ = sys::pidfd_send_signal(target.process().pidfd().as_fd(), libc::SIGSTOP);
        }
        for tracee in tracees {
            let _ = sys::detach(tracee.tid, 0);
        }
    }
    first_error.map_or(Ok(()), Err)
}

fn failed(target: &SkeletonTarget, error: TraceError) -> RestoreError {
    RestoreError::Io {
        what: format!("releasing process {}", target.pid()),
        source: match error {
            TraceError::Io(source) => source,
            other => std::io::Error::other(other.to_string()),
        },
    }
}

/// Stops all threads of a process in their agents.
fn stop(target: &SkeletonTarget) -> Result<Vec<Tracee>, RestoreError> {
    let attempt = || -> Result<Vec<Tracee>, TraceError> {
        for &tid in target.threads() {
            sys::seize(tid)?;
            sys::interrupt(tid)?;
        }
        let mut tracees = Vec::new();
        for (&tid, context) in target.threads().iter().zip(&target.contexts) {
            match tracee::wait(tid, Duration::from_secs(10))? {
                sys::Stop::Interrupted | sys::Stop::Group(_) => {}
                _ => return Err(TraceError::Ended(tid)),
            }
            let context = context.as_ref().expect("every thread of a skeleton has a context");
            tracees.push(Tracee::of_skeleton(tid, context));
        }
        Ok(tracees)
    };
    attempt().map_err(|error| failed(target, error))
}

/// Lays out each thread's way to the program without us. Where there is no room below a stack, the frame in the lane is all
/// that it has, and then the region stays should we be lost.
fn prepare(
    target: &mut SkeletonTarget,
    tracees: &mut [Tracee],
    search: &mut Search,
) -> Result<(Entrance, Vec<Mapping>), TraceError> {
    let ours = target.ours();
    let process = target.process();
    let mappings = Mapping::parse_all(&process.proc.read("maps")?).unwrap_or_default();
    let entrance = search.entrance(process, &mappings)?;
    let unmap = (libc::SYS_munmap, [ours.start, ours.end - ours.start]);
    let lefts: Vec<u64> = target.channels.iter().map(|channel| channel.left_address()).collect();
    let mut ways = Vec::with_capacity(tracees.len());
    for (index, tracee) in tracees.iter_mut().enumerate() {
        let way = match tracee.establish(process, &entrance, &mappings) {
            Ok(()) if index == 0 => Some(tracee.undo_with(process, &entrance, &[unmap])?),
            Ok(()) => Some(tracee.undo_with(process, &entrance, &[(libc::SYS_time, [lefts[index], 0])])?),
            Err(TraceError::NoStack(_)) => None,
            Err(error) => return Err(error),
        };
        ways.push(way.map(|frame| (frame, tracee.plain_frame())));
    }
    for (channel, way) in target.channels.iter_mut().zip(ways) {
        if let Some((frame, plain)) = way {
            channel.set_way(frame, plain);
        }
    }
    Ok((entrance, mappings))
}

/// Gives every thread its registers, the main thread last: as long as it is in the agent, it wakes those that are.
fn hand_over(
    target: &mut SkeletonTarget,
    tracees: &mut [Tracee],
    entrance: &Entrance,
    mappings: &[Mapping],
) -> Result<(), TraceError> {
    let (main, others) = tracees.split_first_mut().expect("a process has a thread");
    for (tracee, channel) in others.iter().zip(&mut target.channels[1..]) {
        tracee.set_context()?;
        channel.set_left();
    }
    let socket = target.agent_fd().0 as u64;
    let ours = target.ours();
    let unmap = [ours.start, ours.end - ours.start, 0, 0, 0, 0];
    let process = target.process();
    // On the main thread; where its stack has no room for the way back, on another that has.
    let mut on = inject_leave(process, main, entrance, mappings, unmap, socket);
    for tracee in &mut *others {
        if !matches!(on, Err(TraceError::NoStack(_))) {
            break;
        }
        on = inject_leave(process, tracee, entrance, mappings, unmap, socket).and_then(|()| tracee.put_back(process));
    }
    if !matches!(on, Err(TraceError::NoStack(_))) {
        on?;
    }
    for tracee in others {
        tracee.clear_way(process);
    }
    main.put_back(process)?;
    entrance::remove_stub(process, entrance);
    Ok(())
}

fn inject_leave(
    process: &Process,
    tracee: &mut Tracee,
    entrance: &entrance::Entrance,
    mappings: &[Mapping],
    unmap: [u64; 6],
    socket: u64,
) -> Result<(), TraceError> {
    tracee.establish(process, entrance, mappings)?;
    // Should we be lost in the middle, it does the rest by itself.
    tracee.undo_with(process, entrance, &[(libc::SYS_munmap, [unmap[0], unmap[1]])])?;
    tracee.inject(entrance, libc::SYS_close, [socket, 0, 0, 0, 0, 0])?;
    tracee.undo_nothing();
    tracee.inject(entrance, libc::SYS_munmap, unmap)?;
    Ok(())
}
