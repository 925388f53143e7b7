//! What the rest of the agent may ask about the node's pods.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use keelson_runtime_shim::runtime::{ContainerStatus, SandboxStatus};

/// A pod as the runtime has it now.
#[derive(Clone, Debug, Default)]
pub struct RuntimePod {
    /// Its sandbox, if there is one; the newest.
    pub sandbox: Option<SandboxStatus>,
    /// Its containers, old attempts included.
    pub containers: Vec<ContainerStatus>,
}

/// The pods of this node, as the workers know them; read by the HTTPS API and the statistics.
pub trait PodDirectory: Send + Sync + 'static {
    /// All pods with the status last computed.
    fn pods(&self) -> Vec<Arc<Pod>>;
    /// One pod.
    fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Pod>>;
    /// What the runtime has of the pod with this UID.
    fn runtime_pod(&self, uid: &str) -> Option<RuntimePod>;
}
