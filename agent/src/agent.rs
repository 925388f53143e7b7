//! The agent as a whole: sources in, one worker for each pod, the node's own tasks beside.
//!
//! ```text
//!   sources::file ─┐                          ┌─► worker of pod A ─► runtime, volumes, API status
//!   sources::api ──┼─► Change ─► Dispatcher ──┼─► worker of pod B
//!   runtime events ┘              │           └─► …
//!                                 ├─► Mirrors ─► sources::mirror
//!                                 └─► counts ──► metrics
//!   node: Node object, lease        logs: rotation
//! ```
//!
//! The dispatcher owns all workers. It decides which pods are taken, never how they are run.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use keelson_api::{events::EventRecorder, quantity::Quantity};
use keelson_runtime_shim::runtime::{PodRuntime, RuntimeError};
use kube::Client;
use prometheus::Registry;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    classes,
    config::AgentConfig,
    directory::PodTable,
    dispatcher::Dispatcher,
    environment::ContainerEnvironment,
    leftover::leftovers,
    logs,
    main_tasks::MainTasks,
    metrics::Metrics,
    node::{self, NodeInfo},
    pods::PodDirectory,
    pulse::Pulse,
    sources::{
        self,
        file::FileSource,
        mirror::{self, Mirrors},
    },
    volumes::PodVolumes,
    worker::Context,
};

/// How many changes of the sources may wait.
const CHANGES: usize = 256;
/// How long tasks have to come to rest when the agent stops.
const REST: Duration = Duration::from_secs(5);

/// Why the agent can't start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A metric of its name is registered already.
    #[error("registering the agent's metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The runtime does not answer.
    #[error("asking the runtime for its version: {0}")]
    Runtime(#[from] RuntimeError),
    /// The machine does not say what it has.
    #[error("reading what the machine has: {0}")]
    Machine(String),
    /// A configured value can't be used.
    #[error("{0}")]
    Config(String),
    /// A part of it ended by itself.
    #[error("{0} ended by itself{1}")]
    Task(&'static str, String),
}

/// What an agent is made of.
pub struct AgentParts {
    /// What it is told.
    pub config: AgentConfig,
    /// The API; without it only static pods run.
    pub client: Option<Client>,
    /// What runs the pods.
    pub runtime: Arc<dyn PodRuntime>,
    /// What makes their volumes.
    pub volumes: Arc<dyn PodVolumes>,
    /// What resolves their environment.
    pub environment: Arc<dyn ContainerEnvironment>,
    /// Where events go.
    pub events: EventRecorder,
    /// Where metrics are registered.
    pub registry: Registry,
    /// Where the metrics of probes are registered, which are served at `/metrics/probes`.
    pub probe_registry: Registry,
    /// Its end. Pods run on.
    pub shutdown: CancellationToken,
}

/// The kubelet's core.
pub struct Agent {
    context: Arc<Context>,
    node: NodeInfo,
}

/// What the node's pods may use together: what the machine has, less what is reserved.
///
/// # Errors
/// When the machine does not say what it has, or a reserved amount can't be read.
pub fn allocatable(config: &AgentConfig) -> Result<BTreeMap<String, Quantity>, AgentError> {
    node::allocatable(config)
}

impl Agent {
    /// An agent that is ready to run.
    ///
    /// # Errors
    /// When the runtime does not answer or the configuration can't be used.
    pub async fn new(parts: AgentParts) -> Result<Self, AgentError> {
        let AgentParts { config, client, runtime, volumes, environment, events, .. } = parts;
        let version = runtime.version().await?;
        let node = NodeInfo::new(&config, &version)?;
        let metrics = Metrics::new(&parts.registry, &parts.probe_registry)?;
        metrics.set_node(&config.node_name);
        let context = Arc::new(Context {
            pulls: Semaphore::new(config.max_parallel_image_pulls.max(1)),
            runtime_name: version.name,
            memory_capacity: node.memory_bytes(),
            config,
            runtime,
            volumes,
            environment,
            client,
            events,
            metrics,
            directory: PodTable::default(),
            pulse: Arc::default(),
            shutdown: parts.shutdown,
        });
        Ok(Self { context, node })
    }

    /// The node's pods as the workers know them.
    pub fn directory(&self) -> Arc<dyn PodDirectory> {
        Arc::new(self.context.directory.clone())
    }

    /// The node's range of pod addresses, as soon as it is known: from the Node object, or from the
    /// configuration.
    pub fn pod_cidr(&self) -> watch::Receiver<Option<String>> {
        self.node.pod_cidr()
    }

    /// Whether the agent's loop turns, for `/healthz` and watchdogs.
    pub fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.context.pulse)
    }

    /// Whether this agent has reported its node as ready.
    pub fn node_ready(&self) -> watch::Receiver<bool> {
        self.node.ready()
    }

    /// Runs until the shutdown it was made with. Pods run on.
    ///
    /// # Errors
    /// When a task that the agent can't do without ended by itself.
    pub async fn run(self) -> Result<(), AgentError> {
        let Self { context, node } = self;
        // before the first look, so that nothing falls between
        let events = context.runtime.events();
        let Some(leftover) = leftovers(&context).await else { return Ok(()) };
        let (changes, changed) = mpsc::channel(CHANGES);
        let (mirrors, mirrors_seen) = watch::channel(Arc::new(Mirrors::default()));
        let mut tasks = MainTasks::default();
        let config = &context.config;
        if let Some(path) = &config.static_pod_path {
            let source = FileSource {
                path: path.clone(),
                kept: Some(config.root_dir.join("static-pods")),
                node: config.node_name.clone(),
                max_bytes: config.max_manifest_bytes,
                period: config.file_check_frequency,
                events: context.events.clone(),
                changes: changes.clone(),
                shutdown: context.shutdown.clone(),
            };
            tasks.spawn("folder of static pods", source.run());
        }
        if let Some(client) = &context.client {
            let (node, shutdown) = (config.node_name.clone(), context.shutdown.clone());
            let watch =
                sources::api::run(client.clone(), node.clone(), changes.clone(), shutdown.clone());
            tasks.spawn("watch of the node's pods", watch);
            tasks.spawn("mirror pods", mirror::run(client.clone(), node, mirrors_seen, shutdown));
        }
        let (node_view, node_uid) = (node.view(), node.uid());
        tasks.spawn("node", node::run(Arc::clone(&context), node));
        tasks.spawn("classes of pods", classes::run(Arc::clone(&context), node_view.clone()));
        tasks.spawn("rotation of logs", logs::run(Arc::clone(&context)));
        let dispatcher =
            Dispatcher::new(Arc::clone(&context), node_view, node_uid, leftover, mirrors);
        let mut dispatch = std::pin::pin!(dispatcher.run(changed, events));
        loop {
            tokio::select! {
                () = &mut dispatch => break,
                end = tasks.next_end() => {
                    if end.result.is_ok() && context.shutdown.is_cancelled() {
                        continue;
                    }
                    let why = end.result.err().map_or_else(String::new, |error| format!(": {error}"));
                    return Err(AgentError::Task(end.name, why));
                }
            }
        }
        // keeps the channel open for as long as somebody listens, with or without sources
        drop(changes);
        if !tasks.rest(REST).await {
            tracing::warn!("a task of the agent did not come to rest");
        }
        Ok(())
    }
}
