//! Real programs, each judged by its own result or by its clients, through five rounds of dump and restore in a row.

mod gcc;
mod nginx;
mod redis;

use std::path::Path;
use std::process::Command;

use super::compiled::{self, Compiled};
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
        Case::program("programs/gcc", RESOURCES, gcc::program()).restless().rounds(3),
        Case::program("programs/java", RESOURCES, script(java, &[("/usr/bin/java", "default-jre-headless")])),
        Case::program("programs/mpi", RESOURCES, compiled::needing(|dir| MPI.command(dir), WITH_MPI)).rounds(3),
        Case::program(
            "programs/nginx",
            &["epoll", "eventfd", "files", "inet_sockets", "memory", "tasks", "unix_sockets"],
            nginx::program(),
        )
        .real_ids("it is ended from outside, by the id in its pid file"),
        Case::program("programs/node", RESOURCES, script(node, &[("/usr/bin/node", "nodejs")])),
        Case::program(
            "programs/numpy",
            &["memory", "registers", "tasks"],
            script(numpy, &[("/usr/lib/python3/dist-packages/numpy/__init__.py", "python3-numpy")]),
        ),
        Case::program("programs/openmp", RESOURCES, compiled::program(|dir| OPENMP.command(dir))).rounds(3),
        Case::program("programs/perl", RESOURCES, script(perl, &[("/usr/bin/perl", "perl")])),
        Case::program(
            "programs/postgresql",
            &["credentials", "files", "memory", "pipes", "sysvipc", "tasks", "unix_sockets"],
            script(
                postgresql,
                &[("/usr/share/postgresql-common/pg_wrapper", "postgresql"), ("/usr/bin/setpriv", "util-linux")],
            ),
        ),
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
        Case::program(
            "programs/redis-and-clients",
            &["epoll", "files", "inet_sockets", "memory", "pipes", "registers", "tasks"],
            script(
                redis_and_clients,
                &[("/usr/bin/redis-server", "redis-server"), ("/usr/bin/python3", "python3"), ("/bin/bash", "bash")],
            ),
        ),
        Case::program(
            "programs/tmux",
            &["files", "tasks", "terminals", "unix_sockets"],
            script(tmux, &[("/usr/bin/tmux", "tmux"), ("/usr/bin/cmp", "diffutils")]),
        ),
        Case::program(
            "programs/vim",
            &["files", "tasks", "terminals"],
            script(vim, &[("/usr/bin/python3", "python3"), ("/usr/bin/vim", "vim")]),
        ),
        Case::with_root("programs/worker", RESOURCES, Root::Subject(worker::worker), 5),
    ]
    .into_iter()
    .map(Case::unsteady)
    .collect()
}

const OPENMP: Compiled = Compiled { flags: "-fopenmp", ..Compiled::new(include_str!("../compiled/openmp.c")) };

const MPI: Compiled = Compiled {
    flags: "$(mpicc --showme:compile) $(mpicc --showme:link)",
    // Copies from process to process by process_vm_readv are what containers forbid.
    by: "mpirun --allow-run-as-root --oversubscribe --bind-to none -np 2 --mca btl vader,self \
         --mca btl_vader_single_copy_mechanism none",
    ..Compiled::new(include_str!("../compiled/mpi.c"))
};
const WITH_MPI: &[(&str, &str)] =
    &[compiled::GCC, ("/usr/bin/mpirun", "openmpi-bin"), ("/usr/bin/mpicc", "libopenmpi-dev")];

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

fn java(dir: &Path) -> Command {
    let source = dir.join("Work.java");
    // If it cannot be written, java says so.
    _ = std::fs::write(&source, include_str!("Work.java"));
    let mut command = Command::new("/usr/bin/java");
    // No threads that come and go, and no file that a JVM of another pid namespace takes for a dead one's. Without a limit its
    // heap is as large as the machine allows, and so is each image.
    command.args(["-XX:-UseDynamicNumberOfCompilerThreads", "-XX:-UseDynamicNumberOfGCThreads", "-XX:-UsePerfData"]);
    command.arg("-Xmx256m");
    command.arg(source);
    command
}

fn node(dir: &Path) -> Command {
    let source = dir.join("work.js");
    _ = std::fs::write(&source, include_str!("node.js"));
    let mut command = Command::new("/usr/bin/node");
    command.arg(source);
    command
}

fn numpy(_dir: &Path) -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", include_str!("numpy_work.py")]);
    command
}

fn postgresql(dir: &Path) -> Command {
    let source = dir.join("postgresql.bash");
    _ = std::fs::write(&source, include_str!("postgresql.bash"));
    let mut command = Command::new("/bin/bash");
    command.arg(source);
    command
}

/// A server and its clients in one tree, connected over TCP in the middle of requests and answers.
fn redis_and_clients(_dir: &Path) -> Command {
    let mut command = Command::new("/bin/bash");
    let run =
        "redis-server --port 6379 --bind 127.0.0.1 --save '' --logfile redis.log --dir . & python3 -c \"$0\" && wait";
    command.args(["-c", run, include_str!("redis_client.py")]);
    command
}

fn tmux(_dir: &Path) -> Command {
    let mut command = Command::new("/bin/bash");
    command.args(["-c", include_str!("tmux.bash"), "tmux.bash"]);
    command
}

fn vim(_dir: &Path) -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", include_str!("vim.py")]);
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
