//! Regular files and directories, deleted files, O_PATH descriptors.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use crate::case::{Case, Checkpoint};
use crate::expect::{done, equal};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("files/offset", &["files"], offset),
        Case::new("files/append", &["files"], append),
        Case::new("files/past-the-end", &["files"], past_the_end),
        Case::new("files/flags", &["files"], flags),
        Case::new("files/directory", &["files"], directory),
        Case::new("files/o-path", &["files"], o_path),
        Case::new("files/proc", &["files"], proc).real_ids("what was opened below /proc before tells real ids"),
        Case::new("files/name-says-deleted", &["files"], name_says_deleted),
        Case::new("files/other-name", &["files"], other_name),
        Case::new("files/deleted", &["files"], deleted),
        Case::new("files/deleted-name-taken", &["files"], deleted_name_taken).loses_names(),
        Case::new("files/deleted-hole", &["files"], deleted_hole),
        Case::new("files/deleted-attributes", &["files"], deleted_attributes).privileged("chown takes CAP_CHOWN"),
        Case::new("files/deleted-guarded", &["files"], deleted_guarded).privileged("its files are guarded by root"),
        Case::new("files/deleted-mapped", &["files", "memory"], deleted_mapped),
        Case::new("files/tmpfile", &["files"], tmpfile),
        Case::new("files/grown", &["files"], grown).after_dump(grow),
        Case::new("files/gone", &["files"], held).after_dump(remove).refused_at_restore("held: it is gone"),
        Case::new("files/replaced", &["files"], held)
            .after_dump(replace)
            .refused_at_restore("replaced by another file"),
        Case::new("files/shorter", &["files"], held).after_dump(shorten).refused_at_restore("shorter than at the dump"),
        Case::new("files/not-a-file", &["files"], held).after_dump(fifo).refused_at_restore("it was a regular file"),
        Case::new("files/deleted-directory", &["files"], deleted_directory)
            .refused_at_dump("a directory that was deleted"),
        Case::new("files/many", &["files", "descriptors"], many),
    ]
}

type Verdict = Result<(), String>;

fn failed(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

fn status_flags(file: &impl AsRawFd) -> i32 {
    // SAFETY: F_GETFL takes no argument.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) }
}

fn read_text(file: &mut File) -> Result<String, String> {
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed("read"))?;
    Ok(text)
}

fn offset(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("text");
    fs::write(&path, "one two three").map_err(failed("write"))?;
    let mut file = File::open(&path).map_err(failed("open"))?;
    let mut other = OpenOptions::new().read(true).write(true).open(&path).map_err(failed("open"))?;
    let mut shared = file.try_clone().map_err(failed("dup"))?;
    file.seek(SeekFrom::Start(4)).map_err(failed("seek"))?;
    other.seek(SeekFrom::Start(8)).map_err(failed("seek"))?;
    checkpoint.wait()?;
    let mut word = [0; 4];
    file.read_exact(&mut word).map_err(failed("read"))?;
    equal("the word at the offset", b"two ", &word)?;
    equal("the rest, by a descriptor that shares the offset", "three".into(), read_text(&mut shared)?)?;
    equal("the offset of another open of the file", 8, other.stream_position().map_err(failed("seek"))?)?;
    other.write_all(b"3").map_err(failed("write"))?;
    equal("the file", "one two 3hree".into(), fs::read_to_string(&path).map_err(failed("read"))?)
}

fn append(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("log");
    let mut log = OpenOptions::new().append(true).create(true).open(&path).map_err(failed("open"))?;
    log.write_all(b"before\n").map_err(failed("write"))?;
    checkpoint.wait()?;
    fs::write(&path, "by another\n").map_err(failed("write"))?;
    log.write_all(b"after\n").map_err(failed("write"))?;
    equal("the log", "by another\nafter\n".into(), fs::read_to_string(&path).map_err(failed("read"))?)
}

