//! Subjects in C: for what has no sound form in Rust (jumps over frames, own functions for memory), and for what libraries and
//! compilers of C bring along.

use std::path::Path;
use std::process::Command;

use crate::case::Program;

/// Compiled in the directory of its trial by a shell, which then becomes it: compiler and shell are none of the subject.
/// `before` is run by the shell first, and `by` is how the program is started.
pub struct Compiled {
    pub source: &'static str,
    pub before: &'static str,
    pub flags: &'static str,
    pub by: &'static str,
}

/// What every one of them needs.
pub const GCC: (&str, &str) = ("/usr/bin/gcc", "gcc");

impl Compiled {
    pub const fn new(source: &'static str) -> Compiled {
        Compiled { source, before: ":", flags: "", by: "" }
    }

    pub fn command(&self, dir: &Path) -> Command {
        // Whatever cannot be written, the compiler says so.
        _ = std::fs::write(dir.join("checkpoint.h"), include_str!("compiled/checkpoint.h"));
        _ = std::fs::write(dir.join("subject.c"), self.source);
        let Compiled { before, flags, by, .. } = self;
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", &format!("{before} && gcc -O1 -pthread -o subject subject.c {flags} && exec {by} ./subject")]);
        command
    }
}

/// A program of this kind that needs nothing but a compiler.
pub fn program(command: fn(&Path) -> Command) -> Program {
    needing(command, &[GCC])
}

pub fn needing(command: fn(&Path) -> Command, needs: &'static [(&'static str, &'static str)]) -> Program {
    Program { command, needs, clients: None }
}
