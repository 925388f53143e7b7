//! The node's lease: the heartbeat by which the control plane knows that the node lives.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::Node,
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference},
};
use keelson_api::{backoff::Backoff, client_error};
use kube::{Api, Client, api::PostParams};
use tokio::sync::watch;

use crate::worker::Context;

/// The namespace of all nodes' leases.
const NAMESPACE: &str = "kube-node-lease";

/// Renews the lease every quarter of its duration until the agent stops.
pub(crate) async fn run(
    client: Client,
    context: Arc<Context>,
    node_uid: watch::Receiver<Option<String>>,
) {
    let leases: Api<Lease> = Api::namespaced(client, NAMESPACE);
    let duration = context.config.node.lease_duration;
    let name = &context.config.node_name;
    let mut held: Option<Lease> = None;
    let mut backoff = Backoff::new(Duration::from_millis(200), duration / 6);
    loop {
        let uid = node_uid.borrow().clone();
        let wait = match renew(&leases, name, duration, uid, held.take()).await {
            Ok(lease) => {
                held = Some(lease);
                backoff.reset();
                // not all nodes at the same moment
                duration.mul_f64(0.25 * (1.0 + 0.04 * rand::random::<f64>()))
            }
            Err(error) => {
                let error = client_error::shown(&error);
                tracing::warn!(error, "lease of the node not renewed, trying again");
                backoff.next_wait()
            }
        };
        tokio::select! {
            () = context.shutdown.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Renews the lease that was held last, or what the API has.
async fn renew(
    leases: &Api<Lease>,
    name: &str,
    duration: Duration,
    node_uid: Option<String>,
    held: Option<Lease>,
) -> Result<Lease, kube::Error> {
    let found = match held {
        Some(lease) => Some(lease),
        None => leases.get_opt(name).await?,
    };
    let Some(mut lease) = found else {
        let lease = lease(name, duration, node_uid, ObjectMeta::default());
        return leases.create(&PostParams::default(), &lease).await;
    };
    lease = self::lease(name, duration, node_uid, lease.metadata);
    leases.replace(name, &PostParams::default(), &lease).await
}

fn lease(
    name: &str,
    duration: Duration,
    node_uid: Option<String>,
    mut metadata: ObjectMeta,
) -> Lease {
    metadata.name = Some(name.to_owned());
    metadata.namespace = Some(NAMESPACE.to_owned());
    metadata.managed_fields = None;
    if let Some(uid) = node_uid {
        metadata.owner_references = Some(vec![OwnerReference {
            api_version: <Node as k8s_openapi::Resource>::API_VERSION.to_owned(),
            kind: <Node as k8s_openapi::Resource>::KIND.to_owned(),
            name: name.to_owned(),
            uid,
            ..Default::default()
        }]);
    }
    Lease {
        metadata,
        spec: Some(LeaseSpec {
            holder_identity: Some(name.to_owned()),
            lease_duration_seconds: i32::try_from(duration.as_secs()).ok(),
            renew_time: Some(MicroTime(Timestamp::now())),
            ..Default::default()
        }),
    }
}