fn past_the_end(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("sparse");
    let mut file = File::create(&path).map_err(failed("create"))?;
    file.seek(SeekFrom::Start(1 << 40)).map_err(failed("seek"))?;
    checkpoint.wait()?;
    equal("the offset", 1 << 40, file.stream_position().map_err(failed("seek"))?)?;
    equal("the size, which no restore may change", 0, file.metadata().map_err(failed("stat"))?.len())
}

fn flags(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("flags");
    fs::write(&path, [7; 8192]).map_err(failed("write"))?;
    let mut files = Vec::new();
    for custom in [
        0,
        libc::O_NONBLOCK,
        libc::O_NOATIME,
        libc::O_SYNC,
        libc::O_DSYNC,
        libc::O_NOFOLLOW,
        libc::O_DIRECT,
        libc::O_APPEND | libc::O_NONBLOCK,
    ] {
        for write in [false, true] {
            let file = OpenOptions::new().read(true).write(write).custom_flags(custom).open(&path);
            let file = file.map_err(|error| format!("open with {custom:#o}: {error}"))?;
            let flags = status_flags(&file);
            files.push((file, flags));
        }
    }
    let created = OpenOptions::new().write(true).create(true).truncate(true).open(checkpoint.dir().join("created"));
    let mut created = created.map_err(failed("create"))?;
    created.write_all(b"content").map_err(failed("write"))?;
    files.push((created, libc::O_WRONLY | 0o100000));
    checkpoint.wait()?;
    for (file, flags) in &files {
        equal("F_GETFL", format!("{flags:#o}"), format!("{:#o}", status_flags(file)))?;
    }
    let created = fs::read(checkpoint.dir().join("created")).map_err(failed("read"))?;
    equal("a file that was opened with O_TRUNC", b"content".to_vec(), created)
}

/// The names that `getdents64` gives until `count` calls of the smallest buffer are done.
fn names(directory: RawFd, calls: usize) -> Result<BTreeSet<Vec<u8>>, String> {
    let mut names = BTreeSet::new();
    for _ in 0..calls {
        let mut buffer = [0u8; 64];
        // SAFETY: the buffer is as long as said.
        let got = unsafe { libc::syscall(libc::SYS_getdents64, directory, buffer.as_mut_ptr(), buffer.len()) };
        done("getdents64", got)?;
        let mut rest = &buffer[..got as usize];
        if rest.is_empty() {
            break;
        }
        while rest.len() > 19 {
            let length = u16::from_ne_bytes([rest[16], rest[17]]) as usize;
            let name = &rest[19..length];
            names.insert(name[..name.iter().position(|&byte| byte == 0).unwrap_or(name.len())].to_vec());
            rest = &rest[length..];
        }
    }
    Ok(names)
}

fn directory(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("directory");
    fs::create_dir(&path).map_err(failed("mkdir"))?;
    let all: BTreeSet<Vec<u8>> = (0..40).map(|number| format!("file-{number}").into_bytes()).collect();
    for name in &all {
        File::create(path.join(std::ffi::OsStr::from_bytes(name))).map_err(failed("create"))?;
    }
    let directory = File::open(&path).map_err(failed("open"))?;
    let mut found = names(directory.as_raw_fd(), 15)?;
    let before = found.len();
    checkpoint.wait()?;
    let rest = names(directory.as_raw_fd(), 100)?;
    if let Some(twice) = found.intersection(&rest).next() {
        return Err(format!("{} was read before the dump and again", String::from_utf8_lossy(twice)));
    }
    found.extend(rest);
    found.retain(|name| name != b"." && name != b"..");
    equal("the names in the directory", all.len(), found.len())?;
    if !(5..=35).contains(&before) {
        return Err(format!("the subject is wrong: {before} names were read before the dump"));
    }
    // SAFETY: the name is a C string.
    let opened = unsafe { libc::openat(directory.as_raw_fd(), c"file-7".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    done("openat of a file in the directory", opened)?;
    // SAFETY: it was just opened here.
    drop(unsafe { OwnedFd::from_raw_fd(opened) });
    Ok(())
}

fn open_path(path: &Path, flags: i32) -> Result<File, String> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | flags)
        .open(path)
        .map_err(|error| format!("open {} with O_PATH: {error}", path.display()))
}

