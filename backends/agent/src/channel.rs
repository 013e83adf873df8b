//! One lane of a region: lays a batch out, wakes the agent, and reads what it did.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ckpt_core::batch::{Arg, Batch, Operation, Replies, Slot, Sysno};
use ckpt_core::{Pid, RemoteFd, TargetError, args};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, sendmsg, setsockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::protocol::{
    self, CHECKSUM_PAGES, CODE_SIZE, COMMAND_LEAVE, CONTROL_SIZE, COPY_PROCESS, Call, Lane, MAY_FAIL, USE_TILES,
};
use crate::region::{FRAME_SIZE, LaneKind, Region};
use crate::sys;

/// How the agent of a lane waits for work.
#[derive(Debug)]
pub enum Wait {
    /// On a socket, whose other end this is: it learns at once when we are gone.
    Socket { ours: OwnedFd, theirs: RemoteFd },
    /// On a futex, beside a main thread that watches a socket.
    Futex,
    /// It makes its sockets first: see [`Channel::connect`].
    Booting,
}

/// A lane with an agent in it.
#[derive(Debug)]
pub struct Channel {
    region: Arc<Region>,
    kind: LaneKind,
    /// Offset of the lane in the region.
    offset: usize,
    /// Where the target has the region.
    base: u64,
    wait: Wait,
    pid: Pid,
    /// How often we look for an answer before we sleep until it is there.
    looks: u32,
}

/// Longest time that one batch may take. Batches are cut so that a slow disk needs a few seconds for one.
const BATCH_TIMEOUT: Duration = Duration::from_secs(120);

/// `struct cmsghdr`.
const CONTROL_HEAD: usize = 16;

/// Most batches are over before we could fall asleep and be woken.
const LOOKS: u32 = 50;

/// Has a `recv` on a socket end now and then, to see to the process.
fn limit(socket: &OwnedFd) {
    // Where it cannot be set, a process that ended is noticed by the end of its socket alone.
    let _ = setsockopt(socket, ReceiveTimeout, &TimeVal::milliseconds(50));
}

impl Channel {
    /// Prepares a lane at `offset` of the region, which the target has at `base`.
    pub fn new(region: Arc<Region>, kind: LaneKind, offset: usize, base: u64, pid: Pid, wait: Wait) -> Channel {
        let channel = Channel::attach(region, kind, offset, base, pid, wait);
        let layout = kind.layout();
        let lane = channel.address();
        channel.region.mapping().put(
            offset,
            Lane {
                command: 0,
                done: 0,
                wait: match channel.wait {
                    Wait::Socket { .. } | Wait::Booting => protocol::WAIT_SOCKET,
                    Wait::Futex => protocol::WAIT_FUTEX,
                },
                leave: protocol::LEAVE_SKELETON,
                socket: match &channel.wait {
                    Wait::Socket { theirs, .. } => theirs.0,
                    Wait::Futex | Wait::Booting => -1,
                },
                calls: 0,
                ran: 0,
                boot: protocol::BOOT_WAITING,
                arrived: 0,
                copy: 0,
                call_array: lane + layout.calls as u64,
                control: base + CODE_SIZE as u64,
                frame: 0,
                left: 0,
                plain_frame: 0,
                borrowed: [0; 4],
                held: [0; 2],
                threads: 0,
                thread_count: 0,
                thread_stride: 0,
                pair: [-1; 2],
                driver: 0,
                watch: -1,
            },
        );
        channel.put_address();
        channel
    }

    /// A new thread or process takes its lane from the top of its stack.
    fn put_address(&self) {
        self.region.mapping().put(self.offset + self.kind.layout().stack_top - 16, self.address());
    }

    /// The agent is on our own processor: it runs when we sleep.
    pub fn take_turns(&mut self) {
        self.looks = 0;
    }

    /// A lane that is prepared already.
    pub fn attach(region: Arc<Region>, kind: LaneKind, offset: usize, base: u64, pid: Pid, wait: Wait) -> Channel {
        if let Wait::Socket { ours, .. } = &wait {
            limit(ours);
        }
        Channel { region, kind, offset, base, wait, pid, looks: LOOKS }
    }

