//! What the runtime has of pods from before this agent started.

use std::{collections::HashMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::Pod,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use keelson_api::backoff::Backoff;
use keelson_runtime_shim::runtime::{ContainerStatus, RuntimeError, SandboxStatus};

use crate::{labels, worker::Context};

/// What the runtime has of one pod from before this agent started.
#[derive(Debug, Default)]
pub(crate) struct Leftover {
    /// Its sandboxes.
    pub(crate) sandboxes: Vec<SandboxStatus>,
    /// Their containers.
    pub(crate) containers: Vec<ContainerStatus>,
}

/// What the runtime has from before; asked for until it answers or the agent stops.
pub(crate) async fn leftovers(context: &Context) -> Option<HashMap<String, Leftover>> {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
    loop {
        context.pulse.beat();
        let listed = async {
            let sandboxes = context.runtime.list_pod_sandboxes().await?;
            let containers = context.runtime.list_containers(None).await?;
            Ok::<_, RuntimeError>((sandboxes, containers))
        };
        match listed.await {
            Ok((sandboxes, containers)) => {
                let mut found: HashMap<String, Leftover> = HashMap::new();
                let mut owners = HashMap::new();
                for sandbox in sandboxes {
                    owners.insert(sandbox.id.clone(), sandbox.config.uid.clone());
                    found.entry(sandbox.config.uid.clone()).or_default().sandboxes.push(sandbox);
                }
                for container in containers {
                    if let Some(uid) = owners.get(&container.sandbox) {
                        found.entry(uid.clone()).or_default().containers.push(container);
                    }
                }
                return Some(found);
            }
            Err(error) => tracing::warn!(%error, "runtime does not list its pods, trying again"),
        }
        tokio::select! {
            () = context.shutdown.cancelled() => return None,
            () = tokio::time::sleep(backoff.next_wait()) => {}
        }
    }
}

/// A pod of which only the runtime's labels are left.
pub(crate) fn orphan(uid: &str, leftover: &Leftover) -> Pod {
    let config = leftover.sandboxes.first().map(|sandbox| &sandbox.config);
    let grace = leftover
        .containers
        .iter()
        .find_map(|container| container.annotations.get(labels::GRACE_PERIOD)?.parse().ok());
    Pod {
        metadata: ObjectMeta {
            uid: Some(uid.to_owned()),
            name: config.map(|config| config.name.clone()),
            namespace: config.map(|config| config.namespace.clone()),
            deletion_grace_period_seconds: grace,
            deletion_timestamp: Some(Time(Timestamp::now())),
            ..Default::default()
        },
        spec: None,
        status: None,
    }
}
