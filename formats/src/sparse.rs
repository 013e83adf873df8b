//! Files with holes: copied, and their checksums taken, without touching the holes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::unistd::{Whence, ftruncate, lseek};

use crate::checksum::append_zeros;

/// Bytes read at once.
const BUFFER: usize = 1 << 20;

/// What went wrong, and on which side.
pub enum Failure {
    Read(io::Error),
    Write(io::Error),
}

/// Reads a whole file, holes skipped, hands what is data to `take`, and returns its size and checksum. The file's offset
/// is where it was afterwards: it may belong to a program.
pub fn read(
    file: BorrowedFd<'_>,
    mut take: impl FnMut(&[u8], u64) -> Result<(), Failure>,
) -> Result<(u64, u32), Failure> {
    let failed = |errno: Errno| Failure::Read(errno.into());
    let size = fstat(file).map_err(failed)?.st_size as u64;
    let offset = lseek(file, 0, Whence::SeekCur).map_err(failed)?;
    let result = read_data(file, size, &mut take);
    lseek(file, offset, Whence::SeekSet).map_err(failed)?;
    Ok((size, result?))
}

fn read_data(
    file: BorrowedFd<'_>,
    size: u64,
    take: &mut impl FnMut(&[u8], u64) -> Result<(), Failure>,
) -> Result<u32, Failure> {
    let reader = File::from(file.try_clone_to_owned().map_err(Failure::Read)?);
    let mut buffer = vec![0; BUFFER.min(size as usize)];
    let mut checksum = 0;
    let mut place = 0;
    while place < size {
        let (data, hole) = next_data(file, place, size).map_err(Failure::Read)?;
        checksum = append_zeros(checksum, data - place);
        place = data;
        while place < hole {
            let part = &mut buffer[..(BUFFER as u64).min(hole - place) as usize];
            reader.read_exact_at(part, place).map_err(Failure::Read)?;
            checksum = crc32c::crc32c_append(checksum, part);
            take(part, place)?;
            place += part.len() as u64;
        }
    }
    Ok(checksum)
}

/// The next stretch of data at or after `place`, empty at the end of the file.
fn next_data(file: BorrowedFd<'_>, place: u64, size: u64) -> io::Result<(u64, u64)> {
    let data = match lseek(file, place as i64, Whence::SeekData) {
        Ok(data) => (data as u64).min(size),
        Err(Errno::ENXIO) => return Ok((size, size)),
        // This file system does not know of holes.
        Err(Errno::EINVAL) => return Ok((place, size)),
        Err(errno) => return Err(errno.into()),
    };
    let hole = match lseek(file, data as i64, Whence::SeekHole) {
        Ok(hole) => (hole as u64).min(size),
        Err(Errno::ENXIO) => size,
        Err(errno) => return Err(errno.into()),
    };
    // Always forward, whatever the file system says.
    Ok((data.max(place), hole.max(data.max(place))))
}

/// Copies a whole file to an empty one, holes kept, and returns its size and checksum.
pub fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(u64, u32), Failure> {
    let writer = File::from(to.try_clone_to_owned().map_err(Failure::Write)?);
    let copied = read(from, |bytes, place| writer.write_all_at(bytes, place).map_err(Failure::Write))?;
    ftruncate(writer.as_fd(), copied.0 as i64).map_err(|errno| Failure::Write(errno.into()))?;
    Ok(copied)
}
