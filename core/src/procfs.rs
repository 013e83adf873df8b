//! Reading `/proc/PID`, through one descriptor of the directory, so that a pid used again is never mistaken.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstatat};

use crate::target::Pid;

/// The directory `/proc/PID` of one process, or `/proc/PID/task/TID` of one thread.
#[derive(Debug)]
pub struct ProcDir {
    directory: OwnedFd,
    pid: Pid,
}

impl ProcDir {
    /// Opens `/proc/PID`.
    pub fn open(pid: Pid) -> io::Result<ProcDir> {
        ProcDir::open_path(Path::new(&format!("/proc/{pid}")), pid)
    }

    fn open_path(path: &Path, pid: Pid) -> io::Result<ProcDir> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(ProcDir { directory: nix::fcntl::open(path, flags, Mode::empty())?, pid })
    }

    /// The directory of one of its threads.
    pub fn thread(&self, tid: Pid) -> io::Result<ProcDir> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = openat(&self.directory, format!("task/{tid}").as_str(), flags, Mode::empty())?;
        Ok(ProcDir { directory, pid: tid })
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Opens a file of it for reading.
    pub fn file(&self, name: impl AsRef<Path>) -> io::Result<File> {
        self.open_with(name, OFlag::O_RDONLY)
    }

    /// Opens a file of it, or what a link of it (`fd/3`, `map_files/..`, `root`) leads to.
    pub fn open_with(&self, name: impl AsRef<Path>, flags: OFlag) -> io::Result<File> {
        Ok(File::from(openat(&self.directory, name.as_ref(), flags | OFlag::O_CLOEXEC, Mode::empty())?))
    }

    /// The whole content of a file of it.
    pub fn read(&self, name: impl AsRef<Path>) -> io::Result<Vec<u8>> {
        read_whole(self.file(name)?)
    }

    /// The same as text; /proc escapes what is not text, but for names that programs choose.
    pub fn text(&self, name: impl AsRef<Path>) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&self.read(name)?).into_owned())
    }

    /// Where a link of it (`cwd`, `exe`, `fd/3`) points.
    pub fn link(&self, name: impl AsRef<Path>) -> io::Result<OsString> {
        Ok(readlinkat(&self.directory, name.as_ref())?)
    }

    /// `stat` of what a link of it leads to.
    pub fn stat(&self, name: impl AsRef<Path>) -> io::Result<FileStat> {
        Ok(fstatat(&self.directory, name.as_ref(), AtFlags::empty())?)
    }

    /// The names in a directory of it that are numbers (`fd`, `task`, `fdinfo`), sorted.
    pub fn numbers(&self, name: impl AsRef<Path>) -> io::Result<Vec<i32>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut directory = nix::dir::Dir::openat(&self.directory, name.as_ref(), flags, Mode::empty())?;
        let mut numbers = Vec::new();
        for entry in directory.iter() {
            if let Some(number) = entry?.file_name().to_str().ok().and_then(|name| name.parse().ok()) {
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    pub fn stat_line(&self) -> io::Result<Stat> {
        Stat::parse(&self.read("stat")?).ok_or_else(|| invalid("stat", self.pid))
    }

    pub fn status(&self) -> io::Result<Status> {
        Ok(Status(self.text("status")?))
    }

    /// `stat` of one of its threads.
    pub fn thread_stat(&self, tid: Pid) -> io::Result<Stat> {
        Stat::parse(&self.read(format!("task/{tid}/stat"))?).ok_or_else(|| invalid("stat", tid))
    }

    /// `status` of one of its threads.
    pub fn thread_status(&self, tid: Pid) -> io::Result<Status> {
        Ok(Status(self.text(format!("task/{tid}/status"))?))
    }

    /// The children of all threads (`task/TID/children`, `CONFIG_PROC_CHILDREN`).
    pub fn children(&self) -> io::Result<Vec<Pid>> {
        let mut children = Vec::new();
        for tid in self.numbers("task")? {
            match self.text(format!("task/{tid}/children")) {
                Ok(text) => children.extend(text.split_whitespace().filter_map(|pid| pid.parse().ok().map(Pid))),
                Err(gone) if matches!(gone.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(children)
    }
}

/// The ids of all processes.
pub fn all_pids() -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok().map(Pid)).collect()
}

/// `MemAvailable` of `/proc/meminfo`, in bytes; 0 where it is not told.
pub fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0).saturating_mul(1024)
}

