//! What there is to try: cases x dumper x restorer, from what the backends say they can do and what this host allows.

use std::collections::BTreeSet;
use std::path::Path;

use ckpt_core::{Availability, Backend};

use crate::backends;
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
    /// A backend says that it can never do this; with the words for it.
    Cannot(String),
    /// Not possible on this host, and not required; with the reason.
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
            if case.snapshot && dumper.restorer.is_some() {
                let todo = todo(case, dumper, Some(dumper), host);
                cells.push(Cell { case: case.clone(), todo, way: Way::Snapshot(dumper.name) });
            }
            if needs_nothing(dumper) && case.refused_at_dump.is_none() {
                let way = Way::Ordinary { backend: dumper.name, rounds: rounds(case, dumper) };
                let todo = match case.privileged {
                    Some(why) => Todo::Cannot(format!("{} as an ordinary user: {why}", dumper.name)),
                    None => match crate::ordinary::probe() {
                        Ok(()) => todo(case, dumper, Some(dumper), host),
                        Err(why) => skip(host.required.has(dumper.name), why),
                    },
                };
                // A refusal is the same, whoever has the ids.
                if case.refused_at_restore.is_none() {
                    let todo = match (&todo, case.real_ids) {
                        (Todo::Try, Some(why)) => Todo::Cannot(format!("{} under other ids: {why}", dumper.name)),
                        _ => todo.clone(),
                    };
                    let way = Way::Taken { backend: dumper.name, rounds: rounds(case, dumper) };
                    cells.push(Cell { case: case.clone(), todo, way });
                }
                cells.push(Cell { case: case.clone(), todo, way });
            }
            for restorer in backends.iter().filter(|backend| backend.restorer.is_some()) {
                // A variant gets its pages from elsewhere; the images that it takes are the same, whoever dumped.
                if backends::is_variant(restorer) && needs_nothing(dumper) {
                    continue;
                }
                let way = Way::Restored { dumper: dumper.name, restorer: restorer.name, rounds: rounds(case, dumper) };
                cells.push(Cell { case: case.clone(), todo: todo(case, dumper, Some(restorer), host), way });
            }
        }
    }
    (cells, idle)
}

/// Whether a backend is for ordinary users, in both directions.
fn needs_nothing(backend: &Backend) -> bool {
    backend.dumper.is_some() && backend.restorer.is_some() && (backend.capability)().privileges.is_empty()
}

/// Rounds of a case whose programs were started to be saved: there are more ways to restore them than to restore others.
const ROUNDS_OF_STARTED: usize = 3;

