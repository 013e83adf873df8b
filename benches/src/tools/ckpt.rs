//! ckpt with one of its backends.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Found, Lazily, Tool, absent, behind, run_aside, said_path, start_alone, version};
use crate::record::ToolFacts;

struct Ckpt {
    file: PathBuf,
    backend: &'static str,
}

/// The backends of these names, as far as this host allows them.
pub fn find(names: &[&str], file: &Path) -> Result<Vec<Found>, String> {
    let output = Command::new(file).args(["backends", "--json"]).output();
    let output = output.map_err(|error| format!("{} cannot be run: {error}; name it with --ckpt", file.display()))?;
    let told: serde_json::Value = serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("{} does not say its backends; is it ckpt?", file.display()))?;
    let told = told.as_array().cloned().unwrap_or_default();
    let found = names.iter().filter(|name| **name != "none").map(|name| {
        let known = super::BACKENDS.iter().find(|known| *known == name);
        let probe = told.iter().find(|backend| backend["name"] == **name).map(|backend| &backend["probe"]);
        let (Some(backend), Some(probe)) = (known, probe) else {
            return absent(name, format!("{} does not have it", file.display()));
        };
        let needed: &[&str] = if *backend == "userfault" { &["restore"] } else { &["dump", "restore"] };
        match needed.iter().find(|what| probe[**what]["available"] != true) {
            Some(what) => {
                let why = &probe[*what];
                let why = why["why"].as_str().map_or(why.to_string(), String::from);
                absent(name, format!("{what}: {why}"))
            }
            None => Found::Tool(Box::new(Ckpt { file: file.to_path_buf(), backend })),
        }
    });
    Ok(found.collect())
}

impl Ckpt {
    fn command(&self, backend: &str) -> Command {
        let mut command = Command::new(&self.file);
        command.args(["--quiet", "--backend", backend]);
        command
    }
}

impl Tool for Ckpt {
    fn name(&self) -> &'static str {
        self.backend
    }

    fn facts(&self) -> ToolFacts {
        let version = version(Command::new(&self.file).arg("--version"));
        ToolFacts { name: self.backend.into(), version, absent: None }
    }

    fn start(&self, program: Command, place: &Path, timeout: Duration) -> Result<i32, String> {
        if self.backend != "preload" {
            return start_alone(program, place);
        }
        let pidfile = place.join("pid");
        let mut run = self.command("preload");
        run.args(["run", "--detach", "--pidfile"]).arg(&pidfile).arg("--output").arg(said_path(place)).arg("--");
        run_aside(behind(run, &program), "ckpt run", place, timeout)?;
        let pid = std::fs::read_to_string(&pidfile).map_err(|error| format!("{}: {error}", pidfile.display()))?;
        pid.trim().parse().map_err(|_| format!("ckpt run gave no process id but {pid:?}"))
    }

    fn dump(&self, root: i32, image: &Path, leave_running: bool) -> Result<Command, String> {
        // userfault restores what ptrace has saved.
        let mut command = self.command(if self.backend == "userfault" { "ptrace" } else { self.backend });
        command.args(["dump", "-t", &root.to_string(), "-D"]).arg(image);
        command.args(leave_running.then_some("--leave-running"));
        Ok(command)
    }

    fn dumps(&self) -> bool {
        self.backend != "userfault"
    }

    fn restore(&self, image: &Path) -> Result<Command, String> {
        let mut command = self.command(self.backend);
        command.args(["restore", "--detach", "-D"]).arg(image);
        Ok(command)
    }

    fn detaches(&self) -> bool {
        true
    }

    fn lazily(&self) -> Option<Lazily> {
        (self.backend == "userfault").then_some(Lazily {
            name: "userfault",
            daemon: None,
            restore: |tool, image| {
                let mut command = tool.restore(image).unwrap_or_else(|_| Command::new("ckpt"));
                command.arg("--json");
                command
            },
        })
    }

    fn refusal(&self) -> Option<i32> {
        Some(3)
    }

    fn wrap(&self, program: &Command, output: &Path) -> Option<Command> {
        let mut run = self.command("preload");
        run.args(["run", "--output"]).arg(output).arg("--");
        (self.backend == "preload").then(|| behind(run, program))
    }
}
