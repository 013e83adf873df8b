//! `ckpt check`: verifies an image, asks whether a process could be saved, or looks at this host.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ckpt_core::backend::{RestoreOptions, Restorer};
use ckpt_core::plan::Plan;
use ckpt_core::procfs::ProcDir;
use ckpt_core::{Availability, Backend, DumpError, Pid, Refusal, RestoreError, registry, resource};

use crate::dump::{How, pid};
use crate::failure::Refused;
use crate::{backends, human, output, sys};

/// Verify an image, ask whether a process could be saved, or look at this host
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ckpt check image             is the image whole, and could it be restored here?
  ckpt check --pid 1234        could process 1234 be saved, and if not, why not? It goes on
  ckpt check                   what does this host allow?

With --backend only that one is asked. The exit code is 0 if a backend could do it, 3 if none could.")]
pub struct Check {
    /// The directory of an image
    #[arg(value_name = "DIR", conflicts_with_all = ["pid", "tcp_close", "timeout"])]
    directory: Option<PathBuf>,

    /// A process: it is frozen for a moment, and goes on
    #[arg(short = 't', long, value_name = "PID", value_parser = pid)]
    pid: Option<Pid>,

    #[command(flatten)]
    how: How,
}

pub fn run(backend: Option<&str>, verb: &Check) -> anyhow::Result<ExitCode> {
    let chosen = match backend {
        Some(_) => vec![backends::find(backend)?],
        None => registry::backends(),
    };
    match (&verb.directory, verb.pid) {
        (Some(directory), _) => image(&chosen, directory, verb.how.shell_job),
        (None, Some(pid)) => process(&chosen, pid, &verb.how),
        (None, None) => host(&chosen),
    }
}

/// Everything of the image is read and compared with its checksums; then it is planned, which touches nothing.
fn image(chosen: &[&Backend], directory: &Path, shell_job: bool) -> anyhow::Result<ExitCode> {
    sys::interrupt_on_signals();
    ckpt_formats::check(directory)?;
    let reader = ckpt_formats::open(directory)?;
    let image = reader.image();
    output::tell(&format!(
        "{} is whole: {}, {} of memory",
        directory.display(),
        human::count(image.processes.len() + image.zombies.len(), "process", "processes"),
        human::size(resource::memory::page_bytes(image))
    ));
    let options = RestoreOptions { shell_job, ..RestoreOptions::default() };
    let mut verdict = Verdict::default();
    for (backend, restorer) in ready(chosen, |probe| &probe.restore, |backend| backend.restorer, &mut verdict) {
        let restorer: Box<dyn Restorer> = restorer();
        match Plan::new(&*restorer, image, &options) {
            Ok(_) => verdict.possible(backend, "restored here"),
            Err(RestoreError::Refused(refusals)) => verdict.refused(backend, "restored here", refusals),
            Err(error) => return Err(error.into()),
        }
    }
    verdict.end()
}

fn process(chosen: &[&Backend], pid: Pid, how: &How) -> anyhow::Result<ExitCode> {
    sys::interrupt_on_signals();
    let mut verdict = Verdict::default();
    for (backend, dumper) in ready(chosen, |probe| &probe.dump, |backend| backend.dumper, &mut verdict) {
        match ckpt_core::dump::examine(&*dumper(), pid, &how.options()) {
            Ok(refusals) => {
                output::tell(&resources(backend, &refusals));
                if refusals.is_empty() {
                    verdict.possible(backend, "saved");
                } else {
                    verdict.refused(backend, "saved", refusals);
                }
            }
            // The same for every backend: there is nothing more to ask.
            Err(error @ DumpError::NoSuchProcess(_)) => return Err(error.into()),
            Err(error @ DumpError::NotDumpable { .. }) => verdict.impossible(backend, "saved", &error.to_string()),
            Err(error) => return Err(error.into()),
        }
    }
    verdict.end()
}

/// The backends that this host lets work, with what makes their working part; of the others it is said why not.
fn ready<'a, F>(
    chosen: &[&'a Backend],
    availability: impl Fn(&ckpt_core::Probe) -> &Availability,
    part: impl Fn(&Backend) -> Option<F>,
    verdict: &mut Verdict,
) -> Vec<(&'a Backend, F)> {
    let mut ready = Vec::new();
    for &backend in chosen {
        match (availability(&(backend.probe)()), part(backend)) {
            (Availability::Available | Availability::Reduced(_), Some(part)) => ready.push((backend, part)),
            (Availability::Unavailable(why), _) => verdict.unavailable(backend, why),
            (Availability::Available | Availability::Reduced(_), None) => {
                verdict.unavailable(backend, "it cannot do this")
            }
        }
    }
    ready
}

