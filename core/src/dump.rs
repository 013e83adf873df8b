//! The dump pipeline: task tree, freeze, resources, image, thaw or kill.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::{DumpOptions, Dumper, Frozen};
use crate::consent;
use crate::error::{DumpError, Refusal};
use crate::host;
use crate::image::{Image, Process, Thread};
use crate::progress::{Meter, Phase, Progress};
use crate::resource::memory::snapshot::{self, Snapshot};
use crate::resource::questions::Questions;
use crate::resource::{
    Collect, attributes, cgroups, credentials, descriptors, filesystem, limits, locks, memory, scheduling, signals,
    sysvipc, tasks, terminals, timers,
};
use crate::store::ImageWriter;
use crate::target::{Pid, Target};

/// What becomes of the tree after the dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    Kill,
    LeaveRunning,
    LeaveStopped,
}

/// Set by a signal handler to end a pipeline at the next step, with everything undone.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What was dumped, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub processes: usize,
    pub threads: usize,
    /// Bytes of page data in the image.
    pub page_bytes: u64,
}

/// Saves the tree under `root` with `dumper` into an image that `store` makes once the tree is frozen.
///
/// # Errors
/// In every case the tree goes on as if nothing had happened, and no image is left behind.
pub fn dump(
    dumper: &dyn Dumper,
    root: Pid,
    options: &DumpOptions,
    after: After,
    mut store: Box<dyn ImageWriter>,
    progress: &mut dyn Progress,
) -> Result<Summary, DumpError> {
    let snapshot = if after == After::LeaveRunning { Snapshot::asked() } else { Snapshot::No };
    progress.phase(Phase::Freeze);
    let (consents, mut frozen) = consent::freeze(dumper, root, options)?;
    progress.phase(Phase::Collect);
    let (mut image, objects) = collect(&mut *frozen, options, &mut *store)?;
    let snapshot = snapshot.of(frozen.targets(), &image);
    let later = write_content(frozen.targets(), &mut image, objects, &snapshot, &mut *store, progress)?;
    let summary = Summary {
        processes: image.processes.len() + image.zombies.len(),
        threads: image.processes.iter().map(|process| process.threads.len()).sum(),
        page_bytes: memory::page_bytes(&image),
    };
    interruption()?;
    // A tree that goes on need not wait for the medium. One that does not is there until the image is.
    let frozen = match after {
        After::Kill | After::LeaveStopped => Some(frozen),
        After::LeaveRunning => {
            progress.phase(Phase::LetGo);
            snapshot::write_later(frozen, &image, later, &mut *store, progress)?;
            interruption()?;
            None
        }
    };
    progress.phase(Phase::Publish);
    store.publish(&image)?;
    if let Some(frozen) = frozen {
        progress.phase(Phase::LetGo);
        if after == After::LeaveStopped { frozen.stop()? } else { frozen.kill()? }
    }
    consents.saved();
    Ok(summary)
}

/// What could not be saved of the tree under `root`: a dump without an image. The tree goes on.
pub fn examine(dumper: &dyn Dumper, root: Pid, options: &DumpOptions) -> Result<Vec<Refusal>, DumpError> {
    let mut frozen = dumper.freeze(root, options)?;
    let result = collect(&mut *frozen, options, &mut crate::store::Nowhere::new()?);
    frozen.thaw()?;
    match result {
        Ok(_) => Ok(Vec::new()),
        Err(DumpError::Unsupported(refusals)) => Ok(refusals),
        Err(error) => Err(error),
    }
}

pub(crate) fn interruption() -> Result<(), DumpError> {
    if INTERRUPTED.load(Ordering::Relaxed) { Err(DumpError::Interrupted) } else { Ok(()) }
}

