//! Kernel settings that kube-proxy sets, and this proxy too.
//!
//! All of it is best effort: a container without the right to write `/proc/sys` still proxies, and
//! says what it couldn't set. `route_localnet` is left alone: node ports are not on loopback.

use std::{fs, io, path::Path};

use crate::config::ConntrackConfig;

const ROOT: &str = "/proc/sys/net";

/// Applies the settings; what can't be set is warned about.
pub(crate) fn apply(config: &ConntrackConfig) {
    apply_under(Path::new(ROOT), config);
}

fn apply_under(root: &Path, config: &ConntrackConfig) {
    if let Some(max) = connections(config) {
        raise(root, "netfilter/nf_conntrack_max", max);
    }
    let seconds = |d: Option<std::time::Duration>| d.map(|d| d.as_secs()).filter(|s| *s > 0);
    for (name, value) in [
        ("netfilter/nf_conntrack_tcp_timeout_established", seconds(config.tcp_established_timeout)),
        ("netfilter/nf_conntrack_tcp_timeout_close_wait", seconds(config.tcp_close_wait_timeout)),
        ("netfilter/nf_conntrack_udp_timeout", seconds(config.udp_timeout)),
        ("netfilter/nf_conntrack_udp_timeout_stream", seconds(config.udp_stream_timeout)),
        ("netfilter/nf_conntrack_tcp_be_liberal", config.tcp_be_liberal.then_some(1)),
    ] {
        if let Some(value) = value {
            set(root, name, value);
        }
    }
}

/// `maxPerCore` times cores, and no less than `min`; `None` leaves the limit as it is.
fn connections(config: &ConntrackConfig) -> Option<u64> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let per_core = u64::from(config.max_per_core.filter(|n| *n > 0)?);
    Some((per_core * cores).max(u64::from(config.min.unwrap_or(0))))
}

fn read(path: &Path) -> io::Result<u64> {
    fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
}

/// Sets a limit unless it is higher already: another program may need more.
fn raise(root: &Path, name: &str, value: u64) {
    match read(&root.join(name)) {
        Ok(present) if present >= value => {}
        _ => set(root, name, value),
    }
}

fn set(root: &Path, name: &str, value: u64) {
    let path = root.join(name);
    if read(&path).is_ok_and(|present| present == value) {
        return;
    }
    match fs::write(&path, value.to_string()) {
        Ok(()) => tracing::info!(setting = %path.display(), value, "kernel setting changed"),
        Err(error) => tracing::warn!(
            setting = %path.display(), value, %error,
            "kernel setting can't be changed; the present one stays"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_raised_and_never_lowered_and_missing_files_survive() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("netfilter");
        fs::create_dir(&dir).unwrap();
        let max = dir.join("nf_conntrack_max");
        let config =
            ConntrackConfig { min: Some(500), max_per_core: Some(1), ..Default::default() };
        fs::write(&max, "100\n").unwrap();
        apply_under(root.path(), &config);
        assert_eq!(read(&max).unwrap(), 500);
        fs::write(&max, "900\n").unwrap();
        apply_under(root.path(), &config);
        assert_eq!(read(&max).unwrap(), 900);
        // fs::write makes files that the kernel would refuse to make; the value is what counts.
        assert_eq!(read(&dir.join("nf_conntrack_tcp_timeout_established")).unwrap(), 86_400);
        assert!(!dir.join("nf_conntrack_udp_timeout").exists());
        let unset = ConntrackConfig { max_per_core: Some(0), ..config };
        assert_eq!(connections(&unset), None);
    }
}
