//! Rebuilding: files made once each, tables filled, and the calls that wait for it run together.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::{Descriptor, F_SETOWN_EX, F_SETSIG, FileId, NAME, OpenFile, finish_kind, rebuild_kind};
use crate::args;
use crate::backend::RestoreOptions;
use crate::batch::{Arg, Batch, CallId, Replies, Sysno};
use crate::error::RestoreError;
use crate::image::Image;
use crate::resource::{memory, terminals};
use crate::store::ImageReader;
use crate::target::{RemoteFd, Target, TargetError};

/// Numbers above the program's that a skeleton may need at one time.
pub(super) const SPARE_NUMBERS: u64 = 512;

/// The first process that has a file.
pub fn holder(image: &Image, file: FileId) -> Option<usize> {
    image.processes.iter().position(|process| process.descriptors.descriptors.iter().any(|held| held.file == file))
}

/// Where the files of a skeleton are so far, and what its processes have yet to be asked to do.
#[derive(Default)]
pub struct Placed {
    /// By file: the processes that have it, with a number it has there.
    places: Vec<Vec<(usize, RemoteFd)>>,
    /// By file: its numbers in the tables of the image, sorted by process.
    numbers: Vec<Vec<(usize, Descriptor)>>,
    /// By process: calls that wait, so that one round trip makes many files.
    pending: Vec<Pending>,
    /// Other ends of files, which no table has, in spare numbers until the files are finished.
    kept: HashMap<FileId, (usize, RemoteFd)>,
    /// Masters of pseudoterminals that control a session already, by their numbers.
    masters: HashMap<u32, OwnedFd>,
}

/// Looks at the results of calls that were put off: what is wrong with them.
type Verify = Box<dyn FnOnce(&Replies) -> Result<(), String>>;

#[derive(Default)]
struct Pending {
    batch: Batch,
    /// (first call, file, how to judge the results), in order.
    parts: Vec<(usize, FileId, Option<Verify>)>,
    /// Files that were made by us, to be handed over.
    given: Vec<(FileId, OwnedFd)>,
}

/// One open file description of a skeleton, to rebuild.
///
/// Files are made in spare numbers, above all of the program's, and take their own by [`stage`](RebuildFile::stage) or
/// [`create`](RebuildFile::create). Both only put their calls in line: [`run`](RebuildFile::run) has the calls that
/// wait for the same process done first.
pub struct RebuildFile<'a> {
    pub targets: &'a mut [Box<dyn Target>],
    pub image: &'a Image,
    pub reader: &'a dyn ImageReader,
    pub options: &'a RestoreOptions,
    pub id: FileId,
    /// Descriptors of the memory objects that are there already, in our own table.
    pub objects: &'a memory::Rebuilt,
    pub placed: &'a mut Placed,
    pub resource: &'static str,
}