fn o_path(checkpoint: &Checkpoint) -> Verdict {
    let at = |name| checkpoint.dir().join(name);
    fs::write(at("plain"), "content").map_err(failed("write"))?;
    symlink("plain", at("link")).map_err(failed("symlink"))?;
    make_fifo(&at("fifo"))?;
    let files = [
        open_path(&at("plain"), 0)?,
        open_path(checkpoint.dir(), libc::O_DIRECTORY)?,
        open_path(&at("link"), libc::O_NOFOLLOW)?,
        open_path(&at("fifo"), 0)?,
        open_path(Path::new("/dev/null"), 0)?,
    ];
    let look = || -> Result<Vec<(i32, u64, u32)>, String> {
        let stat = |file: &File| file.metadata().map(|stat| (status_flags(file), stat.ino(), stat.mode()));
        files.iter().map(|file| stat(file).map_err(failed("fstat"))).collect()
    };
    let before = look()?;
    checkpoint.wait()?;
    equal("flags, inodes and modes", before, look()?)?;
    let mut buffer = [0; 1];
    equal(
        "the error of a read",
        Err(Some(libc::EBADF)),
        (&files[0]).read(&mut buffer).map_err(|error| error.raw_os_error()),
    )?;
    let again = format!("/proc/self/fd/{}", files[0].as_raw_fd());
    equal("the content behind it", "content".into(), fs::read_to_string(again).map_err(failed("read"))?)
}

fn proc(checkpoint: &Checkpoint) -> Verdict {
    let mut own = File::open("/proc/self/status").map_err(failed("open"))?;
    let mut host = File::open("/proc/meminfo").map_err(failed("open"))?;
    let mut word = [0; 5];
    own.read_exact(&mut word).map_err(failed("read"))?;
    equal("the first word", b"Name:", &word)?;
    checkpoint.wait()?;
    equal("the offset", 5, own.stream_position().map_err(failed("seek"))?)?;
    own.rewind().map_err(failed("seek"))?;
    let status = read_text(&mut own)?;
    // Not a stranger's, who has the id of old.
    let name = fs::read_to_string("/proc/self/comm").map_err(failed("read"))?;
    equal("the name in it", Some(format!("Name:\t{}", name.trim_end()).as_str()), status.lines().next())?;
    if !status.contains(&format!("\nPid:\t{}\n", std::process::id())) {
        return Err(format!("it is not about this process: {status}"));
    }
    if !read_text(&mut host)?.starts_with("MemTotal:") {
        return Err("/proc/meminfo is something else".into());
    }
    Ok(())
}

/// A file that is called like the kernel calls a deleted one, beside a deleted one of that name.
fn name_says_deleted(checkpoint: &Checkpoint) -> Verdict {
    let (plain, odd) = (checkpoint.dir().join("x"), checkpoint.dir().join("x (deleted)"));
    fs::write(&plain, "the deleted one").map_err(failed("write"))?;
    fs::write(&odd, "the other one").map_err(failed("write"))?;
    let mut deleted = File::open(&plain).map_err(failed("open"))?;
    let mut named = File::open(&odd).map_err(failed("open"))?;
    fs::remove_file(&plain).map_err(failed("unlink"))?;
    checkpoint.wait()?;
    equal("what was deleted", "the deleted one".into(), read_text(&mut deleted)?)?;
    equal("what only sounds so", "the other one".into(), read_text(&mut named)?)?;
    equal("its links", 1, named.metadata().map_err(failed("fstat"))?.nlink())?;
    equal("a file under the deleted name", false, plain.exists())
}

