//! node and java: a server over HTTP with a table in memory, from a source file, as one would start it.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::http::NEVER;
use super::{PATIENCE, Program, Session, Stamping, Stamps, http, on_path};

#[derive(Clone, Copy, Debug)]
pub struct Server {
    name: &'static str,
    source: &'static str,
    file: &'static str,
    quick: bool,
}

pub const SERVERS: &[Server] = &[
    Server { name: "node", source: include_str!("server.js"), file: "server.js", quick: false },
    Server { name: "java", source: include_str!("Server.java"), file: "Server.java", quick: false },
];

impl Program for Server {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> String {
        format!("an HTTP server of {} with 200,000 objects", self.name)
    }

    fn quick(&self) -> bool {
        self.quick
    }

    fn size(&self) -> u64 {
        0
    }

    fn absent(&self) -> Option<String> {
        if on_path(self.name).is_none() {
            return Some(format!("{} is not on PATH; ./ci deps installs it", self.name));
        }
        // Java runs a source file with its compiler only.
        let modules = || Command::new("java").arg("--list-modules").output().map(|output| output.stdout);
        let compiles = || modules().is_ok_and(|modules| String::from_utf8_lossy(&modules).contains("jdk.compiler"));
        (self.name == "java" && !compiles()).then(|| "this java has no compiler; ./ci bench-deps installs one".into())
    }

    fn prepare(&self, place: &Path) -> Result<(Command, Box<dyn Session>), String> {
        let port = http::free_port()?;
        let source = place.join(self.file);
        std::fs::write(&source, self.source).map_err(|error| format!("{}: {error}", source.display()))?;
        let mut command = Command::new(self.name);
        command.arg(source).arg(port.to_string());
        Ok((command, Box::new(Asking { name: self.name, port, count: 0 })))
    }
}

struct Asking {
    name: &'static str,
    port: u16,
    /// Requests for `/count` that were answered.
    count: u64,
}

impl Asking {
    fn get(&self, path: &str, within: Duration, give_up: &AtomicBool) -> Result<String, String> {
        http::get(self.port, path, within, give_up).map_err(|error| format!("{}: {error}", self.name))
    }
}

impl Session for Asking {
    fn ready(&mut self, give_up: &AtomicBool) -> Result<(), String> {
        self.answer(PATIENCE, give_up)?;
        http::settle(self.port)
    }

    fn answer(&mut self, within: Duration, give_up: &AtomicBool) -> Result<(), String> {
        let count = self.get("/count", within, give_up)?;
        self.count += 1;
        if count == self.count.to_string() {
            Ok(())
        } else {
            Err(format!("{} counts {count}, not {}", self.name, self.count))
        }
    }

    fn verify(&mut self) -> Result<(), String> {
        self.answer(PATIENCE, &NEVER)?;
        let sum = self.get("/sum", PATIENCE, &NEVER)?;
        if sum != "19999900000" {
            return Err(format!("{}: the sum of its objects is {sum}", self.name));
        }
        http::settle(self.port)
    }

    fn before_dump(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn begin_stamps(&mut self) -> Result<Stamping, String> {
        self.get("/stamp", PATIENCE, &NEVER)?;
        http::settle(self.port)?;
        Ok(Stamping::Begun)
    }

    fn end_stamps(&mut self) -> Result<Stamps, String> {
        let gap = self.get("/gap", PATIENCE, &NEVER)?;
        http::settle(self.port)?;
        let nanoseconds = gap.parse().map_err(|_| format!("{}: a gap of {gap}", self.name))?;
        Ok(Stamps { gap: Duration::from_nanos(nanoseconds), behind: None })
    }
}