/// The content of a file of `/proc`, whose size and place in it need not be asked first.
pub fn read_whole(mut file: File) -> io::Result<Vec<u8>> {
    let mut content = vec![0; 4096];
    let mut length = 0;
    loop {
        if length == content.len() {
            content.resize(2 * length, 0);
        }
        match file.read(&mut content[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    content.truncate(length);
    Ok(content)
}

/// A file of the directory that every thread has in `/proc` itself, where it is not listed.
pub fn of_thread(tid: Pid, name: &str) -> io::Result<String> {
    let content = read_whole(File::open(format!("/proc/{tid}/{name}"))?)?;
    Ok(String::from_utf8_lossy(&content).into_owned())
}

fn invalid(what: &str, pid: Pid) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/{what} has an unknown form"))
}

/// The fields of `/proc/PID/stat` that ckpt uses (proc_pid_stat(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    pub comm: Vec<u8>,
    pub state: char,
    pub ppid: Pid,
    pub pgrp: Pid,
    pub session: Pid,
    /// Device number of the controlling terminal, 0 for none.
    pub tty_nr: i32,
    pub tpgid: i32,
    /// `PF_*` flags of the kernel.
    pub flags: u64,
    pub nice: i32,
    pub num_threads: u32,
    /// Since boot, in clock ticks: tells a process from a later one with its pid.
    pub starttime: u64,
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub exit_signal: i32,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    /// As of `waitpid`: meaningful for a zombie.
    pub exit_code: i32,
}

impl Stat {
    /// Parses a line; the command name may hold spaces and parentheses.
    pub fn parse(line: &[u8]) -> Option<Stat> {
        let open = line.iter().position(|&byte| byte == b'(')?;
        let close = line.iter().rposition(|&byte| byte == b')')?;
        let comm = line.get(open + 1..close)?.to_vec();
        let rest = std::str::from_utf8(line.get(close + 2..)?).ok()?;
        // fields[0] is field 3 of the manual page
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let number = |field: usize| -> Option<i64> {
            let text = fields.get(field - 3)?;
            text.parse::<i64>().ok().or_else(|| text.parse::<u64>().ok().map(|n| n as i64))
        };
        let unsigned = |field: usize| number(field).map(|n| n as u64);
        Some(Stat {
            comm,
            state: fields.first()?.chars().next()?,
            ppid: Pid(number(4)? as i32),
            pgrp: Pid(number(5)? as i32),
            session: Pid(number(6)? as i32),
            tty_nr: number(7)? as i32,
            tpgid: number(8)? as i32,
            flags: unsigned(9)?,
            nice: number(19)? as i32,
            num_threads: number(20)? as u32,
            starttime: unsigned(22)?,
            start_code: unsigned(26)?,
            end_code: unsigned(27)?,
            start_stack: unsigned(28)?,
            exit_signal: number(38)? as i32,
            start_data: unsigned(45)?,
            end_data: unsigned(46)?,
            start_brk: unsigned(47)?,
            arg_start: unsigned(48)?,
            arg_end: unsigned(49)?,
            env_start: unsigned(50)?,
            env_end: unsigned(51)?,
            exit_code: number(52)? as i32,
        })
    }
}

/// `/proc/PID/status`, read field by field (proc_pid_status(5)).
#[derive(Clone, Debug)]
pub struct Status(String);

impl Status {
    /// The text after `Name:`.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    }
    /// Its numbers, decimal.
    pub fn numbers(&self, name: &str) -> Option<Vec<i64>> {
        self.field(name)?.split_whitespace().map(|word| word.parse().ok()).collect()
    }
    /// A mask, hexadecimal (`SigBlk`, `CapEff`).
    pub fn mask(&self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.field(name)?, 16).ok()
    }
}

