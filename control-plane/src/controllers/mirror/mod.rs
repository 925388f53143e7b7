//! EndpointSlices of Endpoints that somebody wrote by hand for a Service without a selector, so that
//! whoever looks at slices alone (the proxy, DNS) sees them ("EndpointSlice mirroring" in the
//! documentation of EndpointSlices).

mod plan;

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use keelson_api::object::ObjectKey;
use kube::Client;
use tokio_util::sync::CancellationToken;

use super::{
    endpointslice::{
        carry_out,
        plan::{MANAGED_BY, SERVICE_NAME},
    },
    error::ControllerError,
    expectations::Expectations,
    queue::WorkQueue,
};
use crate::informers::Informers;

const WORKERS: usize = 2;
/// How long a pass waits for a slice that was made to be seen, before it looks again.
const UNSEEN: Duration = Duration::from_secs(1);

/// The Service whose mirrored slice this is.
fn owner(slice: &EndpointSlice) -> Option<ObjectKey> {
    let label = |key| slice.metadata.labels.as_ref().and_then(|labels| labels.get(key));
    let ours = label(MANAGED_BY).is_some_and(|manager| manager == plan::MANAGER);
    let namespace = slice.metadata.namespace.clone().unwrap_or_default();
    label(SERVICE_NAME).filter(|_| ours).map(|name| ObjectKey::new(namespace, name))
}

/// Keeps the mirrored slices until `shutdown`.
pub(crate) async fn run(client: Client, informers: Arc<Informers>, shutdown: CancellationToken) {
    if !(informers.services.synced(&shutdown).await
        && informers.endpoint_slices.synced(&shutdown).await
        && informers.endpoints.synced(&shutdown).await)
    {
        return;
    }
    let queue = WorkQueue::new();
    let expectations = Arc::new(Expectations::default());
    let add = queue.clone();
    informers.endpoints.on_change(move |change| add.add(change.key()));
    let add = queue.clone();
    informers.services.on_change(move |change| add.add(change.key()));
    let (add, seen) = (queue.clone(), expectations.clone());
    informers.endpoint_slices.on_change(move |change| {
        if let Some(owner) = change.newest().and_then(|slice| owner(slice)) {
            seen.created(&owner, change.key().name());
            add.add(owner);
        }
    });
    let work = |key: ObjectKey| {
        let (client, informers) = (client.clone(), informers.clone());
        let expectations = expectations.clone();
        async move { reconcile(&client, &informers, &expectations, &key).await }
    };
    queue.run("endpointslicemirroring", WORKERS, shutdown, work).await;
}

async fn reconcile(
    client: &Client,
    informers: &Informers,
    expectations: &Expectations,
    key: &ObjectKey,
) -> Result<Option<Duration>, ControllerError> {
    if !expectations.are_met(key) {
        return Ok(Some(UNSEEN));
    }
    let mut existing = informers.endpoint_slices.list_in(key.namespace());
    existing.retain(|slice| {
        slice.metadata.deletion_timestamp.is_none() && owner(slice).as_ref() == Some(key)
    });
    let (endpoints, service) = (informers.endpoints.get(key), informers.services.get(key));
    if service.is_none() {
        expectations.forget(key);
    }
    let plan = plan::plan(endpoints.as_deref(), service.as_deref(), &existing);
    carry_out(client, expectations, key, plan).await?;
    Ok(None)
}
