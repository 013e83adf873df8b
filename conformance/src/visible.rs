//! What can be seen of a tree from outside, to compare before a dump with after it: nothing of ckpt may show.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// What `/proc` shows of every process of a tree: (process, what of it) to how it looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visible(BTreeMap<(i32, String), String>);

/// Lines of `/proc/PID/status` that belong to a process.
const PROCESS_STATUS: &[&str] = &[
    "Umask",
    "Tgid",
    "PPid",
    "TracerPid",
    "NStgid",
    "NSpgid",
    "NSsid",
    "ShdPnd",
    "SigIgn",
    "SigCgt",
    "Threads",
    "THP_enabled",
];
/// Lines of `/proc/PID/task/TID/status` that belong to a thread.
const THREAD_STATUS: &[&str] = &[
    "Name",
    "Pid",
    "NSpid",
    "Uid",
    "Gid",
    "Groups",
    "SigPnd",
    "SigBlk",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Cpus_allowed",
    "Speculation_Store_Bypass",
];
/// Files whose whole content is compared.
const FILES: &[&str] = &[
    "cgroup",
    "cmdline",
    "environ",
    "auxv",
    "limits",
    "personality",
    "oom_score_adj",
    "coredump_filter",
    "timers",
    "setgroups",
];
const LINKS: &[&str] = &["exe", "cwd", "root"];

impl Visible {
    /// Looks at the processes `pids`, which should be at rest.
    pub fn look(pids: &BTreeSet<i32>) -> Visible {
        let mut facts = Facts::default();
        for &pid in pids {
            facts.process(pid);
        }
        Visible(facts.facts)
    }

    /// Only what a program that goes on working does not change: no signal masks, no signals with handlers (a shell has
    /// more of them while it reads), no positions of files, none of the files of `/proc` that it has a look into, and of
    /// its mappings only what has a name.
    pub fn coarse(self) -> Visible {
        let changing = ["SigPnd", "ShdPnd", "SigBlk", "SigCgt", "timers"];
        let facts = self.0.into_iter().filter_map(|((pid, what), how)| {
            if changing.iter().any(|end| what.ends_with(end)) {
                None
            } else if what.starts_with("mapping ") {
                // MODES DEVICE INODE NAME at OFFSET
                let name = how.splitn(4, ' ').nth(3)?.rsplit_once(" at ")?.0.to_string();
                (!name.is_empty()).then_some(((pid, format!("mapped {name}")), String::new()))
            } else if what.starts_with("descriptor ") {
                // LINK at POSITION, flags FLAGS
                let (link, rest) = how.rsplit_once(" at ")?;
                // In brackets is why there is none: it was closed while we looked.
                (!link.starts_with("/proc/") && !link.starts_with('('))
                    .then(|| Some(((pid, what), format!("{link}, {}", rest.split_once(", ")?.1))))?
            } else {
                Some(((pid, what), how))
            }
        });
        Visible(facts.collect())
    }

    /// Without what is said of threads that are not the main one of their process.
    pub fn without_other_threads(mut self) -> Visible {
        self.0.retain(|(pid, what), _| {
            let of_main = format!("thread {pid} ");
            what != "Threads" && (!what.starts_with("thread ") || what.starts_with(&of_main))
        });
        self
    }

    /// Without the names of files that were deleted.
    pub fn without_deleted_names(mut self) -> Visible {
        for how in self.0.values_mut() {
            if let Some((name, rest)) = how.rsplit_once(" (deleted)") {
                let directory = name.rsplit_once('/').map_or(name, |(directory, _)| directory);
                *how = format!("{directory}/... (deleted){rest}");
            }
        }
        self
    }

    /// Without the difference between anonymous shared memory and the memfd that an ordinary user gets in its place.
    pub fn with_shared_memory_as_memfd(mut self) -> Visible {
        for how in self.0.values_mut() {
            if how.contains(" /dev/zero (deleted) at ") {
                *how = how.replace("/dev/zero (deleted)", "/memfd:dev-zero (deleted)");
            }
        }
        self
    }

    /// The same without pending signals, and without the mappings that begin in `window`: a worker's.
    pub fn outside(mut self, window: std::ops::Range<u64>) -> Visible {
        self.0.retain(|(_, what), _| {
            let start =
                what.strip_prefix("mapping ").and_then(|range| u64::from_str_radix(range.split('-').next()?, 16).ok());
            !what.ends_with("SigPnd") && !what.ends_with("ShdPnd") && start.is_none_or(|start| !window.contains(&start))
        });
        self
    }

