//! The suite itself is tested: backends that break one thing each, which it must report.
//!
//! Each fake wraps the ptrace backend. They are registered in this program only. Every row is tried with ptrace itself
//! too, where it must pass: else a failure would prove nothing.

use std::cmp::Ordering;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, ExitCode};

use ckpt_conformance::matrix::{Host, Required};
use ckpt_conformance::trial::{self, Way};
use ckpt_conformance::{cases, isolation, suite};
use ckpt_core::backend::{
    Availability, Backend, Capability, DumpOptions, Dumper, Frozen, FrozenProcess, Probe, Restorer, Skeleton,
};
use ckpt_core::batch::{Arg, Batch, Replies, Sysno};
use ckpt_core::image::{Image, Zombie};
use ckpt_core::names::Names;
use ckpt_core::procfs::ProcDir;
use ckpt_core::resource::memory::Filler;
use ckpt_core::{
    Context, DumpError, Footprint, Kcmp, MemoryWriter, NotCopied, Pid, PrivatePages, Queue, Refusal, RemoteFd,
    RemotePtr, RestoreError, SigInfo, Target, TargetError, args, inventory, registry,
};
use libtest_mimic::{Arguments, Trial};

/// What a fake does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    /// Says that nothing is pending.
    LosesSignals,
    /// Does not see one page with data.
    LosesPage,
    /// Changes a bit of a vector register.
    ChangesRegister,
    /// Lets a call that was stopped return EINTR.
    InterruptsCalls,
    /// Panics when it freezes.
    Panics,
    /// Says that the tree was killed, and lets it go on.
    NeverStops,
    /// Leaves the tree stopped when it should go on.
    LeavesStopped,
    /// Leaves a descriptor of its own in the tree that goes on.
    LeavesDescriptor,
    /// Closes one of the tree's descriptors at the release.
    LosesDescriptor,
    /// Opens one more at the release.
    AddsDescriptor,
    /// Maps one page more at the release.
    AddsMapping,
    /// Gives the root another pid.
    OtherPid,
    /// Says that it has restored, and has ended everything.
    RestoresNothing,
    /// Says of everything that it cannot be saved.
    RefusesAll,
}

struct Row {
    backend: &'static str,
    wrong: Wrong,
    dumps: bool,
    /// A case that must find it, whether by `--leave-running` or by a restore, and a part of the message.
    case: &'static str,
    running: bool,
    message: &'static str,
}

const fn dumper(backend: &'static str, wrong: Wrong, case: &'static str, message: &'static str) -> Row {
    Row { backend, wrong, dumps: true, case, running: false, message }
}

const fn restorer(backend: &'static str, wrong: Wrong, case: &'static str, message: &'static str) -> Row {
    Row { backend, wrong, dumps: false, case, running: false, message }
}

const fn leaver(backend: &'static str, wrong: Wrong, case: &'static str, message: &'static str) -> Row {
    Row { backend, wrong, dumps: true, case, running: true, message }
}

const ROWS: &[Row] = &[
    dumper("loses-signals", Wrong::LosesSignals, "signals/pending", "ShdPnd"),
    dumper("loses-page", Wrong::LosesPage, "memory/anonymous", "anonymous memory"),
    dumper("changes-register", Wrong::ChangesRegister, "registers/sse", "SSE"),
    dumper("interrupts-calls", Wrong::InterruptsCalls, "calls/read", "thread"),
    dumper("panics", Wrong::Panics, "tasks/ids", "panicked"),
    dumper("never-stops", Wrong::NeverStops, "tasks/ids", "left processes behind"),
    dumper("refuses-all", Wrong::RefusesAll, "tasks/ids", "the dump failed"),
    leaver("leaves-stopped", Wrong::LeavesStopped, "tasks/ids", "look otherwise"),
    leaver("leaves-descriptor", Wrong::LeavesDescriptor, "tasks/ids", "descriptor"),
    restorer("loses-descriptor", Wrong::LosesDescriptor, "calls/read", "descriptor 3 is gone"),
    restorer("adds-descriptor", Wrong::AddsDescriptor, "tasks/ids", "is new"),
    restorer("adds-mapping", Wrong::AddsMapping, "tasks/ids", "is new"),
    restorer("other-pid", Wrong::OtherPid, "tasks/ids", "is not there"),
    restorer("restores-nothing", Wrong::RestoresNothing, "tasks/ids", "is not there"),
];

