//! Pipes: data, packets, sizes, ends.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use super::descriptors::pipe;
use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal, eventually, in_child};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("pipes/data", &["pipes"], data),
        Case::new("pipes/packets", &["pipes"], packets),
        Case::new("pipes/size", &["pipes"], size),
        Case::new("pipes/full", &["pipes"], full),
        Case::new("pipes/end-of-file", &["pipes"], end_of_file),
        Case::new("pipes/no-reader", &["pipes"], no_reader),
        Case::new("pipes/more-ends", &["pipes"], more_ends),
        Case::new("pipes/inode", &["pipes"], inode).privileged("chown takes CAP_CHOWN"),
        Case::new("pipes/hundreds", &["pipes", "descriptors"], hundreds),
        Case::new("pipes/outside", &["pipes"], outside).refused_at_dump("which is not part of the tree"),
    ]
}

type Verdict = Result<(), String>;

fn failed(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

/// `F_SETFL`.
fn set_flags(file: &File, flags: i32) -> Verdict {
    // SAFETY: takes an integer.
    done("F_SETFL", unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

fn data(checkpoint: &Checkpoint) -> Verdict {
    let (mut reader, mut writer) = pipe()?;
    writer.write_all(b"before, ").map_err(failed("write"))?;
    checkpoint.wait()?;
    writer.write_all(b"after").map_err(failed("write"))?;
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text).map_err(failed("read"))?;
    equal("what is read", "before, after".to_string(), text)
}

fn packets(checkpoint: &Checkpoint) -> Verdict {
    let (mut reader, mut writer) = pipe()?;
    set_flags(&writer, libc::O_DIRECT)?;
    set_flags(&reader, libc::O_NONBLOCK)?;
    let sent: [&[u8]; 5] = [b"one", b"three", b"", &[5; 4096], b"1"];
    for packet in sent {
        writer.write_all(packet).map_err(failed("write"))?;
    }
    checkpoint.wait()?;
    writer.write_all(b"late").map_err(failed("write"))?;
    let mut buffer = [0; 8192];
    for packet in [b"one".as_slice(), b"three", &[5; 4096], b"1", b"late"] {
        let got = reader.read(&mut buffer).map_err(failed("read"))?;
        equal("a packet", packet, &buffer[..got])?;
    }
    equal(
        "a read of the empty pipe",
        Err(ErrorKind::WouldBlock),
        reader.read(&mut buffer).map_err(|error| error.kind()),
    )
}

fn size(checkpoint: &Checkpoint) -> Verdict {
    let sizes = [4096, 65536, 1 << 20];
    let mut pipes = Vec::new();
    for size in sizes {
        let (reader, writer) = pipe()?;
        // SAFETY: takes an integer.
        done("F_SETPIPE_SZ", unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETPIPE_SZ, size) })?;
        pipes.push((reader, writer));
    }
    let mut big = &pipes[2].1;
    let content: Vec<u8> = (0..(1 << 20)).map(|byte: u32| (byte % 251) as u8).collect();
    big.write_all(&content).map_err(failed("write"))?;
    checkpoint.wait()?;
    for ((_, writer), size) in pipes.iter().zip(sizes) {
        // SAFETY: takes no argument.
        equal("F_GETPIPE_SZ", size, unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_GETPIPE_SZ) })?;
    }
    let mut found = vec![0; 1 << 20];
    (&pipes[2].0).read_exact(&mut found).map_err(failed("read"))?;
    if found == content { Ok(()) } else { Err("a mebibyte in a pipe has changed".into()) }
}

/// A child waits to write to a full pipe.
fn full(checkpoint: &Checkpoint) -> Verdict {
    let (mut reader, mut writer) = pipe()?;
    writer.write_all(&[1; 65536]).map_err(failed("write"))?;
    let child = in_child(|| writer.write_all(b"more").map_err(failed("write")))?;
    drop(writer);
    // Until the child sleeps in the kernel: it has nothing else to sleep in.
    let asleep = || std::fs::read_to_string(format!("/proc/{}/stat", child.0)).is_ok_and(|stat| stat.contains(") S "));
    eventually("the writer waits", asleep)?;
    checkpoint.wait()?;
    let mut found = Vec::new();
    reader.read_to_end(&mut found).map_err(failed("read"))?;
    equal("bytes read", 65540, found.len())?;
    equal("the last bytes", b"more".as_slice(), &found[65536..])?;
    child.passed()
}