impl RebuildFile<'_> {
    /// The process to create this file in: the first that has it.
    pub fn process(&self) -> usize {
        self.process_of(self.id)
    }

    /// The process to create another file in.
    pub fn process_of(&self, file: FileId) -> usize {
        self.placed.numbers[file.0 as usize].first().map_or(0, |&(process, _)| process)
    }

    /// This file, with its flags and owner.
    pub fn file(&self) -> &OpenFile {
        &self.image.files[self.id.0 as usize]
    }

    /// The master of a pseudoterminal that controls its session already.
    pub fn taken(&mut self, number: u32) -> Option<OwnedFd> {
        self.placed.masters.remove(&number)
    }

    /// Runs a batch in a process, after what waits for it.
    pub fn run(&mut self, process: usize, batch: &Batch) -> Result<Replies, RestoreError> {
        self.flush(process)?;
        let resource = self.resource;
        let pid = self.targets[process].pid();
        self.targets[process].run(batch).map_err(|source| RestoreError::Target { resource, pid, source })
    }

    /// Makes this file with calls that can wait: no round trip of its own.
    ///
    /// `calls` adds at most `calls_needed` calls with `bytes_needed` bytes to a batch, and gives the one whose result
    /// is the new descriptor, and how to judge the results. The descriptor then takes its numbers.
    pub fn create<V>(
        &mut self,
        process: usize,
        calls_needed: usize,
        bytes_needed: usize,
        calls: impl FnOnce(&mut Batch) -> (CallId, V),
    ) -> Result<(), RestoreError>
    where
        V: FnOnce(&Replies) -> Result<(), String> + 'static,
    {
        let file = self.id;
        let numbers = self.numbers_in(file, process);
        // Few enough for one batch, and a number is known to find it by: all others take two steps.
        let at_once = !numbers.is_empty() && numbers.len() < 256;
        self.make_room(process, calls_needed + if at_once { numbers.len() + 8 } else { 2 }, bytes_needed + 64)?;
        let spare = self.targets[process].footprint().spare_fds;
        let pending = &mut self.placed.pending[process];
        let first = pending.batch.len();
        let (fd, verify) = calls(&mut pending.batch);
        let lifted = lift_to(spare, &mut pending.batch, fd);
        pending.parts.push((first, file, Some(Box::new(verify))));
        if at_once {
            let open = &self.image.files[file.0 as usize];
            add_settings(open, &mut pending.batch, lifted.into());
            for held in &numbers {
                pending.batch.call(Sysno::dup3, args![lifted, held.fd, cloexec(held)]);
            }
            add_async(open, &mut pending.batch, numbers[0].fd.into());
            pending.batch.call(Sysno::close, args![lifted]);
            self.placed.places[file.0 as usize].push((process, RemoteFd(numbers[0].fd)));
            return Ok(());
        }
        let replies = self.flush_calls(process)?.expect("calls were added");
        self.stage(file, process, replies.fd(lifted))
    }

    /// Says that a file now exists, as a descriptor of ours: `process` gets it, with its flags, its owner, and its
    /// numbers there.
    pub fn give(&mut self, file: FileId, process: usize, fd: OwnedFd) -> Result<(), RestoreError> {
        let Some(place) = self.numbers_in(file, process).first().map(|held| RemoteFd(held.fd)) else {
            let brought = self.fds_in(process, &[fd.as_fd()])?[0];
            return self.stage(file, process, brought);
        };
        self.placed.places[file.0 as usize].push((process, place));
        self.placed.pending[process].given.push((file, fd));
        if self.placed.pending[process].given.len() >= HAND_OVER {
            self.flush(process)?;
        }
        Ok(())
    }

    /// Closes a spare descriptor of a process, some time.
    pub fn close(&mut self, process: usize, fd: RemoteFd) -> Result<(), RestoreError> {
        self.make_room(process, 1, 0)?;
        let pending = &mut self.placed.pending[process];
        pending.parts.push((pending.batch.len(), self.id, None));
        pending.batch.call(Sysno::close, args![fd]);
        Ok(())
    }

    /// Adds the calls that move a new descriptor out of the way of the program's numbers. Descriptors handed to
    /// [`stage`](RebuildFile::stage) come from here.
    pub fn lift(&self, process: usize, batch: &mut Batch, fd: CallId) -> CallId {
        lift_to(self.targets[process].footprint().spare_fds, batch, fd)
    }

    /// Says that a file now exists, as a lifted descriptor of `process`: it takes its flags, its owner, and its numbers
    /// there.
    pub fn stage(&mut self, file: FileId, process: usize, fd: RemoteFd) -> Result<(), RestoreError> {
        let place = self.settle(file, process, fd)?;
        self.placed.places[file.0 as usize].push((process, place.unwrap_or(fd)));
        Ok(())
    }

    /// Puts the calls in line that give a new file its settings and its numbers; the first of these, if it has any.
    fn settle(&mut self, file: FileId, process: usize, fd: RemoteFd) -> Result<Option<RemoteFd>, RestoreError> {
        let numbers = self.numbers_in(file, process);
        self.make_room(process, 8, 64)?;
        let pending = &mut self.placed.pending[process];
        pending.parts.push((pending.batch.len(), file, None));
        add_settings(&self.image.files[file.0 as usize], &mut pending.batch, fd.into());
        for held in &numbers {
            self.make_room(process, 2, 0)?;
            let pending = &mut self.placed.pending[process];
            if pending.batch.is_empty() {
                pending.parts.push((0, file, None));
            }
            pending.batch.call(Sysno::dup3, args![fd, held.fd, cloexec(held)]);
        }
        let place = numbers.first().map(|held| RemoteFd(held.fd));
        self.make_room(process, 2, 0)?;
        let pending = &mut self.placed.pending[process];
        if pending.batch.is_empty() {
            pending.parts.push((0, file, None));
        }
        add_async(&self.image.files[file.0 as usize], &mut pending.batch, place.unwrap_or(fd).into());
        if place.is_some() {
            pending.batch.call(Sysno::close, args![fd]);
        }
        Ok(place)
    }

    pub fn is_staged(&self, file: FileId) -> bool {
        !self.placed.places[file.0 as usize].is_empty()
    }

    /// Where a staged file is: a process, and a descriptor that it has there.
    pub fn place(&self, file: FileId) -> (usize, RemoteFd) {
        self.placed.places[file.0 as usize][0]
    }

    /// Has a spare descriptor kept for when a file is finished: its other end, say.
    pub fn keep(&mut self, file: FileId, process: usize, fd: RemoteFd) {
        self.placed.kept.insert(file, (process, fd));
    }

    /// What was kept for a file.
    pub fn kept(&mut self, file: FileId) -> Option<(usize, RemoteFd)> {
        self.placed.kept.remove(&file)
    }

    /// Rebuilds another file of the tree first, if it is not there yet.
    pub fn require(&mut self, file: FileId) -> Result<(), RestoreError> {
        if self.is_staged(file) {
            return Ok(());
        }
        let image = self.image;
        let mut context = RebuildFile {
            targets: &mut *self.targets,
            image,
            reader: self.reader,
            options: self.options,
            id: file,
            objects: self.objects,
            placed: &mut *self.placed,
            resource: NAME,
        };
        rebuild_kind(&image.files[file.0 as usize].kind, &mut context)
    }

    /// A descriptor for a staged file in any process; one that the program has, or a spare one.
    pub fn bring(&mut self, file: FileId, process: usize) -> Result<RemoteFd, RestoreError> {
        let places = &self.placed.places[file.0 as usize];
        if let Some(&(_, fd)) = places.iter().find(|(at, _)| *at == process) {
            return Ok(fd);
        }
        let (from, fd) = places[0];
        let ours = self.fds_out(from, &[fd])?;
        let brought = self.fds_in(process, &[ours[0].as_fd()])?[0];
        self.placed.places[file.0 as usize].push((process, brought));
        Ok(brought)
    }

    /// Copies descriptors of a process to us, after what waits for it.
    pub fn fds_out(&mut self, process: usize, fds: &[RemoteFd]) -> Result<Vec<OwnedFd>, RestoreError> {
        self.flush(process)?;
        let target = &mut self.targets[process];
        let (resource, pid) = (self.resource, target.pid());
        target.fds_out(fds).map_err(|source| RestoreError::Target { resource, pid, source })
    }

    /// Copies descriptors of ours to spare ones of a process, after what waits for it.
    pub fn fds_in(&mut self, process: usize, fds: &[BorrowedFd<'_>]) -> Result<Vec<RemoteFd>, RestoreError> {
        self.flush(process)?;
        let target = &mut self.targets[process];
        let (resource, pid) = (self.resource, target.pid());
        target.fds_in(fds).map_err(|source| RestoreError::Target { resource, pid, source })
    }

    pub fn target_error(&self, source: TargetError) -> RestoreError {
        RestoreError::Target { resource: self.resource, pid: self.targets[self.process()].pid(), source }
    }

    pub fn mismatch(&self, what: impl Into<String>) -> RestoreError {
        let pid = self.targets[self.process()].pid();
        RestoreError::Mismatch { resource: self.resource, pid, what: what.into() }
    }

    /// The numbers that a process has for a file.
    fn numbers_in(&self, file: FileId, process: usize) -> Vec<Descriptor> {
        let numbers = &self.placed.numbers[file.0 as usize];
        let first = numbers.partition_point(|&(holder, _)| holder < process);
        numbers[first..].iter().take_while(|&&(holder, _)| holder == process).map(|&(_, held)| held).collect()
    }

    /// Has the calls that wait done if so many more do not fit.
    fn make_room(&mut self, process: usize, calls: usize, bytes: usize) -> Result<(), RestoreError> {
        if !self.placed.pending[process].batch.has_room(calls, bytes) {
            self.flush_calls(process)?;
        }
        Ok(())
    }

    /// Hands over to a process what is for it, and has the calls that wait for it done.
    fn flush(&mut self, process: usize) -> Result<(), RestoreError> {
        self.flush_calls(process)?;
        let given = std::mem::take(&mut self.placed.pending[process].given);
        if given.is_empty() {
            return Ok(());
        }
        let fds: Vec<BorrowedFd<'_>> = given.iter().map(|(_, fd)| fd.as_fd()).collect();
        let target = &mut self.targets[process];
        let pid = target.pid();
        let brought = target.fds_in(&fds).map_err(|source| RestoreError::Target { resource: NAME, pid, source })?;
        for ((file, _), fd) in given.into_iter().zip(brought) {
            self.settle(file, process, fd)?;
        }
        self.flush_calls(process).map(drop)
    }

    /// Has the calls that wait for a process done.
    fn flush_calls(&mut self, process: usize) -> Result<Option<Replies>, RestoreError> {
        let pending = &mut self.placed.pending[process];
        let (batch, parts) = (std::mem::take(&mut pending.batch), std::mem::take(&mut pending.parts));
        if batch.is_empty() {
            return Ok(None);
        }
        let target = &mut self.targets[process];
        let pid = target.pid();
        let image = self.image;
        let name = |file: FileId| image.files.get(file.0 as usize).map_or(NAME, |file| file.kind.name());
        let replies = target.run(&batch).map_err(|source| {
            let file = match &source {
                TargetError::Call { index, .. } => parts.iter().rev().find(|(first, ..)| first <= index),
                _ => None,
            };
            match (file, source) {
                (Some(&(_, file, _)), TargetError::Call { call, errno, .. }) => RestoreError::Io {
                    what: format!("{} of process {pid}, {}: {call} failed", name(file), describe(image, process, file)),
                    source: errno.into(),
                },
                (_, source) => RestoreError::Target { resource: NAME, pid, source },
            }
        })?;
        for (_, file, verify) in parts {
            if let Some(Err(what)) = verify.map(|verify| verify(&replies)) {
                let what = format!("{}: {what}", describe(image, process, file));
                return Err(RestoreError::Mismatch { resource: name(file), pid, what });
            }
        }
        Ok(Some(replies))
    }
}

