//! What is said of containers and pods: their states and what they use.

use std::sync::Arc;

use jiff::Timestamp;

use super::{Container, EmbeddedRuntime, Inner, blocking, disk::SandboxRecord, lock, rootfs};
use crate::runtime::*;

impl EmbeddedRuntime {
    /// Usage of all pods that run.
    pub(super) async fn measure(&self) -> Result<Vec<SandboxStats>> {
        let sandboxes: Vec<_> = lock(&self.inner.sandboxes).values().cloned().collect();
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            Ok(sandboxes
                .iter()
                .filter(|s| s.is_ready())
                .map(|sandbox| inner.measure_sandbox(&sandbox.record()))
                .collect())
        })
        .await
    }
}

impl Inner {
    /// A container as Kubernetes sees it.
    pub(super) fn describe(&self, container: &Container) -> ContainerStatus {
        let process = container.process.borrow().clone();
        let record = lock(&container.record).clone();
        let alive = self.sandbox(&record.sandbox).is_ok_and(|s| *s.alive.borrow());
        let state = match (process.started, process.finished) {
            (_, 1..) => ContainerState::Exited,
            (1.., _) if alive => ContainerState::Running,
            (1.., _) => ContainerState::Unknown,
            _ => ContainerState::Created,
        };
        let reason = match state {
            ContainerState::Exited if !process.error.is_empty() => "StartError",
            ContainerState::Exited if process.oom => "OOMKilled",
            ContainerState::Exited if process.code == 0 => "Completed",
            ContainerState::Exited => "Error",
            _ => "",
        };
        let exited = state == ContainerState::Exited;
        ContainerStatus {
            id: record.id,
            sandbox: record.sandbox,
            name: record.config.name,
            attempt: record.config.attempt,
            state,
            created_at: record.created_at,
            started_at: time(process.started),
            finished_at: time(process.finished),
            exit_code: exited.then_some(process.code),
            oom_killed: process.oom,
            reason: reason.to_owned(),
            message: process.error,
            image: record.config.image,
            image_id: record.image_id,
            image_ref: record.image_ref,
            pid: (state == ContainerState::Running).then_some(process.pid),
            log_path: record.log_path,
            labels: record.config.labels,
            annotations: record.config.annotations,
            user: Some(record.user),
        }
    }

    fn measure_sandbox(&self, record: &SandboxRecord) -> SandboxStats {
        let at = Timestamp::now();
        let containers = self
            .containers_of(&record.id)
            .iter()
            .filter(|c| c.process.borrow().finished == 0)
            .map(|container| {
                let container = lock(&container.record).clone();
                let upper = self.disk.container(&container.id).join("upper");
                let (rootfs_used_bytes, rootfs_inodes_used) = rootfs::disk_usage(&upper);
                ContainerStats {
                    at,
                    usage: self.cgroups.usage(&container.cgroup),
                    rootfs_used_bytes,
                    rootfs_inodes_used,
                    id: container.id,
                    sandbox: container.sandbox,
                    name: container.config.name,
                }
            })
            .collect();
        SandboxStats {
            id: record.id.clone(),
            at,
            usage: self.pod_cgroup(record).map(|p| self.cgroups.usage(&p)).unwrap_or_default(),
            interfaces: self
                .network_namespace(record)
                .map(|path| crate::network::interface_stats(&path))
                .unwrap_or_default(),
            containers,
        }
    }
}

fn time(nanos: i64) -> Option<Timestamp> {
    (nanos > 0).then(|| Timestamp::from_nanosecond(nanos.into()).ok()).flatten()
}
