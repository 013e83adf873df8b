//! Root, current directory and umask.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::descriptors::pipe;
use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, in_child};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("filesystem/cwd", &["filesystem"], cwd),
        Case::new("filesystem/umask", &["filesystem"], umask),
        Case::new("filesystem/root", &["filesystem", "pipes"], root).privileged("chroot takes CAP_SYS_CHROOT"),
        Case::new("filesystem/cwd-outside-of-root", &["filesystem", "pipes"], outside)
            .privileged("chroot takes CAP_SYS_CHROOT"),
        Case::new("filesystem/cwd-deleted", &["filesystem"], deleted).refused_at_dump("the directory was deleted"),
        Case::new("filesystem/cwd-gone", &["filesystem"], cwd).after_dump(remove).refused_at_restore("it is gone"),
    ]
}

type Verdict = Result<(), String>;

fn failed(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

fn cwd(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("one");
    fs::create_dir(&path).map_err(failed("mkdir"))?;
    std::env::set_current_dir(&path).map_err(failed("chdir"))?;
    checkpoint.wait()?;
    equal("getcwd", Some(path.clone()), std::env::current_dir().ok())?;
    fs::write("relative", "text").map_err(failed("write"))?;
    equal("a file by a relative path", true, path.join("relative").exists())
}

fn remove(dir: &Path) {
    fs::remove_dir(dir.join("one")).expect("the subject made it");
}

fn umask(checkpoint: &Checkpoint) -> Verdict {
    // SAFETY: umask cannot fail.
    unsafe { libc::umask(0o137) };
    checkpoint.wait()?;
    let path = checkpoint.dir().join("masked");
    File::create(&path).map_err(failed("create"))?;
    equal("the mode of a new file", 0o640, fs::metadata(&path).map_err(failed("stat"))?.mode() & 0o777)?;
    // SAFETY: umask cannot fail.
    equal("umask", 0o137, unsafe { libc::umask(0) })
}

fn chroot(path: &Path) -> Verdict {
    let path = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
    // SAFETY: the path is a C string.
    done("chroot", unsafe { libc::chroot(path.as_ptr()) }).map(drop)
}

/// A child gets another root and waits there for a word from its parent: the sign to go on is not to be seen from it.
fn in_root(checkpoint: &Checkpoint, enter: impl FnOnce(&Path) -> Verdict, judge: impl FnOnce() -> Verdict) -> Verdict {
    let path = checkpoint.dir().join("root");
    fs::create_dir_all(path.join("inner")).map_err(failed("mkdir"))?;
    fs::write(path.join("inner/mark"), "inside").map_err(failed("write"))?;
    let ((mut from_child, mut to_parent), (mut from_parent, mut to_child)) = (pipe()?, pipe()?);
    let child = in_child(|| {
        enter(&path)?;
        to_parent.write_all(b"r").map_err(failed("write"))?;
        from_parent.read_exact(&mut [0]).map_err(failed("read"))?;
        judge()
    })?;
    from_child.read_exact(&mut [0]).map_err(failed("read"))?;
    checkpoint.wait()?;
    to_child.write_all(b"g").map_err(failed("write"))?;
    child.passed()
}

fn root(checkpoint: &Checkpoint) -> Verdict {
    let enter = |path: &Path| {
        chroot(path)?;
        std::env::set_current_dir("/inner").map_err(failed("chdir"))
    };
    in_root(checkpoint, enter, || {
        equal("a file by its full path", Some("inside".into()), fs::read_to_string("/inner/mark").ok())?;
        equal("a file by a relative path", Some("inside".into()), fs::read_to_string("mark").ok())?;
        equal("getcwd", Some("/inner".into()), std::env::current_dir().ok())
    })
}

fn outside(checkpoint: &Checkpoint) -> Verdict {
    let enter = |path: &Path| chroot(&path.join("inner"));
    in_root(checkpoint, enter, || {
        equal("a file by its full path", Some("inside".into()), fs::read_to_string("/mark").ok())?;
        equal("a file by a relative path", Some("inside".into()), fs::read_to_string("root/inner/mark").ok())
    })
}

fn deleted(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("deleted");
    fs::create_dir(&path).map_err(failed("mkdir"))?;
    std::env::set_current_dir(&path).map_err(failed("chdir"))?;
    fs::remove_dir(&path).map_err(failed("rmdir"))?;
    checkpoint.wait()?;
    equal("getcwd of a deleted directory", false, std::env::current_dir().is_ok())
}