/// A file as a message names it: `descriptor 5 (/tmp/x)`.
fn describe(image: &Image, process: usize, file: FileId) -> String {
    let table = &image.processes[process].descriptors.descriptors;
    let number = table.iter().find(|held| held.file == file).map(|held| format!("descriptor {}", held.fd));
    let number = number.unwrap_or_else(|| format!("file {}", file.0));
    match image.files.get(file.0 as usize).and_then(|file| file.kind.path()) {
        Some(path) => format!("{number} ({})", path.display()),
        None => number,
    }
}

fn cloexec(held: &Descriptor) -> i32 {
    if held.close_on_exec { libc::O_CLOEXEC } else { 0 }
}

fn lift_to(spare: i32, batch: &mut Batch, fd: CallId) -> CallId {
    let lifted = batch.call(Sysno::fcntl, args![fd, libc::F_DUPFD_CLOEXEC, spare]);
    batch.call(Sysno::close, args![fd]);
    lifted
}

/// Adds what every kind of file has: owner, signal, status flags. At most 3 calls with 64 bytes.
fn add_settings(open: &OpenFile, batch: &mut Batch, fd: Arg) {
    if open.flags & libc::O_PATH != 0 {
        return;
    }
    if let Some(owner) = open.owner {
        let value = batch.bytes(&[owner.kind.to_ne_bytes(), owner.id.to_ne_bytes()].concat());
        batch.call(Sysno::fcntl, &[fd, F_SETSIG.into(), owner.signal.into()]);
        if owner.id != 0 {
            batch.call(Sysno::fcntl, &[fd, F_SETOWN_EX.into(), value.into()]);
        }
    }
    batch.call(Sysno::fcntl, &[fd, libc::F_SETFL.into(), (open.flags & !libc::O_ASYNC).into()]);
}

