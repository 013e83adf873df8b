//! The restorer: that of the ptrace backend, with the memory step replaced.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ckpt_core::batch::{Batch, Sysno};
use ckpt_core::names::Names;
use ckpt_core::progress::Meter;
use ckpt_core::resource::memory::{Eager, Filler, Mapping, Memory, NAME, ObjectId};
use ckpt_core::store::ImageReader;
use ckpt_core::{Image, Pid, Refusal, RestoreError, Restorer, Skeleton, Target, TargetError, args, registry};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair};

use crate::figures::Figures;
use crate::pager::{self, message};
use crate::sys::{self, Userfault};
use crate::{Options, Way, WorkingSetUse, guardian, is_lazy, lazy_objects, object_of, probe};

/// Restores trees whose memory follows.
pub struct UserfaultRestorer {
    options: Options,
    underneath: Option<Box<dyn Restorer>>,
    pager: Rc<RefCell<Option<Pager>>>,
    /// Pages that were there before the release.
    filled: Rc<Cell<u64>>,
    /// Before the skeleton's maker ties us to one processor.
    affinity: Option<CpuSet>,
}

impl UserfaultRestorer {
    pub fn new(options: Options) -> UserfaultRestorer {
        let underneath = registry::backend(probe::UNDERNEATH).ok().and_then(|backend| backend.restorer);
        UserfaultRestorer {
            options,
            underneath: underneath.map(|make| make()),
            pager: Rc::default(),
            filled: Rc::default(),
            affinity: sched_getaffinity(nix::unistd::Pid::from_raw(0)).ok(),
        }
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Why the pager gave up, if it did: the cause of what went wrong in a restore that failed.
    pub fn failure(&self) -> Option<String> {
        let pager = self.pager.borrow();
        let pager = pager.as_ref()?;
        // It may have done so in this very moment.
        let mut ready = [PollFd::new(pager.fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut ready, PollTimeout::from(200u16)), Ok(1..)) {
            return None;
        }
        match pager.hear() {
            Heard::Told(Told::Failed(why)) => Some(why),
            _ => None,
        }
    }

    /// What there is to tell of a restore that needs no pager: all memory was there when the tree was released.
    pub fn figures_without_pager(&self) -> Figures {
        let release_us = self.options.begun.elapsed().as_micros() as u64;
        let mut figures = Figures { release_us, complete_us: release_us, ..Figures::default() };
        figures.pages.eager = self.filled.get();
        if let WorkingSetUse::Record { .. } = self.options.working_set {
            figures.working_set_trouble =
                Some("nothing was recorded, as all memory was there before the release".into());
        }
        figures
    }

    /// The pager of the tree that was released; none if all of its memory was there before. To be asked once.
    pub fn pager(&self) -> Option<Pager> {
        self.pager.borrow_mut().take()
    }
}

impl Restorer for UserfaultRestorer {
    fn check(&self, image: &Image) -> Vec<Refusal> {
        match &self.underneath {
            Some(underneath) => underneath.check(image),
            None => vec![Refusal {
                resource: NAME,
                pid: None,
                subject: String::new(),
                why: format!("this ckpt was built without the backend {}", probe::UNDERNEATH),
                help: String::new(),
            }],
        }
    }

    fn skeleton(&self, image: &Image) -> Result<Box<dyn Skeleton>, RestoreError> {
        let underneath = self.underneath.as_ref().expect("a plan was checked before");
        Ok(Box::new(LazySkeleton {
            inner: underneath.skeleton(image)?,
            pager: self.pager.clone(),
            options: self.options.clone(),
        }))
    }

    fn renames(&self) -> bool {
        self.underneath.as_ref().is_some_and(|underneath| underneath.renames())
    }

    fn filler(&self) -> Box<dyn Filler> {
        Box::new(LazyFiller {
            options: self.options.clone(),
            pager: self.pager.clone(),
            filled: self.filled.clone(),
            affinity: self.affinity,
            objects: Vec::new(),
            unsent: 0,
            eager: 0,
        })
    }
}

/// The pager, as the command that started it sees it. It does not need the command.
pub struct Pager {
    pid: Pid,
    control: OwnedFd,
}

/// What a pager tells, last of all.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// All memory is there.
    Done(Box<Figures>),
    /// It gave up, in words; the tree was killed or stopped.
    Failed(String),
}

enum Heard {
    Prepared,
    Told(Told),
}

impl Pager {
    /// Becomes readable when it has something to tell.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    /// What it has to tell, waiting for it.
    pub fn listen(&self) -> Told {
        loop {
            if let Heard::Told(told) = self.hear() {
                return told;
            }
        }
    }