/// Opened by one name, which is gone; there is another.
fn other_name(checkpoint: &Checkpoint) -> Verdict {
    let (first, second) = (checkpoint.dir().join("temporary"), checkpoint.dir().join("final"));
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&first).map_err(failed("open"))?;
    file.write_all(b"content").map_err(failed("write"))?;
    fs::hard_link(&first, &second).map_err(failed("link"))?;
    fs::remove_file(&first).map_err(failed("unlink"))?;
    checkpoint.wait()?;
    file.write_all(b", and more").map_err(failed("write"))?;
    equal(
        "the file by its other name",
        "content, and more".into(),
        fs::read_to_string(&second).map_err(failed("read"))?,
    )
}

fn deleted(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("deleted");
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).map_err(failed("open"))?;
    file.write_all(b"deleted content").map_err(failed("write"))?;
    file.set_permissions(fs::Permissions::from_mode(0o640)).map_err(failed("chmod"))?;
    // As shm_open(3) opens: the flag stays visible, and can be had only by a name.
    let mut reader =
        OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path).map_err(failed("open"))?;
    reader.seek(SeekFrom::Start(8)).map_err(failed("seek"))?;
    fs::remove_file(&path).map_err(failed("unlink"))?;
    let before = file.metadata().map_err(failed("fstat"))?;
    checkpoint.wait()?;
    let (after, other) = (file.metadata().map_err(failed("fstat"))?, reader.metadata().map_err(failed("fstat"))?);
    equal("the inode that two descriptors have", (after.dev(), after.ino()), (other.dev(), other.ino()))?;
    equal("mode, links, size", (before.mode(), 0, 15), (after.mode(), after.nlink(), after.len()))?;
    equal("owner", (before.uid(), before.gid()), (after.uid(), after.gid()))?;
    equal("time of change", before.modified().ok(), after.modified().ok())?;
    equal("the rest, read", "content".into(), read_text(&mut reader)?)?;
    file.write_all(b", and more").map_err(failed("write"))?;
    equal("what one wrote, read by the other", ", and more".into(), read_text(&mut reader)?)?;
    equal("a file of the former name", false, path.exists())?;
    let mut names: Vec<_> = fs::read_dir(checkpoint.dir())
        .map_err(failed("readdir"))?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| name.starts_with(".ckpt") || name.starts_with('#'))
        .collect();
    names.sort();
    equal("what was left behind", Vec::new(), names)
}

/// Somebody else's file has the name: it is left alone.
fn deleted_name_taken(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("taken");
    fs::write(&path, "the deleted one").map_err(failed("write"))?;
    let mut file = File::open(&path).map_err(failed("open"))?;
    fs::remove_file(&path).map_err(failed("unlink"))?;
    fs::write(&path, "the new one").map_err(failed("write"))?;
    let before = fs::metadata(&path).map_err(failed("stat"))?;
    checkpoint.wait()?;
    let after = fs::metadata(&path).map_err(failed("stat"))?;
    equal("inode and links of the new one", (before.ino(), 1), (after.ino(), after.nlink()))?;
    equal("the deleted one", "the deleted one".to_string(), read_text(&mut file)?)?;
    equal("the new one", "the new one".to_string(), fs::read_to_string(&path).map_err(failed("read"))?)
}

fn deleted_hole(checkpoint: &Checkpoint) -> Verdict {
    const END: u64 = 1 << 32;
    let path = checkpoint.dir().join("sparse");
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).map_err(failed("open"))?;
    file.write_all_at(b"far", END).map_err(failed("write"))?;
    fs::remove_file(&path).map_err(failed("unlink"))?;
    checkpoint.wait()?;
    let stat = file.metadata().map_err(failed("fstat"))?;
    equal("the size", END + 3, stat.len())?;
    if stat.blocks() > 2048 {
        return Err(format!("the hole takes {} blocks", stat.blocks()));
    }
    let mut word = [0; 3];
    file.read_exact_at(&mut word, END).map_err(failed("read"))?;
    equal("the data behind the hole", b"far", &word)
}

