//! What a new instance finds: the pods of the one before.
//!
//! Records on the disk say what was made, sockets say what runs. What has no whole record, or a
//! record that never got to "ready", is removed. After a restart of the machine all sandboxes are
//! not ready, and of their namespaces, mounts and addresses nothing is kept.

use std::{
    fs,
    sync::{Arc, Mutex},
};

use tokio::sync::watch;

use super::{
    Container, EmbeddedRuntime, Sandbox, blocking,
    disk::{self, ContainerRecord, Phase, SandboxRecord},
    lock,
    shim::{self, protocol::Op},
};
use crate::runtime::*;

impl EmbeddedRuntime {
    pub(super) async fn recover(&self) -> Result<()> {
        let inner = Arc::clone(&self.inner);
        let (sandboxes, containers, nameless) = blocking(move || {
            inner.disk.empty_trash();
            Ok(inner.read_records())
        })
        .await?;

        for mut record in sandboxes {
            let rebooted = record.boot != self.inner.boot;
            if record.phase == Phase::Making {
                tracing::info!(sandbox = %record.id, "removing a sandbox that was not finished");
                match self.take_sandbox_apart(&record).await {
                    Ok(()) => continue,
                    // It stays listed as not ready, so that its removal is tried again.
                    Err(error) => {
                        tracing::warn!(sandbox = %record.id, %error, "could not remove it yet");
                    }
                }
            }
            if rebooted && record.phase == Phase::Ready {
                if let Err(error) = self.dissolve(&record).await {
                    tracing::warn!(sandbox = %record.id, %error, "could not tidy up after a restart");
                }
                record.phase = Phase::Stopped;
                let (inner, written) = (Arc::clone(&self.inner), record.clone());
                blocking(move || inner.disk.write_sandbox(&written)).await?;
            }
            let socket = self.inner.disk.socket(&record.id);
            let alive =
                record.phase == Phase::Ready && shim::call(&socket, Op::Hello).await.is_ok();
            let sandbox = Arc::new(Sandbox {
                alive: watch::Sender::new(alive),
                record: Mutex::new(record.clone()),
                changing: tokio::sync::Mutex::default(),
            });
            lock(&self.inner.sandboxes).insert(record.id, sandbox);
        }
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            for id in nameless {
                tracing::info!(container = %id, "removing a container that was not finished");
                inner.take_container_apart(&id, None)?;
            }
            for record in containers {
                inner.adopt_container(record)?;
            }
            Ok(())
        })
        .await?;
        self.inner.network.recover(&self.networks_in_use()).await?;
        let all: Vec<_> = lock(&self.inner.sandboxes).values().cloned().collect();
        for sandbox in all.iter().filter(|s| *s.alive.borrow()) {
            self.watch_shim(sandbox);
        }
        Ok(())
    }

    /// The sandboxes that have a network, with their addresses and host ports.
    fn networks_in_use(&self) -> Vec<crate::network::InUse> {
        lock(&self.inner.sandboxes)
            .values()
            .map(|s| s.record())
            .filter(|r| r.phase == Phase::Ready && !r.config.namespaces.host_network)
            .map(|r| crate::network::InUse {
                addresses: r.ips,
                ports: r.config.port_mappings,
                sandbox: r.id,
            })
            .collect()
    }
}

impl super::Inner {
    fn read_records(&self) -> (Vec<SandboxRecord>, Vec<ContainerRecord>, Vec<ContainerId>) {
        let mut sandboxes = Vec::new();
        for entry in fs::read_dir(self.disk.sandboxes()).into_iter().flatten().flatten() {
            match disk::read_json::<SandboxRecord>(&entry.path().join("sandbox.json")) {
                Some(record) => sandboxes.push(record),
                None => {
                    // Killed before its first step: there is nothing but the folder.
                    if let Err(error) = self.disk.discard(&entry.path()) {
                        tracing::warn!(%error, "could not remove a sandbox without a record");
                    }
                }
            }
        }
        let (mut containers, mut nameless) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(self.disk.containers()).into_iter().flatten().flatten() {
            match disk::read_json::<ContainerRecord>(&entry.path().join("container.json")) {
                Some(record) => containers.push(record),
                None => {
                    nameless.push(ContainerId(entry.file_name().to_string_lossy().into_owned()));
                }
            }
        }
        (sandboxes, containers, nameless)
    }

    fn adopt_container(&self, record: ContainerRecord) -> Result<()> {
        let Ok(sandbox) = self.sandbox(&record.sandbox) else {
            return self.take_container_apart(&record.id, Some(&record.cgroup));
        };
        let mut process = self.disk.read_state(&record.id);
        let stopped = lock(&sandbox.record).phase != Phase::Ready;
        if stopped && process.finished == 0 && process.started != 0 {
            // The machine went down under it: nobody saw how it ended.
            process.finished = process.started;
            process.code = 255;
        }
        let container = Container {
            process: watch::Sender::new(process),
            changing: tokio::sync::Mutex::default(),
            record: Mutex::new(record.clone()),
        };
        lock(&self.containers).insert(record.id, Arc::new(container));
        Ok(())
    }
}
