//! The command line as a whole: the verbs, the options they share, and how a wrong one is answered.

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::failure;

/// Said by `--help`, the manual page and the README alike.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed, nothing was changed: the target goes on, nothing is left behind
  2  bad usage
  3  refused: not supported, or not possible here; found before any harm
Every error is a line `ckpt: error: ...` on standard error; several reasons are
a line each. `run` and `restore` without --detach end as the program ends: with
its exit code, or by its signal (the shell shows 128 + its number). --pidfile
tells the two apart: that file is there if and only if the program went on.
`run --on-signal` ends with 85 when it has saved the command and ended it.";

const EXAMPLES: &str = "\
Examples:
  ckpt demo                          see it work
  ckpt dump -t 1234 -D image         save process 1234 and its children, and end them
  ckpt restore -D image              bring them back, and wait for them
  ckpt check --pid 1234              could it be saved?
  ckpt show image                    what is in an image";

/// The heading of the options that every verb has.
const EVERYWHERE: &str = "Options of every command";

/// Saves running Linux process trees and brings them back.
#[derive(Debug, Parser)]
#[command(
    name = "ckpt",
    bin_name = "ckpt",
    version,
    about = "Saves a running process tree into an image, and brings it back from that image",
    after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"),
    disable_help_subcommand = true,
    max_term_width = 100
)]
pub struct Arguments {
    /// Which backend does it; `ckpt backends` lists them [default: ptrace]
    #[arg(long, global = true, value_name = "NAME", help_heading = EVERYWHERE)]
    pub backend: Option<String>,

    /// Say what is being done, on standard error; -vv and -vvv say more
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = EVERYWHERE)]
    pub verbose: u8,

    /// Say nothing but errors
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = EVERYWHERE)]
    pub quiet: bool,

    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    Dump(crate::dump::Dump),
    Restore(crate::restore::Restore),
    Run(crate::run::Run),
    Ps(crate::ps::Ps),
    Show(crate::show::Show),
    Check(crate::check::Check),
    Backends(crate::backends::Backends),
    Api(crate::api::Api),
    Demo(crate::demo::Demo),
    WorkingSet(crate::working_set::WorkingSet),
    PageServer(crate::page_server::PageServer),
    #[command(hide = true)]
    DemoProgram(crate::demo::DemoProgram),
    #[command(hide = true)]
    Completions(crate::completions::Completions),
    #[command(hide = true)]
    Man(crate::man::ManPages),
}

impl Arguments {
    /// Reads the command line. What has been answered already (help, a wrong option) comes back as a status.
    pub fn read() -> Result<Arguments, ExitCode> {
        Arguments::try_parse().map_err(|error| match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                crate::output::print(&error.render().to_string());
                ExitCode::SUCCESS
            }
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => failure::bad_usage("nothing to do; see ckpt --help"),
            _ => failure::bad_usage(&one_line(&error.render().to_string())),
        })
    }
}

/// clap explains over several lines; the first paragraph is what is the matter.
fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let paragraph = text.split("\n\n").next().unwrap_or(text);
    let words: Vec<&str> = paragraph.split_whitespace().collect();
    format!("{}; see ckpt --help", words.join(" "))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }

    #[test]
    fn an_explanation_becomes_one_line() {
        let long = "error: the following required arguments were not provided:\n  --pid <PID>\n\nUsage: ckpt dump";
        assert_eq!(
            super::one_line(long),
            "the following required arguments were not provided: --pid <PID>; see ckpt --help"
        );
    }
}
