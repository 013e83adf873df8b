//! What the machine is, as far as it matters to times.

use std::fs::read_to_string;
use std::path::Path;

use nix::sys::statfs::{self, statfs};

use crate::record::Host;

pub fn facts(images: &Path) -> Host {
    let read = |path: &str| read_to_string(path).unwrap_or_default().trim().to_string();
    let cpu = read("/proc/cpuinfo");
    let cpu =
        cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name.into());
    let huge_pages = read("/sys/kernel/mm/transparent_hugepage/enabled");
    let chosen = huge_pages.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(chosen, _)| chosen.into());
    Host {
        kernel: read("/proc/sys/kernel/osrelease"),
        cpu: cpu.unwrap_or_default(),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        memory: memory("MemTotal:"),
        file_system: file_system(images),
        huge_pages: chosen.unwrap_or_default(),
        root: nix::unistd::geteuid().is_root(),
    }
}

/// Bytes.
pub fn available_memory() -> u64 {
    memory("MemAvailable:")
}

fn memory(name: &str) -> u64 {
    let text = read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn file_system(path: &Path) -> String {
    match statfs(path).map(|statfs| statfs.filesystem_type()) {
        Ok(statfs::EXT4_SUPER_MAGIC) => "ext4".into(),
        Ok(statfs::TMPFS_MAGIC) => "tmpfs".into(),
        Ok(statfs::BTRFS_SUPER_MAGIC) => "btrfs".into(),
        Ok(statfs::XFS_SUPER_MAGIC) => "xfs".into(),
        Ok(statfs::OVERLAYFS_SUPER_MAGIC) => "overlayfs".into(),
        Ok(other) => format!("{:#x}", other.0),
        Err(errno) => errno.to_string(),
    }
}
