//! What subjects judge themselves with.

use std::fmt::Debug;
use std::io;

/// Says what was expected and what was found, unless they are equal.
pub fn equal<T: PartialEq + Debug>(what: &str, expected: T, found: T) -> Result<(), String> {
    if expected == found { Ok(()) } else { Err(format!("{what}: expected {expected:?}, found {found:?}")) }
}

/// Says what was not so.
pub fn that(what: &str, so: bool) -> Result<(), String> {
    if so { Ok(()) } else { Err(format!("{what}: it is not so")) }
}

/// The result of a C function or raw system call that gives -1 and `errno`, or why the call `what` failed.
pub fn done<T: PartialOrd + Default + Copy>(what: &str, result: T) -> Result<T, String> {
    if result < T::default() { Err(format!("{what} failed: {}", io::Error::last_os_error())) } else { Ok(result) }
}

/// The lines of a file of `/proc` whose names are wanted.
pub fn lines(path: &str, wanted: &[&str]) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    let is_wanted = |line: &&str| line.split_once(':').is_some_and(|(name, _)| wanted.contains(&name));
    Ok(text.lines().filter(is_wanted).map(str::to_string).collect())
}

/// Runs `then` in a new child, which tells how it was by its exit status and, in words, by its standard output. The
/// caller must have one thread.
pub fn in_child(then: impl FnOnce() -> Result<(), String>) -> Result<Child, String> {
    // SAFETY: the caller has one thread, so that its child may do whatever it likes.
    match done("fork", unsafe { libc::fork() })? {
        0 => {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(then));
            let status = match result {
                Ok(Ok(())) => 0,
                Ok(Err(failure)) => {
                    println!("child: {failure}");
                    1
                }
                Err(_) => 2,
            };
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(status) }
        }
        pid => Ok(Child(pid)),
    }
}

/// A child of a subject.
#[derive(Clone, Copy, Debug)]
pub struct Child(pub i32);

impl Child {
    /// Waits for its end, which must be a good one.
    pub fn passed(self) -> Result<(), String> {
        let mut status = 0;
        // SAFETY: waits for our own child.
        done("waitpid", unsafe { libc::waitpid(self.0, &mut status, 0) })?;
        equal("wait status of the child (its words are in the trial's output)", 0, status)
    }
}

/// Makes a sign that another process waits for. It is there at once, and no descriptor was open for it that a look at the
/// tree could find.
pub fn make_sign(path: impl AsRef<std::path::Path>) -> Result<(), String> {
    let path = path.as_ref();
    std::fs::create_dir(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Waits up to ten seconds until something is so.
pub fn eventually(what: &str, mut so: impl FnMut() -> bool) -> Result<(), String> {
    let begin = std::time::Instant::now();
    while !so() {
        if begin.elapsed().as_secs() >= 10 {
            return Err(format!("{what}: not within 10 s"));
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    Ok(())
}
