//! Reading what a cgroup uses.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::Cgroups;
use crate::runtime::ResourceUsage;

/// A limit at or above this is none: version 1 shows the largest number of pages.
const NO_LIMIT: u64 = 1 << 60;

impl Cgroups {
    /// What a cgroup, with all below it, uses. Files that are not there count as nothing.
    pub(crate) fn usage(&self, path: &Path) -> ResourceUsage {
        let dir = |controller: &str| self.controller(controller).map(|h| h.mount.join(path));
        if self.is_v2() { v2(&dir) } else { v1(&dir) }
    }
}

fn v2(dir: &dyn Fn(&str) -> Option<PathBuf>) -> ResourceUsage {
    let mut usage = ResourceUsage::default();
    // cpu.stat is there without the controller too.
    if let Some(dir) = dir("cpu").or_else(|| dir("memory")) {
        usage.cpu_usage_nanos = keyed(&dir.join("cpu.stat"), "usage_usec").saturating_mul(1000);
    }
    if let Some(dir) = dir("memory") {
        usage.memory_usage = number(&dir.join("memory.current"));
        let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        usage.memory_working_set = usage.memory_usage.saturating_sub(value(&stat, "inactive_file"));
        usage.memory_rss = value(&stat, "anon");
        usage.page_faults = value(&stat, "pgfault");
        usage.major_page_faults = value(&stat, "pgmajfault");
        usage.memory_limit = limit(&dir.join("memory.max"));
    }
    if let Some(dir) = dir("pids") {
        usage.pids = number(&dir.join("pids.current"));
    }
    usage
}

fn v1(dir: &dyn Fn(&str) -> Option<PathBuf>) -> ResourceUsage {
    let mut usage = ResourceUsage::default();
    if let Some(dir) = dir("cpuacct") {
        usage.cpu_usage_nanos = number(&dir.join("cpuacct.usage"));
    }
    if let Some(dir) = dir("memory") {
        usage.memory_usage = number(&dir.join("memory.usage_in_bytes"));
        let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        usage.memory_working_set =
            usage.memory_usage.saturating_sub(value(&stat, "total_inactive_file"));
        usage.memory_rss = value(&stat, "total_rss");
        usage.page_faults = value(&stat, "total_pgfault");
        usage.major_page_faults = value(&stat, "total_pgmajfault");
        usage.memory_limit = limit(&dir.join("memory.limit_in_bytes"));
    }
    if let Some(dir) = dir("pids") {
        usage.pids = number(&dir.join("pids.current"));
    }
    usage
}

fn number(file: &Path) -> u64 {
    fs::read_to_string(file).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

fn limit(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    text.trim().parse().ok().filter(|n| *n < NO_LIMIT)
}

fn keyed(file: &Path, key: &str) -> u64 {
    value(&fs::read_to_string(file).unwrap_or_default(), key)
}

fn value(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| {
            let (name, value) = line.split_once(' ')?;
            (name == key).then(|| value.trim().parse().ok()).flatten()
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_their_whole_key() {
        let text = "total_rss_huge 7\ntotal_rss 5\nx\n";
        assert_eq!(value(text, "total_rss"), 5);
        assert_eq!(value(text, "rss"), 0);
    }
}
