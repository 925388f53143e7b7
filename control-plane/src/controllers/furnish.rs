//! What every namespace has: the service account `default` and the ConfigMap with the cluster's
//! certificate authority, `kube-root-ca.crt`. Both come back when somebody removes or changes them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::{
    api::core::v1::{ConfigMap, Namespace, ServiceAccount},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use keelson_api::object::ObjectKey;
use kube::{Api, Client, api::PostParams};
use tokio_util::sync::CancellationToken;

use super::{
    change::{self, Part},
    error::{ControllerError, Doing, code},
    queue::WorkQueue,
};
use crate::informers::Informers;

const WORKERS: usize = 2;
const ACCOUNT: &str = "default";
const ROOT_CA: &str = "kube-root-ca.crt";
const DESCRIPTION: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when \
                           using internal endpoints such as the internal service IP or \
                           kubernetes.default.svc. No other usage is guaranteed across \
                           distributions of Kubernetes clusters.";

fn is_active(namespace: &Namespace) -> bool {
    let phase = namespace.status.as_ref().and_then(|s| s.phase.as_deref());
    namespace.metadata.deletion_timestamp.is_none() && phase != Some("Terminating")
}

fn metadata(namespace: &str, name: &str) -> ObjectMeta {
    ObjectMeta {
        namespace: Some(namespace.to_owned()),
        name: Some(name.to_owned()),
        ..ObjectMeta::default()
    }
}

/// Whether creating failed only because it is there, or because the namespace goes.
fn is_settled(error: &kube::Error) -> bool {
    matches!(code(error), 404 | 409)
        || matches!(error, kube::Error::Api(status)
            if status.code == 403 && status.details.iter().flat_map(|d| &d.causes)
                .any(|cause| cause.reason == "NamespaceTerminating"))
}

/// Keeps the default service accounts until `shutdown`.
pub(crate) async fn run_accounts(
    client: Client,
    informers: Arc<Informers>,
    shutdown: CancellationToken,
) {
    let queue = WorkQueue::new();
    if !(informers.namespaces.synced(&shutdown).await
        && informers.default_accounts.synced(&shutdown).await)
    {
        return;
    }
    let add = queue.clone();
    informers.namespaces.on_change(move |change| add.add(change.key().name().to_owned()));
    let add = queue.clone();
    informers.default_accounts.on_change(move |change| {
        if change.after.is_none() {
            add.add(change.key().namespace().to_owned());
        }
    });
    let work = |name: String| {
        let (client, informers) = (client.clone(), informers.clone());
        async move { ensure_account(&client, &informers, &name).await }
    };
    queue.run("serviceaccount", WORKERS, shutdown, work).await;
}

async fn ensure_account(
    client: &Client,
    informers: &Informers,
    name: &str,
) -> Result<Option<Duration>, ControllerError> {
    let namespace = informers.namespaces.get(&ObjectKey::new("", name));
    let there = informers.default_accounts.get(&ObjectKey::new(name, ACCOUNT)).is_some();
    if there || !namespace.is_some_and(|namespace| is_active(&namespace)) {
        return Ok(None);
    }
    let account = ServiceAccount { metadata: metadata(name, ACCOUNT), ..ServiceAccount::default() };
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), name);
    match api.create(&PostParams::default(), &account).await {
        Err(error) if !is_settled(&error) => {
            Err(error).doing(|| format!("create serviceaccount {name}/{ACCOUNT}"))
        }
        _ => Ok(None),
    }
}

/// Keeps the certificate authority's ConfigMaps until `shutdown`; `pem` is what they hold.
pub(crate) async fn run_root_ca(
    client: Client,
    informers: Arc<Informers>,
    pem: Arc<str>,
    shutdown: CancellationToken,
) {
    let queue = WorkQueue::new();
    if !(informers.namespaces.synced(&shutdown).await
        && informers.root_ca_maps.synced(&shutdown).await)
    {
        return;
    }
    let add = queue.clone();
    informers.namespaces.on_change(move |change| add.add(change.key().name().to_owned()));
    let add = queue.clone();
    informers.root_ca_maps.on_change(move |change| add.add(change.key().namespace().to_owned()));
    let work = |name: String| {
        let (client, informers, pem) = (client.clone(), informers.clone(), pem.clone());
        async move { ensure_root_ca(&client, &informers, &name, &pem).await }
    };
    queue.run("root-ca-cert-publisher", WORKERS, shutdown, work).await;
}

async fn ensure_root_ca(
    client: &Client,
    informers: &Informers,
    name: &str,
    pem: &str,
) -> Result<Option<Duration>, ControllerError> {
    let namespace = informers.namespaces.get(&ObjectKey::new("", name));
    if !namespace.is_some_and(|namespace| is_active(&namespace)) {
        return Ok(None);
    }
    let known = informers.root_ca_maps.get(&ObjectKey::new(name, ROOT_CA));
    let mut wanted = known
        .as_deref()
        .cloned()
        .unwrap_or_else(|| ConfigMap { metadata: metadata(name, ROOT_CA), ..ConfigMap::default() });
    wanted.data = Some(BTreeMap::from([("ca.crt".to_owned(), pem.to_owned())]));
    let annotations = wanted.metadata.annotations.get_or_insert_default();
    annotations.insert("kubernetes.io/description".to_owned(), DESCRIPTION.to_owned());
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), name);
    match known {
        Some(known) => {
            change::write(&api, &*known, &wanted, Part::Main).await?;
        }
        None => match api.create(&PostParams::default(), &wanted).await {
            Err(error) if !is_settled(&error) => {
                return Err(error).doing(|| format!("create configmap {name}/{ROOT_CA}"));
            }
            _ => {}
        },
    }
    Ok(None)
}
