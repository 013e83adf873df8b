//! What there is to try: cases x dumper x restorer, from what the backends say they can do and what this host allows.

use std::collections::BTreeSet;
use std::path::Path;

use ckpt_core::{Availability, Backend};

use crate::case::{Case, Root};
use crate::trial::Way;

/// One cell of the matrix.
#[derive(Clone, Debug)]
pub struct Cell {
    pub case: Case,
    pub way: Way,
    pub todo: Todo,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Todo {
    Try,
    /// With the reason.
    Skip(String),
    /// Not possible here, and required by `CKPT_REQUIRE`.
    Fail(String),
}

/// Names from `CKPT_REQUIRE`: of backends; `programs`; `namespaces`; or `all`.
#[derive(Clone, Debug, Default)]
pub struct Required(BTreeSet<String>);

impl Required {
    pub fn from_environment() -> Required {
        Required::parse(&std::env::var("CKPT_REQUIRE").unwrap_or_default())
    }

    pub fn parse(names: &str) -> Required {
        Required(names.split(',').map(str::trim).filter(|name| !name.is_empty()).map(String::from).collect())
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains(name) || self.0.contains("all")
    }

    /// Required names that mean nothing: a slip there would require nothing at all.
    pub fn unknown(&self, backends: &[&Backend]) -> Vec<&str> {
        let known = |name: &str| {
            ["programs", "namespaces", "all"].contains(&name) || backends.iter().any(|backend| backend.name == name)
        };
        self.0.iter().map(String::as_str).filter(|name| !known(name)).collect()
    }
}

/// The host as far as it decides what can be tried.
pub struct Host {
    /// Whether trials can have their own namespaces; else why not.
    pub namespaces: Result<(), String>,
    pub required: Required,
}

/// All cells, and a line for each backend that there is nothing to try of.
pub fn generate(cases: &[Case], backends: &[&Backend], host: &Host) -> (Vec<Cell>, Vec<String>) {
    let mut cells = Vec::new();
    let mut idle = Vec::new();
    for backend in backends {
        let probe = (backend.probe)();
        if backend.dumper.is_none() && backend.restorer.is_none() {
            idle.push(format!("{}: nothing to try: {}", backend.name, reason(&probe.dump).unwrap_or("not built yet")));
        }
    }
    for case in cases {
        for dumper in backends.iter().filter(|backend| backend.dumper.is_some()) {
            let running = Way::Running(dumper.name);
            cells.push(Cell { case: case.clone(), todo: todo(case, dumper, None, host), way: running });
            if case.refused_at_dump.is_some() {
                continue;
            }
            for restorer in backends.iter().filter(|backend| backend.restorer.is_some()) {
                let way = Way::Restored { dumper: dumper.name, restorer: restorer.name, rounds: rounds(case) };
                cells.push(Cell { case: case.clone(), todo: todo(case, dumper, Some(restorer), host), way });
            }
        }
    }
    (cells, idle)
}

/// `CKPT_ROUNDS` asks for more rounds of every case that is restored.
fn rounds(case: &Case) -> usize {
    let asked = std::env::var("CKPT_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1);
    if case.refused_at_restore.is_some() { 1 } else { case.rounds.max(asked) }
}

fn todo(case: &Case, dumper: &Backend, restorer: Option<&Backend>, host: &Host) -> Todo {
    if let Err(why) = &host.namespaces {
        let needed = host.required.has("namespaces") || host.required.has(dumper.name);
        return skip(needed, why.clone());
    }
    let mut sides = vec![(dumper, (dumper.probe)().dump)];
    sides.extend(restorer.map(|restorer| (restorer, (restorer.probe)().restore)));
    for (backend, availability) in sides {
        // A limit that the backend declares is no fault of this host's, so that it cannot be required away.
        let capability = (backend.capability)();
        if let Some(missing) = case.resources.iter().find(|resource| !capability.resources.contains(resource)) {
            return Todo::Skip(format!("{} does not save {missing}", backend.name));
        }
        if let Some(why) = reason(&availability) {
            return skip(host.required.has(backend.name), format!("{} is not available: {why}", backend.name));
        }
    }
    match missing(case) {
        Some(missing) => skip(host.required.has("programs"), missing),
        None => Todo::Try,
    }
}

fn skip(required: bool, why: String) -> Todo {
    if required { Todo::Fail(format!("required, but {why}")) } else { Todo::Skip(why) }
}

fn reason(availability: &Availability) -> Option<&str> {
    match availability {
        Availability::Available => None,
        Availability::Unavailable(why) => Some(why),
    }
}

/// What a case needs and this host does not have, in words.
pub fn missing(case: &Case) -> Option<String> {
    let Root::Program(program) = &case.root else { return None };
    let (file, package) = program.needs.iter().find(|(file, _)| !Path::new(file).exists())?;
    Some(format!("there is no {file}; install the Debian package {package}"))
}
