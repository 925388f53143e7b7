//! The node's own use, as the kernel tells it.

use std::{fs, io};

use jiff::Timestamp;
use keelson_runtime_shim::runtime::InterfaceStats;

/// The node at one moment.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NodeUsage {
    pub(super) at: Timestamp,
    /// CPU time since the start, all cores together.
    pub(super) cpu_nanos: u64,
    pub(super) cpus: u64,
    pub(super) memory: Memory,
    pub(super) interfaces: Vec<InterfaceStats>,
    pub(super) processes: Processes,
    pub(super) root_fs: FileSystem,
}

/// `/proc/meminfo`, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) total: u64,
    pub(super) free: u64,
    pub(super) available: u64,
    pub(super) anonymous: u64,
    pub(super) inactive_file: u64,
}

impl Memory {
    /// All that is in use, page cache included.
    pub(super) fn usage(&self) -> u64 {
        self.total.saturating_sub(self.free)
    }

    /// What could not be taken back at once: what eviction counts.
    pub(super) fn working_set(&self) -> u64 {
        self.usage().saturating_sub(self.inactive_file)
    }
}

/// Processes and threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Processes {
    pub(super) running: u64,
    pub(super) max: u64,
}

/// A file system's space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FileSystem {
    pub(super) capacity: u64,
    pub(super) available: u64,
    pub(super) inodes: u64,
    pub(super) inodes_free: u64,
}

impl FileSystem {
    /// The one that a path is on.
    pub(super) fn of(path: &std::path::Path) -> io::Result<Self> {
        let stat = nix::sys::statvfs::statvfs(path)?;
        let size = stat.fragment_size();
        Ok(Self {
            capacity: stat.blocks().saturating_mul(size),
            available: stat.blocks_available().saturating_mul(size),
            inodes: stat.files(),
            inodes_free: stat.files_free(),
        })
    }
}

impl NodeUsage {
    /// Reads `/proc`. Blocks for a moment.
    pub(super) fn read() -> io::Result<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        Ok(Self {
            at: Timestamp::now(),
            cpu_nanos: cpu_nanos(&stat),
            cpus: stat.lines().filter(|line| is_cpu(line)).count() as u64,
            memory: memory(&fs::read_to_string("/proc/meminfo")?),
            interfaces: interfaces(&fs::read_to_string("/proc/net/dev")?),
            processes: processes(
                &fs::read_to_string("/proc/loadavg")?,
                &fs::read_to_string("/proc/sys/kernel/pid_max")?,
            ),
            root_fs: FileSystem::of("/".as_ref())?,
        })
    }
}

fn is_cpu(line: &str) -> bool {
    line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// Busy time of `/proc/stat`'s first line, whose unit is a hundredth of a second.
fn cpu_nanos(stat: &str) -> u64 {
    let line = stat.lines().next().unwrap_or_default();
    let fields: Vec<u64> =
        line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; guest time is in user already.
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|index| fields.get(*index)).sum();
    busy.saturating_mul(10_000_000)
}

fn memory(text: &str) -> Memory {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or(0)
            .saturating_mul(1024)
    };
    Memory {
        total: field("MemTotal"),
        free: field("MemFree"),
        available: field("MemAvailable"),
        anonymous: field("AnonPages"),
        inactive_file: field("Inactive(file)"),
    }
}

fn interfaces(text: &str) -> Vec<InterfaceStats> {
    text.lines()
        .skip(2)
        .filter_map(|line| {
            let (name, numbers) = line.split_once(':')?;
            let numbers: Vec<u64> =
                numbers.split_whitespace().filter_map(|number| number.parse().ok()).collect();
            let name = name.trim();
            // The node's own: not the loopback, not the pods' ends.
            (name != "lo" && !name.starts_with("veth") && !name.starts_with("keel")).then(|| {
                InterfaceStats {
                    name: name.to_owned(),
                    rx_bytes: numbers.first().copied().unwrap_or(0),
                    rx_errors: numbers.get(2).copied().unwrap_or(0),
                    tx_bytes: numbers.get(8).copied().unwrap_or(0),
                    tx_errors: numbers.get(10).copied().unwrap_or(0),
                }
            })
        })
        .collect()
}

fn processes(loadavg: &str, pid_max: &str) -> Processes {
    let running = loadavg
        .split_whitespace()
        .nth(3)
        .and_then(|field| field.split_once('/')?.1.parse().ok())
        .unwrap_or(0);
    Processes { running, max: pid_max.trim().parse().unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_read() {
        assert_eq!(cpu_nanos("cpu  1 2 3 100 100 4 5 6 7 8\ncpu0 1\n"), 21 * 10_000_000);
        let memory = memory("MemTotal: 100 kB\nMemFree: 40 kB\nInactive(file): 10 kB\n");
        assert_eq!((memory.usage(), memory.working_set()), (60 * 1024, 50 * 1024));
        let text =
            "h\nh\n  eth0: 10 1 2 0 0 0 0 0 20 1 3 0 0 0 0 0\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0\n";
        let interfaces = interfaces(text);
        assert_eq!(interfaces.len(), 1);
        assert_eq!((interfaces[0].rx_bytes, interfaces[0].tx_errors), (10, 3));
        assert_eq!(
            processes("0.1 0.2 0.3 2/345 99", "4194304\n"),
            Processes { running: 345, max: 4_194_304 }
        );
        assert!(NodeUsage::read().unwrap().cpus > 0);
    }
}
