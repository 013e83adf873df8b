//! What the driver and the shim share: how a thread of a program gets from a signal into its lane of the agent.
//!
//! This file is compiled twice, into the driver and into the shim. The driver listens on an abstract Unix socket and
//! queues a signal with a value for each thread. The first thread that takes it connects, and these messages follow:
//!
//! ```text
//! shim -> driver   Hello     who it is
//! driver -> shim   Welcome   with the memfd of the region
//! shim -> driver   Ready     where the region is mapped now
//! driver -> shim   Go        the lanes are laid out
//! ```
//!
//! Then that thread enters the main lane, and every other one the lane of its index, when its signal comes.

/// The signal. glibc keeps it for `pthread_cancel` alone, so no program can take, block or send it through the C
/// library; one that cancels threads shares it: what is not ours is passed on.
pub const SIGNAL: i32 = 32;

/// In place of it, for a thread that blocks it, as the C library's thread for timers with SIGEV_THREAD does, which takes it by
/// `sigwaitinfo`. The C library leaves this one open there: it has every thread change its user by it (setuid(2)). It is the
/// shim's only from the moment when a driver finds such a thread until that has come.
pub const SECOND_SIGNAL: i32 = 33;

/// Top 16 bits of the value of a signal that is ours. The index of a thread follows in the next 16, then 32 random
/// bits, which name the socket.
pub const VALUE_TAG: u64 = 0xc4b7;

pub const fn signal_value(index: u16, nonce: u32) -> u64 {
    VALUE_TAG << 48 | (index as u64) << 32 | nonce as u64
}

/// What stands for the random bits where a signal could not bring them (`RLIMIT_SIGPENDING` is used up): then the driver
/// waits for this process alone.
pub const fn nonce_of_process(pid: i32) -> u32 {
    pid as u32 | 1 << 31
}

/// Begins every [`Hello`]; the last byte is the version of all that is in this file and in the agent's protocol.
pub const MAGIC: u64 = 0x636b_7074_7368_6d05;

/// The name of the socket, after its zero byte: this, and eight hexadecimal digits.
pub const SOCKET_PREFIX: &[u8; 13] = b"ckpt-preload-";
pub const SOCKET_NAME: usize = 1 + SOCKET_PREFIX.len() + 8;

pub fn socket_name(nonce: u32) -> [u8; SOCKET_NAME] {
    socket_name_of(SOCKET_PREFIX, nonce)
}