/// Signal-driven I/O keeps the number that it was switched on by, and tells it to the program (`si_fd`). At most 1 call.
fn add_async(open: &OpenFile, batch: &mut Batch, fd: Arg) {
    if open.flags & libc::O_ASYNC != 0 && open.flags & libc::O_PATH == 0 {
        batch.call(Sysno::fcntl, &[fd, libc::F_SETFL.into(), open.flags.into()]);
    }
}

/// Rebuilds every file and fills every table.
pub fn rebuild(
    targets: &mut [Box<dyn Target>],
    reader: &dyn ImageReader,
    objects: &memory::Rebuilt,
    options: &RestoreOptions,
) -> Result<(), RestoreError> {
    let image = reader.image();
    let mut placed = Placed {
        places: vec![Vec::new(); image.files.len()],
        numbers: vec![Vec::new(); image.files.len()],
        pending: Vec::new(),
        kept: HashMap::new(),
        masters: terminals::taken(targets, image)?,
    };
    placed.pending.resize_with(targets.len(), Pending::default);
    for (index, process) in image.processes.iter().enumerate() {
        for held in &process.descriptors.descriptors {
            placed.numbers[held.file.0 as usize].push((index, *held));
        }
    }
    let mut context =
        RebuildFile { targets, image, reader, options, id: FileId(0), objects, placed: &mut placed, resource: NAME };
    for process in 0..image.processes.len() {
        make_way(&mut context, process)?;
    }
    for index in 0..image.files.len() {
        context.require(FileId(index as u32))?;
    }
    share(&mut context)?;
    for (index, file) in image.files.iter().enumerate() {
        context.id = FileId(index as u32);
        finish_kind(&file.kind, &mut context)?;
    }
    context.resource = NAME;
    for process in 0..image.processes.len() {
        let spare = context.targets[process].footprint().spare_fds;
        let batch = close_all(&context, process, spare, i32::MAX);
        context.run(process, &batch)?;
    }
    Ok(())
}

