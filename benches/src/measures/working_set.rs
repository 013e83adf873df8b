//! The same requests to a restored redis, with nothing recorded and with a recorded working set: how often it waits for a
//! page.
//!
//! Nothing is brought in but what is asked for (`--no-sweep`), so that every fault is one of these requests. The programs
//! are ended when they have answered: the pager then tells its figures.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;

use super::lazy::{into_page_cache, own_figures};
use super::{Samples, Turn};
use crate::command;
use crate::programs::http;
use crate::programs::redis::{Address, Connection};
use crate::record::Unit;
use crate::tools::Tool;

/// Keys that are asked for.
const REQUESTS: usize = 2000;

pub const WITHOUT: &str = "userfault, nothing recorded";
const WITH: &str = "userfault, recorded";

/// What is restored, and asked.
#[derive(Clone)]
pub struct Saved<'a> {
    pub tool: &'a dyn Tool,
    pub image: PathBuf,
    pub address: Address,
    pub keys: usize,
}

/// In a copy of the image. Each round records anew, as no two recordings are quite the same.
pub fn turns(saved: Saved<'_>, place: Arc<TempDir>, timeout: Duration) -> Vec<Turn<'_>> {
    let again = copy(&saved.image, &place.path().join("again/image")).map(|image| Saved { image, ..saved });
    let turn = |name: &str, records: bool, options: &'static [&'static str]| -> Turn<'_> {
        let (again, place) = (again.clone(), place.clone());
        let work = move || {
            let _ = &place;
            let again = again.as_ref().map_err(String::clone)?;
            if records {
                // What is brought in by an earlier one would not be recorded.
                let _ = std::fs::remove_file(again.image.join("working-set"));
                round(again, &["--record-working-set"], timeout).map_err(|why| format!("while recording: {why}"))?;
            }
            round(again, options, timeout)
        };
        (name.into(), Box::new(work))
    };
    vec![turn(WITHOUT, false, &["--no-sweep", "--ignore-working-set"]), turn(WITH, true, &["--no-sweep"])]
}

/// Copies the files of an image.
fn copy(image: &Path, to: &Path) -> Result<PathBuf, String> {
    let copied: std::io::Result<()> = (|| {
        std::fs::create_dir_all(to)?;
        for entry in std::fs::read_dir(image)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                std::fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
        }
        Ok(())
    })();
    copied.map(|()| to.to_path_buf()).map_err(|error| format!("copying {}: {error}", image.display()))
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