    /// The same lane of a thread once more, for whoever sends a new thread into it.
    ///
    /// For the main lane it gives no way to talk to its agent: only the addresses.
    pub fn again(&self) -> Channel {
        Channel { region: self.region.clone(), wait: Wait::Futex, ..*self }
    }

    /// A thread's lane as it was in the beginning, once its thread has ended.
    pub fn reset(&mut self) {
        let Channel { kind, offset, base, pid, .. } = *self;
        *self = Channel::new(self.region.clone(), kind, offset, base, pid, Wait::Futex);
    }

    /// Once a process that was made on its stack has ended, for another in the place of that: what it is to do is to be done
    /// still.
    pub fn rearm(&mut self) {
        self.put_address();
        self.change(|lane| lane.done = 0);
    }

    /// Whether the agent has something to say.
    pub fn has_message(&self) -> bool {
        let Wait::Socket { ours, .. } = &self.wait else { return false };
        let mut ready = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Frozen targets: prepares the lane of a copy, the last of the region. `ours` is the end of its socket that we keep; the
    /// number of the other is known once the copy is made.
    pub(crate) fn lane_of_copy(&self, ours: OwnedFd) -> Channel {
        let offset = self.region.size() - LaneKind::Copy.size();
        let wait = Wait::Socket { ours, theirs: RemoteFd(-1) };
        Channel::new(self.region.clone(), LaneKind::Copy, offset, self.base, self.pid, wait)
    }

    /// The same, when it is: the agent has written it into the lane.
    pub(crate) fn socket_is_known(&mut self) {
        let number = self.head().socket;
        if let Wait::Socket { theirs, .. } = &mut self.wait {
            *theirs = RemoteFd(number);
        }
    }

    /// Offset in a region of the first lane.
    pub const FIRST: usize = CODE_SIZE + CONTROL_SIZE;

    pub fn region(&self) -> Arc<Region> {
        self.region.clone()
    }

    /// Address of the lane in the target.
    pub fn address(&self) -> u64 {
        self.base + self.offset as u64
    }

    /// Address of the agent's entry in the target.
    pub fn entry(&self) -> u64 {
        self.base
    }

    /// A stack for the agent: its lowest address and its size. The lane's address is the word at the top.
    pub fn stack(&self) -> (u64, u64) {
        let layout = self.kind.layout();
        let low = self.address() + (layout.bytes + layout.max_bytes) as u64;
        (low, self.address() + layout.stack_top as u64 - 16 - low)
    }

    /// Address, in the target, that [`set_frame`](Channel::set_frame) puts a frame at.
    pub fn frame_address(&self) -> u64 {
        self.address() + self.kind.layout().frame as u64
    }

    fn head(&self) -> Lane {
        self.region.mapping().get::<Lane>(self.offset)
    }

    fn change(&self, change: impl FnOnce(&mut Lane)) {
        let mut lane = self.head();
        change(&mut lane);
        self.region.mapping().put(self.offset, lane);
    }

    /// Frozen targets: when we are gone, the agent hands the thread back through the frame at this address; through the
    /// plain one, where it cannot be known whether the region may go.
    pub fn set_healing(&mut self, frame: u64, plain_frame: u64) {
        self.change(|lane| lane.leave = protocol::LEAVE_HEAL);
        self.set_way(frame, plain_frame);
    }

    /// Skeletons that are about to be released: the same frames of a way that leads through the program's own stack.
    pub fn set_way(&mut self, frame: u64, plain_frame: u64) {
        self.change(|lane| {
            lane.frame = frame;
            lane.plain_frame = plain_frame;
        });
    }

    /// For a thread that will enter the lane by itself: as long as it has not, nobody waits for it to leave.
    pub fn expect(&mut self) {
        self.change(|lane| {
            lane.leave = protocol::LEAVE_HEAL;
            lane.left = 1;
        });
    }

    /// Whether such a thread is in its lane.
    pub fn has_arrived(&self) -> bool {
        let arrived = self.offset + std::mem::offset_of!(Lane, arrived);
        self.region.mapping().atomic(arrived).load(Ordering::Acquire) != 0
    }

    /// Reads the end of the lane, where a thread that enters by itself says where it comes from.
    pub fn read_arrival(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= FRAME_SIZE);
        self.region.mapping().read(self.offset + self.kind.layout().frame + at, bytes);
    }