/// Empties the table of a skeleton, and allows it all the numbers that are needed. The limits of the image come later.
fn make_way(context: &mut RebuildFile<'_>, process: usize) -> Result<(), RestoreError> {
    let footprint = context.targets[process].footprint();
    let table = &context.image.processes[process].descriptors.descriptors;
    if let Some(held) = table.iter().find(|held| footprint.fds.contains(&RemoteFd(held.fd))) {
        let pid = context.targets[process].pid();
        let what = format!("descriptor {} of the program is in use by ckpt itself", held.fd);
        return Err(RestoreError::Mismatch { resource: NAME, pid, what });
    }
    let mut batch = close_all(context, process, 0, i32::MAX);
    let needed = footprint.spare_fds as u64 + SPARE_NUMBERS;
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .map_err(|errno| RestoreError::Io { what: "the limit of descriptors".into(), source: errno.into() })?;
    if soft < needed {
        let limit = batch.words(&[hard, hard]);
        batch.call(Sysno::prlimit64, args![0, libc::RLIMIT_NOFILE, limit, 0]);
    }
    context.run(process, &batch).map(drop)
}

/// Calls that close all descriptors of a skeleton in a range, but those that ckpt needs there.
fn close_all(context: &RebuildFile<'_>, process: usize, first: i32, last: i32) -> Batch {
    let mut ours: Vec<i32> = context.targets[process].footprint().fds.iter().map(|fd| fd.0).collect();
    ours.sort_unstable();
    let mut batch = Batch::new();
    let mut next = first;
    for fd in ours.into_iter().filter(|fd| (first..=last).contains(fd)) {
        if next < fd {
            batch.call(Sysno::close_range, args![next, fd - 1, 0]);
        }
        next = fd + 1;
    }
    batch.call(Sysno::close_range, args![next, last, 0]);
    batch
}

