//! Shared memory whose pages follow: objects that several processes map, and no descriptor leads to.
//!
//! Such an object is filled through a mapping that the pager makes of it for itself, registered with a userfaultfd of its
//! own: by that the kernel puts pages into the object one by one and never over one that is there, whatever the tree does
//! meanwhile. Each process has its mappings registered with a second userfaultfd, so that a thread that touches a page that
//! the object does not have waits, and is woken when it has.
//!
//! What processes do to their mappings does not change the object, with one exception: `MADV_REMOVE` makes holes in it.
//! The kernel tells of that in the same words as of `MADV_DONTNEED`, which only takes pages out of a mapping. So before an
//! event is taken that may be one of them, the objects that the process maps are filled, while it waits: then there is no
//! page left that the one or the other could be about.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ckpt_core::procfs::ProcDir;
use ckpt_core::{PAGE_SIZE, Pid};

use crate::object_of;
use crate::outstanding::{Outstanding, Run};
use crate::pager::{Pager, Reason, Space};
use crate::sys::{Event, Userfault, Window};

/// What a space of the pager is.
pub enum Kind {
    /// The private memory of a process.
    Private,
    /// A shared object, by its index in the image. What is outstanding has the addresses of the pager's own mapping.
    Object { id: usize, window: Window },
    /// What a process maps of objects. Nothing is outstanding of these themselves.
    Windows(Windows),
}

impl Kind {
    /// Whether it is of an address space of the tree.
    pub fn is_of_tree(&self) -> bool {
        !matches!(self, Kind::Object { .. })
    }
}

/// Mappings of a process: from, to, the space of the object, and the place in that where they begin.
pub type Windows = Vec<(u64, u64, usize, u64)>;

/// Pages that are put at a time where a process waits for all of them.
const CHUNK: u64 = 16;

