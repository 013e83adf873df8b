//! `ckpt backends`: what is registered, what each can do, and what this host allows. And how a verb finds its backend.

use std::process::ExitCode;

use ckpt_core::{Availability, Backend, Dumper, Feature, Restorer, registry};

use crate::failure::{Refused, Usage};
use crate::output;

/// Show the backends: what each can do, and what this host allows
#[derive(Debug, clap::Args)]
pub struct Backends {
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
}

/// What is used when `--backend` does not say.
pub const DEFAULT: &str = "ptrace";

/// The backend by name.
pub fn find(name: Option<&str>) -> anyhow::Result<&'static Backend> {
    let wanted = name.unwrap_or(DEFAULT);
    registry::backend(wanted).map_err(|known| {
        let known = known.join(", ");
        match name {
            Some(_) => Usage(format!("there is no backend {wanted}; this ckpt has: {known}")).into(),
            None => Refused(format!("this ckpt was built without the backend {wanted}; it has: {known}")).into(),
        }
    })
}

/// The backend for a process where none was named and the usual one may not be used here: that of its shim, if it has one.
pub fn for_process(pid: ckpt_core::Pid) -> Option<&'static str> {
    let usual = find(None).ok()?;
    let unusable = matches!((usual.probe)().dump, Availability::Unavailable(_));
    (unusable && ckpt_preload::find::has_shim(pid)).then_some("preload")
}

/// The dumper of a backend, if this host lets it work.
pub fn dumper(name: Option<&str>) -> anyhow::Result<Box<dyn Dumper>> {
    let backend = find(name)?;
    match (backend.dumper, (backend.probe)().dump) {
        (Some(dumper), Availability::Available | Availability::Reduced(_)) => Ok(dumper()),
        (_, Availability::Unavailable(why)) => Err(unavailable(backend, "dump", &why)),
        (None, _) => Err(unavailable(backend, "dump", "it only restores")),
    }
}

/// The restorer of a backend, if this host lets it work.
pub fn restorer(name: Option<&str>) -> anyhow::Result<Box<dyn Restorer>> {
    let backend = find(name)?;
    match (backend.restorer, (backend.probe)().restore) {
        (Some(restorer), Availability::Available | Availability::Reduced(_)) => Ok(restorer()),
        (_, Availability::Unavailable(why)) => Err(unavailable(backend, "restore", &why)),
        (None, _) => Err(unavailable(backend, "restore", "it only dumps")),
    }
}

fn unavailable(backend: &Backend, what: &str, why: &str) -> anyhow::Error {
    Refused(format!("the backend {} cannot {what} here: {why}", backend.name)).into()
}

pub fn run(name: Option<&str>, verb: &Backends) -> anyhow::Result<ExitCode> {
    let chosen = match name {
        Some(_) => vec![find(name)?],
        None => registry::backends(),
    };
    if verb.json {
        let all: Vec<_> = chosen.into_iter().map(json).collect();
        output::print(&format!("{}\n", serde_json::to_string_pretty(&all)?));
    } else {
        let all: Vec<_> = chosen.into_iter().map(text).collect();
        output::print(&all.join("\n"));
    }
    Ok(ExitCode::SUCCESS)
}

fn text(backend: &Backend) -> String {
    let capability = (backend.capability)();
    let probe = (backend.probe)();
    let mut text = format!("{}: {}\n", backend.name, backend.summary);
    text += &format!("  dump      {}\n", available(&probe.dump));
    text += &format!("  restore   {}\n", available(&probe.restore));
    let abilities = [
        (capability.attach, "saves any running process"),
        (capability.launch, "saves what it started (ckpt run)"),
        (capability.restore, "restores"),
    ];
    let abilities: Vec<&str> = abilities.into_iter().filter_map(|(can, what)| can.then_some(what)).collect();
    if !abilities.is_empty() {
        text += &format!("  can       {}\n", abilities.join(", "));
    }
    if !capability.privileges.is_empty() {
        text += &format!("  needs     {}\n", capability.privileges.join(", "));
    }
    if !capability.resources.is_empty() {
        text += &wrapped("  saves     ", &capability.resources.join(", "));
    }
    if !capability.lacks.is_empty() {
        text += &wrapped("  but not   ", &capability.lacks.join(", "));
    }
    if !probe.features.is_empty() {
        let there: Vec<&str> = probe.features.iter().filter(|it| it.there).map(|it| it.name).collect();
        if !there.is_empty() {
            text += &wrapped("  has       ", &there.join(", "));
        }
        for missing in probe.features.iter().filter(|it| !it.there) {
            text += &wrapped("  has no    ", &in_words(missing));
        }
    }
    text
}

/// A feature that is not there, with what is done instead.
pub fn in_words(missing: &Feature) -> String {
    match missing.instead {
        "" => missing.name.into(),
        instead => format!("{}: {instead}", missing.name),
    }
}

pub fn available(availability: &Availability) -> String {
    match availability {
        Availability::Available => "works here".into(),
        Availability::Reduced(why) => format!("works here, but {why}"),
        Availability::Unavailable(why) => format!("not here: {why}"),
    }
}

/// A list over several lines, under its first word.
fn wrapped(heading: &str, list: &str) -> String {
    let indent = " ".repeat(heading.len());
    let mut text = heading.to_string();
    let mut width = heading.len();
    for word in list.split_inclusive(' ') {
        if width + word.len() > 100 {
            text.truncate(text.trim_end().len());
            text += &format!("\n{indent}");
            width = indent.len();
        }
        text += word;
        width += word.len();
    }
    text + "\n"
}

fn json(backend: &Backend) -> serde_json::Value {
    let capability = (backend.capability)();
    let probe = (backend.probe)();
    let state = |availability: &Availability| match availability {
        Availability::Available => serde_json::json!({ "available": true }),
        Availability::Reduced(why) => serde_json::json!({ "available": true, "reduced": why }),
        Availability::Unavailable(why) => serde_json::json!({ "available": false, "why": why }),
    };
    let features: serde_json::Map<_, _> =
        probe.features.iter().map(|feature| (feature.name.to_string(), feature.there.into())).collect();
    let instead: serde_json::Map<_, _> = probe
        .features
        .iter()
        .filter(|feature| !feature.there && !feature.instead.is_empty())
        .map(|feature| (feature.name.to_string(), feature.instead.into()))
        .collect();
    serde_json::json!({
        "name": backend.name,
        "summary": backend.summary,
        "capability": {
            "attach": capability.attach,
            "launch": capability.launch,
            "restore": capability.restore,
            "resources": capability.resources,
            "lacks": capability.lacks,
            "privileges": capability.privileges,
        },
        "probe": { "dump": state(&probe.dump), "restore": state(&probe.restore), "features": features,
            "instead": instead },
    })
}
