//! What a stopped cluster left behind.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

/// Everything of the machine that a cluster could leave behind, at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftovers {
    processes: BTreeSet<String>,
    mounts: BTreeSet<String>,
    namespaces: BTreeSet<String>,
    interfaces: BTreeSet<String>,
    rules: BTreeSet<String>,
    cgroups: BTreeSet<String>,
}

impl Leftovers {
    /// Looks at the machine whose network namespace is `netns`; mounts and processes are those
    /// that have to do with `dir`, cgroups those named `cgroup`. Other tests run beside this one.
    pub fn now(netns: &str, dir: &Path, cgroup: &str) -> Self {
        let dir = dir.to_string_lossy();
        let lines = |program: &str, arguments: &[&str]| -> BTreeSet<String> {
            let output = Command::new("nsenter")
                .arg(format!("--net=/run/netns/{netns}"))
                .arg(program)
                .args(arguments)
                .output()
                .expect("nsenter");
            String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
        };
        Self {
            processes: processes(netns, &dir),
            mounts: fs::read_to_string("/proc/self/mountinfo")
                .unwrap_or_default()
                .lines()
                .filter(|line| line.contains(&*dir))
                .map(str::to_owned)
                .collect(),
            namespaces: lines("ip", &["-o", "netns", "list-id"]),
            interfaces: lines("ip", &["-br", "link"])
                .into_iter()
                .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
                .collect(),
            rules: lines("nft", &["list", "tables"]),
            cgroups: cgroups(cgroup),
        }
    }

    /// What is in `self` but was not there `before`, one line each.
    pub fn since(&self, before: &Self) -> Vec<String> {
        let new = |kind: &str, now: &BTreeSet<String>, then: &BTreeSet<String>| -> Vec<String> {
            now.difference(then).map(|line| format!("{kind}: {line}")).collect()
        };
        [
            new("process", &self.processes, &before.processes),
            new("mount", &self.mounts, &before.mounts),
            new("network namespace", &self.namespaces, &before.namespaces),
            new("interface", &self.interfaces, &before.interfaces),
            new("rule", &self.rules, &before.rules),
            new("cgroup", &self.cgroups, &before.cgroups),
        ]
        .concat()
    }
}

/// Processes that run in the network namespace or have the folder in their command line.
fn processes(netns: &str, dir: &str) -> BTreeSet<String> {
    let wanted = fs::metadata(format!("/run/netns/{netns}")).ok().map(|m| inode(&m));
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.bytes().all(|b| b.is_ascii_digit()) || name == std::process::id().to_string() {
            continue;
        }
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let netns = fs::metadata(entry.path().join("ns/net")).ok().map(|m| inode(&m));
        if command.contains(dir) || (netns.is_some() && netns == wanted) {
            found.insert(format!("{name} {command}"));
        }
    }
    found
}

fn inode(metadata: &fs::Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

fn cgroups(wanted: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for root in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        for entry in fs::read_dir(root.path()).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() && !wanted.is_empty() && name == wanted {
                found.insert(path.to_string_lossy().into_owned());
            }
        }
    }
    found
}
