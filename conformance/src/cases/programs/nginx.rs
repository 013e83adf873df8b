//! nginx with two workers. Clients outside of the tree connect anew after each restore, and see files and answers; the log
//! at the end has all of their requests.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::case::{Clients, Program};
use crate::visible::numbers;

const SERVER: &str = "/usr/sbin/nginx";
const ADDRESS: &str = "127.0.0.1:8089";
const DEADLINE: Duration = Duration::from_secs(60);
/// Requests between two dumps.
const REQUESTS: usize = 50;

pub fn program() -> Program {
    let needs = &[(SERVER, "nginx-light"), ("/usr/bin/ss", "iproute2")];
    Program { command, needs, clients: Some(Clients { prepare, before_dump, after_restore, finish }) }
}

fn command(dir: &Path) -> Command {
    let dir = dir.display();
    let configuration = format!(
        "daemon off; worker_processes 2; pid {dir}/nginx.pid; error_log {dir}/errors.log;
         events {{ worker_connections 64; }}
         http {{
             access_log {dir}/access.log; root {dir}/files; keepalive_timeout 0;
             client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c;
             uwsgi_temp_path {dir}/d; scgi_temp_path {dir}/e;
             server {{ listen {ADDRESS}; location /who {{ return 200 \"worker $pid\"; }} }}
         }}"
    );
    // If these cannot be written, the server says so.
    _ = fs::create_dir(format!("{dir}/files"));
    _ = fs::write(format!("{dir}/nginx.conf"), configuration);
    _ = fs::write(format!("{dir}/files/large"), content());
    let mut command = Command::new(SERVER);
    // The master of an ordinary user and the workers of root are the same user.
    command.args(["-p", &dir.to_string(), "-c", "nginx.conf", "-e", "errors.log"]);
    command
}

fn content() -> Vec<u8> {
    (0..200_000_u32).flat_map(|number| number.to_le_bytes()).collect()
}

/// The body of an answer with status 200.
fn get(path: &str) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("GET {path}: {error}");
    let mut connection = TcpStream::connect(ADDRESS).map_err(failed)?;
    connection.set_read_timeout(Some(DEADLINE)).map_err(failed)?;
    connection.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).map_err(failed)?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).map_err(failed)?;
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").ok_or(format!("GET {path}: half an answer"))?;
    match answer.starts_with(b"HTTP/1.1 200 ") {
        true => Ok(answer[end + 4..].to_vec()),
        false => Err(format!("GET {path}: {}", String::from_utf8_lossy(&answer[..end]))),
    }
}

fn wait_for(what: &str, so: impl Fn() -> bool) -> Result<(), String> {
    let begin = Instant::now();
    while !so() {
        if begin.elapsed() > DEADLINE {
            return Err(format!("{what}: not within {} s", DEADLINE.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Workers answer, and a large file comes whole.
fn use_it() -> Result<(), String> {
    let mut workers = std::collections::BTreeSet::new();
    for _ in 0..REQUESTS {
        workers.insert(get("/who")?);
    }
    if workers.is_empty() || workers.iter().any(|worker| !worker.starts_with(b"worker ")) {
        return Err(format!("the workers say {workers:?}"));
    }
    match get("/large")? == content() {
        true => Ok(()),
        false => Err("the large file came damaged".into()),
    }
}

/// Connections of the tree, closed ones that wait for their time excepted: these are the kernel's.
fn connections() -> usize {
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let is_open = |line: &&str| line.split_whitespace().nth(3).is_some_and(|state| state != "0A" && state != "06");
    table.lines().skip(1).filter(is_open).count()
}

fn prepare(_dir: &Path) -> Result<(), String> {
    wait_for("nginx to listen", || get("/who").is_ok())?;
    // One that answers may have a sister that is not all there yet.
    wait_for("both workers to work", || workers() == 2)?;
    use_it()
}

/// Workers of this trial's pid namespace that are set up: the title is the last that they change of themselves.
fn workers() -> usize {
    let title = |pid| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    numbers(Path::new("/proc")).into_iter().filter(|&pid| title(pid).starts_with(b"nginx: worker process")).count()
}

/// Bytes that wait in the Unix sockets of the tree: the master tells each worker of the next, in its own time.
fn unread() -> usize {
    // Type, state, and the bytes to be received.
    let listed = Command::new("ss").args(["-xaH"]).output().map(|output| output.stdout).unwrap_or_default();
    let listed = String::from_utf8_lossy(&listed);
    listed.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<usize>().ok()).sum()
}

fn before_dump(_dir: &Path, _round: usize) -> Result<(), String> {
    wait_for("the connections to end", || connections() == 0)?;
    wait_for("the workers to read what the master told them", || unread() == 0)
}

fn after_restore(_dir: &Path, _round: usize) -> Result<(), String> {
    use_it()
}

fn finish(dir: &Path) -> Result<(), String> {
    let log = fs::read_to_string(dir.join("access.log")).map_err(|error| format!("the log: {error}"))?;
    let files = log.lines().filter(|line| line.contains("GET /large")).count();
    let others = log.lines().filter(|line| line.contains("GET /who")).count();
    if files < 2 || others < files * REQUESTS {
        return Err(format!("the log has {files} and {others} requests"));
    }
    if log.lines().any(|line| !line.contains("\" 200 ")) {
        return Err("the log has a request that was not answered".into());
    }
    let pid: i32 = fs::read_to_string(dir.join("nginx.pid"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or("there is no nginx.pid")?;
    // SAFETY: takes numbers; it is the program of this trial.
    if unsafe { libc::kill(pid, libc::SIGQUIT) } < 0 {
        return Err(format!("the master, process {pid}, is gone"));
    }
    Ok(())
}
