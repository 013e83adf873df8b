//! Control groups: a tree comes back into those that it was in.

use std::fs;
use std::path::{Path, PathBuf};

use crate::case::{Case, Checkpoint};
use crate::expect::{equal, in_child, make_sign};

pub fn cases() -> Vec<Case> {
    let cgroups = &["cgroups", "tasks"];
    vec![
        Case::new("cgroups/members", cgroups, members).needs_host(can_make_cgroups),
        Case::new("cgroups/gone", cgroups, member)
            .privileged("to make cgroups takes root")
            .needs_host(can_make_cgroups)
            .after_dump(remove)
            .refused_at_restore("restore --cgroup ignore"),
    ]
}

/// Of the cgroups that these cases make.
const PREFIX: &str = "ckpt-conformance-";

/// The directories of hierarchies where this process may make cgroups: version 2, and one of version 1.
fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let place = |wanted: &dyn Fn(&str, &str) -> bool| {
        mounts.lines().find_map(|line| {
            let (mount, filesystem) = line.split_once(" - ")?;
            let mut words = filesystem.split(' ');
            let (kind, options) = (words.next()?, words.nth(1)?);
            wanted(kind, options).then(|| PathBuf::from(mount.split(' ').nth(4).unwrap_or_default()))
        })
    };
    let two = place(&|kind, _| kind == "cgroup2");
    let one = place(&|kind, options| kind == "cgroup" && options.split(',').any(|option| option == "pids"));
    let usable = |place: &PathBuf| {
        let trial = place.join(format!("{PREFIX}trial-{}", std::process::id()));
        fs::create_dir(&trial).is_ok() && fs::remove_dir(&trial).is_ok()
    };
    two.into_iter().chain(one).filter(usable).collect()
}

fn can_make_cgroups() -> Result<(), String> {
    match hierarchies().is_empty() {
        true => Err("no cgroup can be made here".into()),
        false => Ok(()),
    }
}

/// A cgroup that is removed again.
struct Cgroup(PathBuf);

impl Cgroup {
    /// In a hierarchy; what an earlier trial that was killed left there goes.
    fn make(hierarchy: &Path, trial: &str, name: &str) -> Result<Cgroup, String> {
        let ten_minutes = std::time::Duration::from_secs(600);
        for entry in fs::read_dir(hierarchy).into_iter().flatten().flatten() {
            let age = entry.metadata().and_then(|found| found.modified()).ok().and_then(|made| made.elapsed().ok());
            if entry.file_name().to_string_lossy().starts_with(PREFIX) && age.is_some_and(|age| age > ten_minutes) {
                let _ = fs::remove_dir(entry.path());
            }
        }
        let path = hierarchy.join(format!("{PREFIX}{trial}-{name}"));
        fs::create_dir(&path).map_err(|error| format!("mkdir {}: {error}", path.display()))?;
        Ok(Cgroup(path))
    }

    fn join(&self) -> Result<(), String> {
        join(&self.0)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn join(directory: &Path) -> Result<(), String> {
    fs::write(directory.join("cgroup.procs"), "0").map_err(|error| format!("joining {}: {error}", directory.display()))
}

fn own() -> Result<String, String> {
    fs::read_to_string("/proc/self/cgroup").map_err(|error| format!("/proc/self/cgroup: {error}"))
}

/// The trial, in names: its directory is its own.
fn trial(checkpoint: &Checkpoint) -> String {
    let directory = checkpoint.dir().to_string_lossy().into_owned();
    directory.chars().filter(char::is_ascii_alphanumeric).collect()
}

/// One process in a cgroup of each hierarchy, its child in others, and a grandchild in the root.
fn members(checkpoint: &Checkpoint) -> Result<(), String> {
    let hierarchies = hierarchies();
    let make = |name| -> Result<Vec<Cgroup>, String> {
        hierarchies.iter().map(|place| Cgroup::make(place, &trial(checkpoint), name)).collect()
    };
    let (first, second) = (make("first")?, make("second")?);
    // Each looks before the tree is looked at, so that nobody has the file open then.
    let stay = |before: String| -> Result<(), String> {
        checkpoint.wait_for_go()?;
        equal("the cgroups", before, own()?)
    };
    first.iter().try_for_each(Cgroup::join)?;
    let joined = checkpoint.dir().join("joined");
    let child = in_child(|| {
        second.iter().try_for_each(Cgroup::join)?;
        let before = own()?;
        let grandchild = in_child(|| {
            hierarchies.iter().try_for_each(|place| join(place))?;
            let before = own()?;
            make_sign(&joined)?;
            stay(before)
        })?;
        stay(before)?;
        grandchild.passed()
    })?;
    crate::expect::eventually("the grandchild's cgroups", || joined.exists())?;
    let text = own()?;
    equal("the number of cgroups that were joined", hierarchies.len(), text.matches(&format!("/{PREFIX}")).count())?;
    checkpoint.ready()?;
    let stayed = stay(text);
    let passed = child.passed();
    // Out of them, so that they can be removed.
    hierarchies.iter().try_for_each(|place| join(place))?;
    stayed.and(passed)
}

/// Writes down where its cgroup is, for who removes it.
fn member(checkpoint: &Checkpoint) -> Result<(), String> {
    let hierarchies = hierarchies();
    let cgroup = Cgroup::make(&hierarchies[0], &trial(checkpoint), "gone")?;
    cgroup.join()?;
    fs::write(checkpoint.dir().join("cgroup"), cgroup.0.to_string_lossy().as_bytes())
        .map_err(|error| error.to_string())?;
    let before = own()?;
    checkpoint.wait()?;
    equal("the cgroups", before, own()?)?;
    join(&hierarchies[0])
}

fn remove(dir: &Path) {
    let cgroup = fs::read_to_string(dir.join("cgroup")).expect("the subject wrote it");
    fs::remove_dir(cgroup).expect("nobody is in it");
}
