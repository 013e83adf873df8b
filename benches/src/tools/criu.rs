//! CRIU, as `benches/peers.sh` brings it, or from PATH.
//!
//! It looks at the kernel at each run unless it finds its own notes on a tmpfs under `/run`: so the driver is in a mount
//! namespace of its own with one there, and CRIU gets one look before anything is timed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::{Found, Lazily, Tool, absent, start_alone, version};
use crate::record::ToolFacts;

struct Criu {
    words: Vec<PathBuf>,
}

/// Must be called while the driver has one thread.
pub fn find() -> Found {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.peers/criu");
    let fetched = root.join("usr/sbin/criu");
    let words = if fetched.is_file() {
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        vec![root.join("usr/lib64/ld-linux-x86-64.so.2"), "--library-path".into(), libraries, fetched]
    } else if Command::new("criu").arg("--version").output().is_ok() {
        vec!["criu".into()]
    } else {
        return absent("criu", "it is neither in .peers nor on PATH; benches/peers.sh fetches it");
    };
    if !nix::unistd::geteuid().is_root() {
        return absent("criu", "it needs root");
    }
    let criu = Criu { words };
    if let Err(errno) = cover_run() {
        return absent("criu", format!("its notes need a tmpfs on /run, which cannot be mounted: {errno}"));
    }
    match criu.command().arg("check").output() {
        Ok(output) if output.status.success() => Found::Tool(Box::new(criu)),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            absent("criu", format!("criu check: {}", said.lines().last().unwrap_or("failed")))
        }
        Err(error) => absent("criu", error.to_string()),
    }
}

fn cover_run() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
}

impl Criu {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]);
        command
    }
}

impl Tool for Criu {
    fn name(&self) -> &'static str {
        "criu"
    }

    fn facts(&self) -> ToolFacts {
        ToolFacts { name: "criu".into(), version: version(self.command().arg("--version")), absent: None }
    }

    fn start(&self, program: Command, place: &Path, _timeout: Duration) -> Result<i32, String> {
        start_alone(program, place)
    }

    fn dump(&self, root: i32, image: &Path, leave_running: bool) -> Result<Command, String> {
        std::fs::create_dir_all(image).map_err(|error| format!("{}: {error}", image.display()))?;
        let mut command = self.command();
        command.args(["dump", "-v1", "-t", &root.to_string(), "-D"]).arg(image);
        command.args(leave_running.then_some("--leave-running"));
        Ok(command)
    }

    fn dumps(&self) -> bool {
        true
    }

    fn restore(&self, image: &Path) -> Result<Command, String> {
        let mut command = self.command();
        command.args(["restore", "-v1", "-d", "-D"]).arg(image);
        Ok(command)
    }

    fn detaches(&self) -> bool {
        true
    }

    fn lazily(&self) -> Option<Lazily> {
        Some(Lazily {
            name: "criu-lazy",
            daemon: Some(|tool, image| replace_verb(tool, image, "lazy-pages")),
            restore: |tool, image| {
                let mut command = replace_verb(tool, image, "restore");
                command.args(["-d", "--lazy-pages"]);
                command
            },
        })
    }

    fn refusal(&self) -> Option<i32> {
        None
    }

    fn wrap(&self, _program: &Command, _output: &Path) -> Option<Command> {
        None
    }
}

/// The command up to its verb, with another.
fn replace_verb(tool: &dyn Tool, image: &Path, verb: &str) -> Command {
    let like = tool.restore(image).unwrap_or_else(|_| Command::new("criu"));
    let mut command = Command::new(like.get_program());
    command.args(like.get_args().take_while(|word| *word != "restore"));
    command.args([verb, "-v1", "-D"]).arg(image);
    command
}