    fn hear(&self) -> Heard {
        let mut bytes = [0u8; 4096];
        let told = loop {
            match recv(self.control.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Err(nix::errno::Errno::EINTR) => {}
                other => break other.unwrap_or(0),
            }
        };
        if told > 0 && bytes[0] == message::PREPARED {
            return Heard::Prepared;
        }
        sys::reap(self.pid);
        let text = |from: usize| String::from_utf8_lossy(&bytes[from..told]).into_owned();
        Heard::Told(match (told > 0).then(|| bytes[0]) {
            Some(message::DONE) => match serde_json::from_slice(&bytes[1..told]) {
                Ok(figures) => Told::Done(Box::new(figures)),
                Err(error) => Told::Failed(format!("the pager's figures: {error}")),
            },
            Some(message::FAILED | guardian::LOST) => Told::Failed(text(1)),
            _ => Told::Failed("the pager and its guardian ended before all memory was restored".into()),
        })
    }

    fn send(&self, kind: u8, words: &[u64], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut bytes = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[] } else { &rights[..] };
        sendmsg::<()>(self.control.as_raw_fd(), &[IoSlice::new(&bytes)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// Waits until it has taken all that was sent to it, and is guarded: from then on it may be lost without harm.
    fn prepare(&self) -> io::Result<()> {
        self.send(message::PREPARE, &[], None)?;
        let mut ready = [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
        let deadline = Instant::now() + PREPARED_WITHIN;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match poll(&mut ready, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) => break,
            }
        }
        match self.hear() {
            Heard::Prepared => Ok(()),
            Heard::Told(Told::Failed(why)) => Err(io::Error::other(why)),
            Heard::Told(Told::Done(_)) => Err(io::Error::other("it ended early")),
        }
    }
}

/// How long the pager may take to answer before the release.
const PREPARED_WITHIN: Duration = Duration::from_secs(60);

fn failed(what: &str) -> impl Fn(io::Error) -> RestoreError {
    move |source| RestoreError::Io { what: format!("{NAME}: {what}"), source }
}

struct LazyFiller {
    options: Options,
    pager: Rc<RefCell<Option<Pager>>>,
    filled: Rc<Cell<u64>>,
    affinity: Option<CpuSet>,
    /// The objects whose pages follow.
    objects: Vec<(ObjectId, OwnedFd)>,
    /// The last so many of them the pager does not have yet.
    unsent: usize,
    /// Pages that were brought in and that the pager has not been told of.
    eager: u64,
}

impl LazyFiller {
    fn note_filled(&mut self, pages: u64) {
        self.eager += pages;
        self.filled.set(self.filled.get() + pages);
    }

    fn is_shared_lazily(&self, mapping: &Mapping) -> bool {
        object_of(mapping).is_some_and(|(of, _)| self.objects.iter().any(|(id, _)| *id == of))
    }
}

impl Filler for LazyFiller {
    fn brings_object(&self, image: &Image, object: ObjectId) -> bool {
        lazy_objects(image, &self.options).any(|(id, _)| id == object)
    }

    fn take_objects(&mut self, image: &Image, objects: &[OwnedFd]) -> Result<(), RestoreError> {
        for (id, _) in lazy_objects(image, &self.options) {
            let ours = objects[id.0 as usize].try_clone().map_err(failed("shared memory"))?;
            self.objects.push((id, ours));
        }
        self.unsent = self.objects.len();
        let filled = image.memory_objects.iter().enumerate();
        let filled = filled.filter(|(id, _)| !self.objects.iter().any(|(lazy, _)| lazy.0 as usize == *id));
        let pages = filled.flat_map(|(_, object)| &object.pages).map(|run| run.extent.pages).sum();
        self.note_filled(pages);
        Ok(())
    }

