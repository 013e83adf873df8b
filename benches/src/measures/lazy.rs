//! A redis that answers before its memory is there: the tools that bring it in behind, and beside them those that do not.
//!
//! In turn, each tool saves a redis of its own and restores it from the page cache: anew in each round, as what a client waits
//! for depends on what is in memory where. The client begins to ask as soon as the restore command is started, and goes on until
//! all pages are in.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::cycle::{come_up, gone, no_room, run, settle};
use super::{Bench, Comparison, Samples, Subject, Turn, working_set};
use crate::command;
use crate::programs::redis::{Address, Connection, Redis};
use crate::programs::{Program, http};
use crate::record::{Group, Unit};
use crate::statistics::quantile;
use crate::tools::{Lazily, Tool};

pub struct Workload {
    pub name: &'static str,
    keys: usize,
    pub quick: bool,
}

pub const WORKLOADS: &[Workload] = &[
    Workload { name: "lazy-redis-256m", keys: 200_000, quick: true },
    Workload { name: "lazy-redis-1g", keys: 800_000, quick: false },
    Workload { name: "lazy-redis-4g", keys: 3_200_000, quick: false },
];

impl Workload {
    pub fn about(&self) -> String {
        format!("a redis of {} keys, asked while its memory comes in", self.keys)
    }

    fn bytes(&self) -> u64 {
        self.keys as u64 * 1340
    }
}

/// A way to save and restore.
struct Way<'a> {
    tool: &'a dyn Tool,
    lazily: Option<Lazily>,
    redis: Redis,
    /// Of one round.
    at: PathBuf,
    /// Where the images of all are; they go with the last way.
    _place: Arc<TempDir>,
}

/// Saves a redis with each tool; gives the comparison of the restores, and that with and without a working set. Or says why
/// there is none.
pub fn comparisons<'a>(bench: &'a Bench, workload: &Workload) -> Result<Vec<Comparison<'a>>, String> {
    let redis = Redis { name: workload.name, by_unix_socket: true, keys: workload.keys, quick: workload.quick };
    let tools: Vec<&dyn Tool> = bench.tools.iter().map(|tool| &**tool).collect();
    let tools: Vec<_> =
        tools.into_iter().filter(|tool| matches!(tool.name(), "ptrace" | "userfault" | "criu")).collect();
    if !tools.iter().any(|tool| tool.lazily().is_some()) {
        return Err("none of the tools restores lazily".into());
    }
    // A round removes what it saved; one that failed may leave it.
    let images = tools.len() as u64 + 1;
    if let Some(why) = redis.absent().or_else(|| no_room(&bench.images, workload.bytes(), images)) {
        return Err(why);
    }
    let place = tempfile::tempdir_in(&bench.images).map_err(|error| format!("{}: {error}", bench.images.display()))?;
    let (place, timeout) = (Arc::new(place), bench.timeout);
    let (mut turns, mut again): (Vec<Turn<'a>>, _) = (Vec::new(), None);
    for tool in tools {
        let mut restore = |name: &str, lazily: Option<Lazily>| {
            let way = Way { tool, lazily, redis, at: place.path().join(name), _place: place.clone() };
            turns.push((name.into(), Box::new(move || round(&way, timeout))));
        };
        // CRIU restores both ways.
        if tool.name() != "userfault" {
            restore(tool.name(), None);
        }
        if let Some(lazily) = tool.lazily() {
            restore(lazily.name, Some(lazily));
        }
        if tool.name() == "userfault" {
            again = Some(working_set::turns(tool, redis, &place, timeout));
        }
    }
    let size = workload.bytes();
    let subject = Subject { group: Group::Lazy, workload: workload.name.into(), size, baseline: "userfault" };
    let mut comparisons = vec![Comparison::new(subject, bench.limits, turns)];
    if let Some(turns) = again {
        let subject = Subject {
            group: Group::Lazy,
            workload: format!("{}-again", workload.name),
            size,
            baseline: working_set::WITHOUT,
        };
        comparisons.push(Comparison::new(subject, bench.limits, turns));
    }
    Ok(comparisons)
}

/// Starts a redis and saves it; gives where it listens.
pub fn save(tool: &dyn Tool, redis: &Redis, place: &Path, timeout: Duration) -> Result<Address, String> {
    std::fs::create_dir(place).map_err(|error| format!("{}: {error}", place.display()))?;
    let result = (|| {
        let (command, mut session, address) = redis.prepare_at(place)?;
        let root = tool.start(command, place, timeout)?;
        come_up(&mut *session, root, place)?;
        run(tool, tool.dump(root, &place.join("image"), false)?, "dump", place, timeout)?;
        gone(root)?;
        Ok(address)
    })();
    settle(place);
    let ended = command::end_descendants();
    result.and_then(|address| ended.map(|()| address))
}

fn round(way: &Way<'_>, timeout: Duration) -> Result<Samples, String> {
    // What a round that failed has left.
    let _ = std::fs::remove_dir_all(&way.at);
    let address = save(way.tool, &way.redis, &way.at, timeout)?;
    let image = way.at.join("image");
    into_page_cache(&image)?;
    let result = restore(way, &image, &address, timeout);
    let ended = command::end_descendants();
    let removed = std::fs::remove_dir_all(&way.at).map_err(|error| format!("{}: {error}", way.at.display()));
    result.and_then(|samples| ended.and(removed).map(|()| samples))
}

/// Whether somebody listens on a Unix socket. To connect would be taken for the restore.
fn listens(socket: &Path) -> bool {
    let path = socket.to_string_lossy().into_owned();
    let table = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    // The fourth field has __SO_ACCEPTCON; daemons may have bound a relative path.
    let listening = |line: &str| line.split_whitespace().nth(3) == Some("00010000");
    let named = |line: &str| line.ends_with(&path) || line.ends_with(" lazy-pages.socket");
    socket.exists() && table.lines().any(|line| listening(line) && named(line))
}

