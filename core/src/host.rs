//! What a host is, as far as saved programs depend on it.

use std::io;
use std::os::unix::fs::FileExt;

use nix::time::{ClockId, clock_gettime};

use crate::error::Refusal;
use crate::image::{HostFacts, Image};
use crate::procfs::Mapping;
use crate::resource::files::host_ids;

/// Where the kernel's own bytes in an xsave area are: ptrace shows `XCR0` there.
const XSAVE_SOFTWARE: usize = 464;

/// What this host is. The xsave area's extent comes from the threads that are saved.
pub fn facts() -> io::Result<HostFacts> {
    let name = nix::sys::utsname::uname()?;
    let nanoseconds = |clock| -> io::Result<u64> {
        let time = clock_gettime(clock)?;
        Ok(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
    };
    let (boot_id, machine_id) = host_ids();
    Ok(HostFacts {
        architecture: name.machine().to_string_lossy().into_owned(),
        kernel: name.release().to_string_lossy().into_owned(),
        xsave_features: 0,
        xsave_size: 0,
        cpu_features: cpu_features().into_iter().map(str::to_string).collect(),
        vdso_checksum: vdso_checksum()?,
        boot_id,
        machine_id,
        time: nanoseconds(ClockId::CLOCK_REALTIME)? / 1_000_000_000,
        monotonic: nanoseconds(ClockId::CLOCK_MONOTONIC)?,
        boottime: nanoseconds(ClockId::CLOCK_BOOTTIME)?,
        ckpt_version: env!("CARGO_PKG_VERSION").to_string(),
    })
}

/// Notes what the saved register areas need.
pub fn note_xsave(image: &mut Image) {
    for thread in image.processes.iter().flat_map(|process| &process.threads) {
        let area = &thread.context.registers.xsave;
        if let Some(features) = area.get(XSAVE_SOFTWARE..XSAVE_SOFTWARE + 8) {
            image.host.xsave_features |= u64::from_ne_bytes(features.try_into().expect("eight bytes"));
        }
        image.host.xsave_size = image.host.xsave_size.max(area.len() as u32);
    }
}

/// The CPU features that programs choose code by, by their names in `/proc/cpuinfo`.
fn cpu_features() -> Vec<&'static str> {
    macro_rules! detected {
        ($($feature:tt => $name:literal),* $(,)?) => {
            [$((std::arch::is_x86_feature_detected!($feature), $name)),*]
        };
    }
    let all = detected! {
        "adx" => "adx", "aes" => "aes", "avx" => "avx", "avx2" => "avx2", "avx512bf16" => "avx512_bf16",
        "avx512bitalg" => "avx512_bitalg", "avx512bw" => "avx512bw", "avx512cd" => "avx512cd",
        "avx512dq" => "avx512dq", "avx512f" => "avx512f", "avx512ifma" => "avx512ifma",
        "avx512vbmi" => "avx512vbmi", "avx512vbmi2" => "avx512_vbmi2", "avx512vl" => "avx512vl",
        "avx512vnni" => "avx512_vnni", "avx512vpopcntdq" => "avx512_vpopcntdq", "bmi1" => "bmi1", "bmi2" => "bmi2",
        "cmpxchg16b" => "cx16", "f16c" => "f16c", "fma" => "fma", "gfni" => "gfni", "lzcnt" => "abm",
        "movbe" => "movbe", "pclmulqdq" => "pclmulqdq", "popcnt" => "popcnt", "rdrand" => "rdrand",
        "rdseed" => "rdseed", "rtm" => "rtm", "sha" => "sha_ni", "sse3" => "pni", "sse4.1" => "sse4_1",
        "sse4.2" => "sse4_2", "ssse3" => "ssse3", "tbm" => "tbm", "vaes" => "vaes", "vpclmulqdq" => "vpclmulqdq",
        "xsave" => "xsave", "xsavec" => "xsavec", "xsaveopt" => "xsaveopt", "xsaves" => "xsaves",
    };
    all.into_iter().filter(|(detected, _)| *detected).map(|(_, name)| name).collect()
}

/// For what came with a version of the kernel, and cannot be configured away.
pub fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|byte: char| !byte.is_ascii_digit()).filter_map(|word| word.parse::<u32>().ok());
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    found >= (major, minor)
}

/// CRC-32C of our own vdso, which is every program's.
fn vdso_checksum() -> io::Result<u32> {
    let maps = Mapping::parse_all(&std::fs::read("/proc/self/maps")?).unwrap_or_default();
    let Some(vdso) = maps.iter().find(|mapping| mapping.name.as_os_str() == "[vdso]") else { return Ok(0) };
    let mut code = vec![0; vdso.len() as usize];
    std::fs::File::open("/proc/self/mem")?.read_exact_at(&mut code, vdso.start)?;
    Ok(crc32c::crc32c(&code))
}

/// Whether programs saved on one host can go on here.
pub fn check(saved: &HostFacts, refusals: &mut Vec<Refusal>) {
    let mut refuse = |why: String, help: &str| {
        let help = help.to_string();
        refusals.push(Refusal { resource: "host", pid: None, subject: String::new(), why, help });
    };
    let here = match facts() {
        Ok(here) => here,
        Err(error) => return refuse(format!("this host cannot be examined: {error}"), ""),
    };
    if saved.architecture != here.architecture {
        let why = format!("the image is of {}, and this host is {}", saved.architecture, here.architecture);
        return refuse(why, "restore it on a host of its kind");
    }
    let missing: Vec<&str> =
        saved.cpu_features.iter().filter(|name| !here.cpu_features.contains(name)).map(String::as_str).collect();
    if !missing.is_empty() {
        let why = format!("this CPU lacks what programs could use at the dump: {}", missing.join(", "));
        refuse(why, "restore it on a CPU that has all of these");
    }
    if saved.vdso_checksum != here.vdso_checksum {
        let why = format!("the kernel's vdso is not the one of the dump (then {}, now {})", saved.kernel, here.kernel);
        refuse(why, "restore it under the kernel it was dumped under");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_suits_itself_and_misses_what_it_lacks() {
        let here = facts().unwrap();
        let mut refusals = Vec::new();
        check(&here, &mut refusals);
        assert_eq!(refusals, []);
        let mut other = here;
        other.cpu_features.push("avx1024".into());
        other.vdso_checksum ^= 1;
        check(&other, &mut refusals);
        assert!(refusals[0].why.contains("avx1024") && refusals[1].why.contains("vdso"), "{refusals:?}");
    }

    #[test]
    fn our_features_are_those_in_cpuinfo() {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let flags: Vec<&str> = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap().split(' ').collect();
        for name in cpu_features() {
            assert!(flags.contains(&name), "{name} is not in /proc/cpuinfo");
        }
    }
}
