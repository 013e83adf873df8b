//! What the driver itself adds: the same command, run by it and run bare, in turn.

use std::ffi::{CString, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::command;
use crate::record::Null;
use crate::statistics::{Summary, median, paired_ratio};

const PAIRS: usize = 300;

pub fn measure(place: &Path, timeout: Duration) -> Result<Null, String> {
    let own = std::env::current_exe().map_err(|error| format!("the driver's own file: {error}"))?;
    let (mut driver, mut bare, mut peaks) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=PAIRS {
        let by_driver = || {
            let mut command = Command::new(&own);
            command.args(["call", "spin", "4"]);
            let taken = command::run(&mut command, "null", &place.join("null.log"), timeout);
            taken.map_err(|failure| failure.reason)
        };
        let (taken, alone) = if round % 2 == 0 {
            let taken = by_driver()?;
            (taken, run_bare(&own)?)
        } else {
            let alone = run_bare(&own)?;
            (by_driver()?, alone)
        };
        // The first is to warm up.
        if round > 0 {
            driver.push(taken.wall.as_secs_f64() * 1e3);
            bare.push(alone.as_secs_f64() * 1e3);
            peaks.push(taken.peak);
        }
    }
    let summary = |samples: &[f64]| Summary::of(samples).ok_or("no null measurement");
    Ok(Null {
        driver: summary(&driver)?,
        bare: summary(&bare)?,
        ratio: paired_ratio(&driver, &bare).ok_or("no null measurement")?,
        memory_floor: median(&peaks),
    })
}

/// `posix_spawn` and `waitpid`, and nothing else. The environment is the same: what a command makes of it is not the driver's.
fn run_bare(own: &Path) -> Result<Duration, String> {
    let text = |bytes: &[u8]| CString::new(bytes).map_err(|error| error.to_string());
    let words = [text(own.as_os_str().as_bytes())?, text(b"call")?, text(b"spin")?, text(b"4")?];
    let variable = |(name, value): (OsString, OsString)| text(&[name.as_bytes(), b"=", value.as_bytes()].concat());
    let environment = std::env::vars_os().map(variable).collect::<Result<Vec<_>, _>>()?;
    let pointers = |texts: &[CString]| -> Vec<*mut libc::c_char> {
        texts.iter().map(|text| text.as_ptr().cast_mut()).chain([std::ptr::null_mut()]).collect()
    };
    let (list, environment_list) = (pointers(&words), pointers(&environment));
    let mut pid = 0;
    let begun = Instant::now();
    // SAFETY: both lists end with a null, and their texts live for the calls.
    let status = unsafe {
        let result = libc::posix_spawn(
            &mut pid,
            list[0],
            std::ptr::null(),
            std::ptr::null(),
            list.as_ptr(),
            environment_list.as_ptr(),
        );
        if result != 0 {
            return Err(format!("posix_spawn: {}", std::io::Error::from_raw_os_error(result)));
        }
        let mut status = 0;
        libc::waitpid(pid, &mut status, 0);
        status
    };
    let took = begun.elapsed();
    if status == 0 { Ok(took) } else { Err(format!("the null command ended with status {status:#x}")) }
}
