//! The working set: which pages a program touched first after a restore, recorded in a file beside the image, and brought
//! in at once, before the release, the next time.
//!
//! ```text
//! working-set            "CKPTWS01", number of runs (u32), CRC-32C of the runs (u32), runs
//! a run                  first page in the page file (u64), pages (u32); in the order in which they were touched
//! working-set.guess      the same, as the dump guesses it (`guess.rs`)
//! working-set.recording  the process id of the pager that is recording
//! ```
//!
//! All numbers are little-endian. The file is a hint: one that is damaged, or of another image, costs time and nothing else,
//! as every page is checked and put where the image says that it belongs.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ckpt_core::Pid;

use crate::sys;

const MAGIC: &[u8; 8] = b"CKPTWS01";
pub const FILE: &str = "working-set";
/// In the same form, left by the dump; used where nothing was recorded.
pub const GUESS: &str = "working-set.guess";
const RECORDING: &str = "working-set.recording";
/// 256 MiB of runs: more than any image of this format has use for.
const MOST_RUNS: usize = 16 << 20;
/// Bytes of the longest file.
pub const LONGEST: u64 = (16 + MOST_RUNS * 12) as u64;

/// Pages by their numbers in the page file, in the order in which they were touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    runs: Vec<(u64, u32)>,
}

impl WorkingSet {
    /// One more page.
    pub fn push(&mut self, page: u64) {
        match self.runs.last_mut() {
            Some((first, pages)) if *first + u64::from(*pages) == page => *pages += 1,
            _ => self.runs.push((page, 1)),
        }
    }

    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|(_, pages)| u64::from(*pages)).sum()
    }

    /// First page and number of pages of runs that do not touch each other, sorted: for bringing them in.
    pub fn sorted(&self) -> Vec<(u64, u64)> {
        let mut runs = self.runs.clone();
        runs.sort_unstable();
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for (first, pages) in runs {
            let end = first.saturating_add(u64::from(pages));
            match joined.last_mut() {
                Some((start, length)) if first <= *start + *length => *length = (*length).max(end - *start),
                _ => joined.push((first, end - first)),
            }
        }
        joined
    }

    /// How many pages are in both.
    pub fn shared(&self, other: &WorkingSet) -> u64 {
        let (mine, theirs) = (self.sorted(), other.sorted());
        let (mut a, mut b, mut shared) = (0, 0, 0);
        while let (Some(&(x, x_pages)), Some(&(y, y_pages))) = (mine.get(a), theirs.get(b)) {
            let (x_end, y_end) = (x + x_pages, y + y_pages);
            shared += x_end.min(y_end).saturating_sub(x.max(y));
            if x_end < y_end { a += 1 } else { b += 1 }
        }
        shared
    }

    fn encode(&self) -> Vec<u8> {
        let mut runs = Vec::with_capacity(self.runs.len() * 12);
        for (first, pages) in &self.runs {
            runs.extend(first.to_le_bytes());
            runs.extend(pages.to_le_bytes());
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend((self.runs.len() as u32).to_le_bytes());
        bytes.extend(crc32c::crc32c(&runs).to_le_bytes());
        bytes.extend(runs);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<WorkingSet> {
        let (head, runs) = bytes.split_at_checked(16)?;
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let count = word(8) as usize;
        if &head[..8] != MAGIC || count > MOST_RUNS || runs.len() != count * 12 || crc32c::crc32c(runs) != word(12) {
            return None;
        }
        let run = |run: &[u8]| {
            let first = u64::from_le_bytes(run[..8].try_into().expect("eight bytes"));
            let pages = u32::from_le_bytes(run[8..].try_into().expect("four bytes"));
            // So that ends can be computed.
            (first.min(1 << 52), pages)
        };
        Some(WorkingSet { runs: runs.chunks_exact(12).map(run).collect() })
    }

    /// That of an image, by its directory. `None` where there is none.
    ///
    /// # Errors
    /// Why one that is there cannot be used, in words.
    pub fn load(directory: &Path) -> Result<Option<WorkingSet>, String> {
        WorkingSet::load_from(&directory.join(FILE))
    }

    /// The one to bring in, and whether it is a guess: what was recorded here or there, else what the dump has guessed.
    /// `None` where there is none that can be used; beside it, why one that is there cannot be.
    pub fn choose(directory: Option<&Path>, fetched: &Fetched) -> (Option<(WorkingSet, bool)>, Option<String>) {
        let mut trouble = None;
        let mut note = |found: Result<Option<WorkingSet>, String>| {
            found.unwrap_or_else(|why| {
                trouble.get_or_insert(why);
                None
            })
        };
        let here = |name| directory.map_or(Ok(None), |directory| WorkingSet::load_from(&directory.join(name)));
        let there = |bytes: &Option<Vec<u8>>| match bytes {
            None => Ok(None),
            Some(bytes) => WorkingSet::decode(bytes)
                .map(Some)
                .ok_or_else(|| "the page server's working set is none, or a damaged one; it is not used".to_string()),
        };
        let recorded = note(here(FILE)).or_else(|| note(there(&fetched.recorded)));
        if let Some(recorded) = recorded {
            return (Some((recorded, false)), trouble);
        }
        let guess = here(GUESS).ok().flatten().or_else(|| there(&fetched.guess).ok().flatten());
        (guess.map(|guess| (guess, true)), trouble)
    }

    fn load_from(path: &Path) -> Result<Option<WorkingSet>, String> {
        let said = |what: &str| format!("{}: {what}; it is not used", path.display());
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = match File::options().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(said(&error.to_string())),
        };
        match file.metadata() {
            Ok(found) if found.is_file() => {}
            Ok(_) => return Err(said("not a regular file")),
            Err(error) => return Err(said(&error.to_string())),
        }
        let mut bytes = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(|error| said(&error.to_string()))?;
        WorkingSet::decode(&bytes).map(Some).ok_or_else(|| said("not a working set, or a damaged one"))
    }

    /// Leaves it beside an image: under another name first, so that it is whole or not there.
    pub fn store(&self, image: &Path) -> io::Result<()> {
        let new = image.join("working-set.new");
        let mut file = create(&new)?;
        file.write_all(&self.encode())?;
        file.sync_all()?;
        fs::rename(new, image.join(FILE))
    }

    /// Leaves it as a guess. If the machine fails meanwhile, what is left is none.
    pub fn store_guess(&self, image: &Path) -> io::Result<()> {
        create(&image.join(GUESS))?.write_all(&self.encode())
    }
}

