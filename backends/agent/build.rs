//! Compiles the agent and flattens it to one position-independent blob.

use std::path::PathBuf;
use std::process::Command;

use object::{Object, ObjectSection};

fn main() {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let elf = out.join("agent.elf");
    println!("cargo::rerun-if-changed=blob");
    println!("cargo::rerun-if-changed=src/protocol.rs");
    let status = Command::new(std::env::var_os("RUSTC").expect("cargo sets RUSTC"))
        .args(["--edition", "2024", "--crate-name", "agent", "--crate-type", "bin", "blob/agent.rs", "-o"])
        .arg(&elf)
        .args(["--target", &std::env::var("TARGET").expect("cargo sets TARGET")])
        .args(["-Cpanic=abort", "-Copt-level=2", "-Clto=fat", "-Ccodegen-units=1", "-Crelocation-model=pie"])
        .args(["-Coverflow-checks=off", "-Cdebug-assertions=off", "-Ctarget-feature=+sse4.2", "-Cstrip=none"])
        .args(["-Clink-arg=-nostartfiles", "-Clink-arg=-nostdlib", "-Clink-arg=-static-pie"])
        .args([
            "-Clink-arg=-Wl,--no-dynamic-linker",
            "-Clink-arg=-Wl,--build-id=none",
            "-Clink-arg=-Wl,-T,blob/agent.ld",
        ])
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .expect("rustc could not be started");
    assert!(status.success(), "the agent does not compile");

    let file = std::fs::read(&elf).expect("the agent was linked");
    let file = object::File::parse(&*file).expect("the agent is an ELF file");
    let mut blob = Vec::new();
    for section in file.sections() {
        let name = section.name().unwrap_or_default();
        // A relocation would have to be applied by whoever maps the blob, and nobody does.
        assert!(
            !name.starts_with(".rela") || section.size() == 0,
            "the agent has relocations ({name}): a memcpy, a table of addresses?"
        );
        if name == ".blob" {
            assert_eq!(section.address(), 0, "the entry is not at the start");
            blob = section.data().expect("the section has data").to_vec();
        }
    }
    assert!(!blob.is_empty() && blob.len() <= 8192, "the blob has {} bytes", blob.len());
    std::fs::write(out.join("agent.bin"), blob).expect("OUT_DIR is writable");
}
