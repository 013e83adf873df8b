//! The same requests to a restored redis, with nothing recorded and with a recorded working set: how often it waits for a
//! page.
//!
//! Nothing is brought in but what is asked for (`--no-sweep`), so that every fault is one of these requests. The programs
//! are ended when they have answered: the pager then tells its figures.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;

use super::lazy::{into_page_cache, own_figures, save};
use super::{Samples, Turn};
use crate::command;
use crate::programs::http;
use crate::programs::redis::{Address, Connection, Redis};
use crate::record::Unit;
use crate::tools::Tool;

/// Keys that are asked for.
const REQUESTS: usize = 2000;

pub const WITHOUT: &str = "userfault, nothing recorded";
const WITH: &str = "userfault, recorded";

/// What is restored, and asked.
struct Saved<'a> {
    tool: &'a dyn Tool,
    image: PathBuf,
    address: Address,
    keys: usize,
}

/// Each round saves a redis of its own, and records anew: how many pages are missed depends on both.
pub fn turns<'a>(tool: &'a dyn Tool, redis: Redis, place: &Arc<TempDir>, timeout: Duration) -> Vec<Turn<'a>> {
    let turn = |name: &str, records: bool, options: &'static [&'static str]| -> Turn<'a> {
        let place = place.clone();
        let work = move || {
            let at = place.path().join("again");
            // What a round that failed has left.
            let _ = std::fs::remove_dir_all(&at);
            let address = save(tool, &redis, &at, timeout)?;
            let saved = Saved { tool, image: at.join("image"), address, keys: redis.keys };
            if records {
                round(&saved, &["--record-working-set"], timeout).map_err(|why| format!("while recording: {why}"))?;
            }
            round(&saved, options, timeout)
        };
        (name.into(), Box::new(work))
    };
    vec![turn(WITHOUT, false, &["--no-sweep", "--ignore-working-set"]), turn(WITH, true, &["--no-sweep"])]
}

fn round(saved: &Saved<'_>, options: &[&str], timeout: Duration) -> Result<Samples, String> {
    into_page_cache(&saved.image)?;
    let result = restore(saved, options, timeout);
    let ended = command::end_descendants();
    result.and_then(|samples| ended.map(|()| samples))
}

fn restore(saved: &Saved<'_>, options: &[&str], timeout: Duration) -> Result<Samples, String> {
    let place = saved.image.parent().ok_or("an image without a place")?;
    let (log, pidfile) = (place.join("again.log"), place.join("again.pid"));
    let _ = std::fs::remove_file(&pidfile);
    let mut command = saved.tool.restore(&saved.image)?;
    let ckpt = command.get_program().to_owned();
    command.arg("--json").arg("--pidfile").arg(&pidfile).args(options);
    let running = command::start(&mut command, "restore", &log).map_err(|failure| failure.reason)?;
    let begun = running.begun();
    let asked: Result<Duration, String> = (|| {
        let mut connection = Connection::open(&saved.address, timeout, &http::NEVER)?;
        connection.ask("PING")?;
        (0..REQUESTS).try_for_each(|number| connection.get(number * 1_000_003 % saved.keys))?;
        let answered = begun.elapsed();
        if options.contains(&"--record-working-set") {
            let mut stop = Command::new(&ckpt);
            stop.args(["--quiet", "working-set", "stop", "-D"]).arg(&saved.image);
            command::run(&mut stop, "working-set stop", &place.join("stop.log"), timeout)
                .map_err(|failure| failure.reason)?;
        }
        Ok(answered)
    })();
    let pid = std::fs::read_to_string(&pidfile).ok().and_then(|text| text.trim().parse().ok());
    if let Some(pid) = pid {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
    let ended = running.wait(timeout);
    let answered = asked?;
    ended.map_err(|failure| failure.reason)?;
    let mut samples = Samples::default();
    samples.add_time("requests", answered);
    let figures = own_figures(&log)?;
    let number =
        |path: &str| figures.pointer(path).and_then(|it| it.as_f64()).ok_or("the figures of ckpt have changed");
    samples.add("request-faults", Unit::Count, number("/faults")?);
    samples.add("set-pages", Unit::Count, number("/pages/working_set")?);
    samples.add_time("release", Duration::from_secs_f64(number("/release_us")? / 1e6));
    Ok(samples)
}