/// The files of a page server: what was recorded, and what the dump has guessed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    pub recorded: Option<Vec<u8>>,
    pub guess: Option<Vec<u8>>,
}

/// A new file in the place of whatever has its name: what a foreign image has there is not written through.
fn create(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

/// The note that a pager is recording; removed with it.
pub struct Recording(PathBuf);

impl Recording {
    /// Says that this process records for an image, in place of what one that was lost may have left.
    pub fn begin(image: &Path) -> io::Result<Recording> {
        let path = image.join(RECORDING);
        create(&path)?.write_all(format!("{}\n", std::process::id()).as_bytes())?;
        Ok(Recording(path))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Ends the recording that is under way for an image, and returns how many pages it found.
///
/// # Errors
/// Where there is none, or it does not end.
pub fn stop_recording(image: &Path) -> Result<u64, String> {
    let note = image.join(RECORDING);
    let none = || format!("{}: no recording of a working set is under way", image.display());
    let text = fs::read_to_string(&note).map_err(|_| none())?;
    let pid = text.trim().parse().ok().filter(|&pid| pid > 0).map(Pid).ok_or_else(none)?;
    let is_pager = || fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "ckpt-pager");
    if !is_pager() {
        let _ = fs::remove_file(&note);
        return Err(none());
    }
    sys::kill(pid, libc::SIGUSR1);
    let deadline = Instant::now() + Duration::from_secs(30);
    while note.exists() && is_pager() {
        if Instant::now() > deadline {
            return Err(format!("process {pid}, which records, did not end the recording within 30 s"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    match WorkingSet::load(image)? {
        Some(set) => Ok(set.pages()),
        None => Err(format!("{}: the working set was not written", image.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pages: &[u64]) -> WorkingSet {
        let mut set = WorkingSet::default();
        for &page in pages {
            set.push(page);
        }
        set
    }

    #[test]
    fn what_is_stored_is_loaded() {
        let set = of(&[7, 8, 9, 3, 100, 101]);
        assert_eq!(set.pages(), 6);
        assert_eq!(WorkingSet::decode(&set.encode()), Some(set));
    }

    #[test]
    fn no_damage_is_taken_for_a_working_set() {
        let bytes = of(&[7, 8, 9, 3, 100, 101]).encode();
        for length in 0..bytes.len() {
            assert_eq!(WorkingSet::decode(&bytes[..length]), None, "{length} bytes of it");
        }
        for at in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[at / 8] ^= 1 << (at % 8);
            assert_eq!(WorkingSet::decode(&damaged), None, "bit {at}");
        }
    }

    #[test]
    fn runs_are_joined_and_compared() {
        let set = of(&[9, 3, 4, 5, 8, 100, 4]);
        assert_eq!(set.sorted(), [(3, 3), (8, 2), (100, 1)]);
        assert_eq!(set.shared(&of(&[5, 6, 7, 8])), 2);
        assert_eq!(set.shared(&of(&[])), 0);
        assert_eq!(set.shared(&set), 6);
    }
}