fn set_attribute(file: &File, name: &CStr, value: &[u8]) -> Verdict {
    // SAFETY: a C string, and a value of the length that is said.
    let result = unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    done(&format!("fsetxattr of {}", name.to_string_lossy()), result).map(drop)
}

/// All extended attributes of a file, by name.
fn attributes(file: &File) -> Result<BTreeMap<CString, Vec<u8>>, String> {
    let mut list = vec![0_u8; 65536];
    // SAFETY: a buffer of the length that is said.
    let length = unsafe { libc::flistxattr(file.as_raw_fd(), list.as_mut_ptr().cast(), list.len()) };
    list.truncate(done("flistxattr", length)? as usize);
    let mut all = BTreeMap::new();
    for name in list.split_inclusive(|&byte| byte == 0) {
        let name = CStr::from_bytes_with_nul(name).expect("it ends in NUL");
        let mut value = vec![0_u8; 65536];
        // SAFETY: a C string, and a buffer of the length that is said.
        let length =
            unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        value.truncate(done("fgetxattr", length)? as usize);
        all.insert(name.to_owned(), value);
    }
    Ok(all)
}

/// A POSIX ACL as the kernel has it (linux/posix_acl_xattr.h): user 4242 may read.
fn access_list() -> Vec<u8> {
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, u32::MAX), (2, 4, 4242), (4, 0, u32::MAX), (0x10, 4, u32::MAX), (0x20, 0, u32::MAX)];
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

/// Owner, ACL, capabilities and what programs note of a file, all of a file without a name; the directory hands down an
/// ACL of its own, which must not come to it.
fn deleted_attributes(checkpoint: &Checkpoint) -> Verdict {
    let directory = checkpoint.dir().join("directory");
    fs::create_dir(&directory).map_err(failed("mkdir"))?;
    let create = |name| {
        let path = directory.join(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(failed("create"))?;
        fs::remove_file(&path).map_err(failed("unlink"))?;
        Ok::<File, String>(file)
    };
    let mut file = create("deleted")?;
    file.write_all(b"content").map_err(failed("write"))?;
    std::os::unix::fs::fchown(&file, Some(1234), Some(5678)).map_err(failed("chown"))?;
    // vfs_cap_data of revision 2: CAP_NET_RAW permitted.
    let capabilities: Vec<u8> =
        [0x0200_0000_u32, 1 << 13, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    set_attribute(&file, c"user.note", b"one")?;
    set_attribute(&file, c"user.empty", b"")?;
    set_attribute(&file, c"user.bytes", &[0, 255, 7])?;
    set_attribute(&file, c"trusted.note", b"two")?;
    set_attribute(&file, c"security.capability", &capabilities)?;
    set_attribute(&file, c"system.posix_acl_access", &access_list())?;
    let plain = create("plain")?;
    let handed_down = File::open(&directory).map_err(failed("open"))?;
    set_attribute(&handed_down, c"system.posix_acl_default", &access_list())?;
    let look = |file: &File| -> Result<_, String> {
        let stat = file.metadata().map_err(failed("fstat"))?;
        Ok((attributes(file)?, stat.mode(), stat.uid(), stat.gid(), stat.modified().ok(), stat.accessed().ok()))
    };
    let before = (look(&file)?, look(&plain)?);
    equal("the number of attributes that were set", (6, 0), (before.0.0.len(), before.1.0.len()))?;
    checkpoint.wait()?;
    equal("attributes, mode, owner and times", before, (look(&file)?, look(&plain)?))
}

const FS_IOC_GETFLAGS: libc::c_ulong = 0x8008_6601;
const FS_IOC_SETFLAGS: libc::c_ulong = 0x4008_6602;
const FS_IMMUTABLE_FL: libc::c_long = 0x10;
const FS_APPEND_FL: libc::c_long = 0x20;
const FS_NODUMP_FL: libc::c_long = 0x40;
const FS_NOATIME_FL: libc::c_long = 0x80;

fn inode_flags(file: &File) -> Result<libc::c_long, String> {
    let mut flags: libc::c_long = 0;
    // SAFETY: the kernel writes an int at most, which fits.
    done("FS_IOC_GETFLAGS", unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_GETFLAGS, &mut flags) })?;
    Ok(flags)
}

