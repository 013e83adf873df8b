//! Control groups: which cgroup of each hierarchy a process is in (`/proc/PID/cgroup`, cgroups(7)), of version 1 and 2.
//!
//! A skeleton is born in the cgroups of ckpt. Where the saved ones are others, its processes are moved there before they
//! have any memory, so that it is charged where it belongs. The cgroups themselves, with their limits, are the host's and
//! no part of an image: they must be there.
//!
//! Not looked at: threads in other cgroups than their process (version 1's `tasks`, version 2's threaded mode).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::error::{DumpError, RestoreError};
use crate::image::Image;
use crate::procfs::unescape;
use crate::resource::{Check, Collect};
use crate::target::Target;

/// The section name.
pub const NAME: &str = "cgroups";

/// Where a process is, as far as that is not the root of a hierarchy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroups {
    /// Sorted by hierarchy.
    pub memberships: Vec<Membership>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The controllers or the name of a hierarchy of version 1 (`cpu,cpuacct`, `name=systemd`); empty for version 2.
    pub hierarchy: String,
    /// From the root of the hierarchy, as our cgroup namespace shows it.
    pub path: PathBuf,
}

impl Membership {
    /// For messages: `cgroup /a/b (memory)`.
    fn subject(&self) -> String {
        let hierarchy = if self.hierarchy.is_empty() { "version 2" } else { &self.hierarchy };
        format!("cgroup {} ({hierarchy})", self.path.display())
    }
}

/// All hierarchies that `/proc/PID/cgroup` shows, with the place in each.
fn parse(text: &[u8]) -> BTreeMap<String, PathBuf> {
    let lines = text.split(|&byte| byte == b'\n');
    let fields = lines.filter_map(|line| {
        let mut fields = line.splitn(3, |&byte| byte == b':');
        let (_, hierarchy, path) = (fields.next()?, fields.next()?, fields.next()?);
        Some((String::from_utf8_lossy(hierarchy).into_owned(), PathBuf::from(OsStr::from_bytes(path))))
    });
    fields.collect()
}

/// Reads where a frozen process is.
pub fn collect(context: &mut Collect<'_>) -> Result<Cgroups, DumpError> {
    let text = match context.target.proc().read("cgroup") {
        // A kernel without cgroups.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Cgroups::default()),
        other => other.map_err(|error| context.io_error("cgroup", error))?,
    };
    let memberships = parse(&text)
        .into_iter()
        .filter(|(_, path)| path.as_os_str() != "/")
        .map(|(hierarchy, path)| Membership { hierarchy, path });
    Ok(Cgroups { memberships: memberships.collect() })
}

/// What a process that is born in ours must be moved to.
fn moves(saved: &Cgroups, ours: &BTreeMap<String, PathBuf>) -> Vec<Membership> {
    let mut wanted: BTreeMap<&str, &Path> = ours.keys().map(|hierarchy| (hierarchy.as_str(), Path::new("/"))).collect();
    wanted.extend(saved.memberships.iter().map(|saved| (saved.hierarchy.as_str(), saved.path.as_path())));
    wanted
        .into_iter()
        .filter(|(hierarchy, path)| ours.get(*hierarchy).is_none_or(|ours| ours != path))
        .map(|(hierarchy, path)| Membership { hierarchy: hierarchy.to_string(), path: path.to_path_buf() })
        .collect()
}

fn ours() -> BTreeMap<String, PathBuf> {
    fs::read("/proc/self/cgroup").map(|text| parse(&text)).unwrap_or_default()
}

/// What becomes of the processes of an image if they stay in our cgroups, in words: a line for each that was elsewhere.
pub fn losses(image: &Image) -> Vec<String> {
    let ours = ours();
    let lost = image.processes.iter().flat_map(|process| {
        let moves = moves(&process.cgroups, &ours);
        moves.into_iter().map(|wanted| format!("process {} was in {}", process.task.pid, wanted.subject()))
    });
    lost.collect()
}

/// Whether every cgroup is there, and processes may be put into it.
pub fn check(image: &Image, context: &mut Check<'_>) {
    if context.options.ignore_cgroups {
        return;
    }
    let ours = ours();
    let mut mounts = None;
    let mut looked_at: Vec<&Cgroups> = Vec::new();
    for process in &image.processes {
        // Most processes of a tree are in the same.
        if looked_at.contains(&&process.cgroups) {
            continue;
        }
        looked_at.push(&process.cgroups);
        context.pid = Some(process.task.pid);
        for wanted in moves(&process.cgroups, &ours) {
            let mounts = mounts.get_or_insert_with(Mounts::read);
            if let Err(why) = mounts.directory(&wanted).and_then(|directory| examine(&directory)) {
                let help = "make it again, or leave the processes in the cgroup of ckpt: restore --cgroup ignore";
                context.refuse(wanted.subject(), why, help);
            }
        }
    }
    context.pid = None;
}

fn examine(directory: &Path) -> Result<(), String> {
    if !directory.is_dir() {
        return Err("it is not there".into());
    }
    let processes = directory.join("cgroup.procs");
    fs::OpenOptions::new().write(true).open(&processes).map_err(|error| format!("no process can join it: {error}"))?;
    // A skeleton in it would not run.
    let says =
        |name: &str, value: &str| fs::read_to_string(directory.join(name)).is_ok_and(|text| text.trim() == value);
    if says("cgroup.freeze", "1") || says("freezer.state", "FROZEN") {
        return Err("it is frozen".into());
    }
    Ok(())
}