/// Collects every resource; what is large stays where it is.
fn collect(
    frozen: &mut dyn Frozen,
    options: &DumpOptions,
    store: &mut dyn ImageWriter,
) -> Result<(Image, memory::Objects), DumpError> {
    let host = host::facts().map_err(|source| DumpError::Io { what: "facts of this host".into(), source })?;
    let tasks = frozen.processes().to_vec();
    let zombies = frozen.zombies().to_vec();
    let names = frozen.virtual_ids()?;
    let mut refusals = Vec::new();
    let targets = frozen.targets();
    // All processes find their answers at the same time, and while we look at what needs none of them.
    let questions: Vec<Questions> =
        targets.iter_mut().map(|target| Questions::start(&mut **target)).collect::<Result<_, _>>()?;
    tasks::examine(targets, &tasks, &zombies, options, &mut refusals)?;
    let answers = targets.iter_mut().zip(questions).map(|(target, questions)| questions.finish(&mut **target));
    let answers: Vec<_> = answers.collect::<Result<_, _>>()?;
    let mut looks = memory::Looks::at(targets)?;
    let mut objects = memory::Objects::default();
    let descriptors::Collected { census, tables, files, losses } =
        descriptors::collect(targets, &zombies, &mut objects, store, options, &mut refusals)?;
    let threads: Vec<_> = answers.iter().map(|(_, answers)| answers.as_slice()).collect();
    terminals::examine(targets, &threads, &files, &mut refusals);
    let mut tables = tables.into_iter();
    let locks = locks::collect(targets, &census, &mut refusals)?;
    let mut processes = Vec::with_capacity(targets.len());
    for ((target, task), (asked, answers)) in targets.iter_mut().zip(tasks).zip(&answers) {
        interruption()?;
        let mut context = Collect {
            target: &mut **target,
            thread: 0,
            options,
            refusals: &mut refusals,
            asked,
            answers,
            has_timers: false,
            resource: tasks::NAME,
        };
        // Before the signals: a timer that fires now is found pending.
        let timers = context.collect::<timers::ProcessTimers>()?;
        context.has_timers = !timers.posix.is_empty();
        processes.push(Process {
            task: task.task,
            stopped: task.stopped,
            descriptors: tables.next().expect("a table for each process"),
            filesystem: context.collect::<filesystem::ProcessFilesystem>()?,
            timers,
            limits: context.collect::<limits::ResourceLimits>()?,
            attributes: context.collect::<attributes::Attributes>()?,
            cgroups: cgroups::collect(&mut context.section(cgroups::NAME))?,
            threads: collect_threads(&mut context)?,
            signals: context.collect::<signals::ProcessSignals>()?,
            memory: memory::collect(&mut context.section(memory::NAME), &mut looks, &mut objects)?,
        });
    }
    let mut image = Image {
        host,
        processes,
        zombies,
        files,
        memory_objects: Vec::new(),
        deleted_files: Vec::new(),
        locks,
        sysvipc: sysvipc::SystemV::default(),
        shell_job: options.shell_job,
        virtual_ids: names.is_some(),
        losses,
    };
    // Whose they are is seen by the mappings and credentials.
    image.sysvipc = sysvipc::collect(targets, &image, &mut objects, &mut refusals)?;
    if !refusals.is_empty() {
        return Err(DumpError::Unsupported(refusals));
    }
    if let Some(names) = names {
        image.rename(&names);
    }
    host::note_xsave(&mut image);
    Ok((image, objects))
}

/// Everything can be saved: now what takes the time, but for what can wait until the tree goes on.
fn write_content(
    targets: &mut [Box<dyn Target>],
    image: &mut Image,
    mut objects: memory::Objects,
    snapshot: &Snapshot,
    store: &mut dyn ImageWriter,
    progress: &mut dyn Progress,
) -> Result<memory::Later, DumpError> {
    let mut meter = Meter::new(progress, Phase::WritePages, None);
    let may_wait = |pages| snapshot.may_wait(pages);
    let later = memory::write_pages(targets, &mut image.processes, &may_wait, store, &mut meter)?;
    image.memory_objects = objects.write(store, &mut meter)?;
    image.deleted_files = objects.deleted.write(store)?;
    Ok(later)
}

fn collect_threads(context: &mut Collect<'_>) -> Result<Vec<Thread>, DumpError> {
    let tids = context.target.threads().to_vec();
    let mut threads = Vec::with_capacity(tids.len());
    for (index, tid) in tids.into_iter().enumerate() {
        context.thread = index;
        let saved =
            context.target.context(index).map_err(|source| context.section("registers").target_error(source))?;
        threads.push(Thread {
            tid,
            context: saved,
            signals: context.collect::<signals::ThreadSignals>()?,
            credentials: context.collect::<credentials::ThreadCredentials>()?,
            scheduling: context.collect::<scheduling::ThreadScheduling>()?,
            attributes: context.collect::<attributes::ThreadAttributes>()?,
        });
    }
    context.thread = 0;
    Ok(threads)
}