macro_rules! register {
    ($($name:literal $wrong:ident),* $(,)?) => {$(
        inventory::submit! {
            Backend {
                name: $name,
                summary: "breaks one thing",
                capability: || real().map_or_else(nothing, |real| (real.capability)()),
                probe: || Probe { dump: Availability::Available, restore: Availability::Available, features: vec![] },
                launcher: None,
                dumper: Some(|| Box::new(FakeDumper(Wrong::$wrong))),
                restorer: Some(|| Box::new(FakeRestorer(Wrong::$wrong))),
            }
        }
    )*};
}

register! {
    "loses-signals" LosesSignals, "loses-page" LosesPage, "changes-register" ChangesRegister,
    "interrupts-calls" InterruptsCalls, "panics" Panics, "never-stops" NeverStops, "refuses-all" RefusesAll,
    "leaves-stopped" LeavesStopped, "leaves-descriptor" LeavesDescriptor, "loses-descriptor" LosesDescriptor,
    "adds-descriptor" AddsDescriptor, "adds-mapping" AddsMapping, "other-pid" OtherPid,
    "restores-nothing" RestoresNothing,
}

fn real() -> Option<&'static Backend> {
    registry::backend("ptrace").ok()
}

fn nothing() -> Capability {
    Capability { attach: false, launch: false, restore: false, resources: vec![], lacks: vec![], privileges: vec![] }
}

/// Has this program run [`red_suite`] and nothing else.
const RED_SUITE: &str = "--red-suite";

fn main() -> ExitCode {
    trial::be_a_trial_if_asked();
    if std::env::args().nth(1).as_deref() == Some(RED_SUITE) {
        return red_suite();
    }
    let mut trials: Vec<Trial> =
        ROWS.iter().map(|row| Trial::test(format!("fake {}", row.backend), || Ok(is_caught(row)?))).collect();
    trials.push(Trial::test("every fake is registered once", || Ok(registered()?)));
    trials.push(Trial::test("a suite with a fake is red", || Ok(suite_is_red()?)));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn subject() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_ckpt-subject"))
}

fn is_caught(row: &Row) -> Result<(), String> {
    let way = |backend: &'static str| match (row.running, row.dumps) {
        (true, _) => Way::Running(backend),
        (false, true) => Way::Restored { dumper: backend, restorer: "ptrace", rounds: 1 },
        (false, false) => Way::Restored { dumper: "ptrace", restorer: backend, rounds: 1 },
    };
    let case = cases::find(row.case).ok_or(format!("there is no case {}", row.case))?;
    trial::run(&case, &way("ptrace"), subject()).map_err(|failure| format!("with ptrace itself: {failure}"))?;
    match trial::run(&case, &way(row.backend), subject()) {
        Ok(()) => Err(format!("{} passed {} though its backend {:?}", way(row.backend).name(), row.case, row.wrong)),
        Err(failure) if failure.contains(row.message) => Ok(()),
        Err(failure) => Err(format!("caught, but not for {:?}: {failure}", row.message)),
    }
}

fn registered() -> Result<(), String> {
    let true_ones = ["preload", "ptrace", "userfault", "userfault-by-fault", "userfault-from-server"];
    let mut expected: Vec<&str> = ROWS.iter().map(|row| row.backend).chain(true_ones).collect();
    expected.sort_unstable();
    let found: Vec<&str> = registry::backends().iter().map(|backend| backend.name).collect();
    if expected == found { Ok(()) } else { Err(format!("expected {expected:?}, found {found:?}")) }
}

/// The whole way: a failed trial is in the matrix and in the numbers, and makes the exit code a failure.
fn suite_is_red() -> Result<(), String> {
    // In a process of its own: what it prints is not to be taken for the result of this program.
    let run = Command::new("/proc/self/exe").arg(RED_SUITE).output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&run.stdout);
    let expected = ["tasks/ids          FAILED         FAILED", "conformance: 0 passed, 2 failed, 0 skipped"];
    match expected.iter().find(|line| !text.contains(*line)) {
        None if run.status.code() == Some(101) => Ok(()),
        None => Err(format!("it ended with {}", run.status)),
        Some(line) => Err(format!("{line:?} is not in what it printed:\n{text}")),
    }
}

fn red_suite() -> ExitCode {
    let host = Host { namespaces: isolation::probe(), required: Required::default() };
    let case = cases::find("tasks/ids").expect("a case");
    let backends: Vec<&Backend> = registry::backends().into_iter().filter(|backend| backend.name == "panics").collect();
    let report = suite::run(&[case], &backends, &host, subject(), &Arguments::default());
    print!("{}", report.text());
    report.exit_code()
}

struct FakeDumper(Wrong);

