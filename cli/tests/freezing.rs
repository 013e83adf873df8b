//! Threads anywhere when they are frozen: in user code, inside libc, with its locks held, in calls that wait. Dumps that let
//! the program go on, again and again, are nothing that it could notice.

mod common;

use std::fs;
use std::process::Command;

use ckpt_core::Pid;
use common::*;

const THREADS: usize = 29;

/// `CKPT_DUMPS` asks for another number.
fn dumps() -> usize {
    std::env::var("CKPT_DUMPS").ok().and_then(|number| number.parse().ok()).unwrap_or(40)
}

fn counts(workshop: &Workshop) -> Vec<u64> {
    let bytes = fs::read(workshop.path().join("counts")).unwrap_or_default();
    bytes.chunks_exact(8).take(THREADS).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
}

/// Waits until each thread has done more than it has now. Nobody may have been left asleep.
fn all_go_on(workshop: &Workshop) {
    let before = counts(workshop);
    assert_eq!(before.len(), THREADS);
    wait_until("all threads go on", || counts(workshop).iter().zip(&before).all(|(now, before)| now > before));
}

#[test]
fn many_dumps_are_not_noticed_by_threads_anywhere() {
    let workshop = Workshop::new();
    let source = workshop.path().join("waits.c");
    fs::write(&source, include_str!("waits.c")).unwrap();
    let mut compiler = Command::new("gcc");
    compiler.args(["-O1", "-pthread", "-o", "waits", "waits.c"]).current_dir(workshop.path());
    run(&mut compiler).assert_done();
    let mut command = ckpt(["--backend", "preload", "run", "-d", "-o", "output", "--", "./waits"]);
    adopt_orphans();
    let outcome = run(command.current_dir(workshop.path()));
    outcome.assert_done();
    let pid = Pid(outcome.out.trim().parse().unwrap());
    wait_until("all threads are there", || counts(&workshop).iter().filter(|&&count| count > 0).count() == THREADS);
    let image = workshop.image();
    for number in 0..dumps() {
        let mut dump = ckpt(["--backend", "preload", "dump", "--leave-running", "-t", &pid.to_string(), "-D"]);
        run(dump.arg(&image)).assert_done();
        fs::remove_dir_all(&image).unwrap();
        if number % 20 == 0 {
            all_go_on(&workshop);
        }
    }
    all_go_on(&workshop);
    fs::write(workshop.path().join("over"), "").unwrap();
    let status = wait_for(pid, None);
    let output = fs::read_to_string(workshop.path().join("output")).unwrap();
    assert!(output.ends_with("all is well\n") && status == Some(0), "{status:?}: {output}");
}