    /// What differs, in lines for people; empty if nothing does.
    pub fn difference(&self, later: &Visible) -> Vec<String> {
        let keys: BTreeSet<_> = self.0.keys().chain(later.0.keys()).collect();
        let lines = keys.into_iter().filter_map(|key| {
            let (pid, what) = key;
            match (self.0.get(key), later.0.get(key)) {
                (Some(before), Some(after)) if before == after => None,
                (Some(before), Some(after)) => Some(format!("process {pid}: {what}: was {before:?}, is {after:?}")),
                (Some(before), None) => Some(format!("process {pid}: {what} is gone: {before:?}")),
                (None, Some(after)) => Some(format!("process {pid}: {what} is new: {after:?}")),
                (None, None) => None,
            }
        });
        lines.collect()
    }
}

#[derive(Default)]
struct Facts {
    facts: BTreeMap<(i32, String), String>,
    /// Inode numbers of what has no name: a restored pipe has another one, but the same ends must stay together.
    nameless: BTreeMap<String, usize>,
}

impl Facts {
    fn process(&mut self, pid: i32) {
        let dir = format!("/proc/{pid}");
        let dir = Path::new(&dir);
        let stat = read(&dir.join("stat"));
        let fields: Vec<&str> = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').collect()).unwrap_or_default();
        let names = [
            (0, "state"),
            (1, "parent"),
            (2, "group"),
            (3, "session"),
            (4, "terminal"),
            (5, "foreground group"),
            (35, "exit signal"),
        ];
        for (index, name) in names {
            let mut value = fields.get(index).copied().unwrap_or("?");
            // Running, sleeping, waiting for a disk: chance decides which is seen.
            if name == "state" && matches!(value, "R" | "S" | "D" | "I") {
                value = "running";
            }
            self.note(pid, name, value);
        }
        if fields.first() == Some(&"Z") {
            return self.note(pid, "exit status", fields.get(49).copied().unwrap_or("?"));
        }
        self.status(pid, dir, "", PROCESS_STATUS);
        for file in FILES {
            self.note(pid, file, &read(&dir.join(file)));
        }
        for link in LINKS {
            self.note(pid, link, &read_link(&dir.join(link)));
        }
        for tid in numbers(&dir.join("task")) {
            self.status(pid, &dir.join(format!("task/{tid}")), &format!("thread {tid} "), THREAD_STATUS);
        }
        for fd in numbers(&dir.join("fd")) {
            let mut link = read_link(&dir.join(format!("fd/{fd}")));
            if link.starts_with("pipe:[") || link.starts_with("socket:[") {
                link = self.name_nameless(&link);
            }
            // What O_TMPFILE makes is called by its inode number.
            if let Some((directory, name)) = link.rsplit_once('/')
                && name.starts_with('#')
                && name.ends_with(" (deleted)")
            {
                link = format!("{directory}/{} (deleted)", self.name_nameless(&format!("nameless:{name}")));
            }
            let info = read(&dir.join(format!("fdinfo/{fd}")));
            let field = |name| info.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("?").trim();
            // O_LARGEFILE means nothing here, and only some calls that open files set it.
            let flags = i32::from_str_radix(field("flags:"), 8).map_or(-1, |flags| flags & !0o100_000);
            let value = format!("{link} at {}, flags {flags:#o}", field("pos:"));
            self.note(pid, &format!("descriptor {fd}"), &value);
        }
        self.mappings(pid, &read(&dir.join("maps")));
    }

    fn note(&mut self, pid: i32, what: &str, value: &str) {
        self.facts.insert((pid, what.to_string()), value.to_string());
    }

    fn status(&mut self, pid: i32, dir: &Path, prefix: &str, wanted: &[&str]) {
        for line in read(&dir.join("status")).lines() {
            if let Some((name, value)) = line.split_once(':').filter(|(name, _)| wanted.contains(name)) {
                self.note(pid, &format!("{prefix}{name}"), value.trim());
            }
        }
    }

    fn name_nameless(&mut self, link: &str) -> String {
        let next = self.nameless.len();
        let number = *self.nameless.entry(link.to_string()).or_insert(next);
        let kind = link.split(':').next().unwrap_or(link);
        format!("{kind} number {number}")
    }

