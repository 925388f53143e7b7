//! Kernel settings that kube-proxy sets, and this proxy too.
//!
//! All of it is best effort: a container without the right to write `/proc/sys` still proxies, and
//! says what it couldn't set. `route_localnet` is the iptables mode's own affair.

use std::{fs, io, path::Path};

use crate::config::ConntrackConfig;

const ROOT: &str = "/proc/sys/net";
/// How many lists the connection table has. The kernel lets only who is in the first network
/// namespace change it.
const HASH_SIZE: &str = "/sys/module/nf_conntrack/parameters/hashsize";
/// Connections for each list, as kube-proxy has it: longer lists make every packet slower.
const PER_LIST: u64 = 4;

/// Applies the settings; what can't be set is warned about.
pub(crate) fn apply(config: &ConntrackConfig) {
    apply_under(Path::new(ROOT), Path::new(HASH_SIZE), config);
}

fn apply_under(root: &Path, hash_size: &Path, config: &ConntrackConfig) {
    if let Some(max) = connections(config) {
        raise(&root.join("netfilter/nf_conntrack_max"), max);
        raise(hash_size, max / PER_LIST);
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
            set(&root.join(name), value);
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
fn raise(path: &Path, value: u64) {
    match read(path) {
        Ok(present) if present >= value => {}
        _ => set(path, value),
    }
}

fn set(path: &Path, value: u64) {
    if read(path).is_ok_and(|present| present == value) {
        return;
    }
    match fs::write(path, value.to_string()) {
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
        let (max, hash) = (dir.join("nf_conntrack_max"), root.path().join("hashsize"));
        let config =
            ConntrackConfig { min: Some(500), max_per_core: Some(1), ..Default::default() };
        let apply = |config: &ConntrackConfig| apply_under(root.path(), &hash, config);
        for (before, after) in [((100, 10), (500, 125)), ((900, 300), (900, 300))] {
            fs::write(&max, format!("{}\n", before.0)).unwrap();
            fs::write(&hash, format!("{}\n", before.1)).unwrap();
            apply(&config);
            assert_eq!((read(&max).unwrap(), read(&hash).unwrap()), after);
        }
        let unset = ConntrackConfig { max_per_core: Some(0), ..config };
        assert_eq!(connections(&unset), None);
        apply_under(&root.path().join("nowhere"), &hash, &unset);
    }

    #[test]
    fn each_time_out_has_its_setting_and_zero_leaves_it() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("netfilter")).unwrap();
        let value = |name: &str| read(&root.path().join("netfilter").join(name)).ok();
        let some = |seconds| Some(std::time::Duration::from_secs(seconds));
        let config = ConntrackConfig {
            max_per_core: Some(0),
            tcp_established_timeout: some(0),
            tcp_close_wait_timeout: some(60),
            tcp_be_liberal: true,
            udp_timeout: some(10),
            udp_stream_timeout: some(20),
            ..Default::default()
        };
        apply_under(root.path(), &root.path().join("hashsize"), &config);
        for (name, expected) in [
            ("nf_conntrack_max", None),
            ("nf_conntrack_tcp_timeout_established", None),
            ("nf_conntrack_tcp_timeout_close_wait", Some(60)),
            ("nf_conntrack_udp_timeout", Some(10)),
            ("nf_conntrack_udp_timeout_stream", Some(20)),
            ("nf_conntrack_tcp_be_liberal", Some(1)),
        ] {
            assert_eq!(value(name), expected, "{name}");
        }
        assert!(read(&root.path().join("hashsize")).is_err());
        // A time-out is what was asked for, be it shorter than before.
        let shorter = ConntrackConfig { udp_timeout: some(5), ..config };
        apply_under(root.path(), &root.path().join("hashsize"), &shorter);
        assert_eq!(value("nf_conntrack_udp_timeout"), Some(5));
    }
}