impl Dumper for FakeDumper {
    fn freeze(&self, root: Pid, options: &DumpOptions) -> Result<Box<dyn Frozen>, DumpError> {
        match self.0 {
            Wrong::Panics => panic!("this fake panics"),
            Wrong::RefusesAll => Err(DumpError::Unsupported(vec![Refusal {
                resource: "tasks",
                pid: Some(root),
                subject: String::new(),
                why: "this fake saves nothing".into(),
                help: String::new(),
            }])),
            _ => {
                let mut inner = real().and_then(|real| real.dumper).expect("ptrace dumps")().freeze(root, options)?;
                let targets = borrow_targets(self.0, inner.targets());
                Ok(Box::new(FakeFrozen { wrong: self.0, inner, targets }))
            }
        }
    }
}

/// Takes the targets out of where they are, wrapped, and leaves placeholders there.
fn borrow_targets(wrong: Wrong, inner: &mut [Box<dyn Target>]) -> Vec<Box<dyn Target>> {
    let borrow = |target: &mut Box<dyn Target>| -> Box<dyn Target> {
        Box::new(FakeTarget { wrong, inner: Some(std::mem::replace(target, Box::new(Placeholder))) })
    };
    inner.iter_mut().map(borrow).collect()
}

/// Puts them back.
fn return_targets(targets: Vec<Box<dyn Target>>, inner: &mut [Box<dyn Target>]) {
    for (wrapped, place) in targets.into_iter().zip(inner) {
        let wrapped: Box<dyn std::any::Any> = wrapped;
        let mut fake = wrapped.downcast::<FakeTarget>().expect("what borrow_targets made");
        *place = fake.inner.take().expect("borrowed once");
    }
}

/// Runs one system call in a target.
fn call(target: &mut dyn Target, number: Sysno, arguments: &[Arg]) {
    let mut batch = Batch::new();
    batch.call(number, arguments);
    target.run(&batch).expect("a call that succeeds in every subject");
}

struct FakeFrozen {
    wrong: Wrong,
    inner: Box<dyn Frozen>,
    targets: Vec<Box<dyn Target>>,
}

impl FakeFrozen {
    fn into_inner(mut self) -> Box<dyn Frozen> {
        return_targets(std::mem::take(&mut self.targets), self.inner.targets());
        self.inner
    }
}

impl Frozen for FakeFrozen {
    fn processes(&self) -> &[FrozenProcess] {
        self.inner.processes()
    }
    fn zombies(&self) -> &[Zombie] {
        self.inner.zombies()
    }
    fn targets(&mut self) -> &mut [Box<dyn Target>] {
        &mut self.targets
    }
    fn virtual_ids(&mut self) -> Result<Option<Names>, DumpError> {
        self.inner.virtual_ids()
    }
    fn copy(&mut self, process: usize, without: &NotCopied) -> Result<Box<dyn Target>, TargetError> {
        return_targets(std::mem::take(&mut self.targets), self.inner.targets());
        let copied = self.inner.copy(process, without);
        self.targets = borrow_targets(self.wrong, self.inner.targets());
        copied
    }
    fn thaw(mut self: Box<Self>) -> Result<(), DumpError> {
        let wrong = self.wrong;
        if wrong == Wrong::LeavesDescriptor {
            call(&mut *self.targets[0], Sysno::dup, args![0]);
        }
        if wrong == Wrong::LeavesStopped { self.into_inner().stop() } else { self.into_inner().thaw() }
    }
    fn stop(self: Box<Self>) -> Result<(), DumpError> {
        self.into_inner().stop()
    }
    fn kill(self: Box<Self>) -> Result<(), DumpError> {
        let wrong = self.wrong;
        if wrong == Wrong::NeverStops { self.into_inner().thaw() } else { self.into_inner().kill() }
    }
}

struct FakeRestorer(Wrong);

impl FakeRestorer {
    fn real() -> Box<dyn Restorer> {
        real().and_then(|real| real.restorer).expect("ptrace restores")()
    }
}

impl Restorer for FakeRestorer {
    fn check(&self, image: &Image) -> Vec<Refusal> {
        FakeRestorer::real().check(image)
    }
    fn skeleton(&self, image: &Image) -> Result<Box<dyn Skeleton>, RestoreError> {
        let mut image = image.clone();
        if self.0 == Wrong::OtherPid {
            let (old, new) = (image.processes[0].task.pid, Pid(image.processes[0].task.pid.0 + 5000));
            let task = &mut image.processes[0].task;
            for id in [&mut task.pid, &mut task.pgid, &mut task.sid] {
                *id = if *id == old { new } else { *id };
            }
            image.processes[0].threads[0].tid = new;
        }
        let mut inner = FakeRestorer::real().skeleton(&image)?;
        let targets = borrow_targets(self.0, inner.targets());
        Ok(Box::new(FakeSkeleton { wrong: self.0, inner, targets }))
    }
    fn renames(&self) -> bool {
        FakeRestorer::real().renames()
    }
    fn filler(&self) -> Box<dyn Filler> {
        FakeRestorer::real().filler()
    }
}