/// Moves every process of a skeleton to where it was.
pub fn rebuild(targets: &[Box<dyn Target>], image: &Image, ignore: bool) -> Result<(), RestoreError> {
    if ignore {
        return Ok(());
    }
    let ours = ours();
    let mut mounts = None;
    for (target, process) in targets.iter().zip(&image.processes) {
        for wanted in moves(&process.cgroups, &ours) {
            let mounts = mounts.get_or_insert_with(Mounts::read);
            let failed = |source: io::Error| RestoreError::Io {
                what: format!("{NAME}: process {} cannot join {}", target.pid(), wanted.subject()),
                source,
            };
            let directory = mounts.directory(&wanted).map_err(|why| failed(io::Error::other(why)))?;
            let file = fs::OpenOptions::new().write(true).open(directory.join("cgroup.procs"));
            file.and_then(|mut file| file.write_all(target.pid().to_string().as_bytes())).map_err(failed)?;
        }
    }
    Ok(())
}

/// Where hierarchies are mounted.
struct Mounts(Vec<Mount>);

struct Mount {
    /// `None` for version 2; else the options of the file system, with its controllers and its name among them.
    options: Option<Vec<String>>,
    /// Which cgroup is mounted, and where.
    root: PathBuf,
    place: PathBuf,
}

impl Mounts {
    fn read() -> Mounts {
        Mounts::parse(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    /// Parses `mountinfo` (proc_pid_mountinfo(5)).
    fn parse(text: &str) -> Mounts {
        let mount = |line: &str| {
            let (mount, filesystem) = line.split_once(" - ")?;
            let mut mount = mount.split(' ').skip(3);
            let (root, place) = (mount.next()?, mount.next()?);
            let mut filesystem = filesystem.split(' ');
            let (kind, _, options) = (filesystem.next()?, filesystem.next()?, filesystem.next()?);
            let options = match kind {
                "cgroup2" => None,
                "cgroup" => Some(options.split(',').map(str::to_string).collect()),
                _ => return None,
            };
            let path = |text: &str| PathBuf::from(unescape(text.as_bytes()));
            Some(Mount { options, root: path(root), place: path(place) })
        };
        Mounts(text.lines().filter_map(mount).collect())
    }

    /// The directory of a cgroup; or why there is none.
    fn directory(&self, wanted: &Membership) -> Result<PathBuf, String> {
        if !wanted.path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_))) {
            return Err("it is outside of the cgroup namespace of ckpt".into());
        }
        let is_it = |mount: &Mount| match &mount.options {
            None => wanted.hierarchy.is_empty(),
            Some(options) => {
                let mut names = wanted.hierarchy.split(',');
                !wanted.hierarchy.is_empty() && names.all(|name| options.iter().any(|option| option == name))
            }
        };
        let mut mounts = self.0.iter().filter(|mount| is_it(mount)).peekable();
        if mounts.peek().is_none() {
            return Err("this hierarchy is not mounted here".into());
        }
        let inside = |mount: &Mount| Some(mount.place.join(wanted.path.strip_prefix(&mount.root).ok()?));
        mounts.find_map(inside).ok_or_else(|| "no mount of this hierarchy shows it".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn membership(hierarchy: &str, path: &str) -> Membership {
        Membership { hierarchy: hierarchy.into(), path: path.into() }
    }

    #[test]
    fn only_what_differs_is_moved() {
        let ours = parse(b"4:memory:/a/b\n3:cpu,cpuacct:/\n0::/x:y\n");
        assert_eq!(ours[""], Path::new("/x:y"));
        let same = Cgroups { memberships: vec![membership("", "/x:y"), membership("memory", "/a/b")] };
        assert_eq!(moves(&same, &ours), []);
        let root = membership("memory", "/");
        let other = Cgroups { memberships: vec![membership("", "/x:y"), membership("pids", "/p")] };
        assert_eq!(moves(&other, &ours), [root, membership("pids", "/p")], "the root of one, and one that is not here");
    }

    #[test]
    fn places_of_cgroups() {
        let mounts = Mounts::parse(
            "30 24 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
             31 24 0:27 /docker/7 /sys/fs/cgroup/cpu\\040x rw - cgroup cgroup rw,cpu,cpuacct\n\
             32 24 0:28 / /tmp rw - tmpfs tmpfs rw\n",
        );
        let directory = |hierarchy, path| mounts.directory(&membership(hierarchy, path));
        assert_eq!(directory("", "/a"), Ok("/sys/fs/cgroup/unified/a".into()));
        assert_eq!(directory("cpu,cpuacct", "/docker/7/b"), Ok("/sys/fs/cgroup/cpu x/b".into()));
        assert!(directory("cpu,cpuacct", "/b").is_err(), "outside of what is mounted");
        assert!(directory("memory", "/").is_err(), "not mounted");
        assert!(directory("", "/../a").is_err(), "outside of the namespace");
    }
}
