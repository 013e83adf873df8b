//! gcc that builds a program of many lines, with make: each dump finds compilers at work, later than the one before.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::case::{Clients, Program, READY, VERDICT};

const DEADLINE: Duration = Duration::from_secs(150);

pub fn program() -> Program {
    let needs = &[("/usr/bin/gcc", "gcc"), ("/usr/bin/make", "make"), ("/usr/bin/cmp", "diffutils")];
    Program { command, needs, clients: Some(Clients { prepare, before_dump, after_restore: |_, _| Ok(()), finish }) }
}

fn command(dir: &Path) -> Command {
    let source = dir.join("gcc.bash");
    // If it cannot be written, bash says so.
    _ = fs::write(&source, include_str!("gcc.bash"));
    let mut command = Command::new("/bin/bash");
    command.arg(source);
    command
}

fn wait_for(dir: &Path, what: &str, mut so: impl FnMut() -> bool) -> Result<(), String> {
    let begin = Instant::now();
    while !so() {
        if let Ok(verdict) = fs::read_to_string(dir.join(VERDICT)) {
            return Err(verdict.trim_end().to_string());
        }
        if begin.elapsed() > DEADLINE {
            return Err(format!("{what}: not within {} s", DEADLINE.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn prepare(dir: &Path) -> Result<(), String> {
    wait_for(dir, "the first build is done", || dir.join(READY).exists())
}

/// One file more was compiled than the round before, and there is more to do.
fn before_dump(dir: &Path, round: usize) -> Result<(), String> {
    let compiled = || {
        let entries = fs::read_dir(dir.join("disturbed")).into_iter().flatten().flatten();
        entries.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "o")).count()
    };
    let at_work = || crate::visible::numbers(Path::new("/proc")).into_iter().any(is_compiler);
    wait_for(dir, "compilers are at work", || compiled() > round && at_work() || dir.join("built").exists())?;
    match dir.join("built").exists() {
        false => Ok(()),
        true => Err("the build is done: nothing was in the middle of its work".into()),
    }
}

fn is_compiler(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "cc1\n")
}

fn finish(dir: &Path) -> Result<(), String> {
    let verdict = || fs::read_to_string(dir.join(VERDICT)).unwrap_or_default();
    let begin = Instant::now();
    while !verdict().ends_with('\n') {
        if begin.elapsed() > DEADLINE {
            return Err("the build does not end".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    match verdict().trim_end() {
        "pass" => Ok(()),
        other => Err(other.to_string()),
    }
}
