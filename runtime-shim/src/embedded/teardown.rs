//! Removing everything: what `keelson down` does.

use std::sync::Arc;

use super::{EmbeddedRuntime, blocking, lock, rootfs};
use crate::runtime::*;

/// What was removed, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Pods.
    pub sandboxes: usize,
    /// Containers, those that had ended included.
    pub containers: usize,
    /// Mounts that nothing had a record of.
    pub mounts: usize,
    /// Folders of the cgroup trees beyond those of pods.
    pub cgroups: usize,
    /// Network interfaces, packet filter tables and network namespaces beyond those of pods.
    pub network: usize,
}

impl EmbeddedRuntime {
    /// Stops and removes all pods, and then whatever else the runtime made on this machine: mounts,
    /// network namespaces, interfaces, packet filter rules, cgroups. Images stay.
    ///
    /// # Errors
    /// The first thing that could not be removed; what comes after it was tried all the same.
    pub async fn teardown_all(&self) -> Result<Removed> {
        let mut removed = Removed::default();
        let mut first_error = None;
        let mut note = |error: RuntimeError| {
            tracing::warn!(%error, "could not remove something");
            first_error.get_or_insert(error);
        };
        removed.containers = lock(&self.inner.containers).len();
        let sandboxes: Vec<_> = lock(&self.inner.sandboxes).values().cloned().collect();
        for sandbox in sandboxes {
            match Box::pin(self.remove_sandbox(&sandbox)).await {
                Ok(()) => removed.sandboxes += 1,
                Err(error) => note(error),
            }
        }
        match self.inner.network.teardown().await {
            Ok(report) => removed.network = report,
            Err(error) => note(error),
        }
        let inner = Arc::clone(&self.inner);
        let rest = blocking(move || {
            let mut mounts = 0;
            // The deepest first.
            for path in mounts_below(&[&inner.disk.root, &inner.disk.run]).into_iter().rev() {
                mounts += usize::from(rootfs::unmount(&path)?);
            }
            let cgroups = inner
                .cgroups
                .remove_all()
                .map_err(|source| RuntimeError::Io { what: "removing cgroups".into(), source })?;
            inner.disk.empty_trash();
            Ok((mounts, cgroups))
        });
        match rest.await {
            Ok((mounts, cgroups)) => (removed.mounts, removed.cgroups) = (mounts, cgroups),
            Err(error) => note(error),
        }
        first_error.map_or(Ok(removed), Err)
    }
}

fn mounts_below(roots: &[&std::path::Path]) -> Vec<std::path::PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|at| std::path::PathBuf::from(at.replace("\\040", " ")))
        .filter(|at| roots.iter().any(|root| at.starts_with(root) && at.as_path() != *root))
        .collect()
}