    /// Neighbours that only differ in place are one: the kernel merges mappings or not depending on their history.
    fn mappings(&mut self, pid: i32, maps: &str) {
        let mut merged: Vec<(u64, u64, u64, String)> = Vec::new();
        for line in maps.lines() {
            let mut words = line.splitn(6, ' ');
            let mut word = || words.next().unwrap_or("");
            let (range, modes, offset, device, inode) = (word(), word(), word(), word(), word());
            let name = words.next().unwrap_or("").trim_start();
            let hex = |text: &str| u64::from_str_radix(text, 16).unwrap_or(0);
            let Some((start, end)) = range.split_once('-') else { continue };
            let (start, end, mut offset) = (hex(start), hex(end), hex(offset));
            let made_anew = name.ends_with(" (deleted)") || name.starts_with("/SYSV");
            let inode = if made_anew { "-" } else { inode };
            let device = if made_anew { "-" } else { device };
            if inode == "0" {
                offset = 0;
            }
            let rest = format!("{modes} {device} {inode} {name}");
            match merged.last_mut() {
                Some(last)
                    if last.1 == start && last.3 == rest && (inode == "0" || last.2 + (start - last.0) == offset) =>
                {
                    last.1 = end;
                }
                _ => merged.push((start, end, offset, rest)),
            }
        }
        for (start, end, offset, rest) in merged {
            self.note(pid, &format!("mapping {start:x}-{end:x}"), &format!("{rest} at {offset:#x}"));
        }
    }
}

fn read(path: &Path) -> String {
    match fs::read(path) {
        Ok(content) => String::from_utf8_lossy(&content).into_owned(),
        Err(error) => format!("({error})"),
    }
}

fn read_link(path: &Path) -> String {
    match fs::read_link(path) {
        Ok(target) => target.to_string_lossy().into_owned(),
        Err(error) => format!("({error})"),
    }
}

/// The names in a directory that are numbers, sorted.
pub fn numbers(dir: &Path) -> BTreeSet<i32> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ourselves() -> BTreeSet<i32> {
        BTreeSet::from([std::process::id() as i32])
    }

    #[test]
    fn an_extra_descriptor_and_an_extra_mapping_are_seen() {
        // The threads of the test runner come and go, and their stacks with them.
        let only = |lines: Vec<String>, what: &str| lines.into_iter().filter(|line| line.contains(what)).count();
        let before = Visible::look(&ourselves());
        let file = fs::File::open("/dev/zero").unwrap();
        let opened = Visible::look(&ourselves());
        assert_eq!(only(before.difference(&opened), "/dev/zero"), 1);
        let shell = fs::File::open("/bin/sh").unwrap();
        // SAFETY: maps a page wherever the kernel finds room.
        let page = unsafe {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&shell);
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_PRIVATE, fd, 0)
        };
        assert_ne!(page, libc::MAP_FAILED);
        let mapped = Visible::look(&ourselves());
        assert_eq!(only(opened.difference(&mapped), "sh at 0x0"), 1);
        drop(shell);
        drop(file);
    }

    #[test]
    fn the_coarse_view_keeps_names_and_flags() {
        let fact = |what: &str, how: &str| ((7, what.to_string()), how.to_string());
        let fine = Visible(BTreeMap::from([
            fact("mapping 1000-2000", "rw-p 00:00 0  at 0x0"),
            fact("mapping 3000-4000", "r-xp 08:01 5 /a b at 0x0"),
            fact("descriptor 3", "/a b at 5, flags 02"),
            fact("thread 7 SigBlk", "0"),
            fact("SigCgt", "10000"),
            fact("parent", "1"),
        ]));
        let coarse =
            BTreeMap::from([fact("mapped /a b", ""), fact("descriptor 3", "/a b, flags 02"), fact("parent", "1")]);
        assert_eq!(fine.coarse(), Visible(coarse));
    }

    #[test]
    fn of_passing_threads_nothing_is_left() {
        let fact = |what: &str| ((7, what.to_string()), String::new());
        let all =
            Visible(BTreeMap::from([fact("Threads"), fact("thread 7 Name"), fact("thread 71 Name"), fact("parent")]));
        assert_eq!(all.without_other_threads(), Visible(BTreeMap::from([fact("thread 7 Name"), fact("parent")])));
    }

    #[test]
    fn neighbours_are_merged() {
        let mut facts = Facts::default();
        facts.mappings(7, "1000-2000 rw-p 00000000 00:00 0 \n2000-3000 rw-p 00000000 00:00 0 \n");
        assert_eq!(facts.facts.keys().next().unwrap().1, "mapping 1000-3000");
        let mut facts = Facts::default();
        facts.mappings(7, "1000-2000 r--p 00000000 08:01 5 /a\n2000-3000 r--p 00004000 08:01 5 /a\n");
        assert_eq!(facts.facts.len(), 2, "the second is another part of the file");
    }
}