/// Files without a name that may not be written, or only at their end, though descriptors for writing are open.
fn deleted_guarded(checkpoint: &Checkpoint) -> Verdict {
    let mut files = Vec::new();
    for (name, flags) in
        [("a", FS_NODUMP_FL | FS_NOATIME_FL), ("b", FS_APPEND_FL), ("c", FS_IMMUTABLE_FL | FS_NODUMP_FL)]
    {
        let path = checkpoint.dir().join(name);
        let mut file =
            OpenOptions::new().read(true).append(true).create_new(true).open(&path).map_err(failed("create"))?;
        file.write_all(b"content").map_err(failed("write"))?;
        let reader = File::open(&path).map_err(failed("open"))?;
        fs::remove_file(&path).map_err(failed("unlink"))?;
        let all = inode_flags(&file)? | flags;
        // SAFETY: the kernel reads an int.
        done("FS_IOC_SETFLAGS", unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_SETFLAGS, &all) })?;
        let set = inode_flags(&file)?;
        equal("the flags that were set", flags, set & flags)?;
        files.push((file, reader, set));
    }
    checkpoint.wait()?;
    for (file, reader, before) in &mut files {
        equal("the flags", *before, inode_flags(file)?)?;
        equal("the content", "content".into(), read_text(reader)?)?;
        let wrote = file.write(b"more").map_err(|error| error.raw_os_error());
        let expected = if *before & FS_IMMUTABLE_FL != 0 { Err(Some(libc::EPERM)) } else { Ok(4) };
        equal("what a write gives", expected, wrote)?;
    }
    Ok(())
}

/// One deleted file, mapped by two processes and open in one: it stays one file.
fn deleted_mapped(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("mapped");
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).map_err(failed("open"))?;
    file.set_len(8192).map_err(failed("truncate"))?;
    file.write_all_at(b"before", 4096).map_err(failed("write"))?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping of a file of 8192 bytes.
    let shared = unsafe { libc::mmap(std::ptr::null_mut(), 8192, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if shared == libc::MAP_FAILED {
        return Err("mmap failed".into());
    }
    fs::remove_file(&path).map_err(failed("unlink"))?;
    checkpoint.wait()?;
    // SAFETY: inside of the mapping; nobody else writes there.
    let mapped = unsafe { std::slice::from_raw_parts_mut(shared.cast::<u8>(), 8192) };
    equal("the mapping", b"before".as_slice(), &mapped[4096..4102])?;
    mapped[..6].copy_from_slice(b"mapped");
    let mut word = [0; 6];
    file.read_exact_at(&mut word, 0).map_err(failed("read"))?;
    equal("what was written to the mapping, read from the file", b"mapped", &word)?;
    file.write_all_at(b"stored", 4096).map_err(failed("write"))?;
    equal("what was written to the file, in the mapping", b"stored".as_slice(), &mapped[4096..4102])?;
    equal("links", 0, file.metadata().map_err(failed("fstat"))?.nlink())
}

/// A file without a name that gets one in the end.
fn tmpfile(checkpoint: &Checkpoint) -> Verdict {
    let open =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(checkpoint.dir());
    let mut file = open.map_err(failed("open with O_TMPFILE"))?;
    file.write_all(b"first, ").map_err(failed("write"))?;
    checkpoint.wait()?;
    file.write_all(b"second").map_err(failed("write"))?;
    let path = checkpoint.dir().join("named");
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("no NUL");
    let to = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
    // SAFETY: two C strings.
    let result =
        unsafe { libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::AT_SYMLINK_FOLLOW) };
    done("linkat", result)?;
    equal("the file by its name", "first, second".into(), fs::read_to_string(&path).map_err(failed("read"))?)
}

