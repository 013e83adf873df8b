//! A batch of system calls for a [`Target`](crate::Target) to run with one wake-up.
//!
//! A [`Batch`] is data: calls with their arguments, and the bytes those arguments point at. An argument can be a
//! number, a place in the batch's own bytes ([`Slot`]), or the result of an earlier call ([`CallId`]), so that
//! `openat`, `fcntl` on what it returned, and `close` are one round trip. Whoever runs the batch puts the bytes where
//! the target sees them, turns slots into addresses, and hands back [`Replies`].

use nix::errno::Errno;
pub use syscalls::Sysno;

/// Most calls that one batch may hold. Split longer work over several batches.
pub const MAX_CALLS: usize = 512;
/// Most bytes that the slots of one batch may hold.
pub const MAX_BYTES: usize = 192 * 1024;

/// A place in the bytes of a batch: input that calls read, or room for what they write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub(crate) offset: u32,
    pub(crate) len: u32,
}

impl Slot {
    /// The same slot, beginning `by` bytes later.
    pub fn after(self, by: usize) -> Slot {
        assert!(by <= self.len as usize, "a slot of {} bytes has no byte {by}", self.len);
        Slot { offset: self.offset + by as u32, len: self.len - by as u32 }
    }
    /// Offset in the bytes of the batch.
    pub fn offset(self) -> usize {
        self.offset as usize
    }
    #[allow(clippy::len_without_is_empty)]
    pub fn len(self) -> usize {
        self.len as usize
    }
}

/// Names one call of a batch, to use its result in a later one or to read it from the [`Replies`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallId(pub(crate) u16);

/// One argument of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    Value(u64),
    /// The address, in the target, of a slot.
    Address(Slot),
    /// What an earlier call of the same batch returned.
    Result(CallId),
    /// The 32-bit word (a descriptor number, say) that is at the beginning of a slot when the call is made.
    Loaded(Slot),
}

macro_rules! arg_from_integer {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Arg {
            // Sign extension is what the kernel expects of an int argument.
            fn from(value: $kind) -> Arg { Arg::Value(value as i64 as u64) }
        }
    )*};
}
arg_from_integer!(i32, u32, i64, u64, usize, isize);
impl From<Slot> for Arg {
    fn from(slot: Slot) -> Arg {
        Arg::Address(slot)
    }
}
impl From<CallId> for Arg {
    fn from(id: CallId) -> Arg {
        Arg::Result(id)
    }
}
impl From<crate::RemotePtr> for Arg {
    fn from(ptr: crate::RemotePtr) -> Arg {
        Arg::Value(ptr.0)
    }
}
impl From<crate::RemoteFd> for Arg {
    fn from(fd: crate::RemoteFd) -> Arg {
        Arg::Value(fd.0 as u64)
    }
}

/// What a call of a batch does: a system call, or one of the agent's own operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    System(Sysno),
    /// CRC-32C of each 4,096-byte page from `args[0]` on, `args[1]` pages, as `u32`s to `args[2]`.
    ChecksumPages,
    /// Uses a tile register (AMX), with the configuration at `args[0]`, and releases it again.
    UseTiles,
    /// Makes a copy of the process that is nobody's child there, with the agent at the lane `args[0]`, on the stack that
    /// ends at `args[1]`. Of its descriptors the copy keeps `args[2]` only, its socket. The result is its pid.
    CopyProcess,
}

/// One call.
#[derive(Clone, Debug)]
pub struct Call {
    pub operation: Operation,
    pub args: [Arg; 6],
    /// A failure of this call does not end the batch.
    pub may_fail: bool,
}

/// Builds an argument list: `args![dirfd, path, libc::O_RDONLY]`.
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$($crate::batch::Arg::from($arg)),*] };
}

/// Calls to run in a target, with the bytes they read and write. See the [module](self).
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub(crate) calls: Vec<Call>,
    pub(crate) bytes: Vec<u8>,
    /// (where in `bytes`, which slot): an address to be written into the bytes themselves, for iovecs and the like.
    pub(crate) pointers: Vec<(u32, Slot)>,
}

impl Batch {
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Adds a system call. If it fails, the calls after it are not run and the whole batch is an error.
    pub fn call(&mut self, number: Sysno, args: &[Arg]) -> CallId {
        self.push(Operation::System(number), args, false)
    }

    /// Adds a system call that may fail: look at its result with [`Replies::result`].
    pub fn try_call(&mut self, number: Sysno, args: &[Arg]) -> CallId {
        self.push(Operation::System(number), args, true)
    }

    /// Adds the agent's page checksum: one CRC-32C (Castagnoli) for each of `pages` pages at `from`.
    pub fn checksum_pages(&mut self, from: crate::RemotePtr, pages: usize) -> Slot {
        let out = self.room(pages * 4);
        self.push(Operation::ChecksumPages, args![from, pages, out], false);
        out
    }

    /// Has the thread use the tile registers of AMX once. The kernel makes room for them in the thread's state only then, and
    /// no state with tiles can be set before. The process must have asked for them (`ARCH_REQ_XCOMP_PERM`).
    pub fn use_tiles(&mut self) {
        // What ldtilecfg reads: palette 1, and tile 0 with one row of four bytes.
        let mut configuration = [0_u8; 64];
        (configuration[0], configuration[16], configuration[48]) = (1, 4, 1);
        let configuration = self.bytes(&configuration);
        self.push(Operation::UseTiles, args![configuration], false);
    }

