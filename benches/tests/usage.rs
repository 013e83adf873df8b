//! What goes wrong is said in a line, and nothing panics or hangs.

use std::path::Path;
use std::process::{Command, Output};

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ckpt-bench")).args(arguments).env_remove("CARGO").output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
}

/// A file that takes the place of ckpt: says that ptrace is there, and otherwise does what it is told.
fn stand_in(folder: &Path, does: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let probe = r#"{"dump":{"available":true},"restore":{"available":true}}"#;
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in\n*backends*) echo '[{{\"name\":\"ptrace\",\"probe\":{probe}}}]';;\n\
         *--version*) echo ckpt stand-in;;\n*) {does};;\nesac\n"
    );
    let file = folder.join("ckpt");
    std::fs::write(&file, script).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    file.to_str().unwrap().to_string()
}

#[test]
fn unknown_names_list_the_known_ones() {
    for (option, known) in
        [("--backends", "userfault"), ("--peers", "dmtcp"), ("--workloads", "memory-256m-random-huge")]
    {
        let output = bench(&[option, "nonesuch"]);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("nonesuch") && said.contains(known), "{said}");
    }
}

#[test]
fn files_that_are_no_records_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("some.json");
    let name = file.to_str().unwrap();
    let record = include_str!("data/bench.json");
    let newer = record.replacen("\"version\":1", "\"version\":99", 1);
    assert_ne!(newer, record);
    for (text, expected) in [("no json", "not JSON"), ("{}", "not from ckpt-bench"), (&newer, "version 99")] {
        std::fs::write(&file, text).unwrap();
        let output = bench(&["compare", name, name]);
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains(expected), "{}", said(&output));
        assert_eq!(said(&output).lines().count(), 1, "{}", said(&output));
    }
}

#[test]
fn what_became_slower_is_shown_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let before = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/bench.json");
    let mut record: serde_json::Value = serde_json::from_str(include_str!("data/bench.json")).unwrap();
    let row = record["rows"].as_array_mut().unwrap().iter_mut();
    let row = row.into_iter().find(|row| row["workload"] == "tiny" && row["tool"] == "ptrace").unwrap();
    for sample in row["measures"]["restore"]["samples"].as_array_mut().unwrap() {
        *sample = (sample.as_f64().unwrap() * 30.0).into();
    }
    let after = folder.path().join("after.json");
    std::fs::write(&after, record.to_string()).unwrap();
    let output = bench(&["compare", before.to_str().unwrap(), after.to_str().unwrap()]);
    let said = said(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("slower or larger: 1\n  tiny ") && said.contains("faster or smaller: 0"), "{said}");
}

#[test]
fn a_tool_that_hangs_is_ended_and_its_row_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let ckpt = stand_in(folder.path(), "exec sleep 3600");
    let out = folder.path().join("out");
    let options = ["--backends", "ptrace", "--peers", "none", "--workloads", "tiny", "--timeout", "2", "--ckpt", &ckpt];
    let output = bench(&[&options[..], &["--out", out.to_str().unwrap()]].concat());
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("failed: dump --leave-running did not end within 2 s"), "{said}");
    let record = std::fs::read_to_string(out.join("bench.json")).unwrap();
    assert!(record.contains("did not end within 2 s"), "{record}");
}

/// A restore that says it is done, and nothing goes on.
#[test]
fn a_program_that_does_not_go_on_has_no_number() {
    let folder = tempfile::tempdir().unwrap();
    let kill = "while [ $# -gt 0 ]; do case \"$1\" in -t) pid=$2;; -D) mkdir -p \"$2\";; --leave-running) leave=1;; esac; shift; \
                done; [ -z \"$pid\" ] || [ -n \"$leave\" ] || kill -9 $pid";
    let ckpt = stand_in(folder.path(), kill);
    let out = folder.path().join("out");
    let options = ["--backends", "ptrace", "--peers", "none", "--workloads", "tiny", "--timeout", "2", "--ckpt", &ckpt];
    let output = bench(&[&options[..], &["--out", out.to_str().unwrap()]].concat());
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("after the restore: tiny does not go on"), "{said}");
}

#[test]
fn a_full_disk_is_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let ckpt = stand_in(folder.path(), "exit 1");
    let script = format!(
        "mount -t tmpfs -o size=4k tmpfs {folder} && exec {bench} --backends none --peers none --workloads tiny --ckpt {ckpt} \
         --out {folder} --images /tmp",
        folder = folder.path().join("small").display(),
        bench = env!("CARGO_BIN_EXE_ckpt-bench"),
    );
    std::fs::create_dir(folder.path().join("small")).unwrap();
    let output = Command::new("unshare").args(["-m", "sh", "-c", &script]).env_remove("CARGO").output().unwrap();
    let said = said(&output);
    if said.contains("unshare failed") || said.contains("mount:") {
        println!("skipped: no file system can be mounted here: {said}");
        return;
    }
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot be written: No space left on device"), "{said}");
}
