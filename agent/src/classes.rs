//! The cgroups above the pods' own: one for all pods, one for each class of service.
//!
//! ```text
//!   kubepods               the share and the memory that the node has for pods
//!   ├── pod<uid>           Guaranteed
//!   ├── burstable          the share that its pods request together
//!   │   └── pod<uid>
//!   └── besteffort         the smallest share
//!       └── pod<uid>
//! ```
//!
//! Without them a node full of pods that request nothing would take the CPU of those that do
//! (Kubernetes' node allocatable, `enforceNodeAllocatable: [pods]`, and its QoS cgroups).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Pod;
use keelson_api::quantity::Quantity;
use keelson_runtime_shim::runtime::LinuxResources;
use tokio::sync::watch;

use crate::{
    admission::NodeView,
    container_config::resources::{pod_request, shares},
    pods::PodDirectory,
    status::qos::{self, QosClass},
    worker::{Context, view},
};

/// How often the cgroups are set though nothing changed: another program may have.
const AGAIN: Duration = Duration::from_secs(60);

/// A cgroup's path, and what to set of it.
type Limits = BTreeMap<&'static str, LinuxResources>;

/// Keeps the cgroups as they should be until the agent's shutdown.
pub(crate) async fn run(context: Arc<Context>, node: watch::Receiver<Arc<NodeView>>) {
    let mut failed = Limits::new();
    loop {
        let limits = plan(&context.directory.pods(), &node.borrow().allocatable);
        for (path, resources) in &limits {
            match context.runtime.set_parent_cgroup(path, resources).await {
                Ok(()) => {
                    failed.remove(path);
                }
                Err(error) if failed.get(path) != Some(resources) => {
                    tracing::warn!(%error, "pods may get more or less of the CPU than they should");
                    failed.insert(path, resources.clone());
                }
                Err(_) => {}
            }
        }
        tokio::select! {
            () = context.directory.others() => {}
            () = tokio::time::sleep(AGAIN) => {}
            () = context.shutdown.cancelled() => return,
        }
    }
}

fn plan(pods: &[Arc<Pod>], allocatable: &BTreeMap<String, Quantity>) -> Limits {
    let share = |milli| LinuxResources { cpu_shares: Some(shares(milli)), ..Default::default() };
    let active = pods.iter().filter(|pod| !view::is_terminal(view::phase(pod)));
    let burstable = active
        .filter(|pod| qos::class(pod) == QosClass::Burstable)
        .fold(Quantity::ZERO, |sum, pod| sum + pod_request(pod, "cpu"));
    let of = |name: &str| allocatable.get(name).copied().unwrap_or(Quantity::ZERO);
    let memory = of("memory").value();
    let all =
        LinuxResources { memory_limit: (memory > 0).then_some(memory), ..share(of("cpu").milli()) };
    Limits::from([
        ("kubepods", all),
        ("kubepods/burstable", share(burstable.milli())),
        ("kubepods/besteffort", share(0)),
    ])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(requests: &serde_json::Value, limits: &serde_json::Value, phase: &str) -> Arc<Pod> {
        let value = json!({
            "metadata": {"name": "p", "namespace": "d"}, "status": {"phase": phase},
            "spec": {"containers": [
                {"name": "c", "image": "i", "resources": {"requests": requests, "limits": limits}},
            ]},
        });
        Arc::new(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn each_class_has_the_share_that_its_pods_request() {
        let both = json!({"cpu": "2", "memory": "1Gi"});
        let none = json!({});
        let pods = [
            pod(&json!({"cpu": "250m"}), &none, "Running"),
            pod(&json!({"cpu": "1"}), &none, "Pending"),
            pod(&json!({"cpu": "4"}), &none, "Succeeded"),
            pod(&both, &both, "Running"),
            pod(&none, &none, "Running"),
        ];
        let allocatable = BTreeMap::from([
            ("cpu".to_owned(), Quantity::parse("4").unwrap()),
            ("memory".to_owned(), Quantity::parse("8Gi").unwrap()),
        ]);
        let limits = plan(&pods, &allocatable);
        assert_eq!(limits["kubepods"].cpu_shares, Some(4096));
        assert_eq!(limits["kubepods"].memory_limit, Some(8 << 30));
        assert_eq!(limits["kubepods/burstable"].cpu_shares, Some(1280));
        assert_eq!(limits["kubepods/besteffort"].cpu_shares, Some(2));
        assert_eq!(limits["kubepods/besteffort"].memory_limit, None);
    }
}
