//! The restore pipeline: image, plan, skeleton, resources, memory, release.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use crate::backend::{RestoreOptions, Restorer, Skeleton};
use crate::crew;
use crate::dump::INTERRUPTED;
use crate::error::{DumpError, RestoreError, StoreError};
use crate::image::{Image, Process};
use crate::plan::Plan;
use crate::progress::{Meter, Phase, Progress};
use crate::resource::{
    Deferred, Rebuild, attributes, cgroups, credentials, descriptors, files, filesystem, limits, locks, memory,
    scheduling, signals, sysvipc, threads, timers,
};
use crate::store::{BlobId, ImageReader, PageExtent};
use crate::target::Pid;

/// Brings back the tree of an image. Returns the pid of its root as the kernel has it, which runs.
///
/// # Errors
/// In every case nothing of the tree runs or is left behind.
pub fn restore(
    restorer: &dyn Restorer,
    reader: &dyn ImageReader,
    options: &RestoreOptions,
    progress: &mut dyn Progress,
) -> Result<Pid, RestoreError> {
    prepare(restorer, reader, options, progress)?.release()
}

/// A tree that is whole again and does not run yet. Dropping it ends it.
pub struct Prepared {
    skeleton: Box<dyn Skeleton>,
    root: Pid,
}

impl Prepared {
    /// The root of the tree.
    pub fn root(&self) -> Pid {
        self.root
    }

    /// Lets the tree go on. Returns the pid of its root.
    pub fn release(self) -> Result<Pid, RestoreError> {
        interruption()?;
        self.skeleton.release()?;
        Ok(self.root)
    }
}

/// The first part of [`restore`]: everything but the release.
///
/// # Errors
/// In every case nothing of the tree is left behind.
pub fn prepare(
    restorer: &dyn Restorer,
    reader: &dyn ImageReader,
    options: &RestoreOptions,
    progress: &mut dyn Progress,
) -> Result<Prepared, RestoreError> {
    let image = reader.image();
    crew::processors();
    progress.phase(Phase::Plan);
    let plan = Plan::new(restorer, image, options)?;
    interruption()?;
    progress.phase(Phase::Skeleton);
    let mut skeleton = plan.skeleton()?;
    progress.phase(Phase::Rebuild);
    let mut made = sysvipc::Made::default();
    let names = skeleton.real_ids();
    let renamed = names.map(|names| {
        let mut image = image.clone();
        image.rename(&names);
        Renamed { reader, image }
    });
    let reader = renamed.as_ref().map_or(reader, |renamed| renamed as &dyn ImageReader);
    if let Err(error) = rebuild(&mut *skeleton, restorer, reader, options, progress, &mut made) {
        made.remove(skeleton.targets());
        return Err(error);
    }
    Ok(Prepared { skeleton, root: reader.image().processes[0].task.pid })
}

/// An image in other ids.
struct Renamed<'a> {
    reader: &'a dyn ImageReader,
    image: Image,
}

impl ImageReader for Renamed<'_> {
    fn image(&self) -> &Image {
        &self.image
    }

    fn pages(&self) -> BorrowedFd<'_> {
        self.reader.pages()
    }

    fn page_checksums(&self, extent: PageExtent) -> Result<Vec<u32>, StoreError> {
        self.reader.page_checksums(extent)
    }

    fn checksum_table(&self) -> (BorrowedFd<'_>, u64) {
        self.reader.checksum_table()
    }

    fn damaged_page(&self, page: u64) -> StoreError {
        self.reader.damaged_page(page)
    }

    fn copy_blob(&self, blob: BlobId, into: BorrowedFd<'_>) -> Result<(), StoreError> {
        self.reader.copy_blob(blob, into)
    }

    fn find_page(&self, process: usize, address: u64) -> Option<u64> {
        self.reader.find_page(process, address)
    }
}

pub(crate) fn interruption() -> Result<(), RestoreError> {
    if INTERRUPTED.load(Ordering::Relaxed) { Err(RestoreError::Interrupted) } else { Ok(()) }
}

