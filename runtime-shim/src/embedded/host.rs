//! A look at the host, once at the start: what specs depend on.

use std::fs;

use crate::{cgroup::Cgroups, spec};

pub(super) fn look(cgroups: &Cgroups) -> spec::Host {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = |field: &str| {
        status
            .lines()
            .find_map(|l| u64::from_str_radix(l.strip_prefix(field)?.trim(), 16).ok())
            .unwrap_or(0)
    };
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    spec::Host {
        architecture: std::env::consts::ARCH.to_owned(),
        cgroup_v2: cgroups.is_v2(),
        swap_accounting: cgroups.has_swap_accounting(),
        capabilities: spec::capabilities_from_bits(bits("CapBnd:") & bits("CapPrm:")),
        hostname: fs::read_to_string("/proc/sys/kernel/hostname")
            .map(|t| t.trim().to_owned())
            .unwrap_or_default(),
        mqueue: filesystems.lines().any(|l| l.ends_with("\tmqueue")),
    }
}