fn end_of_file(checkpoint: &Checkpoint) -> Verdict {
    let (mut reader, mut writer) = pipe()?;
    writer.write_all(b"last words").map_err(failed("write"))?;
    drop(writer);
    checkpoint.wait()?;
    let mut text = String::new();
    reader.read_to_string(&mut text).map_err(failed("read"))?;
    equal("what is read up to the end", "last words".to_string(), text)
}

fn no_reader(checkpoint: &Checkpoint) -> Verdict {
    let (reader, mut writer) = pipe()?;
    drop(reader);
    checkpoint.wait()?;
    // Rust programs ignore SIGPIPE.
    equal("a write", Err(ErrorKind::BrokenPipe), writer.write(b"x").map_err(|error| error.kind()))
}

/// Several open file descriptions of each end, with flags of their own.
fn more_ends(checkpoint: &Checkpoint) -> Verdict {
    let (mut reader, mut writer) = pipe()?;
    let again = |file: &File, options: &mut OpenOptions| {
        options.open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(failed("open in /proc"))
    };
    let mut impatient = again(&reader, OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK))?;
    let mut second = again(&writer, OpenOptions::new().write(true))?;
    let mut both = again(&writer, OpenOptions::new().read(true).write(true))?;
    checkpoint.wait()?;
    let mut buffer = [0; 16];
    equal(
        "a read of the empty pipe",
        Err(ErrorKind::WouldBlock),
        impatient.read(&mut buffer).map_err(|error| error.kind()),
    )?;
    writer.write_all(b"1").map_err(failed("write"))?;
    second.write_all(b"2").map_err(failed("write"))?;
    both.write_all(b"3").map_err(failed("write"))?;
    equal("bytes read", Some(3), reader.read(&mut buffer).ok())?;
    equal("what all ends have written", b"123".as_slice(), &buffer[..3])?;
    drop((writer, second));
    equal(
        "a read while there is a writer",
        Err(ErrorKind::WouldBlock),
        impatient.read(&mut buffer).map_err(|error| error.kind()),
    )?;
    drop(both);
    equal("a read at the end", Some(0), impatient.read(&mut buffer).ok())
}

fn inode(checkpoint: &Checkpoint) -> Verdict {
    use std::os::unix::fs::MetadataExt;
    let (reader, writer) = pipe()?;
    reader.set_permissions(std::fs::Permissions::from_mode(0o640)).map_err(failed("fchmod"))?;
    std::os::unix::fs::fchown(&reader, Some(1234), Some(5678)).map_err(failed("fchown"))?;
    checkpoint.wait()?;
    let (one, other) = (reader.metadata().map_err(failed("fstat"))?, writer.metadata().map_err(failed("fstat"))?);
    equal("the inode of both ends", one.ino(), other.ino())?;
    equal("mode and owner", (0o640, 1234, 5678), (other.mode() & 0o7777, other.uid(), other.gid()))
}

fn hundreds(checkpoint: &Checkpoint) -> Verdict {
    let mut pipes = Vec::new();
    for number in 0..300u32 {
        let (reader, mut writer) = pipe()?;
        writer.write_all(&number.to_ne_bytes()).map_err(failed("write"))?;
        pipes.push((reader, writer));
    }
    checkpoint.wait()?;
    for (number, (mut reader, writer)) in pipes.into_iter().enumerate() {
        drop(writer);
        let mut found = Vec::new();
        reader.read_to_end(&mut found).map_err(failed("read"))?;
        equal("what is in the pipe", (number as u32).to_ne_bytes().as_slice(), &found)?;
    }
    Ok(())
}

/// The other end is held by a process that has left the tree.
fn outside(checkpoint: &Checkpoint) -> Verdict {
    let (mut reader, writer) = pipe()?;
    let between = in_child(move || {
        // Init adopts it when the process between ends.
        in_child(move || {
            let mut writer = writer;
            checkpoint.wait_for_go()?;
            writer.write_all(b"from outside").map_err(failed("write"))
        })
        .map(drop)
    })?;
    between.passed()?;
    checkpoint.wait()?;
    let mut text = String::new();
    reader.read_to_string(&mut text).map_err(failed("read"))?;
    equal("what is read", "from outside".to_string(), text)
}
