//! `ckpt ps`: the processes that run under the shim, and so can be saved without privileges.

use std::process::ExitCode;
use std::time::Duration;

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use nix::time::{ClockId, clock_gettime};

use crate::{human, output};

/// Show the processes that were started with --backend preload
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ckpt ps                                     what runs under the shim
  ckpt dump -t PID -D image                   save one of them, with what it has
                                              started

Of an ordinary user it shows his own processes, of root those of everybody.")]
pub struct Ps {
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
}

/// A process with the shim.
struct Found {
    pid: Pid,
    age: Duration,
    command: Vec<String>,
}

pub fn run(verb: &Ps) -> anyhow::Result<ExitCode> {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME)?;
    let now = Duration::new(now.tv_sec() as u64, now.tv_nsec() as u32);
    let found: Vec<Found> = ckpt_preload::find::processes()?.into_iter().filter_map(|pid| look(pid, now)).collect();
    if verb.json {
        let all: Vec<_> = found
            .iter()
            .map(|found| {
                serde_json::json!({
                    "pid": found.pid.0,
                    "age_seconds": found.age.as_secs_f64(),
                    "command": found.command,
                    "backend": "preload",
                })
            })
            .collect();
        output::print(&format!("{:#}\n", serde_json::Value::Array(all)));
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = format!("{:>7}  {:>12}  {:8}  COMMAND\n", "PID", "AGE", "BACKEND");
    for Found { pid, age, command } in &found {
        let command = output::plain(&command.join(" "));
        text += &format!("{:>7}  {:>12}  {:8}  {command}\n", pid.0, human::duration(*age), "preload");
    }
    output::print(&text);
    Ok(ExitCode::SUCCESS)
}

/// `None` if it has ended meanwhile.
fn look(pid: Pid, now: Duration) -> Option<Found> {
    let proc = ProcDir::open(pid).ok()?;
    let stat = proc.stat_line().ok()?;
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    let begun = Duration::from_secs_f64(stat.starttime as f64 / ticks.max(1) as f64);
    let line = proc.read("cmdline").ok()?;
    let words = line.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let mut command: Vec<String> = words.collect();
    command.pop();
    Some(Found { pid, age: now.saturating_sub(begun), command })
}
