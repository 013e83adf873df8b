//! The same requests to a restored redis, with nothing recorded and with a recorded working set: how often it waits for a
//! page.
//!
//! Nothing is brought in but what is asked for (`--no-sweep`), so that every fault is one of these requests. The programs
//! are ended when they have answered: the pager then tells its figures.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::lazy::own_figures;
use super::{Bench, Samples, Turn, ratios, row, take_turns};
use crate::command;
use crate::programs::http;
use crate::programs::redis::{Address, Connection};
use crate::record::{Group, Unit};
use crate::tools::Tool;

/// Keys that are asked for.
const REQUESTS: usize = 2000;

const WITHOUT: &str = "userfault, nothing recorded";
const WITH: &str = "userfault, recorded";

/// What is restored, and asked.
#[derive(Clone, Copy)]
struct Saved<'a> {
    tool: &'a dyn Tool,
    image: &'a Path,
    address: &'a Address,
    keys: usize,
}

/// Records once, and compares then, in turn.
pub fn measure(bench: &mut Bench, workload: &str, image: &Path, address: &Address, keys: usize, bytes: u64) {
    let Some(tool) = bench.tools.iter().find(|tool| tool.name() == "userfault") else { return };
    let saved = Saved { tool: &**tool, image, address, keys };
    let (timeout, workload) = (bench.timeout, format!("{workload}-again"));
    let recorded = round(saved, &["--record-working-set"], timeout);
    let turn = |options: &'static [&'static str]| {
        let recorded = recorded.as_ref().err().cloned();
        move || match &recorded {
            Some(why) => Err(format!("while recording: {why}")),
            None => round(saved, options, timeout),
        }
    };
    let mut turns: Vec<Turn<'_>> = vec![
        (WITHOUT.into(), Box::new(turn(&["--no-sweep", "--ignore-working-set"]))),
        (WITH.into(), Box::new(turn(&["--no-sweep"]))),
    ];
    let results = take_turns(bench.rounds, bench.within, &mut turns);
    let rows: Vec<_> = turns
        .iter()
        .zip(&results)
        .map(|((tool, _), result)| row(Group::Lazy, &workload, tool, bytes, result))
        .collect();
    drop(turns);
    bench.ratios.extend(ratios(&rows, WITHOUT));
    bench.rows.extend(rows);
}

fn round(saved: Saved<'_>, options: &[&str], timeout: Duration) -> Result<Samples, String> {
    let result = restore(saved, options, timeout);
    let ended = command::end_descendants();
    result.and_then(|samples| ended.map(|()| samples))
}

fn restore(saved: Saved<'_>, options: &[&str], timeout: Duration) -> Result<Samples, String> {
    let place = saved.image.parent().ok_or("an image without a place")?;
    let (log, pidfile) = (place.join("again.log"), place.join("again.pid"));
    let _ = std::fs::remove_file(&pidfile);
    let mut command = saved.tool.restore(saved.image)?;
    let ckpt = command.get_program().to_owned();
    command.arg("--json").arg("--pidfile").arg(&pidfile).args(options);
    let running = command::start(&mut command, "restore", &log).map_err(|failure| failure.reason)?;
    let begun = running.begun();
    let asked: Result<Duration, String> = (|| {
        let mut connection = Connection::open(saved.address, timeout, &http::NEVER)?;
        connection.ask("PING")?;
        (0..REQUESTS).try_for_each(|number| connection.get(number * 1_000_003 % saved.keys))?;
        let answered = begun.elapsed();
        if options.contains(&"--record-working-set") {
            let mut stop = Command::new(&ckpt);
            stop.args(["--quiet", "working-set", "stop", "-D"]).arg(saved.image);
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
