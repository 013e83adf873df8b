//! The memory that agents and their driver share: one memfd, with the code and a lane for each agent thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub use crate::protocol::FRAME_SIZE;
use crate::protocol::{CODE_SIZE, CONTROL_SIZE, COPY_LANE_SIZE, Call, Lane, MAIN_LANE_SIZE, THREAD_LANE_SIZE};
use crate::sys::SharedMapping;
use crate::{BLOB, sys};

/// What a lane is for, which gives its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneKind {
    /// The main thread of a process: large batches.
    Main,
    /// Another thread: a few calls.
    Thread,
    /// A copy of the process: as many calls as the main thread, with fewer bytes.
    Copy,
}

/// Where the parts of a lane are, in bytes from its start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LaneLayout {
    pub size: usize,
    pub calls: usize,
    pub max_calls: usize,
    pub bytes: usize,
    pub max_bytes: usize,
    pub stack_top: usize,
    pub frame: usize,
}

impl LaneKind {
    pub(crate) const fn layout(self) -> LaneLayout {
        let (max_calls, max_bytes, stack, size) = match self {
            LaneKind::Main => (ckpt_core::batch::MAX_CALLS, ckpt_core::batch::MAX_BYTES, 15 * 1024, MAIN_LANE_SIZE),
            LaneKind::Thread => (64, 8 * 1024, 7 * 1024, THREAD_LANE_SIZE),
            LaneKind::Copy => (ckpt_core::batch::MAX_CALLS, 32 * 1024, 15 * 1024, COPY_LANE_SIZE),
        };
        let calls = 256;
        let bytes = calls + max_calls * size_of::<Call>();
        let stack_top = bytes + max_bytes + stack;
        LaneLayout { size, calls, max_calls, bytes, max_bytes, stack_top, frame: size - FRAME_SIZE }
    }

    /// Bytes that a lane of this kind takes.
    pub const fn size(self) -> usize {
        self.layout().size
    }
}

const _: () = {
    assert!(size_of::<Lane>() <= 256);
    let main = LaneKind::Main.layout();
    assert!(main.stack_top <= main.frame);
    let thread = LaneKind::Thread.layout();
    assert!(thread.stack_top <= thread.frame);
    let copy = LaneKind::Copy.layout();
    assert!(copy.stack_top <= copy.frame);
};

/// A region, as the driver has it.
#[derive(Debug)]
pub struct Region {
    memfd: OwnedFd,
    /// The whole of it, code included.
    mapping: SharedMapping,
}

impl Region {
    /// Bytes for the given lanes, code and control page included.
    pub fn size_for(lanes: impl IntoIterator<Item = LaneKind>) -> usize {
        CODE_SIZE + CONTROL_SIZE + lanes.into_iter().map(LaneKind::size).sum::<usize>()
    }

    /// A region of our own.
    pub fn create(size: usize) -> io::Result<Region> {
        let name = c"ckpt-agent";
        let memfd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&memfd, size as i64)?;
        Region::adopt(memfd, size)
    }

    /// Makes a region of empty shared memory of its size, which a target may have made.
    pub fn adopt(memfd: OwnedFd, size: usize) -> io::Result<Region> {
        let mapping = SharedMapping::new(memfd.as_fd(), size)?;
        mapping.write(0, BLOB);
        Ok(Region { memfd, mapping })
    }

    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    pub fn size(&self) -> usize {
        self.mapping.len()
    }

    /// Maps the region at a given address of our own, code executable, for a skeleton that is forked from us.
    pub fn map_at(&self, address: u64) -> io::Result<sys::FixedMapping> {
        sys::FixedMapping::new(self.memfd.as_fd(), address, self.size(), CODE_SIZE)
    }

    /// Says that the tree is released.
    pub fn commit(&self) {
        self.mapping.atomic(CODE_SIZE).store(1, std::sync::atomic::Ordering::Release);
    }

    pub(crate) fn mapping(&self) -> &SharedMapping {
        &self.mapping
    }
}
