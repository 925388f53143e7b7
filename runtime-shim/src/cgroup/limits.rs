//! Limits of a cgroup: which file gets what, and writing it.

use std::{fs, io, path::Path};

use super::{Cgroups, named};
use crate::runtime::LinuxResources;

/// One file to write.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Write {
    controller: &'static str,
    file: String,
    value: String,
}

impl Cgroups {
    /// Sets what is given; what is absent stays as it is.
    pub(crate) fn set_limits(&self, path: &Path, resources: &LinuxResources) -> io::Result<()> {
        let mut failed: Vec<Write> = Vec::new();
        for write in plan(resources, self.is_v2(), self.has_swap_accounting()) {
            if self.write(path, &write).is_err() {
                failed.push(write);
            }
        }
        // Some pairs have an order that depends on whether they grow or shrink (memory below memory
        // and swap, quota below the parent's): what failed is tried once more after the others, in
        // both orders.
        failed.reverse();
        let mut still: Vec<Write> = Vec::new();
        for write in failed {
            if self.write(path, &write).is_err() {
                still.push(write);
            }
        }
        still.iter().rev().try_for_each(|write| self.write(path, write))
    }

    fn write(&self, path: &Path, write: &Write) -> io::Result<()> {
        let controller = self.controller(write.controller).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "the cgroup controller {:?}, which {} = {} needs, is not there on this host",
                    write.controller, write.file, write.value
                ),
            )
        })?;
        let file = controller.mount.join(path).join(&write.file);
        fs::write(&file, &write.value).map_err(|e| {
            named(&file, &io::Error::new(e.kind(), format!("writing {:?}: {e}", write.value)))
        })
    }
}

/// The weight of version 2 for shares of version 1: 2, 1024 and 262144 become 1, 100 and 10000, on a
/// curve that container runtimes agree on (Kubernetes' KEP-2254, runc since 1.3.2), libcontainer too:
/// a change of a running container's limits gives what its start gave.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // all in range
fn weight(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            let power = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            (10_f64.powf(power).ceil() as u64).clamp(1, 10_000)
        }
    }
}

fn plan(resources: &LinuxResources, v2: bool, swap_accounting: bool) -> Vec<Write> {
    let mut writes = Vec::new();
    let mut write = |controller, file: &str, value: String| {
        writes.push(Write { controller, file: file.to_owned(), value });
    };
    let limit = |n: i64| if n < 0 { "max".to_owned() } else { n.to_string() };
    if let Some(shares) = resources.cpu_shares.filter(|n| *n > 0) {
        if v2 {
            write("cpu", "cpu.weight", weight(shares).to_string());
        } else {
            write("cpu", "cpu.shares", shares.clamp(2, 262_144).to_string());
        }
    }
    let period = resources.cpu_period.filter(|n| *n > 0);
    let quota = resources.cpu_quota.filter(|n| *n != 0);
    if v2 {
        match (quota, period) {
            (Some(quota), Some(period)) => {
                write("cpu", "cpu.max", format!("{} {period}", limit(quota)));
            }
            // The kernel keeps the period then.
            (Some(quota), None) => write("cpu", "cpu.max", limit(quota)),
            (None, Some(period)) => write("cpu", "cpu.max", format!("max {period}")),
            (None, None) => {}
        }
    } else {
        if let Some(period) = period {
            write("cpu", "cpu.cfs_period_us", period.to_string());
        }
        if let Some(quota) = quota {
            write("cpu", "cpu.cfs_quota_us", quota.max(-1).to_string());
        }
    }
    if let Some(bytes) = resources.memory_limit.filter(|n| *n != 0) {
        if v2 {
            write("memory", "memory.max", limit(bytes));
            if swap_accounting {
                let swap = if bytes < 0 { "max" } else { "0" };
                write("memory", "memory.swap.max", swap.to_owned());
            }
        } else {
            write("memory", "memory.limit_in_bytes", bytes.max(-1).to_string());
            if swap_accounting {
                write("memory", "memory.memsw.limit_in_bytes", bytes.max(-1).to_string());
            }
        }
    }
    if let Some(count) = resources.pids_limit.filter(|n| *n != 0) {
        write("pids", "pids.max", limit(count));
    }
    if let Some(cpus) = resources.cpuset_cpus.as_ref().filter(|s| !s.is_empty()) {
        write("cpuset", "cpuset.cpus", cpus.clone());
    }
    if let Some(nodes) = resources.cpuset_mems.as_ref().filter(|s| !s.is_empty()) {
        write("cpuset", "cpuset.mems", nodes.clone());
    }
    for (file, value) in &resources.unified {
        // The controller is the part before the dot; the spec refused these on version 1.
        let controller = match file.split('.').next() {
            Some("cpu") => "cpu",
            Some("cpuset") => "cpuset",
            Some("pids") => "pids",
            Some("io") => "io",
            Some("hugetlb") => "hugetlb",
            _ => "memory",
        };
        write(controller, file, value.clone());
    }
    writes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(resources: &LinuxResources, v2: bool) -> Vec<(String, String)> {
        plan(resources, v2, true).into_iter().map(|w| (w.file, w.value)).collect()
    }

    #[test]
    fn each_version_gets_its_own_files() {
        let resources = LinuxResources {
            cpu_period: Some(100_000),
            cpu_quota: Some(50_000),
            cpu_shares: Some(1024),
            memory_limit: Some(1 << 20),
            pids_limit: Some(-1),
            ..LinuxResources::default()
        };
        let own = |list: &[(&str, &str)]| {
            list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<Vec<_>>()
        };
        assert_eq!(
            files(&resources, true),
            own(&[
                ("cpu.weight", "100"),
                ("cpu.max", "50000 100000"),
                ("memory.max", "1048576"),
                ("memory.swap.max", "0"),
                ("pids.max", "max"),
            ])
        );
        assert_eq!(
            files(&resources, false),
            own(&[
                ("cpu.shares", "1024"),
                ("cpu.cfs_period_us", "100000"),
                ("cpu.cfs_quota_us", "50000"),
                ("memory.limit_in_bytes", "1048576"),
                ("memory.memsw.limit_in_bytes", "1048576"),
                ("pids.max", "max"),
            ])
        );
        assert!(files(&LinuxResources::default(), true).is_empty());

        // Without accounting for swap there is no file to write.
        let resources = LinuxResources { memory_limit: Some(5), ..LinuxResources::default() };
        for (v2, file) in [(true, "memory.max"), (false, "memory.limit_in_bytes")] {
            let writes: Vec<_> = plan(&resources, v2, false).into_iter().map(|w| w.file).collect();
            assert_eq!(writes, [file]);
        }

        // A quota alone leaves the period.
        let resources = LinuxResources { cpu_quota: Some(7000), ..LinuxResources::default() };
        assert_eq!(files(&resources, true), own(&[("cpu.max", "7000")]));
    }

    #[test]
    fn shares_become_weights_over_the_whole_range() {
        for (shares, expected) in
            [(0, 1), (2, 1), (512, 59), (1024, 100), (262_144, 10_000), (u64::MAX, 10_000)]
        {
            assert_eq!(weight(shares), expected, "{shares}");
        }
        assert!((2..5000).all(|shares| weight(shares) <= weight(shares + 1)));
    }
}
