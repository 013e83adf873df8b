//! redis-server with keys in it, asked over TCP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::http::NEVER;
use super::{PATIENCE, Program, Session, Stamping, Stamps, http, on_path};

#[derive(Clone, Copy, Debug)]
pub struct Redis {
    pub name: &'static str,
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
    /// With the port that it will listen on.
    pub fn prepare_at(&self, place: &Path) -> Result<(Command, Box<dyn Session>, u16), String> {
        let port = http::free_port()?;
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--dir"]).arg(place);
        command.args(["--save", "", "--enable-debug-command", "local"]);
        Ok((command, Box::new(Asking { port, keys: self.keys, at: 0 }), port))
    }
}

struct Asking {
    port: u16,
    keys: usize,
    at: usize,
}

/// A connection to a server.
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    pub fn open(port: u16, within: Duration, give_up: &AtomicBool) -> Result<Connection, String> {
        Ok(Connection { stream: BufReader::new(http::connect(port, within, give_up)?) })
    }

    /// Sends a line, and gives the answer without its type.
    pub fn ask(&mut self, command: &str) -> Result<String, String> {
        let failed = |error: std::io::Error| format!("redis {command}: {error}");
        self.stream.get_mut().write_all(format!("{command}\r\n").as_bytes()).map_err(failed)?;
        let mut line = String::new();
        self.stream.read_line(&mut line).map_err(failed)?;
        let line = line.trim_end();
        match (line.get(..1), line.get(1..)) {
            (Some("+" | ":"), Some(rest)) => Ok(rest.to_string()),
            (Some("$"), Some(length)) => {
                let length: usize = length.parse().map_err(|_| format!("redis {command}: no such key"))?;
                let mut value = vec![0; length + 2];
                self.stream.read_exact(&mut value).map_err(failed)?;
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
            return Err(format!("redis: key:{key} is not what it was: {:?}", &value.chars().take(40).collect::<String>()));
        }
        Ok(())
    }
}

impl Session for Asking {
    fn ready(&mut self) -> Result<(), String> {
        let mut connection = Connection::open(self.port, PATIENCE, &NEVER)?;
        connection.ask(&format!("DEBUG POPULATE {} key {VALUE}", self.keys))?;
        drop(connection);
        http::settle(self.port)
    }

    fn answer(&mut self, within: Duration, give_up: &AtomicBool) -> Result<(), String> {
        self.at = (self.at + 7919) % self.keys;
        Connection::open(self.port, within, give_up)?.get(self.at)
    }

    fn verify(&mut self) -> Result<(), String> {
        let mut connection = Connection::open(self.port, PATIENCE, &NEVER)?;
        let keys = connection.ask("DBSIZE")?;
        if keys != self.keys.to_string() {
            return Err(format!("redis has {keys} keys of {}", self.keys));
        }
        let step = (self.keys / 5000).max(1);
        (0..self.keys).step_by(step).try_for_each(|key| connection.get(key))?;
        drop(connection);
        http::settle(self.port)
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
