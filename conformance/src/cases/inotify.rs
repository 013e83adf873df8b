//! File watches.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("inotify/watches", &["inotify"], watches).privileged("open_by_handle_at takes CAP_DAC_READ_SEARCH"),
        Case::new("inotify/of-another-user", &["inotify", "credentials"], of_another_user)
            .privileged("several users take root"),
        Case::new("inotify/unread", &["inotify"], unread).refused_at_dump("events that were not read"),
        Case::new("inotify/watched-file-gone", &["inotify"], watched_file_gone)
            .privileged("open_by_handle_at takes CAP_DAC_READ_SEARCH")
            .after_dump(remove)
            .refused_at_restore("it is gone"),
    ]
}

type Verdict = Result<(), String>;

fn inotify() -> Result<File, String> {
    let flags = libc::IN_NONBLOCK | libc::IN_CLOEXEC;
    // SAFETY: makes a new descriptor, which the File owns.
    unsafe { Ok(File::from_raw_fd(done("inotify_init1", libc::inotify_init1(flags))?)) }
}

fn watch(inotify: &File, path: &Path, mask: u32) -> Result<i32, String> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: a C string that lives until the call returns.
    done("inotify_add_watch", unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask) })
}

/// All events: (watch, mask).
fn events(mut inotify: &File) -> Vec<(i32, u32)> {
    let mut buffer = [0; 4096];
    let mut found = Vec::new();
    let Ok(length) = inotify.read(&mut buffer) else { return found };
    let mut rest = &buffer[..length];
    while rest.len() >= 16 {
        let word = |at: usize| u32::from_ne_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
        found.push((word(0) as i32, word(4)));
        rest = &rest[16 + word(12) as usize..];
    }
    found
}

fn watches(checkpoint: &Checkpoint) -> Verdict {
    let (file, directory) = (checkpoint.dir().join("a file"), checkpoint.dir().join("directory"));
    fs::write(&file, "content").map_err(|error| error.to_string())?;
    fs::create_dir(&directory).map_err(|error| error.to_string())?;
    let inotify = inotify()?;
    let gone = watch(&inotify, Path::new("/"), libc::IN_DELETE)?;
    let on_file = watch(&inotify, &file, libc::IN_MODIFY | libc::IN_ONESHOT)?;
    let on_directory = watch(&inotify, &directory, libc::IN_CREATE | libc::IN_DELETE | libc::IN_OPEN)?;
    // SAFETY: takes numbers.
    done("inotify_rm_watch", unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), gone) })?;
    equal("the removed watch", vec![(gone, libc::IN_IGNORED)], events(&inotify))?;
    checkpoint.wait()?;
    equal("nothing has happened", vec![], events(&inotify))?;
    let new = directory.join("new");
    fs::write(&new, "").map_err(|error| error.to_string())?;
    let created = vec![(on_directory, libc::IN_CREATE), (on_directory, libc::IN_OPEN)];
    equal("a file was made and opened", created, events(&inotify))?;
    fs::remove_file(&new).map_err(|error| error.to_string())?;
    equal("and removed", vec![(on_directory, libc::IN_DELETE)], events(&inotify))?;
    fs::write(&file, "other").map_err(|error| error.to_string())?;
    let once = vec![(on_file, libc::IN_MODIFY), (on_file, libc::IN_IGNORED)];
    equal("the file was written to, which is told once", once, events(&inotify))?;
    // SAFETY: takes numbers.
    done("inotify_rm_watch", unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), on_directory) }).map(drop)
}

/// Whom the kernel would not let look up handles.
fn of_another_user(checkpoint: &Checkpoint) -> Verdict {
    let inotify = inotify()?;
    let directory = checkpoint.dir().join("directory");
    fs::create_dir(&directory).map_err(|error| error.to_string())?;
    let number = watch(&inotify, &directory, libc::IN_CREATE)?;
    // SAFETY: changes our own id.
    done("setresuid", unsafe { libc::setresuid(12345, 12345, 0) })?;
    checkpoint.wait()?;
    // SAFETY: as above.
    done("setresuid", unsafe { libc::setresuid(0, 0, 0) })?;
    fs::write(directory.join("new"), "").map_err(|error| error.to_string())?;
    equal("what has happened", vec![(number, libc::IN_CREATE)], events(&inotify))
}

fn unread(checkpoint: &Checkpoint) -> Verdict {
    let inotify = inotify()?;
    let directory = checkpoint.dir().join("directory");
    fs::create_dir(&directory).map_err(|error| error.to_string())?;
    let number = watch(&inotify, &directory, libc::IN_CREATE)?;
    fs::write(directory.join("new"), "").map_err(|error| error.to_string())?;
    checkpoint.wait()?;
    equal("the event", vec![(number, libc::IN_CREATE)], events(&inotify))
}

fn watched_file_gone(checkpoint: &Checkpoint) -> Verdict {
    let inotify = inotify()?;
    let file = checkpoint.dir().join("watched");
    fs::write(&file, "").map_err(|error| error.to_string())?;
    watch(&inotify, &file, libc::IN_MODIFY)?;
    checkpoint.wait()?;
    let mut buffer = [0; 64];
    let found = (&inotify).read(&mut buffer).map_err(|error| error.kind());
    equal("no event", Err(ErrorKind::WouldBlock), found)
}

fn remove(dir: &Path) {
    fs::remove_file(dir.join("watched")).expect("the watched file is there");
}
