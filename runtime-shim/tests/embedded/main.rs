//! The embedded runtime against the real kernel: processes, mounts, cgroups, namespaces, packets.
//!
//! Each test runs as a process of its own in network and mount namespaces of its own, with a cgroup
//! and folders of its own, and compares at its end what is left with nothing. They need root.

#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod enforced;
mod fixture;
mod life;
mod shared;
mod streams;

use std::path::Path;

fn lines(path: &Path) -> Vec<(String, String, String)> {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(|line| {
            let mut words = line.splitn(4, ' ').skip(1).map(str::to_owned);
            let mut next = || words.next().unwrap_or_default();
            (next(), next(), next())
        })
        .collect()
}