/// What the client saw.
struct Seen {
    ping: Instant,
    first: Instant,
    /// Microseconds.
    while_loading: Vec<f64>,
}

/// Others may have been run since it was read last.
pub fn into_page_cache(image: &Path) -> Result<(), String> {
    let read = |file: &Path| std::io::copy(&mut std::fs::File::open(file)?, &mut std::io::sink());
    let failed = |error| format!("reading {}: {error}", image.display());
    for entry in std::fs::read_dir(image).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_file() {
            read(&entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

fn restore(way: &Way<'_>, image: &Path, address: &Address, timeout: Duration) -> Result<Samples, String> {
    let (mut samples, keys) = (Samples::default(), way.redis.keys);
    let place = &way.at;
    let daemon = match way.lazily.as_ref().and_then(|lazily| lazily.daemon) {
        Some(daemon) => {
            let mut command = daemon(way.tool, image);
            let log = place.join("daemon.log");
            let daemon = command::start(&mut command, "the daemon", &log).map_err(|failure| failure.reason)?;
            // Whoever uses it starts it before as well; its start is not counted.
            let socket = image.join("lazy-pages.socket");
            let begun = Instant::now();
            while !listens(&socket) {
                if begun.elapsed() > timeout {
                    daemon.kill();
                    return Err(format!("{} is not listened on", socket.display()));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Some(daemon)
        }
        None => None,
    };
    let mut command: Command = match &way.lazily {
        Some(lazily) => (lazily.restore)(way.tool, image),
        None => way.tool.restore(image)?,
    };
    let log = place.join("restore.log");
    let running = command::start(&mut command, "restore", &log).map_err(|failure| failure.reason)?;
    let begun = running.begun();
    let (give_up, loaded) = (AtomicBool::new(false), AtomicBool::new(false));
    let (done, seen) = std::thread::scope(|scope| {
        let asking = std::thread::Builder::new().spawn_scoped(scope, || ask(way, address, timeout, &give_up, &loaded));
        let done = running.wait(timeout).and_then(|taken| match daemon {
            Some(daemon) => daemon.wait(timeout).map(|daemon| daemon.begun.max(taken.begun)),
            None => Ok(taken.begun),
        });
        let complete = Instant::now();
        loaded.store(true, SeqCst);
        give_up.store(done.is_err(), SeqCst);
        let seen = asking.map_err(|error| format!("no thread to ask with: {error}"));
        let seen = seen.and_then(|asking| asking.join().unwrap_or_else(|_| Err("asking failed".into())));
        (done.map(|_| complete), seen)
    });
    let complete = done.map_err(|failure| failure.reason)?;
    let seen = seen.map_err(|error| format!("after the restore: {error}"))?;
    samples.add_time("ping", seen.ping.duration_since(begun));
    samples.add_time("first-get", seen.first.duration_since(begun));
    samples.add_time("all-pages", complete.duration_since(begun));
    if way.lazily.is_some() && seen.while_loading.len() >= 10 {
        samples.add("get-p50", Unit::Microseconds, quantile(&seen.while_loading, 0.5));
        samples.add("get-p99", Unit::Microseconds, quantile(&seen.while_loading, 0.99));
        samples.pooled.push(("GET while loading", Unit::Microseconds, seen.while_loading));
    }
    if way.tool.name() == "userfault" {
        let figures = own_figures(&log)?;
        let number = |value: &serde_json::Value| value.as_f64().ok_or("the figures of ckpt have changed");
        samples.add("faults", Unit::Count, number(&figures["faults"])?);
        samples.add("fault-p50", Unit::Microseconds, number(&figures["fault_latency_us"]["p50"])?);
        samples.add("fault-p99", Unit::Microseconds, number(&figures["fault_latency_us"]["p99"])?);
    }
    // All of it must be what it was.
    let mut connection = Connection::open(address, timeout, &http::NEVER)?;
    let count = connection.ask("DBSIZE")?;
    if count != keys.to_string() {
        return Err(format!("after the restore: {count} keys of {keys}"));
    }
    (0..keys).step_by(keys / 2000 + 1).try_for_each(|key| connection.get(key))?;
    Ok(samples)
}

fn ask(
    way: &Way<'_>,
    address: &Address,
    timeout: Duration,
    give_up: &AtomicBool,
    loaded: &AtomicBool,
) -> Result<Seen, String> {
    let keys = way.redis.keys;
    let mut connection = Connection::open(address, timeout, give_up)?;
    connection.ask("PING")?;
    let ping = Instant::now();
    connection.get(keys / 2)?;
    let first = Instant::now();
    let mut while_loading = Vec::new();
    let mut at = 1;
    // An eager restore is done by now, or about to be.
    while way.lazily.is_some() && !loaded.load(SeqCst) && ping.elapsed() < timeout {
        at = (at + 1_000_003) % keys;
        let asked = Instant::now();
        connection.get(at)?;
        while_loading.push(asked.elapsed().as_secs_f64() * 1e6);
    }
    Ok(Seen { ping, first, while_loading })
}

/// What the pager of ckpt tells of itself.
pub fn own_figures(log: &Path) -> Result<serde_json::Value, String> {
    let text = std::fs::read_to_string(log).map_err(|error| format!("{}: {error}", log.display()))?;
    let start = text.find('{').ok_or("ckpt told no figures")?;
    serde_json::from_str(&text[start..]).map_err(|error| format!("the figures of ckpt: {error}"))
}