fn held(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("held");
    fs::write(&path, "some content").map_err(failed("write"))?;
    let mut file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed("open"))?;
    checkpoint.wait()?;
    equal("the content", "some content".into(), read_text(&mut file)?)
}

fn remove(dir: &Path) {
    fs::remove_file(dir.join("held")).expect("the subject made it");
}

fn replace(dir: &Path) {
    fs::write(dir.join("new"), "some content").expect("the directory is there");
    fs::rename(dir.join("new"), dir.join("held")).expect("the subject made it");
}

fn shorten(dir: &Path) {
    fs::write(dir.join("held"), "some").expect("the subject made it");
}

fn fifo(dir: &Path) {
    remove(dir);
    make_fifo(&dir.join("held")).expect("the name is free");
}

pub(super) fn make_fifo(path: &Path) -> Verdict {
    let name = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
    // SAFETY: the name is a C string.
    done("mkfifo", unsafe { libc::mkfifo(name.as_ptr(), 0o600) }).map(drop)
}

/// A log that others write to while the program is away.
fn grown(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("log");
    fs::write(&path, "one\n").map_err(failed("write"))?;
    let mut file = File::open(&path).map_err(failed("open"))?;
    equal("the first line", "one\n".into(), read_text(&mut file)?)?;
    checkpoint.wait()?;
    // Where the subject was left running, nobody has written.
    let expected = fs::read_to_string(&path).map_err(failed("read"))?;
    equal("what was written meanwhile", expected, format!("one\n{}", read_text(&mut file)?))
}

fn grow(dir: &Path) {
    let mut log = OpenOptions::new().append(true).open(dir.join("log")).expect("the subject made it");
    log.write_all(b"two\n").expect("there is room");
}

fn deleted_directory(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.dir().join("directory");
    fs::create_dir(&path).map_err(failed("mkdir"))?;
    let directory = File::open(&path).map_err(failed("open"))?;
    fs::remove_dir(&path).map_err(failed("rmdir"))?;
    checkpoint.wait()?;
    equal("its type", true, directory.metadata().map_err(failed("fstat"))?.is_dir())
}

/// Thousands of descriptors, up to a high number, under a limit that is just enough.
fn many(checkpoint: &Checkpoint) -> Verdict {
    const COUNT: usize = 3000;
    const HIGH: RawFd = 15_000;
    let limit = libc::rlimit { rlim_cur: HIGH as u64 + 1, rlim_max: HIGH as u64 + 100 };
    // SAFETY: the structure lives as long as the call.
    done("setrlimit", unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })?;
    let path = checkpoint.dir().join("text");
    fs::write(&path, vec![b'x'; COUNT]).map_err(failed("write"))?;
    let mut files = Vec::with_capacity(COUNT);
    for number in 0..COUNT {
        let mut file = File::open(&path).map_err(failed("open"))?;
        file.seek(SeekFrom::Start(number as u64)).map_err(failed("seek"))?;
        files.push(file);
    }
    // SAFETY: numbers of descriptors; the new one is owned by nobody else.
    let high = unsafe {
        done("dup2", libc::dup2(files[7].as_raw_fd(), HIGH))?;
        File::from_raw_fd(HIGH)
    };
    checkpoint.wait()?;
    for (number, file) in files.iter_mut().enumerate() {
        equal("an offset", number as u64, file.stream_position().map_err(failed("seek"))?)?;
    }
    files[7].seek(SeekFrom::Start(99)).map_err(failed("seek"))?;
    equal("the offset by the high number", 99, (&high).stream_position().map_err(failed("seek"))?)?;
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure lives as long as the call.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut now) };
    equal("the limit", (limit.rlim_cur, limit.rlim_max), (now.rlim_cur, now.rlim_max))
}