/// Most descriptors handed over at once: a message of a Unix socket may carry 253 (`SCM_MAX_FD`).
const HAND_OVER: usize = 200;

/// Fills the tables with files that were made in another process: what `fork` and passing descriptors shared.
fn share(context: &mut RebuildFile<'_>) -> Result<(), RestoreError> {
    let files = 0..context.image.files.len();
    let shared: Vec<usize> = files.filter(|&file| !missing_in(context, file).is_empty()).collect();
    for files in shared.chunks(HAND_OVER) {
        let mut ours: HashMap<usize, OwnedFd> = HashMap::new();
        let mut homes: HashMap<usize, Vec<(usize, RemoteFd)>> = HashMap::new();
        let mut wanted: Vec<Vec<usize>> = vec![Vec::new(); context.targets.len()];
        for &file in files {
            let (home, fd) = context.placed.places[file][0];
            homes.entry(home).or_default().push((file, fd));
            for process in missing_in(context, file) {
                wanted[process].push(file);
            }
        }
        for (home, list) in homes {
            let numbers: Vec<RemoteFd> = list.iter().map(|&(_, fd)| fd).collect();
            let out = context.fds_out(home, &numbers)?;
            ours.extend(list.into_iter().map(|(file, _)| file).zip(out));
        }
        for (process, files) in wanted.into_iter().enumerate().filter(|(_, files)| !files.is_empty()) {
            let handed: Vec<BorrowedFd<'_>> = files.iter().map(|file| ours[file].as_fd()).collect();
            let brought = context.fds_in(process, &handed)?;
            for (file, fd) in files.into_iter().zip(brought) {
                place_shared(context, file, process, fd)?;
            }
        }
    }
    for process in 0..context.targets.len() {
        context.flush(process)?;
    }
    Ok(())
}

/// The processes whose table should have a file and has not.
fn missing_in(context: &RebuildFile<'_>, file: usize) -> Vec<usize> {
    let mut processes: Vec<usize> = context.placed.numbers[file].iter().map(|&(process, _)| process).collect();
    processes.dedup();
    processes.retain(|&process| {
        let spare = context.targets[process].footprint().spare_fds;
        !context.placed.places[file].iter().any(|&(at, fd)| at == process && fd.0 < spare)
    });
    processes
}

/// Gives a descriptor that was handed over its numbers.
fn place_shared(context: &mut RebuildFile<'_>, file: usize, process: usize, fd: RemoteFd) -> Result<(), RestoreError> {
    let id = FileId(file as u32);
    let numbers = context.numbers_in(id, process);
    for held in &numbers {
        context.make_room(process, 2, 0)?;
        let pending = &mut context.placed.pending[process];
        pending.parts.push((pending.batch.len(), id, None));
        pending.batch.call(Sysno::dup3, args![fd, held.fd, cloexec(held)]);
    }
    context.placed.pending[process].batch.call(Sysno::close, args![fd]);
    let places = &mut context.placed.places[file];
    // A spare one that was brought before is closed with all the others.
    places.retain(|(at, _)| *at != process);
    places.push((process, RemoteFd(numbers[0].fd)));
    Ok(())
}
