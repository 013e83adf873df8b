//! redis-server with 100,000 keys and a `BGSAVE` child at work during every dump. Its clients check the values.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::case::{Clients, Program};
use crate::visible::numbers;

const KEYS: usize = 100_000;
const SERVER: &str = "/usr/bin/redis-server";
const CHECKER: &str = "/usr/bin/redis-check-rdb";
const DEADLINE: Duration = Duration::from_secs(60);

pub fn program() -> Program {
    let needs = &[(SERVER, "redis-server"), (CHECKER, "redis-tools")];
    Program { command, needs, clients: Some(Clients { prepare, before_dump, after_restore, finish }) }
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(SERVER);
    // A saving child that rests after each key is still at work when it is dumped.
    command.args(["--port", "6379", "--bind", "127.0.0.1", "--unixsocket", "redis.sock", "--save", ""]);
    command.args(["--rdb-key-save-delay", "20", "--dbfilename", "dump.rdb", "--logfile", "redis.log", "--dir"]);
    command.arg(dir);
    command
}

fn prepare(dir: &Path) -> Result<(), String> {
    let begin = Instant::now();
    let mut client = loop {
        match Client::over_tcp() {
            Ok(client) => break client,
            Err(error) if begin.elapsed() > DEADLINE => return Err(format!("connecting to redis: {error}")),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    for first in (0..KEYS).step_by(1000) {
        for number in first..first + 1000 {
            client.send(&["SET", &key(number), &value(number)])?;
        }
        for _ in 0..1000 {
            client.expect("OK")?;
        }
    }
    drop(client);
    no_connections(dir)
}

/// Sees to it that a child is saving, and that no connection is open, neither in the server nor in the child.
fn before_dump(dir: &Path, round: usize) -> Result<(), String> {
    let begin = Instant::now();
    while begin.elapsed() < DEADLINE {
        no_connections(dir)?;
        if let Some(child) = saving_child() {
            // Before it has its file, it still sets itself up.
            wait_for("the child's file", || has_file(child) || saving_child() != Some(child))?;
            if connections(child) == 0 {
                // Before that it still changes what is to be compared: its title, its actions, its descriptors.
                wait_for("the child to write", || is_writing(child) || saving_child() != Some(child))?;
                if saving_child() == Some(child) {
                    return Ok(());
                }
                continue;
            }
            // It began while a client was there, and has inherited its connection.
            wait_for("the first child to end", || saving_child().is_none())?;
        }
        // The server's own clock starts the child, a second after the last save, when this client is gone.
        let mut client = Client::over_unix(dir)?;
        client.call(&["CONFIG", "SET", "save", ""])?;
        client.call(&["SET", "round", &round.to_string()])?;
        client.call(&["CONFIG", "SET", "save", "1 1"])?;
        drop(client);
        wait_for("redis to save", || saving_child().is_some())?;
    }
    Err("redis did not save without an open connection".into())
}

fn after_restore(dir: &Path, round: usize) -> Result<(), String> {
    let mut client = if round.is_multiple_of(2) { Client::over_tcp() } else { Client::over_unix(dir) }?;
    client.call(&["CONFIG", "SET", "save", ""])?;
    for number in (round..KEYS).step_by(97) {
        client.check(number)?;
    }
    let info = client.call(&["INFO", "persistence"])?;
    if !info.contains("rdb_bgsave_in_progress:1") {
        return Err(format!("no child is saving any more after round {round}: {info}"));
    }
    Ok(())
}

fn finish(dir: &Path) -> Result<(), String> {
    let mut client = Client::over_tcp()?;
    let mut info = String::new();
    wait_for("the saving child to be done", || {
        info = client.call(&["INFO", "persistence"]).unwrap_or_else(|error| error);
        info.contains("rdb_bgsave_in_progress:0")
    })
    .map_err(|failure| format!("{failure}: {info}"))?;
    if !info.contains("rdb_last_bgsave_status:ok") {
        return Err(format!("the save failed: {info}"));
    }
    for number in 0..KEYS {
        client.check(number)?;
    }
    let saved = Command::new(CHECKER).arg(dir.join("dump.rdb")).output().map_err(|error| error.to_string())?;
    let report = String::from_utf8_lossy(&saved.stdout);
    let keys = KEYS + 1;
    if !saved.status.success() || !report.contains(&format!("{keys} keys read")) {
        return Err(format!("{CHECKER} does not find {keys} keys: {report}"));
    }
    client.send(&["SHUTDOWN", "NOSAVE"])
}

fn key(number: usize) -> String {
    format!("key:{number:06}")
}

/// 100 bytes or so that only this key has.
fn value(number: usize) -> String {
    format!("{:016x}", (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)).repeat(6)
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) -> Result<(), String> {
    let begin = Instant::now();
    while !condition() {
        if begin.elapsed() > DEADLINE {
            return Err(format!("waited {} s for {what}", DEADLINE.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Redis processes of this trial's pid namespace, with their parents.
fn processes() -> Vec<(i32, i32)> {
    let stat = |pid: i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (name, rest) = stat.rsplit_once(") ")?;
        let (state, rest) = rest.split_once(' ')?;
        let parent = rest.split(' ').next()?.parse().ok()?;
        (name.contains("(redis") && state != "Z").then_some((pid, parent))
    };
    numbers(Path::new("/proc")).into_iter().filter_map(stat).collect()
}

/// Whether the child has its file open, and has written to it.
fn is_writing(child: i32) -> bool {
    let fds = numbers(Path::new(&format!("/proc/{child}/fd"))).into_iter();
    let mut links = fds.filter_map(|fd| fs::read_link(format!("/proc/{child}/fd/{fd}")).ok());
    let file = links.find(|link| link.extension().is_some_and(|extension| extension == "rdb"));
    file.and_then(|file| fs::metadata(file).ok()).is_some_and(|metadata| metadata.len() > 0)
}

fn saving_child() -> Option<i32> {
    processes().into_iter().find(|(_, parent)| *parent != 1).map(|(pid, _)| pid)
}

/// Whether the saving child writes to its file.
fn has_file(child: i32) -> bool {
    let links = fs::read_dir(format!("/proc/{child}/fd")).into_iter().flatten().flatten();
    links.filter_map(|link| fs::read_link(link.path()).ok()).any(|file| file.to_string_lossy().contains("/temp-"))
}

/// Sockets of a process that are connections: connected ones, over TCP or unix, are in these tables by their inode.
fn connections(pid: i32) -> usize {
    let mut connected = Vec::new();
    for line in fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default().lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.get(3).is_some_and(|state| *state != "0A") {
            connected.extend(words.get(9).map(|inode| inode.to_string()));
        }
    }
    for line in fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap_or_default().lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        // Flags 00010000: it listens.
        if words.get(3).is_some_and(|flags| *flags != "00010000") {
            connected.extend(words.get(6).map(|inode| inode.to_string()));
        }
    }
    let links = numbers(Path::new(&format!("/proc/{pid}/fd"))).into_iter();
    let links = links.filter_map(|fd| fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok());
    let inodes = links.filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_string()));
    inodes.filter(|inode| connected.contains(inode)).count()
}

fn no_connections(_dir: &Path) -> Result<(), String> {
    let server = processes().into_iter().find(|(_, parent)| *parent == 1).ok_or("redis is not there")?.0;
    wait_for("redis to close its connections", || connections(server) == 0)
}

trait Connection: Read + Write {}
impl<T: Read + Write> Connection for T {}

/// A client with as much of the redis protocol (RESP2) as is needed here.
struct Client {
    connection: BufReader<Box<dyn Connection>>,
}

impl Client {
    fn over_tcp() -> Result<Client, String> {
        let connect = || {
            let stream = TcpStream::connect(("127.0.0.1", 6379))?;
            stream.set_read_timeout(Some(DEADLINE))?;
            Ok(stream)
        };
        let stream: io::Result<TcpStream> = connect();
        let stream = stream.map_err(|error| format!("connecting over TCP: {error}"))?;
        Ok(Client { connection: BufReader::new(Box::new(stream)) })
    }

    fn over_unix(dir: &Path) -> Result<Client, String> {
        let path: PathBuf = dir.join("redis.sock");
        let connect = || {
            let stream = UnixStream::connect(&path)?;
            stream.set_read_timeout(Some(DEADLINE))?;
            Ok(stream)
        };
        let stream: io::Result<UnixStream> = connect();
        let stream = stream.map_err(|error| format!("connecting to {}: {error}", path.display()))?;
        Ok(Client { connection: BufReader::new(Box::new(stream)) })
    }

    fn send(&mut self, words: &[&str]) -> Result<(), String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.connection.get_mut().write_all(request.as_bytes()).map_err(|error| format!("sending to redis: {error}"))
    }

    fn receive(&mut self) -> Result<String, String> {
        let fail = |error: io::Error| format!("receiving from redis: {error}");
        let mut line = String::new();
        self.connection.read_line(&mut line).map_err(fail)?;
        let line = line.trim_end();
        if let Some(length) = line.strip_prefix('$').and_then(|length| length.parse::<usize>().ok()) {
            let mut bulk = vec![0; length + 2];
            self.connection.read_exact(&mut bulk).map_err(fail)?;
            bulk.truncate(length);
            return String::from_utf8(bulk).map_err(|error| error.to_string());
        }
        match line.split_at_checked(1) {
            Some(("+" | ":", rest)) => Ok(rest.to_string()),
            _ => Err(format!("redis answered {line:?}")),
        }
    }

    fn expect(&mut self, expected: &str) -> Result<(), String> {
        let found = self.receive()?;
        if found == expected { Ok(()) } else { Err(format!("redis should answer {expected}, answered {found}")) }
    }

    fn call(&mut self, words: &[&str]) -> Result<String, String> {
        self.send(words)?;
        self.receive()
    }

    fn check(&mut self, number: usize) -> Result<(), String> {
        let found = self.call(&["GET", &key(number)])?;
        let expected = value(number);
        if found == expected { Ok(()) } else { Err(format!("{} should be {expected}, is {found}", key(number))) }
    }
}