/// Resource by resource, with the reasons below those that are in the way.
fn resources(backend: &Backend, refusals: &[Refusal]) -> String {
    let known = (backend.capability)().resources;
    let mut text = format!("{}:", backend.name);
    let mut names = resource::names();
    names.extend(refusals.iter().map(|refusal| refusal.resource));
    names.sort_unstable();
    names.dedup();
    for name in names {
        let reasons: Vec<_> = refusals.iter().filter(|refusal| refusal.resource == name).collect();
        let state = match (reasons.is_empty(), known.contains(&name)) {
            (false, _) => "in the way",
            (true, true) => "fine",
            (true, false) => "fine (none there)",
        };
        let _ = write!(text, "\n  {name:<20} {state}");
        for reason in reasons {
            let _ = write!(text, "\n      {reason}");
        }
    }
    text
}

/// What the backends said.
#[derive(Default)]
struct Verdict {
    possible: bool,
    against: Vec<String>,
    unavailable: Vec<String>,
}

impl Verdict {
    fn possible(&mut self, backend: &Backend, what: &str) {
        self.possible = true;
        output::tell(&format!("with the backend {} it can be {what}", backend.name));
    }

    fn refused(&mut self, backend: &Backend, what: &str, refusals: Vec<Refusal>) {
        let reasons: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
        self.impossible(backend, what, &reasons.join("\n"));
    }

    fn impossible(&mut self, backend: &Backend, what: &str, reasons: &str) {
        output::tell(&format!("with the backend {} it cannot be {what}", backend.name));
        self.against.push(reasons.to_string());
    }

    fn unavailable(&mut self, backend: &Backend, why: &str) {
        output::tell(&format!("the backend {} is not available: {why}", backend.name));
        self.unavailable.push(format!("the backend {} is not available: {why}", backend.name));
    }

    fn end(self) -> anyhow::Result<ExitCode> {
        // What a backend that works here says is of more use than that others do not.
        let reasons = if self.against.is_empty() { self.unavailable } else { self.against };
        if self.possible { Ok(ExitCode::SUCCESS) } else { Err(Refused(reasons.join("\n")).into()) }
    }
}

/// Capabilities by their numbers, and what a checkpoint or restore wants them for.
const CAPABILITIES: [(u32, &str, &str); 12] = [
    (19, "CAP_SYS_PTRACE", "save processes of other users"),
    (40, "CAP_CHECKPOINT_RESTORE", "give processes their old ids back"),
    (21, "CAP_SYS_ADMIN", "the same on kernels before 5.9; mounts, namespaces"),
    (5, "CAP_KILL", "signal processes of other users"),
    (6, "CAP_SETGID", "bring back processes of other groups"),
    (7, "CAP_SETUID", "bring back processes of other users"),
    (8, "CAP_SETPCAP", "bring back capability bounding sets"),
    (12, "CAP_NET_ADMIN", "socket options; TCP connections"),
    (10, "CAP_NET_BIND_SERVICE", "sockets on ports below 1024"),
    (18, "CAP_SYS_CHROOT", "bring back processes with another root directory"),
    (23, "CAP_SYS_NICE", "bring back priorities and real-time policies"),
    (24, "CAP_SYS_RESOURCE", "bring back hard limits above our own"),
];

fn host(chosen: &[&Backend]) -> anyhow::Result<ExitCode> {
    let mut text = String::new();
    let file = |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_string()).ok();
    let kernel = nix::sys::utsname::uname()?;
    let (release, machine) = (kernel.release().to_string_lossy(), kernel.machine().to_string_lossy());
    let _ = writeln!(text, "kernel     Linux {release}, {machine}");
    if let Some(scope) = file("/proc/sys/kernel/yama/ptrace_scope") {
        let meaning = match scope.as_str() {
            "0" => "any process of the same user",
            "1" => "only descendants, without CAP_SYS_PTRACE",
            "2" => "only with CAP_SYS_PTRACE",
            _ => "nobody",
        };
        let _ = writeln!(text, "ptrace     {meaning} (kernel.yama.ptrace_scope = {scope})");
    }
    let status = ProcDir::open(Pid(std::process::id() as i32))?.status()?;
    let effective = status.mask("CapEff").unwrap_or(0);
    text += "privileges\n";
    for (number, name, purpose) in CAPABILITIES {
        let there = if effective >> number & 1 == 1 { "yes" } else { "no " };
        let _ = writeln!(text, "  {there}  {name:<24} {purpose}");
    }
    text += "backends\n";
    let mut usable = false;
    for backend in chosen {
        let probe = (backend.probe)();
        for (what, availability) in [("dump", &probe.dump), ("restore", &probe.restore)] {
            usable |= !matches!(availability, Availability::Unavailable(_));
            let said = backends::available(availability);
            let _ = writeln!(text, "  {:<10} {what:<8} {said}", backend.name);
        }
        for feature in &probe.features {
            let _ = match feature.there {
                true => writeln!(text, "  {:<10} {:<8} {}", "", "has", feature.name),
                false => writeln!(text, "  {:<10} {:<8} {}", "", "has no", backends::in_words(feature)),
            };
        }
    }
    output::print(&text);
    if usable { Ok(ExitCode::SUCCESS) } else { Err(Refused("no backend works on this host".into()).into()) }
}