/// `CKPT_ROUNDS` asks for more rounds of every case that is restored.
fn rounds(case: &Case, dumper: &Backend) -> usize {
    let asked = std::env::var("CKPT_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1);
    let usual = if needs_nothing(dumper) { case.rounds.min(ROUNDS_OF_STARTED) } else { case.rounds };
    if case.refused_at_restore.is_some() { 1 } else { usual.max(asked) }
}

fn todo(case: &Case, dumper: &Backend, restorer: Option<&Backend>, host: &Host) -> Todo {
    if let Err(why) = &host.namespaces {
        let needed = host.required.has("namespaces") || host.required.has(dumper.name);
        return skip(needed, why.clone());
    }
    if let Some(lacks) = lacks_cpu(case) {
        return Todo::Cannot(lacks);
    }
    let mut sides = vec![(dumper, (dumper.probe)().dump)];
    sides.extend(restorer.map(|restorer| (restorer, (restorer.probe)().restore)));
    for (backend, availability) in sides {
        // A limit that the backend declares is no fault of this host's.
        let capability = (backend.capability)();
        if let Some(missing) = case.resources.iter().find(|resource| !capability.resources.contains(resource)) {
            return Todo::Cannot(format!("{} does not save {missing}", backend.name));
        }
        if let Some(lacking) = case.needs.iter().find(|needed| capability.lacks.contains(needed)) {
            return Todo::Cannot(format!("{} cannot do {lacking}", backend.name));
        }
        if let Some(why) = reason(&availability) {
            return skip(host.required.has(backend.name), format!("{} is not available: {why}", backend.name));
        }
    }
    if let Some(why) = not_allowed(case) {
        return skip(false, why);
    }
    match missing_program(case) {
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
        // What it is tried for is not there: that it passes would say nothing.
        Availability::Reduced(why) | Availability::Unavailable(why) => Some(why),
    }
}

/// What a case needs and this host does not have, in words.
pub fn missing(case: &Case) -> Option<String> {
    lacks_cpu(case).or_else(|| not_allowed(case)).or_else(|| missing_program(case))
}

fn lacks_cpu(case: &Case) -> Option<String> {
    case.cpu.filter(|(_, has)| !has()).map(|(what, _)| format!("this CPU has no {what}"))
}

fn not_allowed(case: &Case) -> Option<String> {
    case.host.and_then(|allows| allows().err())
}

fn missing_program(case: &Case) -> Option<String> {
    let Root::Program(program) = &case.root else { return None };
    let (file, package) = program.needs.iter().find(|(file, _)| !Path::new(file).exists())?;
    Some(format!("there is no {file}; install the Debian package {package}"))
}

#[cfg(test)]
mod tests {
    use ckpt_core::backend::{Capability, Dumper, Probe, Restorer};

    use super::*;

    fn can(resources: &[&'static str]) -> Capability {
        Capability {
            attach: true,
            launch: false,
            restore: true,
            resources: resources.to_vec(),
            lacks: vec![],
            privileges: vec!["CAP_SYS_PTRACE"],
        }
    }

    fn probe(dump: Availability, restore: Availability) -> Probe {
        Probe { dump, restore, features: vec![] }
    }

    fn dumps() -> Box<dyn Dumper> {
        unreachable!("only generated")
    }

    fn restores() -> Box<dyn Restorer> {
        unreachable!("only generated")
    }

    static GOOD: Backend = Backend {
        name: "good",
        summary: "",
        capability: || can(&["tasks", "pipes"]),
        probe: || probe(Availability::Available, Availability::Available),
        launcher: None,
        dumper: Some(dumps),
        restorer: Some(restores),
    };
    static RESTORE_ONLY: Backend = Backend {
        name: "lazy",
        summary: "",
        capability: || can(&["tasks"]),
        probe: || probe(Availability::Unavailable("never".into()), Availability::Unavailable("no userfaultfd".into())),
        launcher: None,
        dumper: None,
        restorer: Some(restores),
    };
    static UNBUILT: Backend = Backend {
        name: "later",
        summary: "",
        capability: || can(&[]),
        probe: || probe(Availability::Unavailable("not built yet".into()), Availability::Available),
        launcher: None,
        dumper: None,
        restorer: None,
    };

    fn case(name: &'static str, resources: &'static [&'static str]) -> Case {
        Case::new(name, resources, |_| Ok(()))
    }

    fn check(cases: &[Case], required: &str, namespaces: Result<(), String>, expected: &[(&str, &str, Todo)]) {
        let host = Host { namespaces, required: Required::parse(required) };
        let (cells, idle) = generate(cases, &[&GOOD, &UNBUILT, &RESTORE_ONLY], &host);
        let found: Vec<_> = cells.iter().map(|cell| (cell.case.name, cell.way.name(), cell.todo.clone())).collect();
        let expected: Vec<_> =
            expected.iter().map(|(case, way, todo)| (*case, way.to_string(), todo.clone())).collect();
        assert_eq!(found, expected);
        assert_eq!(idle, ["later: nothing to try: not built yet"]);
    }

    #[test]
    fn every_dumper_with_every_restorer() {
        let unavailable = "lazy is not available: no userfaultfd";
        let no_pipes = "lazy does not save pipes";
        check(
            &[case("a/1", &["tasks"]), case("a/2", &["pipes"]), case("a/3", &["locks"]).refused_at_dump("no")],
            "",
            Ok(()),
            &[
                ("a/1", "good+running", Todo::Try),
                ("a/1", "good+good", Todo::Try),
                ("a/1", "good+lazy", Todo::Skip(unavailable.into())),
                ("a/2", "good+running", Todo::Try),
                ("a/2", "good+good", Todo::Try),
                ("a/2", "good+lazy", Todo::Cannot(no_pipes.into())),
                ("a/3", "good+running", Todo::Cannot("good does not save locks".into())),
            ],
        );
    }

    #[test]
    fn what_is_required_fails_where_it_is_not_available() {
        let lazy = Todo::Fail("required, but lazy is not available: no userfaultfd".into());
        check(
            &[case("a/1", &["tasks"])],
            "good,lazy",
            Ok(()),
            &[("a/1", "good+running", Todo::Try), ("a/1", "good+good", Todo::Try), ("a/1", "good+lazy", lazy)],
        );
    }

    static EASY: Backend =
        Backend { name: "easy", capability: || Capability { privileges: vec![], ..can(&["tasks"]) }, ..GOOD };

    #[test]
    fn as_an_ordinary_user_too_where_no_privilege_is_needed() {
        let host = Host { namespaces: Ok(()), required: Required::parse("") };
        let cases = [case("a/1", &["tasks"]), case("a/2", &["tasks"]).privileged("it is root's")];
        let (cells, _) = generate(&cases, &[&EASY], &host);
        let found: Vec<_> = cells.iter().map(|cell| (cell.case.name, cell.way.name())).collect();
        let ways = ["easy+running", "easy@taken", "easy@nobody", "easy+easy"].map(String::from);
        let expected: Vec<_> =
            ["a/1", "a/2"].into_iter().flat_map(|case| ways.clone().map(|way| (case, way))).collect();
        assert_eq!(found, expected);
        assert_eq!(cells[5].todo, cells[6].todo);
        assert_eq!(cells[6].todo, Todo::Cannot("easy as an ordinary user: it is root's".into()));
    }

    #[test]
    fn without_namespaces_nothing_is_tried() {
        let none = || Err("EPERM".to_string());
        let expect = |todo: Todo| ["good+running", "good+good", "good+lazy"].map(|way| ("a/1", way, todo.clone()));
        check(&[case("a/1", &["tasks"])], "", none(), &expect(Todo::Skip("EPERM".into())));
        check(&[case("a/1", &["tasks"])], "namespaces", none(), &expect(Todo::Fail("required, but EPERM".into())));
    }

    #[test]
    fn a_required_name_that_means_nothing_is_found() {
        let required = Required::parse("good, programs,godo");
        assert_eq!(required.unknown(&[&GOOD]), ["godo"]);
    }
}
