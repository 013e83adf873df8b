//! What the driver and the agent share: the layout of the region.
//!
//! This file is compiled twice, into the driver and into the blob. A region is one memfd, mapped in both:
//!
//! ```text
//! code      read and execute only in the target
//! control   one page for the whole region
//! lanes     one for each thread that runs the agent: a head, the calls, the bytes, a stack, the final frame;
//!           in a frozen target, one at the end for the agent of a copy of it
//! ```

/// The code's part of the region, in bytes.
pub const CODE_SIZE: usize = 8192;
/// Where lanes begin, counted from the control page.
pub const CONTROL_SIZE: usize = 4096;

/// Bytes of the lane of a main thread, and of any other's.
pub const MAIN_LANE_SIZE: usize = 256 * 1024;
pub const THREAD_LANE_SIZE: usize = 32 * 1024;
/// Bytes of the lane of a copy: the last of the region of a frozen target.
pub const COPY_LANE_SIZE: usize = 96 * 1024;
/// The end of each lane: room for `struct ucontext` and the largest xsave area there is (AMX: 11,008 bytes).
pub const FRAME_SIZE: usize = 12 * 1024;

/// The first page after the code.
#[repr(C)]
pub struct Control {
    /// Skeletons: 1 once the tree has been released. From then on a lost driver means "go on", not "exit".
    pub committed: u32,
}

/// What a call of the agent's own is: a number no system call has.
pub const CHECKSUM_PAGES: u32 = 0x8000_0000;
pub const USE_TILES: u32 = 0x8000_0001;
pub const COPY_PROCESS: u32 = 0x8000_0002;

/// Set in [`Call::flags`]: go on when it fails.
pub const MAY_FAIL: u16 = 1;

/// One call, as the agent finds it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Call {
    pub number: u32,
    pub flags: u16,
    /// Bit `n` set: argument `n` is the index of an earlier call, whose result it takes.
    pub results: u8,
    /// Bit `n` set: argument `n` is the address of a 32-bit word, whose value it takes.
    pub loads: u8,
    pub args: [u64; 6],
    pub result: i64,
}

/// How an agent waits for work.
pub const WAIT_SOCKET: u32 = 0;
pub const WAIT_FUTEX: u32 = 1;

/// What an agent does when its driver is gone.
pub const LEAVE_HEAL: u32 = 0;
pub const LEAVE_SKELETON: u32 = 1;

/// In [`Lane::command`] of a futex lane: return through the frame.
pub const COMMAND_LEAVE: u32 = u32::MAX;

/// Values of [`Lane::boot`]. Another value is the negative error number of the call that failed.
pub const BOOT_WAITING: i32 = 0;
/// The sockets are there.
pub const BOOT_READY: i32 = 1;
/// The driver has its own, and says so. Only from `BOOT_READY`.
pub const BOOT_TAKEN: i32 = 2;
/// The agent has left by itself, as nobody came: the thread runs the program. Never from `BOOT_TAKEN`.
pub const BOOT_GONE: i32 = 3;

/// The head of a lane. Addresses are the target's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Lane {
    /// Futex lanes: counts batches; the driver raises it and wakes.
    pub command: u32,
    /// Futex lanes: the last batch that is done; the agent sets it and wakes.
    pub done: u32,
    pub wait: u32,
    pub leave: u32,
    /// Socket lanes: the agent's end.
    pub socket: i32,
    /// Calls in the batch.
    pub calls: u32,
    /// Calls that were run.
    pub ran: u32,
    /// Frozen targets, main lane: whether the agent has made its sockets.
    pub boot: i32,
    /// Lanes that threads enter by themselves (from a signal handler): set by the thread once it is there.
    pub arrived: u32,
    /// Lanes of copies: the pid of the copy, or the negative error number of the call that was to make it.
    pub copy: i32,
    pub call_array: u64,
    pub control: u64,
    /// A `struct ucontext` for `rt_sigreturn`, through which the thread leaves the agent.
    pub frame: u64,
    /// Futex lanes of frozen targets: not 0 once the thread has left for good. The kernel writes it for a system call that
    /// the thread makes outside of the region.
    pub left: u64,
    /// Socket lanes of frozen targets: the way out that leaves the region behind.
    pub plain_frame: u64,
    /// Socket lanes of frozen targets: descriptors of ours to close on the way out; 0 for none.
    pub borrowed: [u32; 4],
    /// The same for a run of numbers: the first, and the one after the last; equal for none.
    pub held: [u32; 2],
    /// Socket lanes: the futex lanes of the same process, to release them.
    pub threads: u64,
    pub thread_count: u64,
    pub thread_stride: u64,
    /// Frozen targets, main lane: the sockets that the agent makes: its own, and the driver's, which the driver takes
    /// (`pidfd_getfd`) before it sends anything.
    pub pair: [i32; 2],
    /// Frozen targets, main lane: the driver, whose end is noticed while it has no socket yet; 0 where the target knows it by
    /// another number.
    pub driver: i32,
    /// Frozen targets, main lane: by what the agent watches the driver.
    pub watch: i32,
}
