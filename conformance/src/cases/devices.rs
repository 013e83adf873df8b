//! Device nodes without state.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};

use crate::case::{Case, Checkpoint};
use crate::expect::{equal, that};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("devices/stateless", &["devices"], stateless),
        Case::new("devices/others", &["devices"], others)
            .privileged("the device is root's")
            .refused_at_dump("devices of this kind are not supported"),
    ]
}

fn stateless(checkpoint: &Checkpoint) -> Result<(), String> {
    let open = |name: &str| {
        let device = OpenOptions::new().read(true).write(true).open(format!("/dev/{name}"));
        device.map_err(|error| format!("/dev/{name}: {error}"))
    };
    let (mut null, mut zero, mut full) = (open("null")?, open("zero")?, open("full")?);
    let randoms = [open("random")?, open("urandom")?];
    checkpoint.wait()?;
    let mut buffer = [7; 64];
    equal("bytes read from null", Some(0), null.read(&mut buffer).ok())?;
    equal("bytes written to null", Some(64), null.write(&buffer).ok())?;
    equal("bytes read from zero", Some(64), zero.read(&mut buffer).ok())?;
    equal("what zero gives", [0; 64], buffer)?;
    let error = full.write(&buffer).map_err(|error| error.raw_os_error());
    equal("a write to full", Err(Some(libc::ENOSPC)), error)?;
    for mut random in randoms {
        let mut buffer = [0; 64];
        equal("bytes read from random", Some(64), random.read(&mut buffer).ok())?;
        that("random bytes are not all zero", buffer != [0; 64])?;
    }
    Ok(())
}

fn others(checkpoint: &Checkpoint) -> Result<(), String> {
    // Who has it open has a place in the kernel's log.
    let _log = File::open("/dev/kmsg").map_err(|error| format!("/dev/kmsg: {error}"))?;
    checkpoint.wait()
}
