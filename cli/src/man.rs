//! `ckpt man`: the manual pages, generated from the command line's own description.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_mangen::Man;

use crate::arguments::Arguments;
use crate::output;

/// Print the manual page of ckpt, or write those of all verbs to a directory
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ckpt man | man -l -
  ckpt man --dir /usr/local/share/man/man1")]
pub struct ManPages {
    /// Write ckpt.1, ckpt-dump.1, ... here
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub fn run(verb: &ManPages) -> anyhow::Result<ExitCode> {
    let pages = pages()?;
    match &verb.dir {
        None => output::pass(&pages[0].1),
        Some(dir) => {
            for (name, page) in pages {
                let path = dir.join(name);
                std::fs::write(&path, page).with_context(|| format!("{} cannot be written", path.display()))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// (file name, page); that of ckpt itself first.
fn pages() -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut ckpt = Arguments::command();
    ckpt.build();
    let mut pages = vec![("ckpt.1".to_string(), page(ckpt.clone())?)];
    for verb in ckpt.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        let name = format!("ckpt-{}", verb.get_name());
        pages.push((format!("{name}.1"), page(verb.clone().name(name))?));
    }
    Ok(pages)
}

fn page(command: Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    Man::new(command).manual("ckpt").render(&mut page)?;
    Ok(page)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_visible_verb_has_a_page_and_the_first_says_the_exit_codes() {
        let pages = super::pages().unwrap();
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
        assert!(names.starts_with(&["ckpt.1", "ckpt-dump.1", "ckpt-restore.1"]), "{names:?}");
        assert!(String::from_utf8_lossy(&pages[0].1).contains("bad usage"));
    }
}