/// Rebuilds every resource, and brings in the pages.
fn rebuild(
    skeleton: &mut dyn Skeleton,
    restorer: &dyn Restorer,
    reader: &dyn ImageReader,
    options: &RestoreOptions,
    progress: &mut dyn Progress,
    made: &mut sysvipc::Made,
) -> Result<(), RestoreError> {
    let image = reader.image();
    let targets = skeleton.targets();
    // While there is nothing in them to be charged to anyone.
    cgroups::rebuild(targets, image, options.ignore_cgroups)?;
    let deleted = files::rebuild_deleted(reader)?;
    sysvipc::rebuild(targets, image, made)?;
    let mut filler = restorer.filler();
    let objects = memory::rebuild_objects(targets, reader, deleted, &mut *filler)?;
    interruption()?;
    // While all processes are still on our own processor: descriptors go from one to the other.
    descriptors::rebuild(targets, reader, &objects, options)?;
    locks::rebuild(targets, image)?;
    interruption()?;
    memory::map_all(targets, reader, &objects)?;
    sysvipc::finish(targets, image)?;
    files::guard_deleted(image, &objects.deleted)?;
    let executables = memory::deleted_executables(image, &objects)?;
    drop(objects);
    let mut meter = Meter::new(progress, Phase::ReadPages, Some(memory::page_bytes(image)));
    filler.fill_all(targets, &image.processes, reader, &mut meter)?;
    // Only now that the slow part is done: timers run from here on.
    crew::each(targets, &image.processes, |index, target, process| {
        interruption()?;
        memory::finish(target, &process.memory, &executables)?;
        let initial = threads::ask_main(target).map_err(asked)?;
        let mut context = Rebuild {
            target,
            thread: 0,
            options,
            initial: &initial,
            deferred: &mut Deferred::default(),
            resource: crate::resource::tasks::NAME,
        };
        rebuild_process(&mut context, process, index == 0)
    })
}

/// A skeleton that could not be asked what it begins with.
fn asked(error: DumpError) -> RestoreError {
    match error {
        DumpError::Target { resource, pid, source } => RestoreError::Target { resource, pid, source },
        DumpError::Io { what, source } => RestoreError::Io { what, source },
        other => RestoreError::Io { what: "asking a skeleton".into(), source: std::io::Error::other(other) },
    }
}

/// The settings of one process. Order matters: what needs privilege comes before the credentials, and signals are
/// queued when their actions are set and those that came by building have been taken.
fn rebuild_process(context: &mut Rebuild<'_>, process: &Process, is_root: bool) -> Result<(), RestoreError> {
    context.rebuild::<filesystem::ProcessFilesystem>(&process.filesystem)?;
    context.rebuild::<signals::ProcessSignals>(&process.signals)?;
    context.rebuild::<attributes::Attributes>(&process.attributes)?;
    for (index, thread) in process.threads.iter().enumerate() {
        context.thread = index;
        context.rebuild::<scheduling::ThreadScheduling>(&thread.scheduling)?;
        context.rebuild::<signals::ThreadSignals>(&thread.signals)?;
        context.rebuild::<attributes::ThreadAttributes>(&thread.attributes)?;
        context.flush()?;
    }
    context.thread = 0;
    signals::discard_all(context)?;
    context.rebuild::<timers::ProcessTimers>(&process.timers)?;
    signals::rebuild_pending(process, context)?;
    context.rebuild::<limits::ResourceLimits>(&process.limits)?;
    for (index, thread) in process.threads.iter().enumerate() {
        context.thread = index;
        context.rebuild::<credentials::ThreadCredentials>(&thread.credentials)?;
        attributes::after_credentials(&thread.attributes, is_root, context)?;
    }
    context.thread = 0;
    attributes::finish(&process.attributes, context)?;
    timers::start(&process.timers, context)?;
    for (index, thread) in process.threads.iter().enumerate() {
        let set = context.target.set_context(index, &thread.context);
        set.map_err(|source| RestoreError::Target { resource: "registers", pid: process.task.pid, source })?;
    }
    Ok(())
}
