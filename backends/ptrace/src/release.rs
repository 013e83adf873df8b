//! The release: the whole tree goes on at once, and nothing of us stays in it.
//!
//! Every thread of the tree is brought to a ptrace stop inside its agent, and finds its way to the program below its
//! stack. Should we be lost until then, the agents end. One store commits: from there on an agent that loses us hands its
//! thread to the program, and the last takes the region away. Then each thread gets its registers, the agents' mapping is
//! removed, and all are let go.

use std::os::fd::AsFd;
use std::time::Duration;

use ckpt_core::Target;
use ckpt_core::error::RestoreError;
use ckpt_core::procfs::Mapping;

use crate::entrance::{self, Entrance, Search};
use crate::skeleton::{SkeletonTarget, SkeletonTree};
use crate::sys;
use crate::tracee::{self, Injection, TraceError, Tracee};

pub fn release(mut tree: SkeletonTree) -> Result<(), RestoreError> {
    let timed =
        tree.each().any(|target| target.contexts.iter().flatten().any(|context| context.timeout_left.is_some()));
    if !timed {
        return let_all_go(tree);
    }
    // A thread that sleeps with what was left of its timeout is let go of when the thread of ours that traces it ends.
    let releasing = std::thread::Builder::new().spawn(|| let_all_go(tree));
    let releasing = releasing
        .map_err(|source| RestoreError::Io { what: "a thread of ckpt that lets the tree go".into(), source })?;
    match releasing.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn let_all_go(mut tree: SkeletonTree) -> Result<(), RestoreError> {
    for target in tree.each() {
        for &tid in target.threads() {
            let stopped = sys::seize(tid).and_then(|()| sys::interrupt(tid));
            stopped.map_err(|error| failed(target, error.into()))?;
        }
    }
    let mut search = Search::default();
    let mut leaving = Vec::new();
    for target in tree.each() {
        let mut tracees = stopped(target).map_err(|error| failed(target, error))?;
        let way = prepare(target, &mut tracees, &mut search).map_err(|error| failed(target, error))?;
        leaving.push(Leaving { tracees, way, failure: None });
    }
    tree.region.commit();
    tree.released = true;
    // All processes take each step together, as each takes a wake-up of the process.
    let steps = [
        Leaving::hand_over_others,
        Leaving::begin_close,
        Leaving::continue_call,
        Leaving::begin_unmap,
        Leaving::continue_call,
        Leaving::begin_last_stop,
        Leaving::hand_over_main,
    ];
    for step in steps {
        for (target, leaving) in tree.each().zip(&mut leaving) {
            // The tree is committed: where a step fails, the agents do the rest themselves when we let go of them.
            if leaving.failure.is_none() {
                leaving.failure = step(leaving, target).err();
            }
        }
    }
    let mut first_error = None;
    for (target, leaving) in tree.each().zip(leaving) {
        if target.stopped {
            let _ = sys::pidfd_send_signal(target.process().pidfd().as_fd(), libc::SIGSTOP);
        }
        for tracee in &leaving.tracees {
            if target.stopped {
                let _ = sys::detach(tracee.tid, 0);
            } else {
                tracee.let_go(target.process());
            }
        }
        if let Some(error) = leaving.failure {
            first_error.get_or_insert(failed(target, error));
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

/// They stop within microseconds, unless they have no processor.
const STOPPED_WITHIN: Duration = Duration::from_secs(60);

/// Waits until all threads of a process are stopped in their agents.
fn stopped(target: &SkeletonTarget) -> Result<Vec<Tracee>, TraceError> {
    let mut tracees = Vec::new();
    for (&tid, context) in target.threads().iter().zip(&target.contexts) {
        match tracee::wait(tid, STOPPED_WITHIN)? {
            sys::Stop::Interrupted | sys::Stop::Group(_) => {}
            _ => return Err(TraceError::Ended(tid)),
        }
        let context = context.as_ref().expect("every thread of a skeleton has a context");
        tracees.push(Tracee::of_skeleton(tid, context));
    }
    Ok(tracees)
}

/// How a process is entered and left again.
struct Way {
    entrance: Entrance,
    /// The call that takes the region away.
    unmap: [u64; 6],
    /// The thread that makes the last calls: the main thread, or another where that has no room below its stack. Where none
    /// has, the region stays.
    by: Option<usize>,
    call: Option<Injection>,
}

/// A process on its way out of our hands.
struct Leaving {
    tracees: Vec<Tracee>,
    way: Way,
    failure: Option<TraceError>,
}

/// Lays out each thread's way to the program without us. Where there is no room below a stack, the frame in the lane is all
/// that it has, and then the region stays should we be lost.
fn prepare(target: &mut SkeletonTarget, tracees: &mut [Tracee], search: &mut Search) -> Result<Way, TraceError> {
    let ours = target.ours();
    let process = target.process();
    let mappings = Mapping::parse_all(&process.proc.read("maps")?).unwrap_or_default();
    let entrance = search.entrance(process, &mappings)?;
    let unmap = (libc::SYS_munmap, [ours.start, ours.end - ours.start]);
    let lefts: Vec<u64> = target.channels.iter().map(|channel| channel.left_address()).collect();
    let mut ways = Vec::with_capacity(tracees.len());
    for (index, tracee) in tracees.iter_mut().enumerate() {
        // What the kernel does not take of an image, it refuses now, while all of it can still be undone.
        tracee.try_vector_state()?;
        let way = match tracee.establish(process, &entrance, &mappings) {
            Ok(()) if index == 0 => Some(tracee.undo_with(process, &entrance, &[unmap])?),
            Ok(()) => Some(tracee.undo_with(process, &entrance, &[(libc::SYS_time, [lefts[index], 0])])?),
            Err(TraceError::NoStack(_)) => None,
            Err(error) => return Err(error),
        };
        ways.push(way.map(|frame| (frame, tracee.plain_frame())));
    }
    let by = ways.iter().position(Option::is_some);
    for (channel, way) in target.channels.iter_mut().zip(ways) {
        if let Some((frame, plain)) = way {
            channel.set_way(frame, plain);
        }
    }
    Ok(Way { entrance, unmap: [unmap.1[0], unmap.1[1], 0, 0, 0, 0], by, call: None })
}

impl Leaving {
    /// Gives every thread but the main thread its registers. As long as that is in the agent, it wakes those that are.
    fn hand_over_others(&mut self, target: &mut SkeletonTarget) -> Result<(), TraceError> {
        for (index, (tracee, channel)) in self.tracees.iter_mut().zip(&mut target.channels).enumerate().skip(1) {
            if tracee.has_way() {
                tracee.leave_lane(&self.way.entrance, channel)?;
            }
            tracee.set_context()?;
            if self.way.by != Some(index) {
                tracee.clear_way(target.process.as_ref().expect("it was made"));
            }
        }
        Ok(())
    }

    fn begin_close(&mut self, target: &mut SkeletonTarget) -> Result<(), TraceError> {
        let Some(by) = self.way.by else { return Ok(()) };
        let tracee = &mut self.tracees[by];
        // Should we be lost in the middle, it does the rest by itself.
        let unmap = (libc::SYS_munmap, [self.way.unmap[0], self.way.unmap[1]]);
        tracee.undo_with(target.process(), &self.way.entrance, &[unmap])?;
        let socket = target.agent_fd().0 as u64;
        self.way.call = Some(tracee.begin_call(&self.way.entrance, libc::SYS_close, [socket, 0, 0, 0, 0, 0])?);
        Ok(())
    }

    fn continue_call(&mut self, _target: &mut SkeletonTarget) -> Result<(), TraceError> {
        if let (Some(by), Some(call)) = (self.way.by, self.way.call) {
            self.way.call = Some(self.tracees[by].continue_call(call)?);
        }
        Ok(())
    }

    fn end_call(&mut self) -> Result<(), TraceError> {
        if let (Some(by), Some(call)) = (self.way.by, self.way.call.take()) {
            self.tracees[by].end_call(call)?;
        }
        Ok(())
    }

    fn begin_unmap(&mut self, _target: &mut SkeletonTarget) -> Result<(), TraceError> {
        self.end_call()?;
        let Some(by) = self.way.by else { return Ok(()) };
        let tracee = &mut self.tracees[by];
        tracee.undo_nothing();
        self.way.call = Some(tracee.begin_call(&self.way.entrance, libc::SYS_munmap, self.way.unmap)?);
        Ok(())
    }

    fn begin_last_stop(&mut self, _target: &mut SkeletonTarget) -> Result<(), TraceError> {
        self.end_call()?;
        for index in self.last() {
            self.tracees[index].begin_put_back()?;
        }
        Ok(())
    }

    fn hand_over_main(&mut self, target: &mut SkeletonTarget) -> Result<(), TraceError> {
        for index in self.last() {
            self.tracees[index].end_put_back(target.process())?;
        }
        entrance::remove_stub(target.process(), &self.way.entrance);
        Ok(())
    }

    /// The threads that are put back last: the main thread, and the one that made the last calls.
    fn last(&self) -> impl Iterator<Item = usize> + use<> {
        let by = self.way.by.filter(|&by| by != 0);
        by.into_iter().chain([0])
    }
}
