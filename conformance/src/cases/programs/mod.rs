//! Real programs, each judged by its own result or by its clients, through five rounds of dump and restore in a row.

mod redis;

use std::path::Path;
use std::process::Command;

use crate::case::{Case, Program, Root};
use crate::worker;

/// What a program of several processes, threads and files needs.
const RESOURCES: &[&str] = &["files", "memory", "pipes", "registers", "signals", "tasks"];

pub fn cases() -> Vec<Case> {
    vec![
        Case::program("programs/bash", RESOURCES, script(bash, &[("/bin/bash", "bash"), ("/usr/bin/awk", "mawk")])),
        Case::program(
            "programs/deleted-executable",
            &["fifos", "files", "memory", "tasks"],
            script(deleted_executable, &[("/bin/bash", "bash"), ("/usr/bin/cmp", "diffutils")]),
        )
        .needs(&["deleted executables"]),
        Case::program("programs/perl", RESOURCES, script(perl, &[("/usr/bin/perl", "perl")])),
        Case::program(
            "programs/python",
            &["files", "locks", "memory", "registers", "signals", "tasks"],
            script(python, &[("/usr/bin/python3", "python3")]),
        ),
        Case::program(
            "programs/redis",
            &["epoll", "files", "inet_sockets", "memory", "pipes", "registers", "tasks", "unix_sockets"],
            redis::program(),
        ),
        Case::with_root("programs/worker", RESOURCES, Root::Subject(worker::worker), 5),
    ]
    .into_iter()
    .map(Case::unsteady)
    .collect()
}

fn script(command: fn(&Path) -> Command, needs: &'static [(&'static str, &'static str)]) -> Program {
    Program { command, needs, clients: None }
}

fn bash(_dir: &Path) -> Command {
    let mut command = Command::new("/bin/bash");
    command.args(["-c", include_str!("pipeline.bash"), "pipeline.bash"]);
    command
}

/// A program whose file was removed while it runs, as an upgrade does it.
fn deleted_executable(_dir: &Path) -> Command {
    let mut command = Command::new("/bin/bash");
    command.args(["-c", "cp /bin/bash shell && exec ./shell -c \"$0\"", include_str!("deleted_executable.bash")]);
    command
}

fn perl(_dir: &Path) -> Command {
    let mut command = Command::new("/usr/bin/perl");
    command.args(["-e", include_str!("words.pl")]);
    command
}

fn python(_dir: &Path) -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", include_str!("threads_and_sqlite.py")]);
    command
}
