//! redis-server with keys in it, asked over TCP or a Unix socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use super::http::NEVER;
use super::{PATIENCE, Program, Session, Stamping, Stamps, http, on_path};

#[derive(Clone, Copy, Debug)]
pub struct Redis {
    pub name: &'static str,
    /// CRIU 4.1 cannot save TCP sockets on kernels from 6.16 on.
    pub by_unix_socket: bool,
    /// Of 1,000 bytes each.
    pub keys: usize,
    pub quick: bool,
}

const VALUE: usize = 1000;

impl Program for Redis {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> String {
        format!("redis-server with {} keys of {VALUE} bytes", self.keys)
    }

    fn quick(&self) -> bool {
        self.quick
    }

    fn size(&self) -> u64 {
        0
    }

    fn absent(&self) -> Option<String> {
        on_path("redis-server").is_none().then(|| "redis-server is not on PATH; ./ci deps installs it".into())
    }

    fn prepare(&self, place: &Path) -> Result<(Command, Box<dyn Session>), String> {
        self.prepare_at(place).map(|(command, session, _)| (command, session))
    }
}

impl Redis {
    /// With the place that it will listen at.
    pub fn prepare_at(&self, place: &Path) -> Result<(Command, Box<dyn Session>, Address), String> {
        let mut command = Command::new("redis-server");
        let address = if self.by_unix_socket {
            let path = place.join("redis.sock");
            command.args(["--port", "0", "--unixsocket"]).arg(&path);
            Address::Unix(path)
        } else {
            let port = http::free_port()?;
            command.args(["--port", &port.to_string(), "--bind", "127.0.0.1"]);
            Address::Port(port)
        };
        command.arg("--dir").arg(place).args(["--save", "", "--enable-debug-command", "local"]);
        Ok((command, Box::new(Asking { address: address.clone(), keys: self.keys, at: 0 }), address))
    }
}

#[derive(Clone, Debug)]
pub enum Address {
    Port(u16),
    Unix(PathBuf),
}

impl Address {
    /// Waits until the server has closed its side of all connections.
    fn settle(&self) -> Result<(), String> {
        let path = match self {
            Address::Port(port) => return http::settle(*port),
            Address::Unix(path) => path.to_string_lossy().into_owned(),
        };
        // The sixth field of a line is the state; 03 is connected.
        let connected = |line: &str| line.ends_with(&path) && line.split_whitespace().nth(5) == Some("03");
        super::wait_for("closing connections", PATIENCE, &NEVER, || {
            Ok(!std::fs::read_to_string("/proc/net/unix").unwrap_or_default().lines().any(connected))
        })
    }
}

struct Asking {
    address: Address,
    keys: usize,
    at: usize,
}

/// A connection to a server.
pub struct Connection {
    reader: Box<dyn BufRead + Send>,
    writer: Box<dyn Write + Send>,
}

impl Connection {
    /// Tries until it listens, or it is given up.
    pub fn open(address: &Address, within: Duration, give_up: &AtomicBool) -> Result<Connection, String> {
        let path = match address {
            Address::Port(port) => {
                let stream = http::connect(*port, within, give_up)?;
                let reader = stream.try_clone().map_err(|error| error.to_string())?;
                return Ok(Connection { reader: Box::new(BufReader::new(reader)), writer: Box::new(stream) });
            }
            Address::Unix(path) => path,
        };
        let begun = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    let failed = |error: std::io::Error| error.to_string();
                    stream.set_read_timeout(Some(within)).map_err(failed)?;
                    let reader = stream.try_clone().map_err(failed)?;
                    return Ok(Connection { reader: Box::new(BufReader::new(reader)), writer: Box::new(stream) });
                }
                Err(error) if begun.elapsed() > within || give_up.load(SeqCst) => {
                    return Err(format!("{}: {error}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_micros(500)),
            }
        }
    }

    /// Sends a line, and gives the answer without its type.
    pub fn ask(&mut self, command: &str) -> Result<String, String> {
        let failed = |error: std::io::Error| format!("redis {command}: {error}");
        self.writer.write_all(format!("{command}\r\n").as_bytes()).map_err(failed)?;
        let mut line = String::new();
        self.reader.read_line(&mut line).map_err(failed)?;
        let line = line.trim_end();
        match (line.get(..1), line.get(1..)) {
            (Some("+" | ":"), Some(rest)) => Ok(rest.to_string()),
            (Some("$"), Some(length)) => {
                let length: usize = length.parse().map_err(|_| format!("redis {command}: no such key"))?;
                let mut value = vec![0; length + 2];
                self.reader.read_exact(&mut value).map_err(failed)?;
                value.truncate(length);
                Ok(String::from_utf8_lossy(&value).into_owned())
            }
            _ => Err(format!("redis {command}: {line:?}")),
        }
    }

    /// Gets a key, and checks its value.
    pub fn get(&mut self, key: usize) -> Result<(), String> {
        let value = self.ask(&format!("GET key:{key}"))?;
        let expected = format!("value:{key}");
        let (start, rest) = value.split_at_checked(expected.len()).unwrap_or(("", ""));
        if start != expected || value.len() != VALUE || !rest.bytes().all(|byte| byte == 0) {
            return Err(format!(
                "redis: key:{key} is not what it was: {:?}",
                &value.chars().take(40).collect::<String>()
            ));
        }
        Ok(())
    }
}

impl Session for Asking {
    fn ready(&mut self, give_up: &AtomicBool) -> Result<(), String> {
        let mut connection = Connection::open(&self.address, PATIENCE, give_up)?;
        connection.ask(&format!("DEBUG POPULATE {} key {VALUE}", self.keys))?;
        drop(connection);
        self.address.settle()
    }

    fn answer(&mut self, within: Duration, give_up: &AtomicBool) -> Result<(), String> {
        self.at = (self.at + 7919) % self.keys;
        Connection::open(&self.address, within, give_up)?.get(self.at)
    }

    fn verify(&mut self) -> Result<(), String> {
        let mut connection = Connection::open(&self.address, PATIENCE, &NEVER)?;
        let keys = connection.ask("DBSIZE")?;
        if keys != self.keys.to_string() {
            return Err(format!("redis has {keys} keys of {}", self.keys));
        }
        let step = (self.keys / 5000).max(1);
        (0..self.keys).step_by(step).try_for_each(|key| connection.get(key))?;
        drop(connection);
        self.address.settle()
    }

    fn before_dump(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn begin_stamps(&mut self) -> Result<Stamping, String> {
        Ok(Stamping::Unable)
    }

    fn end_stamps(&mut self) -> Result<Stamps, String> {
        Err("redis does not stamp".into())
    }
}