struct FakeSkeleton {
    wrong: Wrong,
    inner: Box<dyn Skeleton>,
    targets: Vec<Box<dyn Target>>,
}

impl Skeleton for FakeSkeleton {
    fn targets(&mut self) -> &mut [Box<dyn Target>] {
        &mut self.targets
    }
    fn real_ids(&self) -> Option<Names> {
        self.inner.real_ids()
    }
    fn release(mut self: Box<Self>) -> Result<(), RestoreError> {
        let root = &mut *self.targets[0];
        match self.wrong {
            Wrong::LosesDescriptor => call(root, Sysno::close, args![3]),
            Wrong::AddsDescriptor => call(root, Sysno::dup, args![0]),
            Wrong::AddsMapping => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                call(root, Sysno::mmap, args![0, 4096, libc::PROT_READ, flags, -1, 0]);
            }
            _ => {}
        }
        return_targets(std::mem::take(&mut self.targets), self.inner.targets());
        if self.wrong == Wrong::RestoresNothing { Ok(()) } else { self.inner.release() }
    }
}

/// A target that passes everything on, but for what is broken.
struct FakeTarget {
    wrong: Wrong,
    inner: Option<Box<dyn Target>>,
}

impl FakeTarget {
    fn inner(&mut self) -> &mut dyn Target {
        &mut **self.inner.as_mut().expect("not returned yet")
    }
    fn peek(&self) -> &dyn Target {
        &**self.inner.as_ref().expect("not returned yet")
    }
}

