//! `ckpt`: saves a running process tree into an image and brings it back. One verb a file.

#![deny(unsafe_code)]

mod api;
mod arguments;
mod backends;
mod check;
mod completions;
mod demo;
mod dump;
mod failure;
mod human;
mod man;
mod output;
mod page_server;
mod periodic;
mod progress;
mod ps;
mod requests;
mod restore;
mod run;
mod show;
mod supervise;
#[allow(unsafe_code)]
mod sys;
mod working_set;

use std::process::ExitCode;

use arguments::{Arguments, Verb};

// A backend registers itself when its crate is linked, and a crate that nobody names is not.
use ckpt_preload as _;
use ckpt_ptrace as _;

fn main() -> ExitCode {
    failure::catch_bugs();
    let arguments = match Arguments::read() {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    output::configure(arguments.verbose, arguments.quiet);
    let done = failure::contain(|| verb(&arguments));
    match done {
        Ok(status) => status,
        Err(error) => failure::report(&error),
    }
}

fn verb(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let backend = arguments.backend.as_deref();
    match &arguments.verb {
        Verb::Dump(verb) => dump::run(backend, verb),
        Verb::Restore(verb) => restore::run(backend, verb),
        Verb::Run(verb) => run::run(backend, verb),
        Verb::Ps(verb) => ps::run(verb),
        Verb::Api(verb) => api::run(verb),
        Verb::Show(verb) => show::run(verb),
        Verb::Check(verb) => check::run(backend, verb),
        Verb::Backends(verb) => backends::run(backend, verb),
        Verb::PageServer(verb) => page_server::run(verb),
        Verb::WorkingSet(verb) => working_set::run(verb),
        Verb::Demo(verb) => demo::run(backend, verb),
        Verb::DemoProgram(verb) => demo::program(verb),
        Verb::Completions(verb) => completions::run(verb),
        Verb::Man(verb) => man::run(verb),
    }
}
