//! A postgresql cluster of its own, made anew, asked in its own protocol.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use super::http::NEVER;
use super::{PATIENCE, Program, Session, Stamping, Stamps, http};

#[derive(Clone, Copy, Debug)]
pub struct Postgresql;

/// Debian has the programs beside PATH, by version.
fn programs() -> Option<PathBuf> {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten().map(|entry| entry.path()).collect();
    found.sort();
    found.into_iter().rev().map(|version| version.join("bin")).find(|bin| bin.join("postgres").is_file())
}

/// It does not run as root.
fn as_its_user(program: &Path) -> Command {
    if !nix::unistd::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(program);
    command
}

impl Program for Postgresql {
    fn name(&self) -> &'static str {
        "postgresql"
    }

    fn about(&self) -> String {
        "a postgresql cluster with a table of 100,000 rows".into()
    }

    fn quick(&self) -> bool {
        false
    }

    fn size(&self) -> u64 {
        0
    }

    fn absent(&self) -> Option<String> {
        programs().is_none().then(|| "/usr/lib/postgresql is not there; ./ci deps installs it".into())
    }

    fn prepare(&self, place: &Path) -> Result<(Command, Box<dyn Session>), String> {
        let programs = programs().ok_or("postgresql went away")?;
        let data = place.join("data");
        let failed = |error: std::io::Error| format!("{}: {error}", place.display());
        std::fs::create_dir(&data).map_err(failed)?;
        if nix::unistd::geteuid().is_root() {
            let user = nix::unistd::User::from_name("postgres").ok().flatten().ok_or("there is no user postgres")?;
            std::os::unix::fs::chown(&data, Some(user.uid.as_raw()), Some(user.gid.as_raw())).map_err(failed)?;
            // Down to the data it must get through.
            for above in place.ancestors().take(2) {
                std::fs::set_permissions(above, std::os::unix::fs::PermissionsExt::from_mode(0o755)).map_err(failed)?;
            }
        }
        let mut initdb = as_its_user(&programs.join("initdb"));
        initdb.args(["--auth=trust", "--no-sync", "--username=postgres", "-D"]).arg(&data).current_dir("/");
        let output = initdb.output().map_err(|error| format!("initdb: {error}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("initdb failed: {}", said.lines().last().unwrap_or("")));
        }
        let port = http::free_port()?;
        let mut command = as_its_user(&programs.join("postgres"));
        command.arg("-D").arg(&data).args(["-p", &port.to_string(), "-h", "127.0.0.1", "-k", ""]);
        Ok((command, Box::new(Asking { port, inserted: 0 })))
    }
}

struct Asking {
    port: u16,
    inserted: u64,
}

/// Reads the messages of an answer, up to "ready for query". Gives the first column of the first row.
fn read_answer(stream: &mut TcpStream) -> std::io::Result<Option<String>> {
    let mut value = None;
    loop {
        let mut head = [0; 5];
        stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let invalid = |why: String| std::io::Error::new(std::io::ErrorKind::InvalidData, why);
        if !(4..1 << 20).contains(&length) {
            return Err(invalid(format!("a message of {length} bytes")));
        }
        let mut body = vec![0; length - 4];
        stream.read_exact(&mut body)?;
        match head[0] {
            b'Z' => return Ok(value),
            b'E' => return Err(invalid(String::from_utf8_lossy(&body).replace('\0', " "))),
            // A number of columns, the length of the first, and its bytes.
            b'D' if body.len() > 6 && value.is_none() => {
                let length = u32::from_be_bytes([body[2], body[3], body[4], body[5]]) as usize;
                value = body.get(6..6 + length).map(|text| String::from_utf8_lossy(text).into_owned());
            }
            _ => {}
        }
    }
}

impl Asking {
    fn query(&self, sql: &str, within: Duration, give_up: &AtomicBool) -> Result<Option<String>, String> {
        let failed = |error: std::io::Error| format!("postgresql: {error}");
        let mut stream = http::connect(self.port, within, give_up)?;
        let parameters = b"user\0postgres\0database\0postgres\0\0";
        let mut message = (parameters.len() as u32 + 8).to_be_bytes().to_vec();
        message.extend(196_608_u32.to_be_bytes());
        message.extend(parameters);
        stream.write_all(&message).map_err(failed)?;
        read_answer(&mut stream).map_err(failed)?;
        let mut message = vec![b'Q'];
        message.extend((sql.len() as u32 + 5).to_be_bytes());
        message.extend(sql.as_bytes());
        message.push(0);
        stream.write_all(&message).map_err(failed)?;
        let answer = read_answer(&mut stream).map_err(failed)?;
        stream.write_all(b"X\0\0\0\x04").map_err(failed)?;
        Ok(answer)
    }
}

impl Session for Asking {
    fn ready(&mut self, give_up: &AtomicBool) -> Result<(), String> {
        let begun = std::time::Instant::now();
        // While it comes up it takes connections and says that it does not answer yet.
        while let Err(error) = self.query("SELECT 1", PATIENCE, give_up) {
            if begun.elapsed() > PATIENCE || give_up.load(SeqCst) {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.query(
            "CREATE TABLE t AS SELECT n, md5(n::text) AS text FROM generate_series(1, 100000) n",
            PATIENCE,
            &NEVER,
        )?;
        self.query("CREATE INDEX ON t (n)", PATIENCE, &NEVER)?;
        http::settle(self.port)
    }

    fn answer(&mut self, within: Duration, give_up: &AtomicBool) -> Result<(), String> {
        match self.query("SELECT count(*) FROM t WHERE n BETWEEN 5000 AND 5009", within, give_up)?.as_deref() {
            Some("10") => Ok(()),
            other => Err(format!("postgresql counts {other:?} rows of 10")),
        }
    }

    fn verify(&mut self) -> Result<(), String> {
        self.query("INSERT INTO t VALUES (0, 'after')", PATIENCE, &NEVER)?;
        self.inserted += 1;
        let count = self.query("SELECT count(*) FROM t", PATIENCE, &NEVER)?;
        if count != Some((100_000 + self.inserted).to_string()) {
            return Err(format!("postgresql has {count:?} rows"));
        }
        http::settle(self.port)
    }

    fn before_dump(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn begin_stamps(&mut self) -> Result<Stamping, String> {
        Ok(Stamping::Unable)
    }

    fn end_stamps(&mut self) -> Result<Stamps, String> {
        Err("postgresql does not stamp".into())
    }
}
