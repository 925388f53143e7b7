//! The parts of the agent that every worker uses.

use std::{future::Future, sync::Arc, time::Instant};

use k8s_openapi::api::core::v1::Pod;
use keelson_api::{
    events::{EventRecorder, EventType},
    object,
};
use keelson_runtime_shim::runtime::PodRuntime;
use kube::Client;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{
    config::AgentConfig, directory::PodTable, environment::ContainerEnvironment, metrics::Metrics,
    pulse::Pulse, volumes::PodVolumes,
};

/// The parts of the agent that every worker uses.
pub(crate) struct Context {
    /// What the agent was told.
    pub(crate) config: AgentConfig,
    /// What runs the pods.
    pub(crate) runtime: Arc<dyn PodRuntime>,
    /// What makes their volumes.
    pub(crate) volumes: Arc<dyn PodVolumes>,
    /// What resolves their environment.
    pub(crate) environment: Arc<dyn ContainerEnvironment>,
    /// The API, if there is one.
    pub(crate) client: Option<Client>,
    /// Events.
    pub(crate) events: EventRecorder,
    /// Counters.
    pub(crate) metrics: Metrics,
    /// One permit for each image pull at a time.
    pub(crate) pulls: Semaphore,
    /// The runtime's name, which prefixes container ids.
    pub(crate) runtime_name: String,
    /// Bytes of memory of the machine.
    pub(crate) memory_capacity: i64,
    /// What others may ask about the pods.
    pub(crate) directory: PodTable,
    /// Whether the agent's loop turns.
    pub(crate) pulse: Arc<Pulse>,
    /// The agent stops; the pods run on.
    pub(crate) shutdown: CancellationToken,
}

impl Context {
    /// Times and counts one call of the runtime.
    pub(crate) async fn timed<T, E>(
        &self,
        operation: &str,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let begun = Instant::now();
        let result = call.await;
        self.metrics.runtime_operation(operation, begun.elapsed(), result.is_err());
        result
    }

    /// Records an event on a pod.
    pub(crate) fn pod_event(
        &self,
        pod: &Pod,
        kind: EventType,
        reason: &str,
        message: impl Into<String>,
    ) {
        self.events.event(&object::object_reference(pod), kind, reason, message);
    }

    /// Records an event on one of a pod's containers.
    pub(crate) fn container_event(
        &self,
        pod: &Pod,
        container: &str,
        kind: EventType,
        reason: &str,
        message: impl Into<String>,
    ) {
        let mut reference = object::object_reference(pod);
        let list = match super::view::container(pod, container) {
            Some((super::view::Role::Main, _)) | None => "containers",
            Some(_) => "initContainers",
        };
        reference.field_path = Some(format!("spec.{list}{{{container}}}"));
        self.events.event(&reference, kind, reason, message);
    }
}
