//! What a process is asked for all kinds at once, in one batch: every wake-up of a process costs more than what it then
//! does. A kind whose calls need no answer of another joins here; its own file has the calls, and reads the answers.

use crate::args;
use crate::batch::{Batch, CallId, Replies, Sysno};
use crate::error::DumpError;
use crate::resource::{attributes, limits, signals, threads, timers};
use crate::target::Target;

/// The questions, before they are asked.
pub struct Questions {
    batch: Batch,
    threads: threads::Asked,
    limits: limits::Asked,
    attributes: attributes::Asked,
    timers: timers::Asked,
    actions: signals::Asked,
    brk: CallId,
}

/// The questions with what came back. Each kind knows its own.
pub struct Asked {
    pub replies: Replies,
    pub limits: limits::Asked,
    pub attributes: attributes::Asked,
    pub timers: timers::Asked,
    pub actions: signals::Asked,
    /// Of the memory.
    pub brk: CallId,
}

impl Questions {
    /// Has a process begin with its answers.
    pub fn start(target: &mut dyn Target) -> Result<Questions, DumpError> {
        let mut batch = Batch::new();
        let threads = threads::Asked::ask(target, &mut batch);
        let questions = Questions {
            threads,
            limits: limits::ask(&mut batch),
            attributes: attributes::ask(&mut batch),
            timers: timers::ask(&mut batch),
            actions: signals::ask(&mut batch),
            brk: batch.call(Sysno::brk, args![0]),
            batch,
        };
        target.start(0, &questions.batch).map_err(threads::failed(target.pid()))?;
        Ok(questions)
    }

    /// The answers, and those of each thread.
    pub fn finish(self, target: &mut dyn Target) -> Result<(Asked, Vec<threads::Answers>), DumpError> {
        let Questions { batch, threads, limits, attributes, timers, actions, brk } = self;
        let replies = target.finish(0, &batch).map_err(threads::failed(target.pid()))?;
        let answers = threads.answers(target, &replies)?;
        Ok((Asked { replies, limits, attributes, timers, actions, brk }, answers))
    }
}
