//! What the node and its pods use: `/stats/summary`, `/metrics/resource`, `/metrics/cadvisor`.
//!
//! Everything is read when it is asked for; nothing runs in between. The rate of CPU use
//! (`usageNanoCores`) is the difference to the sample before, so the first answer has none.

mod node;
mod prometheus_text;
mod summary;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use keelson_runtime_shim::{
    PodRuntime,
    runtime::{RuntimeError, SandboxStats},
};
use serde_json::Value;

use self::node::NodeUsage;
use crate::pods::PodDirectory;

/// Samples closer together than this say nothing about a rate.
const LEAST_NANOS: i128 = 500_000_000;

/// Statistics can't be read.
#[derive(Debug, thiserror::Error)]
pub enum StatisticsError {
    /// The runtime could not say.
    #[error("pods' statistics: {0}")]
    Runtime(#[from] RuntimeError),
    /// The kernel could not say.
    #[error("node's statistics: {0}")]
    Node(#[from] std::io::Error),
    /// What was measured can't be printed.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// A CPU counter at one moment.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Timestamp,
    nanos: u64,
    rate: Option<u64>,
}

/// Reads statistics. One for each node.
pub struct Statistics {
    node_name: String,
    started: Timestamp,
    runtime: Arc<dyn PodRuntime>,
    pods: Arc<dyn PodDirectory>,
    samples: Mutex<HashMap<String, Sample>>,
}

/// Everything that was read at one moment.
struct Reading {
    node: NodeUsage,
    pods: Vec<SandboxStats>,
}

impl Statistics {
    /// For the node of this name.
    pub fn new(
        node_name: impl Into<String>,
        runtime: Arc<dyn PodRuntime>,
        pods: Arc<dyn PodDirectory>,
    ) -> Self {
        Self {
            node_name: node_name.into(),
            started: Timestamp::now(),
            runtime,
            pods,
            samples: Mutex::default(),
        }
    }

    /// The Summary (`stats/v1alpha1`) as JSON.
    ///
    /// # Errors
    /// When the runtime or the kernel can't say.
    pub async fn summary(&self, only_cpu_and_memory: bool) -> Result<Value, StatisticsError> {
        let reading = self.read().await?;
        let image_fs = self.runtime.image_fs_info().await?;
        Ok(summary::summary(self, &reading, &image_fs, only_cpu_and_memory))
    }

    /// `/metrics/resource`.
    ///
    /// # Errors
    /// As [`Self::summary`].
    pub async fn resource_metrics(&self) -> Result<String, StatisticsError> {
        Ok(prometheus_text::resource(&self.read().await?, self.pods.as_ref())?)
    }

    /// `/metrics/cadvisor`: the usual ones of its container and machine metrics.
    ///
    /// # Errors
    /// As [`Self::summary`].
    pub async fn container_metrics(&self) -> Result<String, StatisticsError> {
        Ok(prometheus_text::containers(&self.read().await?, self.pods.as_ref())?)
    }

    async fn read(&self) -> Result<Reading, StatisticsError> {
        let pods = self.runtime.list_pod_sandbox_stats().await?;
        let node =
            tokio::task::spawn_blocking(NodeUsage::read).await.map_err(std::io::Error::other)??;
        let reading = Reading { node, pods };
        self.forget_gone(&reading);
        Ok(reading)
    }

    /// The rate of CPU use of `id`, in billionths of a core, given its counter now.
    fn rate(&self, id: &str, at: Timestamp, nanos: u64) -> Option<u64> {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let before = samples.get(id).copied();
        let Some(before) = before else {
            samples.insert(id.to_owned(), Sample { at, nanos, rate: None });
            return None;
        };
        let passed = at.as_nanosecond() - before.at.as_nanosecond();
        if passed < LEAST_NANOS {
            return before.rate;
        }
        let rate = next_rate(before.nanos, nanos, passed);
        samples.insert(id.to_owned(), Sample { at, nanos, rate });
        rate
    }

    fn forget_gone(&self, reading: &Reading) {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.retain(|id, _| {
            id == "node"
                || reading.pods.iter().any(|pod| {
                    pod.id.as_str() == id || pod.containers.iter().any(|c| c.id.as_str() == id)
                })
        });
    }
}

fn next_rate(before: u64, now: u64, passed: i128) -> Option<u64> {
    // A counter that went back belongs to something new.
    let used = i128::from(now.checked_sub(before)?);
    u64::try_from(used * 1_000_000_000 / passed).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences() {
        assert_eq!(next_rate(0, 1_000_000_000, 2_000_000_000), Some(500_000_000));
        assert_eq!(next_rate(5, 4, 1_000_000_000), None);
    }
}