/// One line pair of `/proc/PID/smaps`: a mapping with the flags that only smaps shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    pub read: bool,
    pub write: bool,
    pub execute: bool,
    pub shared: bool,
    /// Offset in the file, in bytes.
    pub offset: u64,
    pub major: u32,
    pub minor: u32,
    pub inode: u64,
    /// Path or `[name]`, with the kernel's escapes undone; empty for plain anonymous memory.
    pub name: PathBuf,
    /// The two-letter codes of `VmFlags`.
    pub flags: Vec<[u8; 2]>,
    /// `ProtectionKey`, 0 where there is none.
    pub protection_key: u32,
}

impl Mapping {
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|known| known == flag.as_bytes())
    }
    pub fn len(&self) -> u64 {
        self.end - self.start
    }
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Parses all of a `smaps` file.
    pub fn parse_all(smaps: &[u8]) -> Option<Vec<Mapping>> {
        let mut mappings: Vec<Mapping> = Vec::new();
        for line in smaps.split(|&byte| byte == b'\n') {
            if let Some(flags) = line.strip_prefix(b"VmFlags:") {
                mappings.last_mut()?.flags =
                    flags.split(|&byte| byte == b' ').filter_map(|word| <[u8; 2]>::try_from(word).ok()).collect();
            } else if let Some(key) = line.strip_prefix(b"ProtectionKey:") {
                mappings.last_mut()?.protection_key = std::str::from_utf8(key).ok()?.trim().parse().ok()?;
            } else if line.first().is_some_and(|first| first.is_ascii_hexdigit() && !first.is_ascii_uppercase()) {
                mappings.push(Mapping::parse_line(line)?);
            }
        }
        Some(mappings)
    }

    /// Parses a line of `maps`.
    fn parse_line(line: &[u8]) -> Option<Mapping> {
        let mut words = line.splitn(6, |&byte| byte == b' ');
        let mut word = || std::str::from_utf8(words.next()?).ok();
        let (start, end) = word()?.split_once('-')?;
        let modes = word()?.as_bytes().to_vec();
        let offset = word()?;
        let (major, minor) = word()?.split_once(':')?;
        let inode = word()?;
        let name = words.next().unwrap_or_default();
        let blanks = name.iter().take_while(|&&byte| byte == b' ').count();
        Some(Mapping {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            read: *modes.first()? == b'r',
            write: *modes.get(1)? == b'w',
            execute: *modes.get(2)? == b'x',
            shared: *modes.get(3)? == b's',
            offset: u64::from_str_radix(offset, 16).ok()?,
            major: u32::from_str_radix(major, 16).ok()?,
            minor: u32::from_str_radix(minor, 16).ok()?,
            inode: inode.parse().ok()?,
            name: PathBuf::from(unescape(&name[blanks..])),
            flags: Vec::new(),
            protection_key: 0,
        })
    }
}

/// Undoes the octal escapes (`\012`) that /proc uses in paths.
pub fn unescape(text: &[u8]) -> OsString {
    use std::os::unix::ffi::OsStringExt;
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|_| first == b'\\').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match digits {
            Some(byte) => {
                plain.push(byte);
                rest = &tail[3..];
            }
            None => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_of_a_hostile_name() {
        let mut line = b"17 (a) R (b) S 1 17 17 0 -1 4194560".to_vec();
        line.extend(std::iter::repeat_n(b" 1".as_slice(), 43).flatten());
        let stat = Stat::parse(&line).unwrap();
        assert_eq!(stat.comm, b"a) R (b");
        assert_eq!((stat.state, stat.ppid), ('S', Pid(1)));
    }

    #[test]
    fn our_own_mappings() {
        let mappings = Mapping::parse_all(&std::fs::read("/proc/self/smaps").unwrap()).unwrap();
        let stack = mappings.iter().find(|mapping| mapping.name == Path::new("[stack]")).unwrap();
        assert!(stack.has("gd") && stack.write && !stack.shared);
        assert!(mappings.iter().all(|mapping| mapping.start < mapping.end && !mapping.flags.is_empty()));
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape(br"/a\040b\134c"), OsString::from("/a b\\c"));
        assert_eq!(unescape(br"/a\0"), OsString::from("/a\\0"));
    }
}