impl Target for FakeTarget {
    fn pid(&self) -> Pid {
        self.peek().pid()
    }
    fn threads(&self) -> &[Pid] {
        self.peek().threads()
    }
    fn proc(&self) -> &ProcDir {
        self.peek().proc()
    }
    fn start(&mut self, thread: usize, batch: &Batch) -> Result<(), TargetError> {
        self.inner().start(thread, batch)
    }
    fn finish(&mut self, thread: usize, batch: &Batch) -> Result<Replies, TargetError> {
        self.inner().finish(thread, batch)
    }
    fn read(&mut self, from: RemotePtr, buffer: &mut [u8]) -> Result<(), TargetError> {
        self.inner().read(from, buffer)
    }
    fn write(&mut self, to: RemotePtr, bytes: &[u8]) -> Result<(), TargetError> {
        self.inner().write(to, bytes)
    }
    fn writer(&self) -> Option<Box<dyn MemoryWriter>> {
        self.peek().writer()
    }
    fn fds_out(&mut self, fds: &[RemoteFd]) -> Result<Vec<OwnedFd>, TargetError> {
        self.inner().fds_out(fds)
    }
    fn fds_in(&mut self, fds: &[BorrowedFd<'_>]) -> Result<Vec<RemoteFd>, TargetError> {
        self.inner().fds_in(fds)
    }
    fn receive_fd(&self, batch: &mut Batch) -> Result<Arg, TargetError> {
        self.peek().receive_fd(batch)
    }
    fn send_fd(&mut self, fd: BorrowedFd<'_>) -> Result<(), TargetError> {
        self.inner().send_fd(fd)
    }
    fn fds_done(&mut self, fds: &[RemoteFd]) -> Result<(), TargetError> {
        self.inner().fds_done(fds)
    }
    fn hold_fds(&mut self, numbers: std::ops::Range<i32>) {
        self.inner().hold_fds(numbers);
    }
    fn compare(&self, kind: Kcmp, mine: u64, other: Pid, theirs: u64) -> Result<Ordering, TargetError> {
        self.peek().compare(kind, mine, other, theirs)
    }

    fn file_of_handle(&self, mount: BorrowedFd<'_>, kind: i32, handle: &[u8]) -> Result<OwnedFd, TargetError> {
        self.peek().file_of_handle(mount, kind, handle)
    }
    fn private_pages(&mut self, start: u64, end: u64) -> Result<PrivatePages, TargetError> {
        let mut pages = self.inner().private_pages(start, end)?;
        // So many single pages with zeros between them are those of the case.
        if self.wrong == Wrong::LosesPage && pages.data.len() > 100 {
            pages.data.remove(pages.data.len() / 2);
        }
        Ok(pages)
    }
    fn covered(&self) -> Vec<(RemotePtr, Vec<u8>)> {
        self.peek().covered()
    }
    fn footprint(&self) -> Footprint {
        self.peek().footprint()
    }
    fn context(&mut self, thread: usize) -> Result<Context, TargetError> {
        let mut context = self.inner().context(thread)?;
        match self.wrong {
            // The first byte of XMM13 in the legacy area of every xsave layout.
            Wrong::ChangesRegister => context.registers.xsave[160 + 13 * 16] ^= 1,
            // The call of the case is made by its second thread.
            Wrong::InterruptsCalls if thread == 1 => {
                let mut next = [0; 2];
                let general = &mut context.registers.general;
                if self.inner().read(RemotePtr(general.rip), &mut next).is_ok() && next == [0x0f, 0x05] {
                    general.rip += 2;
                    general.rax = -i64::from(libc::EINTR) as u64;
                }
            }
            _ => {}
        }
        Ok(context)
    }
    fn pending(&mut self, queue: Queue) -> Result<Vec<SigInfo>, TargetError> {
        if self.wrong == Wrong::LosesSignals { Ok(Vec::new()) } else { self.inner().pending(queue) }
    }
    fn set_context(&mut self, thread: usize, context: &Context) -> Result<(), TargetError> {
        self.inner().set_context(thread, context)
    }
}

/// Where a target was borrowed from. Nobody may use it.
struct Placeholder;

impl Target for Placeholder {
    fn pid(&self) -> Pid {
        unreachable!("a borrowed target")
    }
    fn threads(&self) -> &[Pid] {
        unreachable!("a borrowed target")
    }
    fn proc(&self) -> &ProcDir {
        unreachable!("a borrowed target")
    }
    fn start(&mut self, _: usize, _: &Batch) -> Result<(), TargetError> {
        unreachable!("a borrowed target")
    }
    fn finish(&mut self, _: usize, _: &Batch) -> Result<Replies, TargetError> {
        unreachable!("a borrowed target")
    }
    fn read(&mut self, _: RemotePtr, _: &mut [u8]) -> Result<(), TargetError> {
        unreachable!("a borrowed target")
    }
    fn write(&mut self, _: RemotePtr, _: &[u8]) -> Result<(), TargetError> {
        unreachable!("a borrowed target")
    }
    fn writer(&self) -> Option<Box<dyn MemoryWriter>> {
        unreachable!("a borrowed target")
    }
    fn fds_out(&mut self, _: &[RemoteFd]) -> Result<Vec<OwnedFd>, TargetError> {
        unreachable!("a borrowed target")
    }
    fn fds_in(&mut self, _: &[BorrowedFd<'_>]) -> Result<Vec<RemoteFd>, TargetError> {
        unreachable!("a borrowed target")
    }
    fn receive_fd(&self, _: &mut Batch) -> Result<Arg, TargetError> {
        unreachable!("a borrowed target")
    }
    fn send_fd(&mut self, _: BorrowedFd<'_>) -> Result<(), TargetError> {
        unreachable!("a borrowed target")
    }
    fn fds_done(&mut self, _: &[RemoteFd]) -> Result<(), TargetError> {
        unreachable!("a borrowed target")
    }
    fn hold_fds(&mut self, _: std::ops::Range<i32>) {
        unreachable!("a borrowed target")
    }
    fn compare(&self, _: Kcmp, _: u64, _: Pid, _: u64) -> Result<Ordering, TargetError> {
        unreachable!("a borrowed target")
    }
    fn file_of_handle(&self, _: BorrowedFd<'_>, _: i32, _: &[u8]) -> Result<OwnedFd, TargetError> {
        unreachable!("a borrowed target")
    }
    fn private_pages(&mut self, _: u64, _: u64) -> Result<PrivatePages, TargetError> {
        unreachable!("a borrowed target")
    }
    fn covered(&self) -> Vec<(RemotePtr, Vec<u8>)> {
        unreachable!("a borrowed target")
    }
    fn footprint(&self) -> Footprint {
        unreachable!("a borrowed target")
    }
    fn context(&mut self, _: usize) -> Result<Context, TargetError> {
        unreachable!("a borrowed target")
    }
    fn pending(&mut self, _: Queue) -> Result<Vec<SigInfo>, TargetError> {
        unreachable!("a borrowed target")
    }
    fn set_context(&mut self, _: usize, _: &Context) -> Result<(), TargetError> {
        unreachable!("a borrowed target")
    }
}