pub fn socket_name_of(prefix: &[u8; 13], number: u32) -> [u8; SOCKET_NAME] {
    let mut name = [0; SOCKET_NAME];
    let mut n = 0;
    while n < prefix.len() {
        name[1 + n] = prefix[n];
        n += 1;
    }
    n = 0;
    while n < 8 {
        name[1 + prefix.len() + n] = b"0123456789abcdef"[(number >> (28 - 4 * n) & 15) as usize];
        n += 1;
    }
    name
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Hello {
    pub magic: u64,
    pub pid: i32,
    pub tid: i32,
    /// Index of the thread in the driver's list: the one that will be in the main lane.
    pub index: u32,
    /// glibc's `__rseq_offset`, from the thread pointer, and whether there is one.
    pub has_rseq: u32,
    pub rseq_offset: i64,
    /// Where the header of the virtual ids is, and their generation; see `translation.rs`.
    pub ids: u64,
    pub generation: u64,
    /// Where the [`Lent`] is.
    pub lent: u64,
}

/// In the shim: two actions (`struct sigaction` of the kernel) of [`SECOND_SIGNAL`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Lent {
    /// The shim's handler.
    pub ours: [u64; 4],
    /// What the driver has found before it set that.
    pub before: [u64; 4],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Welcome {
    /// Of the region.
    pub size: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ready {
    pub base: u64,
    /// The frame that leads out, for the agent.
    pub frame: u64,
    pub socket: i32,
    pub _reserved: u32,
}

/// At the end of a lane: where its thread comes from.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Arrival {
    /// `struct ucontext`, up to the signal mask.
    pub context: [u64; 38],
    pub fs_base: u64,
    pub gs_base: u64,
    /// The number of a system call that gave EINTR for nothing but our signal; see [`NO_CALL`] and [`UNKNOWN_CALL`].
    pub interrupted: i64,
    /// Bytes of the xsave area, which follows at [`XSAVE_AT`].
    pub xsave_size: u64,
    pub tid: i32,
    pub _reserved: i32,
    /// Where the handler has its stack of [`HANDLER_STACK`] bytes: a mapping that is not the program's.
    pub stack: u64,
}

pub const HANDLER_STACK: usize = 16 * 1024;

pub const NO_CALL: i64 = -1;
/// It gave EINTR, and the code does not tell which call it was.
pub const UNKNOWN_CALL: i64 = -2;

/// From the start of an [`Arrival`]; aligned to 64.
pub const XSAVE_AT: usize = 512;
pub const MOST_XSAVE: usize = 12 * 1024 - XSAVE_AT;

/// In the environment of a program that is started with the shim: the number of its descriptor, which the shim closes.
pub const DESCRIPTOR_VARIABLE: &[u8] = b"CKPT_SHIM_FD=";
/// In that of one that is started to become a skeleton: the numbers of its socket and of the region's memfd, its address
/// and size, the address of its lane. The shim takes over at once.
pub const SKELETON_VARIABLE: &[u8] = b"CKPT_SKELETON=";

/// Top 16 bits of the value of a signal by which a program that uses the interface is asked whether it may be saved. The
/// random bits name the driver's socket for answers: [`CONSENT_PREFIX`] and they.
pub const ASK_TAG: u64 = VALUE_TAG + 1;
/// The same of one by which a program is told what became of a dump or of its request: 0 in the next 16 bits, or an errno.
pub const TELL_TAG: u64 = VALUE_TAG + 2;

pub const fn ask_value(nonce: u32) -> u64 {
    ASK_TAG << 48 | nonce as u64
}

pub const fn tell_value(nonce: u32, errno: u16) -> u64 {
    TELL_TAG << 48 | (errno as u64) << 32 | nonce as u64
}

/// Where the programs of a tree are heard during a dump: a datagram socket that is there as long as the dump goes on.
pub const CONSENT_PREFIX: &[u8; 13] = b"ckpt-consent-";
/// Where a ckpt that is the parent of a tree takes requests: this, and its process id.
pub const MANAGER_PREFIX: &[u8; 13] = b"ckpt-manager-";

/// Begins both kinds of datagrams; the last byte is the version.
pub const INTERFACE_MAGIC: u64 = 0x636b_7074_6173_6b01;

/// From a program that was asked. Who it is, the kernel says (`SCM_CREDENTIALS`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    pub magic: u64,
    pub nonce: u32,
    pub state: u32,
    /// What a hook has returned that refuses.
    pub code: i32,
    pub _reserved: u32,
}

/// It is in a region in which no checkpoint may happen.
pub const IN_REGION: u32 = 1;
/// Its hooks are running.
pub const IN_HOOKS: u32 = 2;
/// It may be saved: nobody enters a region until it was told.
pub const READY: u32 = 3;
/// One of its hooks refuses.
pub const REFUSES: u32 = 4;
/// It has to do with another dump.
pub const BUSY: u32 = 5;

/// From a program that wants to be saved now.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Request {
    pub magic: u64,
    /// The answer is a signal with [`tell_value`] of it.
    pub nonce: u32,
    /// Bytes of `image` that are used; 0 if the manager is to choose.
    pub length: u32,
    pub image: [u8; MOST_IMAGE],
}

/// Longest name of an image in a request: `PATH_MAX` with the zero byte.
pub const MOST_IMAGE: usize = 4096;
