//! DMTCP, where it is on PATH. It starts what it saves, has a coordinator for each program, and restores in the foreground.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Found, Tool, absent, behind, start_alone, version};
use crate::record::ToolFacts;

struct Dmtcp;

pub fn find() -> Found {
    match version(Command::new("dmtcp_launch").arg("--version")) {
        Some(_) => Found::Tool(Box::new(Dmtcp)),
        None => absent("dmtcp", "dmtcp_launch is not on PATH"),
    }
}

/// The file in which the coordinator of a program leaves its port.
fn port_file(beside: &Path) -> PathBuf {
    beside.with_file_name("dmtcp-port")
}

impl Tool for Dmtcp {
    fn name(&self) -> &'static str {
        "dmtcp"
    }

    fn facts(&self) -> ToolFacts {
        let version = version(Command::new("dmtcp_launch").arg("--version"));
        ToolFacts { name: "dmtcp".into(), version, absent: None }
    }

    fn start(&self, program: Command, place: &Path, _timeout: Duration) -> Result<i32, String> {
        let mut launch = Command::new("dmtcp_launch");
        launch.args(["--new-coordinator", "--coord-port", "0", "--no-gzip", "--quiet", "--port-file"]);
        launch.arg(port_file(&place.join("image"))).arg("--ckptdir").arg(place.join("image"));
        start_alone(behind(launch, &program), place)
    }

    fn dump(&self, _root: i32, image: &Path, leave_running: bool) -> Result<Command, String> {
        let file = port_file(image);
        let port = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        std::fs::create_dir_all(image).map_err(|error| format!("{}: {error}", image.display()))?;
        let mut command = Command::new("dmtcp_command");
        command.args(["--quiet", "--coord-port", port.trim(), "--ckptdir"]).arg(image);
        command.arg(if leave_running { "--bcheckpoint" } else { "--kcheckpoint" });
        Ok(command)
    }

    fn dumps(&self) -> bool {
        true
    }

    fn restore(&self, image: &Path) -> Result<Command, String> {
        let entries = std::fs::read_dir(image).map_err(|error| format!("{}: {error}", image.display()))?;
        let images = entries.flatten().map(|entry| entry.path());
        let images = images.filter(|path| path.extension().is_some_and(|extension| extension == "dmtcp"));
        let mut command = Command::new("dmtcp_restart");
        command.args(["--new-coordinator", "--coord-port", "0", "--quiet"]).args(images);
        Ok(command)
    }

    fn detaches(&self) -> bool {
        false
    }

    fn lazily(&self) -> Option<super::Lazily> {
        None
    }

    fn refusal(&self) -> Option<i32> {
        None
    }

    fn wrap(&self, program: &Command, _output: &Path) -> Option<Command> {
        let mut launch = Command::new("dmtcp_launch");
        launch.args(["--new-coordinator", "--coord-port", "0", "--no-gzip", "--quiet"]);
        Some(behind(launch, program))
    }
}
