//! Compiles the shim into a shared library, which becomes part of this crate.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo::rerun-if-changed=shim");
    println!("cargo::rerun-if-changed=src/protocol.rs");
    println!("cargo::rerun-if-changed=src/translation.rs");
    println!("cargo::rerun-if-changed=../agent/src/protocol.rs");
    let library = out.join("shim.so");
    let status = Command::new(std::env::var_os("RUSTC").expect("cargo sets RUSTC"))
        .args(["--edition", "2024", "--crate-name", "shim", "--crate-type", "cdylib", "shim/shim.rs", "-o"])
        .arg(&library)
        .args(["--target", &std::env::var("TARGET").expect("cargo sets TARGET")])
        .args(["-Cpanic=abort", "-Copt-level=2", "-Clto=fat", "-Ccodegen-units=1", "-Coverflow-checks=off"])
        .args(["-Cdebug-assertions=off", "-Cstrip=symbols", "-Crelocation-model=pic"])
        // Its constructor runs before any other: a skeleton runs nothing of the program.
        .args(["-Clink-arg=-nostartfiles", "-Clink-arg=-nostdlib", "-Clink-arg=-Wl,-z,initfirst"])
        .args(["-Clink-arg=-Wl,--build-id=none", "-Clink-arg=-Wl,-z,max-page-size=4096"])
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .expect("rustc could not be started");
    assert!(status.success(), "the shim does not compile");
    let size = std::fs::metadata(&library).expect("the shim was linked").len();
    assert!(size < 72 * 1024, "the shim has {size} bytes: every program carries a copy of it");
}