    /// Writes there.
    pub fn write_arrival(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= FRAME_SIZE);
        self.region.mapping().write(self.offset + self.kind.layout().frame + at, bytes);
    }

    /// Address of the word that says that the thread of this lane has left.
    pub fn left_address(&self) -> u64 {
        self.address() + std::mem::offset_of!(Lane, left) as u64
    }

    /// Frozen targets: the agent closes these if we are lost. There is room for four; more are left behind.
    pub fn set_borrowed(&mut self, fds: &[RemoteFd]) {
        let mut borrowed = [0u32; 4];
        for (place, fd) in borrowed.iter_mut().zip(fds) {
            // One more than the number, so that 0 is none.
            *place = fd.0 as u32 + 1;
        }
        self.change(|lane| lane.borrowed = borrowed);
    }

    /// Frozen targets: the agent closes all of these numbers if we are lost.
    pub fn set_held(&mut self, numbers: std::ops::Range<i32>) {
        self.change(|lane| lane.held = [numbers.start as u32, numbers.end as u32]);
    }

    /// The thread of this lane is stopped, and will not come back to it.
    pub fn set_left(&mut self) {
        self.change(|lane| lane.left = 1);
    }

    /// Frozen targets: whose end ends the wait for a first batch; 0 for nobody's.
    pub fn set_driver(&mut self, driver: i32) {
        self.change(|lane| lane.driver = driver);
    }

    /// Frozen targets: waits until the agent has made its sockets, and takes ours with `take`.
    pub fn connect(
        &mut self,
        idle: &mut dyn FnMut() -> Result<(), TargetError>,
        take: impl FnOnce(RemoteFd) -> Result<OwnedFd, TargetError>,
    ) -> Result<(), TargetError> {
        let deadline = Instant::now() + BATCH_TIMEOUT;
        let word = self.region.mapping().atomic(self.offset + std::mem::offset_of!(Lane, boot));
        let mut looks = 200;
        loop {
            match word.load(Ordering::Acquire) as i32 {
                protocol::BOOT_READY => break,
                protocol::BOOT_GONE => return Err(self.left_by_itself()),
                protocol::BOOT_WAITING if looks > 0 => {
                    looks -= 1;
                    std::thread::yield_now();
                }
                protocol::BOOT_WAITING => {
                    sys::futex_wait(word, protocol::BOOT_WAITING as u32, Duration::from_millis(20));
                    idle()?;
                    if Instant::now() > deadline {
                        return Err(TargetError::TimedOut { pid: self.pid, seconds: BATCH_TIMEOUT.as_secs() });
                    }
                }
                error => {
                    return Err(self.driver_error("a socket in the process", io::Error::from_raw_os_error(-error)));
                }
            }
        }
        let [theirs, ours] = self.head().pair.map(RemoteFd);
        let ours = take(ours)?;
        // From here on the agent stays as long as we have the socket.
        let (ready, taken) = (protocol::BOOT_READY as u32, protocol::BOOT_TAKEN as u32);
        if word.compare_exchange(ready, taken, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return Err(self.left_by_itself());
        }
        limit(&ours);
        self.wait = Wait::Socket { ours, theirs };
        Ok(())
    }

    fn left_by_itself(&self) -> TargetError {
        self.driver_error("getting in", io::Error::other("it went on by itself, as ckpt was held up; try again"))
    }

    /// Frozen targets: whether the thread has left the agent by itself, and runs the program.
    pub fn has_left(&self) -> bool {
        self.head().boot == protocol::BOOT_GONE
    }

    /// Frozen targets: what the agent has open, should it not have come to [`connect`](Channel::connect).
    pub fn boot_descriptors(&self) -> Vec<RemoteFd> {
        let Lane { pair, watch, .. } = self.head();
        pair.into_iter().chain([watch]).filter(|&fd| fd >= 0).map(RemoteFd).collect()
    }

    /// Skeletons: the frame that the thread goes on through if we are lost after the release.
    pub fn set_frame(&mut self, frame: &[u8]) {
        assert!(frame.len() <= FRAME_SIZE);
        self.region.mapping().write(self.offset + self.kind.layout().frame, frame);
        let address = self.frame_address();
        self.set_way(address, address);
    }

    /// The futex lanes of the same process, one after the other in the region.
    pub fn set_threads(&mut self, first: u64, count: usize) {
        self.change(|lane| {
            lane.threads = first;
            lane.thread_count = count as u64;
            lane.thread_stride = LaneKind::Thread.size() as u64;
        });
    }

    /// The agent's end of the socket, where it has one.
    pub fn their_socket(&self) -> Option<RemoteFd> {
        match &self.wait {
            Wait::Socket { theirs, .. } => Some(*theirs),
            Wait::Futex | Wait::Booting => None,
        }
    }

    /// The agent's end has another number now.
    pub fn socket_moved(&mut self, to: RemoteFd) {
        if let Wait::Socket { theirs, .. } = &mut self.wait {
            *theirs = to;
        }
        self.change(|lane| lane.socket = to.0);
    }

    /// Runs a batch. `idle` is called now and then while nothing comes: the process may have to be helped along.
    pub fn run(
        &mut self,
        batch: &Batch,
        idle: &mut dyn FnMut() -> Result<(), TargetError>,
    ) -> Result<Replies, TargetError> {
        self.send(batch)?;
        self.finish(batch, idle)
    }

    /// Waits for the end of a batch that was sent.
    pub fn finish(
        &mut self,
        batch: &Batch,
        idle: &mut dyn FnMut() -> Result<(), TargetError>,
    ) -> Result<Replies, TargetError> {
        if batch.is_empty() {
            return Ok(Replies::new(Vec::new(), batch.initial_bytes().to_vec()));
        }
        self.wait(idle)?;
        self.replies(batch)
    }

    /// Lays a batch out and wakes the agent, if there is anything to do for it.
    pub fn send(&mut self, batch: &Batch) -> Result<(), TargetError> {
        if batch.is_empty() {
            return Ok(());
        }
        let layout = self.kind.layout();
        let (calls, bytes) = (batch.len(), batch.initial_bytes().len());
        if calls > layout.max_calls || bytes > layout.max_bytes {
            return Err(TargetError::BatchTooLarge { calls, bytes });
        }
        for (index, call) in self.place(batch).into_iter().enumerate() {
            self.region.mapping().put(self.offset + layout.calls + index * size_of::<Call>(), call);
        }
        self.change(|lane| {
            lane.calls = calls as u32;
            lane.ran = 0;
        });
        match &self.wait {
            Wait::Socket { ours, .. } => {
                let sent = nix::sys::socket::send(ours.as_raw_fd(), b"r", MsgFlags::MSG_NOSIGNAL);
                sent.map_err(|_| TargetError::Gone { pid: self.pid })?;
            }
            Wait::Futex => {
                let command = self.region.mapping().atomic(self.offset);
                command.fetch_add(1, Ordering::Release);
                sys::futex_wake(command);
            }
            Wait::Booting => unreachable!("a lane is connected before it is used"),
        }
        Ok(())
    }

    /// Puts the bytes of a batch into the lane, and gives its calls with all addresses filled in.
    fn place(&mut self, batch: &Batch) -> Vec<Call> {
        let layout = self.kind.layout();
        let memory = self.region.mapping();
        let bytes_at = self.offset + layout.bytes;
        let bytes_address = self.address() + layout.bytes as u64;
        memory.write(bytes_at, batch.initial_bytes());
        for (at, slot) in batch.pointers() {
            memory.put(bytes_at + at, bytes_address + slot.offset() as u64);
        }
        let in_target = |call: &ckpt_core::batch::Call| {
            let (mut results, mut loads) = (0, 0);
            let mut args = [0; 6];
            for (n, arg) in call.args.iter().enumerate() {
                args[n] = match *arg {
                    Arg::Value(value) => value,
                    Arg::Address(slot) => bytes_address + slot.offset() as u64,
                    Arg::Result(id) => {
                        results |= 1 << n;
                        id.index() as u64
                    }
                    Arg::Loaded(slot) => {
                        loads |= 1 << n;
                        bytes_address + slot.offset() as u64
                    }
                };
            }
            let number = match call.operation {
                Operation::System(number) => number as u32,
                Operation::ChecksumPages => CHECKSUM_PAGES,
                Operation::UseTiles => USE_TILES,
                Operation::CopyProcess => COPY_PROCESS,
            };
            Call { number, flags: if call.may_fail { MAY_FAIL } else { 0 }, results, loads, args, result: 0 }
        };
        batch.calls().iter().map(in_target).collect()
    }

    /// The bytes of a batch that was placed, as its calls left them.
    fn placed_bytes(&self, batch: &Batch) -> Vec<u8> {
        let mut bytes = vec![0; batch.initial_bytes().len()];
        self.region.mapping().read(self.offset + self.kind.layout().bytes, &mut bytes);
        bytes
    }

    /// Waits until the agent has run what was sent.
    pub fn wait(&mut self, idle: &mut dyn FnMut() -> Result<(), TargetError>) -> Result<(), TargetError> {
        let deadline = Instant::now() + BATCH_TIMEOUT;
        let mut looks = self.looks;
        loop {
            match &self.wait {
                Wait::Socket { ours, .. } => {
                    // It has a time-out of its own: see `limit`.
                    let flags = if looks > 0 { MsgFlags::MSG_DONTWAIT } else { MsgFlags::empty() };
                    match recv(ours.as_raw_fd(), &mut [0], flags) {
                        Ok(1) => return Ok(()),
                        Ok(_) => return Err(TargetError::Gone { pid: self.pid }),
                        Err(Errno::EAGAIN) if looks > 0 => {
                            looks -= 1;
                            std::thread::yield_now();
                            continue;
                        }
                        Err(Errno::EAGAIN | Errno::EINTR) => {}
                        Err(_) => return Err(TargetError::Gone { pid: self.pid }),
                    }
                }
                Wait::Futex => {
                    let memory = self.region.mapping();
                    let command = memory.atomic(self.offset).load(Ordering::Relaxed);
                    let done = memory.atomic(self.offset + 4);
                    let seen = done.load(Ordering::Acquire);
                    if seen == command {
                        return Ok(());
                    }
                    sys::futex_wait(done, seen, Duration::from_millis(50));
                    if done.load(Ordering::Acquire) == command {
                        return Ok(());
                    }
                }
                Wait::Booting => unreachable!("a lane is connected before it is used"),
            }
            idle()?;
            if Instant::now() > deadline {
                return Err(TargetError::TimedOut { pid: self.pid, seconds: BATCH_TIMEOUT.as_secs() });
            }
        }
    }

    /// What the calls of a batch that was run returned.
    pub fn replies(&self, batch: &Batch) -> Result<Replies, TargetError> {
        let layout = self.kind.layout();
        let memory = self.region.mapping();
        let ran = (self.head().ran as usize).min(batch.len());
        let mut results = Vec::with_capacity(batch.len());
        for (index, call) in batch.calls()[..ran].iter().enumerate() {
            let result = memory.get::<Call>(self.offset + layout.calls + index * size_of::<Call>()).result;
            if let (Err(errno), false, Operation::System(name)) =
                (ckpt_core::batch::decode(result), call.may_fail, call.operation)
            {
                return Err(TargetError::Call { pid: self.pid, call: name, index, errno });
            }
            results.push(result);
        }
        if ran < batch.len() {
            return Err(TargetError::Gone { pid: self.pid });
        }
        Ok(Replies::new(results, self.placed_bytes(batch)))
    }

    /// Copies descriptors of ours into the target, with numbers from `spare` on.
    pub fn fds_in(
        &mut self,
        fds: &[BorrowedFd<'_>],
        spare: i32,
        idle: &mut dyn FnMut() -> Result<(), TargetError>,
    ) -> Result<Vec<RemoteFd>, TargetError> {
        // SCM_MAX_FD is 253.
        let mut all = Vec::with_capacity(fds.len());
        for some in fds.chunks(200) {
            all.extend(self.fds_in_once(some, spare, idle)?);
        }
        Ok(all)
    }

    /// Adds the call that takes one descriptor. The argument stands for its number; for none, if nothing was sent.
    pub fn receive_one(&self, batch: &mut Batch) -> Result<Arg, TargetError> {
        Ok(Arg::Loaded(self.receive(batch, 1)?.after(CONTROL_HEAD)))
    }

    /// Adds the call that takes descriptors, and gives its control message: their numbers come after its head.
    fn receive(&self, batch: &mut Batch, count: usize) -> Result<Slot, TargetError> {
        let Wait::Socket { theirs, .. } = &self.wait else {
            return Err(self.driver_error("passing descriptors to a thread", io::ErrorKind::Unsupported.into()));
        };
        // struct msghdr: name, namelen, iov, iovlen, control, controllen, flags
        let control_size = CONTROL_HEAD + count.next_multiple_of(2) * 4;
        let byte = batch.room(1);
        let mut nothing = vec![0xff; control_size];
        nothing[..CONTROL_HEAD].fill(0);
        let control = batch.bytes(&nothing);
        let vector = batch.words(&[0, 1]);
        batch.pointer(vector, 0, byte);
        let message = batch.words(&[0, 0, 0, 1, 0, control_size as u64, 0]);
        batch.pointer(message, 16, vector);
        batch.pointer(message, 32, control);
        batch.call(Sysno::recvmsg, args![*theirs, message, libc::MSG_CMSG_CLOEXEC]);
        Ok(control)
    }

    /// Sends what [`receive_one`](Channel::receive_one) takes.
    pub fn pass(&self, fds: &[BorrowedFd<'_>]) -> Result<(), TargetError> {
        let Wait::Socket { ours, .. } = &self.wait else {
            return Err(self.driver_error("passing descriptors to a thread", io::ErrorKind::Unsupported.into()));
        };
        let raw: Vec<i32> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let sent = sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(b"f")], &rights, MsgFlags::MSG_NOSIGNAL, None);
        sent.map(drop).map_err(|errno| {
            // Whoever waits for a descriptor gets a word without one.
            let _ = nix::sys::socket::send(ours.as_raw_fd(), b"f", MsgFlags::MSG_NOSIGNAL);
            self.driver_error("passing descriptors", errno.into())
        })
    }

    fn fds_in_once(
        &mut self,
        fds: &[BorrowedFd<'_>],
        spare: i32,
        idle: &mut dyn FnMut() -> Result<(), TargetError>,
    ) -> Result<Vec<RemoteFd>, TargetError> {
        let mut batch = Batch::new();
        let control = self.receive(&mut batch, fds.len())?;
        self.send(&batch)?;
        self.pass(fds)?;
        let replies = self.finish(&batch, idle)?;
        let got = (replies.u64(control) as usize).saturating_sub(CONTROL_HEAD) / 4;
        if got != fds.len() {
            return Err(self.driver_error("passing descriptors", Errno::EMFILE.into()));
        }
        let mut batch = Batch::new();
        let mut lifted = Vec::with_capacity(fds.len());
        for word in replies.bytes(control)[CONTROL_HEAD..].chunks_exact(4).take(got) {
            let low = i32::from_ne_bytes(word.try_into().unwrap());
            if low >= spare {
                lifted.push(Err(low));
            } else {
                lifted.push(Ok(batch.call(Sysno::fcntl, args![low, libc::F_DUPFD_CLOEXEC, spare])));
                batch.call(Sysno::close, args![low]);
            }
        }
        let replies = self.run(&batch, idle)?;
        Ok(lifted.into_iter().map(|fd| fd.map_or_else(RemoteFd, |call| replies.fd(call))).collect())
    }

    /// Sends the agent's end a byte: whoever is to become the agent may go on.
    pub fn wake(&self) -> Result<(), TargetError> {
        let Wait::Socket { ours, .. } = &self.wait else {
            return Err(self.driver_error("waking a thread", io::ErrorKind::Unsupported.into()));
        };
        let sent = nix::sys::socket::send(ours.as_raw_fd(), b"g", MsgFlags::MSG_NOSIGNAL);
        sent.map(drop).map_err(|_| TargetError::Gone { pid: self.pid })
    }

    /// Copies descriptors of the target to us, through the socket (`SCM_RIGHTS`).
    pub fn fds_out(
        &mut self,
        fds: &[RemoteFd],
        idle: &mut dyn FnMut() -> Result<(), TargetError>,
    ) -> Result<Vec<OwnedFd>, TargetError> {
        let mut all = Vec::with_capacity(fds.len());
        for some in fds.chunks(200) {
            all.extend(self.fds_out_once(some, idle)?);
        }
        Ok(all)
    }

    fn fds_out_once(
        &mut self,
        fds: &[RemoteFd],
        idle: &mut dyn FnMut() -> Result<(), TargetError>,
    ) -> Result<Vec<OwnedFd>, TargetError> {
        let Wait::Socket { ours, theirs } = &self.wait else {
            return Err(self.driver_error("fetching descriptors from a thread", io::ErrorKind::Unsupported.into()));
        };
        // struct cmsghdr: length, level, type, and the numbers
        let mut control = (16 + 4 * fds.len() as u64).to_ne_bytes().to_vec();
        control.extend([libc::SOL_SOCKET.to_ne_bytes(), libc::SCM_RIGHTS.to_ne_bytes()].concat());
        control.extend(fds.iter().flat_map(|fd| fd.0.to_ne_bytes()));
        let mut batch = Batch::new();
        let byte = batch.bytes(b"d");
        let length = control.len();
        let control = batch.bytes(&control);
        let vector = batch.words(&[0, 1]);
        batch.pointer(vector, 0, byte);
        let message = batch.words(&[0, 0, 0, 1, 0, length as u64, 0]);
        batch.pointer(message, 16, vector);
        batch.pointer(message, 32, control);
        let sent = batch.try_call(Sysno::sendmsg, args![*theirs, message, libc::MSG_NOSIGNAL]);
        let ours = ours.as_raw_fd();
        self.send(&batch)?;
        // What comes first are the descriptors, or, where they could not be sent, the word that the batch is done.
        self.await_message(idle)?;
        let mut byte = [0u8];
        let mut vector = [io::IoSliceMut::new(&mut byte)];
        let mut room = nix::cmsg_space!([i32; 253]);
        let got = recvmsg::<()>(ours, &mut vector, Some(&mut room), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(|_| TargetError::Gone { pid: self.pid })?;
        let mut received = Vec::with_capacity(fds.len());
        for message in got.cmsgs().map_err(|errno| self.driver_error("fetching descriptors", errno.into()))? {
            if let ControlMessageOwned::ScmRights(fds) = message {
                received.extend(fds.into_iter().map(sys::own));
            }
        }
        let is_end = got.bytes == 0;
        if is_end {
            return Err(TargetError::Gone { pid: self.pid });
        }
        if byte != *b"d" {
            // The batch is done, and nothing was sent.
            let replies = self.replies(&batch)?;
            let errno = replies.result(sent).err().unwrap_or(Errno::EBADF);
            return Err(self.driver_error("sendmsg of descriptors", errno.into()));
        }
        self.wait(idle)?;
        if received.len() != fds.len() {
            return Err(self.driver_error("fetching descriptors", Errno::EMFILE.into()));
        }
        Ok(received)
    }

    /// Waits until there is something to read in the socket.
    fn await_message(&self, idle: &mut dyn FnMut() -> Result<(), TargetError>) -> Result<(), TargetError> {
        let Wait::Socket { ours, .. } = &self.wait else { return Ok(()) };
        let deadline = Instant::now() + BATCH_TIMEOUT;
        loop {
            let mut ready = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::from(50u8)) {
                Ok(1..) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => idle()?,
                Err(errno) => return Err(self.driver_error("poll", errno.into())),
            }
            if Instant::now() > deadline {
                return Err(TargetError::TimedOut { pid: self.pid, seconds: BATCH_TIMEOUT.as_secs() });
            }
        }
    }

    /// Lets a futex lane go on through its frame.
    pub fn leave(&mut self) {
        let command = self.region.mapping().atomic(self.offset);
        command.store(COMMAND_LEAVE, Ordering::Release);
        sys::futex_wake(command);
    }

    fn driver_error(&self, operation: &'static str, source: io::Error) -> TargetError {
        TargetError::Driver { pid: self.pid, operation, source }
    }
}