    /// Adds the agent's copying of its process, which may fail: see [`Operation::CopyProcess`]. For backends.
    pub fn copy_process(&mut self, lane: u64, stack: u64, socket: Arg) -> CallId {
        self.push(Operation::CopyProcess, &[lane.into(), stack.into(), socket], true)
    }

    fn push(&mut self, operation: Operation, args: &[Arg], may_fail: bool) -> CallId {
        let mut all = [Arg::Value(0); 6];
        all[..args.len()].copy_from_slice(args);
        self.calls.push(Call { operation, args: all, may_fail });
        CallId(self.calls.len() as u16 - 1)
    }

    /// Puts bytes where the calls can read them, aligned to 16.
    pub fn bytes(&mut self, bytes: &[u8]) -> Slot {
        let slot = self.room(bytes.len());
        self.bytes[slot.offset()..][..bytes.len()].copy_from_slice(bytes);
        slot
    }

    /// Puts a path or other string there, with a NUL after it.
    pub fn string(&mut self, string: &[u8]) -> Slot {
        let slot = self.room(string.len() + 1);
        self.bytes[slot.offset()..][..string.len()].copy_from_slice(string);
        slot
    }

    /// Puts 64-bit words there, in native order: most kernel structures are made of these.
    pub fn words(&mut self, words: &[u64]) -> Slot {
        let slot = self.room(words.len() * 8);
        for (place, word) in self.bytes[slot.offset()..].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        slot
    }

    /// Zeroed room of `len` bytes for a call to write to, aligned to 16.
    pub fn room(&mut self, len: usize) -> Slot {
        let offset = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(offset + len, 0);
        Slot { offset: offset as u32, len: len as u32 }
    }

    /// Has the address of `to` written at byte `at` of `place` (the `iov_base` of an iovec, say).
    pub fn pointer(&mut self, place: Slot, at: usize, to: Slot) {
        assert!(at + 8 <= place.len(), "a pointer at byte {at} does not fit a slot of {} bytes", place.len);
        self.pointers.push((place.offset + at as u32, to));
    }

    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }
    pub fn len(&self) -> usize {
        self.calls.len()
    }
    /// Whether `calls` more calls with `bytes` more bytes still fit.
    pub fn has_room(&self, calls: usize, bytes: usize) -> bool {
        self.calls.len() + calls <= MAX_CALLS && self.bytes.len() + bytes + 32 <= MAX_BYTES
    }

    // What a backend needs to run it.
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }
    pub fn initial_bytes(&self) -> &[u8] {
        &self.bytes
    }
    /// (offset in the bytes, slot whose address belongs there)
    pub fn pointers(&self) -> impl Iterator<Item = (usize, Slot)> + '_ {
        self.pointers.iter().map(|&(at, slot)| (at as usize, slot))
    }
}

impl CallId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What the calls of a batch returned, and the bytes as they left them.
#[derive(Clone, Debug)]
pub struct Replies {
    results: Vec<i64>,
    bytes: Vec<u8>,
}

impl Replies {
    /// For backends: results as the kernel gives them (`-errno` on failure), and the batch's bytes afterwards.
    pub fn new(results: Vec<i64>, bytes: Vec<u8>) -> Replies {
        Replies { results, bytes }
    }

    /// The result of a call that may fail.
    pub fn result(&self, call: CallId) -> Result<u64, Errno> {
        decode(self.results[call.index()])
    }

    /// The result of a call that cannot have failed, because its failure would have ended the batch.
    pub fn value(&self, call: CallId) -> u64 {
        self.results[call.index()] as u64
    }

    /// The same as a descriptor of the target.
    pub fn fd(&self, call: CallId) -> crate::RemoteFd {
        crate::RemoteFd(self.value(call) as i32)
    }

    pub fn bytes(&self, slot: Slot) -> &[u8] {
        &self.bytes[slot.offset()..][..slot.len()]
    }

    /// The 64-bit words of a slot, in native order.
    pub fn words(&self, slot: Slot) -> Vec<u64> {
        self.bytes(slot).chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
    }

    /// The first 32-bit word of a slot.
    pub fn u32(&self, slot: Slot) -> u32 {
        u32::from_ne_bytes(self.bytes(slot)[..4].try_into().unwrap())
    }

    /// The first 64-bit word of a slot.
    pub fn u64(&self, slot: Slot) -> u64 {
        u64::from_ne_bytes(self.bytes(slot)[..8].try_into().unwrap())
    }
}

/// A raw result of the kernel: -4095..=-1 are errors.
pub fn decode(raw: i64) -> Result<u64, Errno> {
    if (-4095..0).contains(&raw) { Err(Errno::from_raw(-raw as i32)) } else { Ok(raw as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_aligned_and_strings_end_in_nul() {
        let mut batch = Batch::new();
        let name = batch.string(b"abc");
        let words = batch.words(&[7, 9]);
        assert_eq!(words.offset() % 16, 0);
        let replies = Replies::new(vec![], batch.initial_bytes().to_vec());
        assert_eq!(replies.bytes(name), b"abc\0");
        assert_eq!(replies.words(words), [7, 9]);
    }

    #[test]
    fn errors_are_the_last_page_of_numbers() {
        assert_eq!(decode(-2), Err(Errno::ENOENT));
        assert_eq!(decode(-4096), Ok(-4096i64 as u64), "an address near the top is no error");
        assert_eq!(decode(3), Ok(3));
    }

    #[test]
    fn negative_ints_are_sign_extended() {
        assert_eq!(Arg::from(libc::AT_FDCWD), Arg::Value(-100i64 as u64));
    }
}
