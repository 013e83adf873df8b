//! SIGINT at any moment of a dump or a restore: everything is undone, and a second one does not make it worse.

mod common;

use std::fs;
use std::time::Duration;

use ckpt_core::Pid;
use ckpt_core::procfs::ProcDir;
use common::*;

/// How often a signal must have been in time for the test to mean something.
const ENOUGH: usize = 5;
const MOST_TRIALS: u64 = 400;

/// A moment within a command, another one each time.
fn moment(trial: u64) -> Duration {
    Duration::from_micros(trial.wrapping_mul(2_654_435_761) % 12_000)
}

/// Ended by the signal before it took notice of signals, when nothing was begun; or interrupted, with one line.
#[track_caller]
fn is_interrupted(outcome: &Outcome) -> bool {
    if outcome.signal() == Some(libc::SIGINT) {
        return false;
    }
    outcome.assert_error(FAILED, &["interrupted"]);
    true
}

#[test]
fn during_a_dump() {
    let workshop = Workshop::new();
    let subject = Subject::start(&workshop);
    let mut interrupted = 0;
    for trial in 0..MOST_TRIALS {
        let image = workshop.image();
        let dump = start(&mut dump(subject.pid, &image, &["--leave-running"]));
        let pid = Pid(dump.child.id() as i32);
        std::thread::sleep(moment(trial));
        kill(pid, libc::SIGINT);
        kill(pid, libc::SIGINT);
        let outcome = dump.wait();
        if outcome.code() == Some(DONE) {
            fs::remove_dir_all(&image).unwrap();
        } else {
            interrupted += usize::from(is_interrupted(&outcome));
        }
        if outcome.signal().is_none() {
            workshop.assert_no_image();
        }
        subject.assert_unharmed();
        if interrupted >= ENOUGH {
            return subject.finish();
        }
    }
    panic!("only {interrupted} of {MOST_TRIALS} signals were in time");
}

#[test]
fn during_a_restore() {
    let workshop = Workshop::new();
    let (mut subject, image) = dumped(&workshop);
    let mut interrupted = 0;
    for trial in 0..MOST_TRIALS {
        let restore = start(&mut restore(&image));
        let pid = Pid(restore.child.id() as i32);
        std::thread::sleep(moment(trial));
        kill(pid, libc::SIGINT);
        kill(pid, libc::SIGINT);
        let outcome = restore.wait();
        if outcome.code() == Some(DONE) {
            // Too late: it is back, and its file goes on growing, so it is saved anew.
            subject.adopt();
            subject.assert_unharmed();
            fs::remove_dir_all(&image).unwrap();
            run(&mut dump(subject.pid, &image, &[])).assert_done();
            wait_for(subject.pid, None);
        } else {
            interrupted += usize::from(is_interrupted(&outcome));
            assert!(ProcDir::open(subject.pid).is_err(), "something of the tree is there: {outcome:?}");
        }
        if interrupted >= ENOUGH {
            run(&mut common::restore(&image)).assert_done();
            subject.adopt();
            return subject.finish();
        }
    }
    panic!("only {interrupted} of {MOST_TRIALS} signals were in time");
}
