//! Running a subject without any dump: a subject that fails so is broken itself.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::case::{Case, GO, OUTPUT, READY, VERDICT};

const DEADLINE: Duration = Duration::from_secs(60);

/// Runs `case` with this program (`ckpt-subject`) in a new directory, and lets it go on once it is ready.
pub fn run(case: &Case) -> Result<(), String> {
    let dir = tempfile::Builder::new().prefix("ckpt-dry-").tempdir().map_err(|error| error.to_string())?;
    // A subject may have become another user when it writes its verdict.
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).map_err(|error| error.to_string())?;
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut child = start(&program, case, dir.path())?;
    let result = attend(&mut child, dir.path());
    if result.is_err() {
        // A subject may hang; it is the leader of its session, and of its group.
        let _ = child.kill();
        let _ = child.wait();
    }
    result.map_err(|failure| {
        let output = fs::read_to_string(dir.path().join(OUTPUT)).unwrap_or_default();
        format!("{failure}\n--- its output:\n{output}")
    })
}

fn start(program: &Path, case: &Case, dir: &Path) -> Result<Child, String> {
    let output = File::create(dir.join(OUTPUT)).map_err(|error| error.to_string())?;
    let mut command = Command::new(program);
    command.arg(case.name).current_dir(dir).stdin(Stdio::null());
    command.stdout(output.try_clone().map_err(|error| error.to_string())?).stderr(output);
    // SAFETY: setsid(2) is async-signal-safe.
    unsafe { command.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?)) };
    command.spawn().map_err(|error| format!("starting {}: {error}", program.display()))
}

fn attend(child: &mut Child, dir: &Path) -> Result<(), String> {
    let begin = Instant::now();
    let status = loop {
        if dir.join(READY).exists() && !dir.join(GO).exists() {
            File::create(dir.join(GO)).map_err(|error| error.to_string())?;
        }
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            break status;
        }
        if begin.elapsed() > DEADLINE {
            return Err(format!("it did not end within {} s", DEADLINE.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let verdict = fs::read_to_string(dir.join(VERDICT)).unwrap_or_else(|_| "no verdict".into());
    if !dir.join(GO).exists() {
        return Err(format!("it ended ({status}) before it was ready: {verdict}"));
    }
    if verdict == "pass" && status.success() { Ok(()) } else { Err(format!("{verdict} ({status})")) }
}
