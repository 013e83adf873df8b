//! FIFOs: data, and the hang-up state of their readers.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::files::make_fifo;
use crate::case::{Case, Checkpoint};
use crate::expect::equal;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("fifos/data", &["fifos"], data),
        Case::new("fifos/both-ways", &["fifos"], both_ways),
        Case::new("fifos/no-writer-yet", &["fifos"], no_writer_yet),
        Case::new("fifos/writer-left", &["fifos"], writer_left),
        Case::new("fifos/gone", &["fifos"], both_ways).after_dump(remove).refused_at_restore("it is gone"),
    ]
}

type Verdict = Result<(), String>;

fn failed(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

/// Opens a FIFO without waiting for the other side.
fn reader(path: &Path) -> Result<File, String> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed("open to read"))
}

fn writer(path: &Path) -> Result<File, String> {
    OpenOptions::new().write(true).open(path).map_err(failed("open to write"))
}

/// What `poll` shows.
fn events(file: &File) -> i16 {
    let mut list = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure, as said.
    unsafe { libc::poll(&mut list, 1, 0) };
    list.revents
}

fn data(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("fifo");
    make_fifo(&path)?;
    let mut reader = reader(&path)?;
    let mut writer = writer(&path)?;
    writer.write_all(b"before, ").map_err(failed("write"))?;
    checkpoint.wait()?;
    writer.write_all(b"after").map_err(failed("write"))?;
    let mut late = self::writer(&path)?;
    late.write_all(b", by name").map_err(failed("write"))?;
    drop((writer, late));
    let mut text = String::new();
    reader.read_to_string(&mut text).map_err(failed("read"))?;
    equal("what is read", "before, after, by name".to_string(), text)
}

fn both_ways(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("fifo");
    make_fifo(&path)?;
    let mut both = OpenOptions::new().read(true).write(true).open(&path).map_err(failed("open"))?;
    both.write_all(b"held").map_err(failed("write"))?;
    checkpoint.wait()?;
    let mut text = [0; 4];
    both.read_exact(&mut text).map_err(failed("read"))?;
    equal("what is read", b"held", &text)
}

fn remove(dir: &Path) {
    std::fs::remove_file(dir.join("fifo")).expect("the subject made it");
}

/// A daemon waits for its first client: no hang-up, or it would spin.
fn no_writer_yet(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("fifo");
    make_fifo(&path)?;
    let mut reader = reader(&path)?;
    equal("events before", 0, events(&reader))?;
    checkpoint.wait()?;
    equal("events", 0, events(&reader))?;
    equal("bytes read without a writer", Some(0), reader.read(&mut [0; 8]).ok())?;
    let mut writer = writer(&path)?;
    writer.write_all(b"x").map_err(failed("write"))?;
    equal("events with data", libc::POLLIN, events(&reader))
}

fn writer_left(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("fifo");
    make_fifo(&path)?;
    let mut reader = reader(&path)?;
    writer(&path)?.write_all(b"last words").map_err(failed("write"))?;
    equal("events before", libc::POLLIN | libc::POLLHUP, events(&reader))?;
    checkpoint.wait()?;
    equal("events", libc::POLLIN | libc::POLLHUP, events(&reader))?;
    let mut text = String::new();
    reader.read_to_string(&mut text).map_err(failed("read"))?;
    equal("what is read up to the end", "last words".to_string(), text)
}
