//! Namespaces on their way out: everything in them is deleted, then they are let go.
//!
//! Pods go first and all others only after the last pod, as Kubernetes does since 1.33 (KEP-5080):
//! so that no policy that protects a running pod is gone before it. What is in a namespace is
//! learnt from discovery, so kinds that nobody here has heard of go as well.

mod plan;

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Namespace;
use keelson_api::object::ObjectKey;
use kube::{
    Api, Client,
    api::{DeleteParams, DynamicObject, ListParams},
};
use tokio_util::sync::CancellationToken;

use self::plan::Left;
use super::{
    change::{self, Part},
    discover::{self, Discovered},
    error::{ControllerError, Doing, code, reason},
    queue::WorkQueue,
};
use crate::informers::Informers;

const WORKERS: usize = 3;
/// When to look again at a namespace that is not empty yet; its pods' ends are noticed sooner.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// The finalizer in a namespace's spec that stands for this controller.
const FINALIZER: &str = "kubernetes";

/// Empties namespaces that are being deleted until `shutdown`.
pub(crate) async fn run(client: Client, informers: Arc<Informers>, shutdown: CancellationToken) {
    let queue = WorkQueue::new();
    if !(informers.namespaces.synced(&shutdown).await && informers.pods.synced(&shutdown).await) {
        return;
    }
    let add = queue.clone();
    informers.namespaces.on_change(move |change| {
        if change.after.as_ref().is_some_and(|namespace| is_ours(namespace)) {
            add.add(change.key().name().to_owned());
        }
    });
    let (add, namespaces) = (queue.clone(), informers.namespaces.clone());
    informers.pods.on_change(move |change| {
        let namespace = change.key().namespace().to_owned();
        if change.after.is_none()
            && namespaces
                .get(&ObjectKey::new("", &namespace))
                .is_some_and(|namespace| is_ours(&namespace))
        {
            add.add(namespace);
        }
    });
    let work = |name: String| {
        let (client, informers) = (client.clone(), informers.clone());
        async move { reconcile(&client, &informers, &name).await }
    };
    queue.run("namespace", WORKERS, shutdown, work).await;
}

fn is_ours(namespace: &Namespace) -> bool {
    namespace.metadata.deletion_timestamp.is_some()
        && namespace
            .spec
            .iter()
            .flat_map(|spec| spec.finalizers.iter().flatten())
            .any(|finalizer| finalizer == FINALIZER)
}

async fn reconcile(
    client: &Client,
    informers: &Informers,
    name: &str,
) -> Result<Option<Duration>, ControllerError> {
    let Some(namespace) = informers.namespaces.get(&ObjectKey::new("", name)) else {
        return Ok(None);
    };
    if !is_ours(&namespace) {
        return Ok(None);
    }
    let left = delete_content(client, name).await;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let mut after = (*namespace).clone();
    after.status = Some(plan::status(&namespace, &left, Timestamp::now()));
    let current = match change::write(&namespaces, &*namespace, &after, Part::Status).await? {
        Some(written) => written,
        None => (*namespace).clone(),
    };
    if left.is_nothing() {
        finalize(client, current).await?;
        return Ok(None);
    }
    Ok(Some(LOOK_AGAIN))
}

async fn delete_content(client: &Client, namespace: &str) -> Left {
    let mut left = Left::default();
    let resources = match discover::resources(client).await {
        Ok(resources) => resources,
        Err(error) => {
            left.discovery_error = Some(error.to_string());
            return left;
        }
    };
    let in_namespaces: Vec<&Discovered> =
        resources.iter().filter(|r| r.namespaced && r.can("list") && r.can("delete")).collect();
    let is_pods = |r: &Discovered| r.resource.group.is_empty() && r.resource.plural == "pods";
    for resource in in_namespaces.iter().filter(|r| is_pods(r)) {
        delete_all(client, namespace, resource, &mut left).await;
    }
    if !left.is_nothing() {
        return left;
    }
    for resource in in_namespaces.iter().filter(|r| !is_pods(r)) {
        delete_all(client, namespace, resource, &mut left).await;
    }
    left
}

/// Deletes all objects of a resource and notes what stays.
async fn delete_all(client: &Client, namespace: &str, resource: &Discovered, left: &mut Left) {
    let api: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), namespace, &resource.resource);
    if let Err(error) = delete_and_count(&api, resource, left).await {
        // The kind itself may be gone, or know no such request.
        if !matches!(code(&error), 404 | 405) {
            left.deletion_errors.push(format!("{}: {}", resource.name(), reason(&error)));
        }
    }
}

async fn delete_and_count(
    api: &Api<DynamicObject>,
    resource: &Discovered,
    left: &mut Left,
) -> Result<(), kube::Error> {
    let params = DeleteParams::background();
    let present = api.list_metadata(&ListParams::default()).await?;
    if present.items.is_empty() {
        return Ok(());
    }
    if resource.can("deletecollection") {
        api.delete_collection(&params, &ListParams::default()).await?;
    } else {
        for object in &present.items {
            let name = object.metadata.name.as_deref().unwrap_or_default();
            match api.delete(name, &params).await {
                Err(error) if code(&error) != 404 => return Err(error),
                _ => {}
            }
        }
    }
    let rest = api.list_metadata(&ListParams::default()).await?;
    if !rest.items.is_empty() {
        left.objects.insert(resource.name(), rest.items.len());
    }
    for finalizer in rest.items.iter().flat_map(|o| o.metadata.finalizers.iter().flatten()) {
        *left.finalizers.entry(finalizer.clone()).or_default() += 1;
    }
    Ok(())
}

/// Lets the namespace go.
async fn finalize(client: &Client, mut namespace: Namespace) -> Result<(), ControllerError> {
    let name = namespace.metadata.name.clone().unwrap_or_default();
    if let Some(finalizers) = namespace.spec.as_mut().and_then(|spec| spec.finalizers.as_mut()) {
        finalizers.retain(|finalizer| finalizer != FINALIZER);
    }
    let doing = || format!("finalize namespace {name}");
    let body = serde_json::to_vec(&namespace).map_err(kube::Error::SerdeError).doing(doing)?;
    let request = http::Request::put(format!("/api/v1/namespaces/{name}/finalize"))
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(body)
        .map_err(kube::Error::HttpError)
        .doing(doing)?;
    match client.request::<Namespace>(request).await {
        Err(error) if code(&error) != 404 => Err(error).doing(doing),
        _ => Ok(()),
    }
}