impl Pager<'_> {
    pub fn add_object(&mut self, id: usize, file: OwnedFd) -> Result<(), String> {
        let failed = |what: &'static str| move |error: std::io::Error| format!("{what} shared memory: {error}");
        let Some(object) = self.objects.get(id) else { return Err("an object that is not in the image".into()) };
        let size = object.size.next_multiple_of(PAGE_SIZE);
        let window = Window::on(file.as_fd(), size).map_err(failed("mapping"))?;
        let fault = Userfault::create().map_err(failed("a userfaultfd for"))?;
        fault.enable(0).map_err(failed("a userfaultfd for"))?;
        fault.register(window.address(), window.len()).map_err(failed("registering"))?;
        let mut left = Outstanding::default();
        for run in &object.pages {
            let start = window.address() + run.start;
            left.add(Run { start, first: run.extent.first, pages: run.extent.pages });
        }
        let kind = Kind::Object { id, window };
        let (pid, process, wiped) = (None, None, Vec::new());
        self.spaces.push(Some(Space { fault, kind, left, cursor: 0, announced: 0, pid, process, wiped }));
        Ok(())
    }

    /// What a process of the image maps of objects that were added.
    pub fn windows_of(&self, process: usize) -> Windows {
        let mut windows = Vec::new();
        for mapping in self.memory_of(process).into_iter().flat_map(|memory| &memory.mappings) {
            let Some((of, offset)) = object_of(mapping) else { continue };
            let spaces = self.spaces.iter().enumerate();
            let found = spaces.filter_map(|(index, space)| match &space.as_ref()?.kind {
                Kind::Object { id, window } if *id == of.0 as usize => Some((index, window.address())),
                _ => None,
            });
            windows.extend(found.map(|(index, base)| (mapping.start, mapping.end, index, base + offset)));
        }
        windows
    }

    /// Which space an address of another is of, and its place there.
    pub fn place_of(&self, index: usize, address: u64) -> (usize, u64) {
        let Some(Space { kind: Kind::Windows(windows), .. }) = &self.spaces[index] else { return (index, address) };
        let found = windows.iter().find(|(start, end, ..)| (*start..*end).contains(&address));
        found.map_or((index, address), |&(start, _, object, place)| (object, place + (address - start)))
    }

    /// Whether a process misses pages of what it maps of objects.
    pub fn misses_shared(&self, index: usize) -> bool {
        let Some(Space { kind: Kind::Windows(windows), .. }) = &self.spaces[index] else { return false };
        windows.iter().any(|&(.., object, _)| self.spaces[object].is_some())
    }

    /// Lets go of objects that nobody maps any more.
    pub fn drop_unseen(&mut self, windows: &Windows) {
        for &(.., object, _) in windows {
            let sees = |space: &Space| matches!(&space.kind, Kind::Windows(all) if all.iter().any(|it| it.2 == object));
            if !self.spaces.iter().flatten().any(sees) {
                self.drop_space(object);
            }
        }
    }

    /// Takes what a process did to its mappings of objects, one by one.
    pub fn take_shared_events(&mut self, index: usize) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("reading a userfaultfd: {error}");
        loop {
            let Some(space) = &self.spaces[index] else { return Ok(()) };
            if self.misses_shared(index)
                && space.fault.has_changes().map_err(failed)?
                && space.pid.is_none_or(may_give_back_memory)
            {
                self.fill_objects(index)?;
            }
            let Some(space) = &self.spaces[index] else { return Ok(()) };
            let Kind::Windows(windows) = &space.kind else { return Ok(()) };
            match space.fault.event().map_err(failed)? {
                None => return Ok(()),
                Some(Event::Fault { address, tid }) => {
                    self.meet(index, tid);
                    self.figures.faults += 1;
                    self.answer(index, address, Instant::now())?;
                }
                Some(Event::Fork(fd)) => {
                    let windows = windows.clone();
                    self.add_space(fd, Kind::Windows(windows), Outstanding::default(), None, Vec::new())?;
                }
                // Where the object is whole, it does not matter any more at which addresses it is.
                Some(Event::Moved { .. }) => self.fill_objects(index)?,
                Some(Event::Unmapped { .. }) => {}
                // A thread that was to wait for a page was interrupted in the instant in which we looked.
                Some(Event::Removed { start, .. }) if self.misses_shared(index) => {
                    return Err(format!(
                        "shared memory at {start:#x} was given back by a process before it was there, and the kernel does \
                         not say in which way"
                    ));
                }
                Some(Event::Removed { .. }) => {}
            }
            self.close_if_done(index);
        }
    }

    /// Brings in all that is missing of the objects that a process maps.
    fn fill_objects(&mut self, index: usize) -> Result<(), String> {
        let Some(Space { kind: Kind::Windows(windows), .. }) = &self.spaces[index] else { return Ok(()) };
        let objects: Vec<usize> = windows.iter().map(|window| window.2).collect();
        for object in objects {
            while let Some(run) = self.spaces[object].as_ref().and_then(|it| it.left.next(0, u64::MAX, CHUNK)) {
                self.bring(object, run, Reason::Sweep)?;
            }
            self.drop_space(object);
        }
        Ok(())
    }
}

/// Whether a thread of a process, which waits for us to take an event, may be giving back memory (madvise(2)). A thread that
/// waits is in its call, as `/proc/PID/task/TID/syscall` shows it.
fn may_give_back_memory(pid: Pid) -> bool {
    // Of programs for x86-64, and of i386.
    const MADVISE: [&str; 2] = ["28", "219"];
    const OTHERS: [&str; 2] = ["440", "426"]; // process_madvise(2) and io_uring_enter(2) of both
    let begun = Instant::now();
    loop {
        // Who cannot be looked at may do anything.
        let Ok(process) = ProcDir::open(pid) else { return true };
        let Ok(threads) = process.numbers("task") else { return true };
        let mut running = false;
        for thread in threads {
            let read = |file: &str| process.read(format!("task/{thread}/{file}")).unwrap_or_default();
            let call = read("syscall");
            let call = String::from_utf8_lossy(&call);
            let number = call.split_whitespace().next().unwrap_or("running");
            if MADVISE.contains(&number) || OTHERS.contains(&number) || read("comm").starts_with(b"iou-") {
                return true;
            }
            running |= number == "running";
        }
        if !running {
            return false;
        }
        // It may be about to wait.
        if begun.elapsed() > Duration::from_micros(500) {
            return true;
        }
    }
}