    fn fill(
        &mut self,
        process: usize,
        target: &mut dyn Target,
        memory: &Memory,
        reader: &dyn ImageReader,
        meter: &mut Meter<'_>,
    ) -> Result<(), RestoreError> {
        let (lazy, rest): (Vec<&Mapping>, Vec<&Mapping>) =
            memory.mappings.iter().partition(|mapping| is_lazy(memory, mapping, &self.options));
        let rest = Memory {
            mappings: rest.into_iter().cloned().collect(),
            layout: memory.layout,
            auxv: Vec::new(),
            exe: memory.exe.clone(),
            exe_identity: memory.exe_identity,
            exe_deleted: memory.exe_deleted,
            lock_future: memory.lock_future,
        };
        self.note_filled(rest.mappings.iter().flat_map(|mapping| &mapping.pages).map(|run| run.extent.pages).sum());
        Eager.fill(process, target, &rest, reader, meter)?;
        let shared: Vec<&Mapping> = memory.mappings.iter().filter(|mapping| self.is_shared_lazily(mapping)).collect();
        if lazy.is_empty() && shared.is_empty() {
            return Ok(());
        }
        let mut pager = self.pager.borrow_mut();
        if pager.is_none() {
            *pager = Some(start(reader, &self.options, self.affinity.as_ref()).map_err(failed("starting the pager"))?);
        }
        let pager = pager.as_ref().expect("just started");

        // Objects before the first mapping of one.
        for (id, file) in &self.objects[self.objects.len() - std::mem::take(&mut self.unsent)..] {
            pager.send(message::OBJECT, &[u64::from(id.0)], Some(file.as_fd())).map_err(failed("the pager"))?;
        }
        for (kind, mappings) in [(message::SPACE, lazy), (message::SHARED, shared)] {
            if mappings.is_empty() {
                continue;
            }
            let fault = userfault_of(target, self.options.host.way())?;
            fault.enable(probe::NEEDED).map_err(failed("userfaultfd"))?;
            for mapping in mappings {
                let what = format!("registering {:x}-{:x} with userfaultfd", mapping.start, mapping.end);
                fault.register(mapping.start, mapping.end - mapping.start).map_err(failed(&what))?;
            }
            let eager = std::mem::take(&mut self.eager);
            pager.send(kind, &[process as u64, eager], Some(fault.fd())).map_err(failed("the pager"))?;
        }
        Ok(())
    }
}

/// Has a process make a userfaultfd, and pass it out.
fn userfault_of(target: &mut dyn Target, way: Option<Way>) -> Result<Userfault, RestoreError> {
    let pid = target.pid();
    let failed = |source: TargetError| RestoreError::Target { resource: NAME, pid, source };
    let mut batch = Batch::new();
    let fd = match way {
        Some(Way::Device) => {
            // It is of the memory of whoever makes the call, whoever has opened the device.
            let device = sys::open_device().map_err(crate::restorer::failed(sys::DEVICE))?;
            let theirs = target.receive_fd(&mut batch).map_err(failed)?;
            let fd = batch.call(Sysno::ioctl, &[theirs, sys::USERFAULTFD_IOC_NEW.into(), sys::FLAGS.into()]);
            batch.call(Sysno::close, &[theirs]);
            target.start(0, &batch).map_err(failed)?;
            target.send_fd(device.as_fd()).map_err(failed)?;
            target.finish(0, &batch).map_err(failed)?.fd(fd)
        }
        Some(Way::Call) | None => {
            let fd = batch.call(Sysno::userfaultfd, args![sys::FLAGS]);
            target.run(&batch).map_err(failed)?.fd(fd)
        }
    };
    let ours = target.fds_out(&[fd]).map_err(failed)?.remove(0);
    let mut batch = Batch::new();
    batch.call(Sysno::close, args![fd]);
    target.run(&batch).map_err(failed)?;
    Ok(Userfault::from_fd(ours))
}

/// Forks the pager. It has the image as we have it.
fn start(reader: &dyn ImageReader, options: &Options, affinity: Option<&CpuSet>) -> io::Result<Pager> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    match sys::fork()? {
        sys::Fork::Child => pager::run(reader, options, theirs.as_raw_fd(), affinity),
        sys::Fork::Parent(pid) => Ok(Pager { pid, control: ours }),
    }
}

struct LazySkeleton {
    inner: Box<dyn Skeleton>,
    pager: Rc<RefCell<Option<Pager>>>,
    options: Options,
}

impl Skeleton for LazySkeleton {
    fn targets(&mut self) -> &mut [Box<dyn Target>] {
        self.inner.targets()
    }

    fn real_ids(&self) -> Option<Names> {
        self.inner.real_ids()
    }

    fn release(self: Box<Self>) -> Result<(), RestoreError> {
        let pager = self.pager.borrow();
        if let Some(pager) = &*pager {
            pager.prepare().map_err(failed("the pager"))?;
        }
        self.inner.release()?;
        if let Some(pager) = &*pager {
            let elapsed = self.options.begun.elapsed().as_micros() as u64;
            // One that is gone by now has taken the tree with it, and whoever listens to it is told.
            let _ = pager.send(message::RELEASED, &[elapsed], None);
        }
        Ok(())
    }
}
