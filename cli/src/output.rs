//! What is said on standard output, and the log on standard error.

use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

static QUIET: AtomicBool = AtomicBool::new(false);

/// Starts the log, if it is wanted; otherwise nothing is set up at all, for the sake of a short start.
pub fn configure(verbose: u8, quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
    let level = match verbose {
        0 => return,
        1 => tracing::Level::INFO,
        2 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    let color = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_timer(tracing_subscriber::fmt::time::uptime())
        .with_ansi(color)
        .init();
}

pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Prints what was asked for. A reader that has gone away (`ckpt show image | head`) is no error.
pub fn print(text: &str) {
    pass(plain(text).as_bytes());
}

/// Without control characters: an image may have any in its names, and a terminal would obey them.
pub fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\t' => plain.push(character),
            _ if character.is_control() => plain.extend(character.escape_default()),
            _ => plain.push(character),
        }
    }
    plain
}

/// The same for bytes that a program wrote.
pub fn pass(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            let _ = writeln!(std::io::stderr(), "ckpt: standard output: {error}");
        }
        _ => {}
    }
}

/// Prints a line that only tells how it went, unless `--quiet`.
pub fn tell(line: &str) {
    if !is_quiet() {
        print(&format!("{line}\n"));
    }
}

/// The same, on standard error where standard output is for JSON.
pub fn tell_apart(json: bool, line: &str) {
    if json { tell_aside(line) } else { tell(line) }
}

/// The same on standard error, where standard output belongs to a program.
pub fn tell_aside(line: &str) {
    if !is_quiet() {
        let _ = writeln!(std::io::stderr(), "ckpt: {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_gives_orders_to_a_terminal() {
        assert_eq!(plain("a\u{1b}[2Jb\tc\u{9b}é\n"), "a\\u{1b}[2Jb\tc\\u{9b}é\n");
    }
}
