//! What the machine is and has.

use std::{fs, io, path::Path};

use nix::sys::{statvfs::statvfs, utsname::uname};

/// What the machine is and has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Machine {
    /// CPUs that this process may use.
    pub(crate) cpus: u32,
    /// Bytes of memory.
    pub(crate) memory_bytes: u64,
    /// Bytes of the file system that holds the agent's folder.
    pub(crate) disk_bytes: u64,
    /// Huge pages by size in bytes: how many there are.
    pub(crate) huge_pages: Vec<(u64, u64)>,
    /// `/etc/machine-id`.
    pub(crate) machine_id: String,
    /// The firmware's id of the machine, else its machine id.
    pub(crate) system_uuid: String,
    /// Of this boot.
    pub(crate) boot_id: String,
    /// As `uname -r` prints it.
    pub(crate) kernel_version: String,
    /// The distribution's name.
    pub(crate) os_image: String,
    /// Go's word for the processor: `amd64`, `arm64`.
    pub(crate) architecture: String,
    /// Bytes of swap.
    pub(crate) swap_bytes: u64,
}

/// How short the machine is of something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Free {
    /// Bytes of memory that can be had.
    pub(crate) memory_bytes: u64,
    /// Bytes of disk that can be had.
    pub(crate) disk_bytes: u64,
    /// Bytes of disk.
    pub(crate) disk_total: u64,
    /// Files that can be made.
    pub(crate) inodes: u64,
    /// Files at most.
    pub(crate) inodes_total: u64,
    /// Processes that can be started.
    pub(crate) pids: u64,
}

impl Machine {
    /// Reads `/proc` and `/sys`, and the file system of `root_dir` or of the nearest folder above it.
    pub(crate) fn read(root_dir: &Path) -> io::Result<Self> {
        let memory = fs::read_to_string("/proc/meminfo")?;
        let machine_id = text("/etc/machine-id");
        let uts = uname()?;
        Ok(Self {
            cpus: std::thread::available_parallelism()
                .map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX)),
            memory_bytes: meminfo(&memory, "MemTotal").unwrap_or(0),
            swap_bytes: meminfo(&memory, "SwapTotal").unwrap_or(0),
            disk_bytes: disk(root_dir).map_or(0, |disk| disk.0),
            huge_pages: huge_pages(Path::new("/sys/kernel/mm/hugepages")),
            system_uuid: Some(text("/sys/class/dmi/id/product_uuid"))
                .filter(|uuid| !uuid.is_empty())
                .unwrap_or_else(|| machine_id.clone()),
            machine_id,
            boot_id: text("/proc/sys/kernel/random/boot_id"),
            kernel_version: uts.release().to_string_lossy().into_owned(),
            os_image: os_image(&text("/etc/os-release")),
            architecture: match std::env::consts::ARCH {
                "x86_64" => "amd64",
                "aarch64" => "arm64",
                "powerpc64" => "ppc64le",
                other => other,
            }
            .to_owned(),
        })
    }
}

impl Free {
    /// Reads what is free now.
    pub(crate) fn read(root_dir: &Path) -> io::Result<Self> {
        let memory = fs::read_to_string("/proc/meminfo")?;
        let (disk_total, disk_bytes, inodes_total, inodes) = disk(root_dir).unwrap_or((1, 1, 0, 0));
        let number = |path: &str| text(path).parse::<u64>().ok();
        let most = number("/proc/sys/kernel/pid_max").unwrap_or(u64::MAX);
        // the fourth field is `running/all`
        let used = text("/proc/loadavg")
            .split_ascii_whitespace()
            .nth(3)
            .and_then(|field| field.split_once('/')?.1.parse::<u64>().ok())
            .unwrap_or(0);
        Ok(Self {
            memory_bytes: meminfo(&memory, "MemAvailable").unwrap_or(u64::MAX),
            disk_bytes,
            disk_total,
            inodes,
            inodes_total,
            pids: most.saturating_sub(used),
        })
    }
}

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// A field of `/proc/meminfo`, in bytes.
fn meminfo(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Bytes, free bytes, files and free files of a folder's file system.
fn disk(folder: &Path) -> Option<(u64, u64, u64, u64)> {
    let found = folder.ancestors().find(|folder| folder.exists())?;
    let stat = statvfs(found).ok()?;
    let block = stat.fragment_size();
    Some((
        stat.blocks().saturating_mul(block),
        stat.blocks_available().saturating_mul(block),
        stat.files(),
        stat.files_available(),
    ))
}

fn huge_pages(folder: &Path) -> Vec<(u64, u64)> {
    let mut sizes: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let number = fs::read_to_string(entry.path().join("nr_hugepages")).ok()?;
            Some((kib * 1024, number.trim().parse().ok()?))
        })
        .collect();
    sizes.sort_unstable();
    sizes
}

fn os_image(os_release: &str) -> String {
    let value = |key: &str| {
        os_release.lines().find_map(|line| {
            let value = line.strip_prefix(key)?.strip_prefix('=')?;
            Some(value.trim_matches('"').to_owned())
        })
    };
    value("PRETTY_NAME").or_else(|| value("NAME")).unwrap_or_else(|| "Linux".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_read() {
        let machine = Machine::read(Path::new("/var/lib/nowhere")).unwrap();
        assert!(machine.cpus > 0 && machine.memory_bytes > 0 && machine.disk_bytes > 0);
        let free = Free::read(Path::new("/")).unwrap();
        assert!(free.memory_bytes <= machine.memory_bytes);
    }

    #[test]
    fn files_of_the_system_are_parsed() {
        assert_eq!(meminfo("MemTotal:  16 kB\nMemAvailable: 4 kB\n", "MemAvailable"), Some(4096));
        assert_eq!(os_image("NAME=x\nPRETTY_NAME=\"Some Linux 1\"\n"), "Some Linux 1");
    }
}
