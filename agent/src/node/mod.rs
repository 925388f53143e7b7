//! The node's own face in the API: its Node object and its lease.
//!
//! `machine` reads what the machine has, `plan` (pure) makes the Node object and its conditions from
//! it, `apply` registers and writes, `lease` keeps the lease.

pub(crate) mod apply;
pub(crate) mod lease;
pub(crate) mod machine;
pub(crate) mod plan;

use std::{collections::BTreeMap, sync::Arc};

use keelson_api::quantity::Quantity;
use keelson_runtime_shim::runtime::RuntimeVersion;
use machine::Machine;
use tokio::sync::watch;

use crate::{admission::NodeView, agent::AgentError, config::AgentConfig, worker::Context};

/// What the node's pods may use together.
pub(crate) fn allocatable(config: &AgentConfig) -> Result<BTreeMap<String, Quantity>, AgentError> {
    let machine =
        Machine::read(&config.root_dir).map_err(|error| AgentError::Machine(error.to_string()))?;
    let capacity = plan::capacity(&machine, config);
    plan::allocatable(&capacity, &config.node.reserved).map_err(AgentError::Config)
}

/// What is known of the node, and the channels that say it.
pub(crate) struct NodeInfo {
    machine: Machine,
    runtime: RuntimeVersion,
    capacity: BTreeMap<String, Quantity>,
    allocatable: BTreeMap<String, Quantity>,
    view: watch::Sender<Arc<NodeView>>,
    uid: watch::Sender<Option<String>>,
    pod_cidr: watch::Sender<Option<String>>,
    ready: watch::Sender<bool>,
}

impl NodeInfo {
    /// Reads the machine.
    pub(crate) fn new(config: &AgentConfig, runtime: &RuntimeVersion) -> Result<Self, AgentError> {
        let machine = Machine::read(&config.root_dir)
            .map_err(|error| AgentError::Machine(error.to_string()))?;
        let capacity = plan::capacity(&machine, config);
        let allocatable =
            plan::allocatable(&capacity, &config.node.reserved).map_err(AgentError::Config)?;
        let view = NodeView {
            name: config.node_name.clone(),
            labels: plan::labels(config),
            allocatable: allocatable.clone(),
            max_pods: usize::try_from(config.max_pods).unwrap_or(usize::MAX),
            allowed_unsafe_sysctls: config.allowed_unsafe_sysctls.clone(),
        };
        Ok(Self {
            machine,
            runtime: runtime.clone(),
            capacity,
            allocatable,
            view: watch::channel(Arc::new(view)).0,
            uid: watch::channel(None).0,
            pod_cidr: watch::channel(config.node.pod_cidr.clone()).0,
            ready: watch::channel(false).0,
        })
    }

    /// Bytes of memory of the machine.
    pub(crate) fn memory_bytes(&self) -> i64 {
        i64::try_from(self.machine.memory_bytes).unwrap_or(i64::MAX)
    }

    /// What decides whether pods are taken.
    pub(crate) fn view(&self) -> watch::Receiver<Arc<NodeView>> {
        self.view.subscribe()
    }

    /// The Node object's UID.
    pub(crate) fn uid(&self) -> watch::Receiver<Option<String>> {
        self.uid.subscribe()
    }

    /// Whether this process has reported the node as ready.
    pub(crate) fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// The pods' range.
    pub(crate) fn pod_cidr(&self) -> watch::Receiver<Option<String>> {
        self.pod_cidr.subscribe()
    }
}

/// Keeps the Node object and the lease until the agent stops. Without an API there is nothing to do.
pub(crate) async fn run(context: Arc<Context>, info: NodeInfo) {
    let Some(client) = context.client.clone() else {
        // the channels' ends stay here: their readers wait and are not told of an end
        context.shutdown.cancelled().await;
        return;
    };
    let lease = lease::run(client.clone(), Arc::clone(&context), info.uid());
    tokio::join!(lease, apply::run(client, Arc::clone(&context), info));
}
