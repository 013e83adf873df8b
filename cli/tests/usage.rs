//! The command line itself: wrong usage, help, what is generated from it, and backends that cannot do what is asked.

mod common;

use std::process::{Command, Stdio};

use common::*;

#[test]
fn wrong_usage_is_one_line_and_exit_code_2() {
    for (arguments, says) in [
        (&[][..], "ckpt --help"),
        (&["thaw"], "thaw"),
        (&["dump"], "--pid"),
        (&["dump", "-t", "12"], "--dir"),
        (&["dump", "-t", "0", "-D", "x"], "process id"),
        (&["dump", "-t", "-5", "-D", "x"], "-5"),
        (&["dump", "-t", "python3", "-D", "x"], "process id"),
        (&["dump", "-t", "99999999999", "-D", "x"], "process id"),
        (&["dump", "-t", "12", "-D", "x", "--leave-running", "--leave-stopped"], "--leave-stopped"),
        (&["dump", "-t", "12", "-D", "x", "--timeout", "0"], "seconds"),
        (&["dump", "-t", "12", "-D", "x", "--timeout", "nan"], "seconds"),
        (&["restore"], "--dir"),
        (&["run"], "CMD"),
        (&["run", "true"], "true"),
        (&["show"], "DIR"),
        (&["check", "image", "--pid", "12"], "--pid"),
        (&["-q", "-v", "backends"], "--verbose"),
        (
            &["--backend", "gdb", "dump", "-t", "12", "-D", "x"],
            "no backend gdb; this ckpt has: preload, ptrace, userfault",
        ),
    ] {
        let outcome = run(&mut ckpt(arguments));
        outcome.assert_error(BAD_USAGE, &[says]);
        assert_eq!(outcome.out, "", "{arguments:?}");
    }
}

#[test]
fn a_backend_that_cannot_is_refused() {
    for arguments in [
        &["--backend", "userfault", "dump", "-t", "12", "-D", "x"][..],
        &["--backend", "userfault", "run", "--", "true"],
        &["--backend", "userfault", "demo"],
    ] {
        run(&mut ckpt(arguments)).assert_error(REFUSED, &["backend", arguments[1]]);
    }
}

#[test]
fn every_help_fits_80_columns_and_says_the_exit_codes() {
    for verb in ["", "dump", "restore", "run", "ps", "show", "check", "backends", "demo"] {
        let arguments = [verb, "--help"].into_iter().filter(|word| !word.is_empty());
        let outcome = run(ckpt(arguments).env("COLUMNS", "80"));
        outcome.assert_done();
        for line in outcome.out.lines() {
            assert!(line.chars().count() <= 80, "{verb}: {line}");
        }
        if verb.is_empty() {
            assert!(outcome.out.contains("Exit codes:\n  0  done\n  1  failed"), "{}", outcome.out);
        }
    }
}

#[test]
fn completions_and_manual_pages_are_generated() {
    for shell in ["bash", "zsh", "fish"] {
        let outcome = run(&mut ckpt(["completions", shell]));
        outcome.assert_done();
        assert!(outcome.out.contains("leave-running"), "{shell}: {}", outcome.out);
    }
    let workshop = Workshop::new();
    run(ckpt(["man", "--dir"]).arg(workshop.path())).assert_done();
    let pages = names(workshop.path());
    assert!(pages.contains(&"ckpt.1".to_string()) && pages.contains(&"ckpt-dump.1".to_string()), "{pages:?}");
}

#[test]
fn backends_as_json() {
    let outcome = run(&mut ckpt(["backends", "--json"]));
    outcome.assert_done();
    let all: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    let names: Vec<&str> = all.as_array().unwrap().iter().map(|backend| backend["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["preload", "ptrace", "userfault"]);
    assert_eq!(all[0]["probe"]["dump"]["available"], true);
    assert!(!all[0]["capability"]["lacks"].as_array().unwrap().is_empty());
    assert_eq!(all[2]["probe"]["restore"]["available"], true);
    assert_eq!(all[2]["probe"]["dump"]["available"], false);
    assert!(all[2]["probe"]["dump"]["why"].as_str().unwrap().contains("restores only"));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut reader = Command::new("/bin/true").stdin(Stdio::piped()).spawn().unwrap();
    let into = reader.stdin.take().unwrap();
    reader.wait().unwrap();
    let output = ckpt(["--help"]).stdout(into).stderr(Stdio::piped()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn this_host_is_described() {
    let outcome = run(&mut ckpt(["check"]));
    outcome.assert_done();
    for word in ["kernel", "CAP_CHECKPOINT_RESTORE", "ptrace", "preload"] {
        assert!(outcome.out.contains(word), "{word} in: {}", outcome.out);
    }
}
