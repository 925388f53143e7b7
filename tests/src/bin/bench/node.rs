//! A cluster that runs, whose moments of start are known, and that is stopped whatever happens.

use std::{
    path::PathBuf,
    process::Command,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use anyhow::Context;
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use keelson_tests::{Cluster, Machine};
use kube::Api;

use crate::{api, inside::inside_async, startup};

/// What a signal must clean up: data folders and network namespaces of running clusters.
static TO_CLEAN: Mutex<Vec<(PathBuf, [String; 2])>> = Mutex::new(Vec::new());

/// A cluster whose node, if it has one, is ready.
#[derive(Debug)]
pub(crate) struct Running {
    /// It.
    pub(crate) cluster: Cluster,
    /// When its API first answered.
    pub(crate) answered: Instant,
    /// When it was first seen ready.
    pub(crate) ready: Instant,
}

impl Running {
    /// Starts one on a machine of its own and waits until pods may be made.
    ///
    /// # Errors
    /// When it does not get ready; the message has the end of its log.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let (cluster, (answered, ready)) =
            started(Cluster::prepare(&[]), |data_dir, pid| async move {
                let (client, answered) = api::answering(&data_dir, pid).await?;
                let nodes: Api<Node> = Api::all(client.clone());
                let ready = api::until(&nodes, "the node to be Ready", startup::is_ready).await?;
                // Pods are refused before their namespace's service account is there.
                let accounts: Api<ServiceAccount> = Api::namespaced(client, "default");
                let is_default =
                    |account: &ServiceAccount| account.metadata.name.as_deref() == Some("default");
                api::until(&accounts, "the default service account", is_default).await?;
                Ok((answered, ready))
            })?;
        Ok(Self { cluster, answered, ready })
    }

    /// Starts a control plane alone on a machine of its own and waits until its API answers.
    ///
    /// # Errors
    /// When it does not; the message has the end of its log.
    pub(crate) fn start_control_plane() -> anyhow::Result<Self> {
        let cluster = Cluster::prepare_control_plane();
        let (cluster, answered) = started(cluster, |data_dir, pid| async move {
            Ok(api::answering(&data_dir, pid).await?.1)
        })?;
        Ok(Self { cluster, answered, ready: answered })
    }

    /// The folder of its data.
    pub(crate) fn data_dir(&self) -> PathBuf {
        self.cluster.machine.data_dir()
    }

    /// Stops it and says on standard error what it left behind.
    pub(crate) fn stop(mut self) {
        for left in self.cluster.down() {
            eprintln!("left behind by `keelson down`: {left}");
        }
    }
}

/// Starts a cluster, to be cleaned up by a signal too, and waits for something of it, given its data
/// folder and process.
fn started<T, F>(
    mut cluster: Cluster,
    wait: impl FnOnce(PathBuf, i32) -> F + Send,
) -> anyhow::Result<(Cluster, T)>
where
    T: Send,
    F: Future<Output = anyhow::Result<T>>,
{
    let machine = &cluster.machine;
    TO_CLEAN
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push((machine.dir().to_owned(), [machine.netns(), machine.neighbour_netns()]));
    cluster.start_process();
    let (data_dir, pid) = (cluster.machine.data_dir(), cluster.pid());
    let waited = inside_async(&cluster.machine.netns(), || wait(data_dir, pid));
    let waited = waited.with_context(|| {
        let log = std::fs::read_to_string(cluster.log_path()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("the log of keelson:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"))
    })?;
    Ok((cluster, waited))
}

/// Cleans up after a signal: what dropping the clusters would have done.
pub(crate) fn clean_up() {
    let all = std::mem::take(&mut *TO_CLEAN.lock().unwrap_or_else(PoisonError::into_inner));
    for (dir, netns) in all.into_iter().filter(|(dir, _)| dir.exists()) {
        let _ = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", netns[0]))
            .arg(Machine::binary())
            .args(["down", "--purge", "--data-dir"])
            .arg(dir.join("k"))
            .output();
        for netns in netns {
            let _ = Command::new("ip").args(["netns", "delete", &netns]).output();
        }
        let _ = std::fs::remove_dir_all(dir);
    }
}
