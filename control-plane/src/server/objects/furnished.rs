//! A namespace's service account `default` comes a moment after the namespace, made by a controller:
//! a pod that is created in between waits for it, as at kube-apiserver.

use std::time::Duration;

use serde_json::Value;

use crate::{
    lookup::Lookup as _,
    registry::Resource,
    server::core::{Core, text},
};

/// How long at most; kube-apiserver tries for about as long.
const PATIENCE: Duration = Duration::from_secs(2);
const ACCOUNT: &str = "default";

/// Waits until the namespace of a new pod has the account that the pod will run as. Whether it came
/// is for admission to see.
pub(super) async fn wait(core: &Core, resource: &Resource, namespace: &str, object: &Value) {
    let is_pod = resource.group.is_empty() && resource.plural == "pods";
    if !is_pod || !runs_as_default(object) || is_there(core, namespace) {
        return;
    }
    let lives = core
        .cache
        .get("", "namespaces", None, namespace)
        .is_some_and(|namespace| text(&namespace, "/metadata/deletionTimestamp").is_empty());
    let Some(accounts) = core.cache.resource("", "serviceaccounts").filter(|_| lives) else {
        return;
    };
    let Ok(mut watcher) = accounts.watch(core.cache.applied()) else { return };
    let comes = async { while !is_there(core, namespace) && watcher.next().await.is_ok() {} };
    let _ = tokio::time::timeout(PATIENCE, comes).await;
}

fn runs_as_default(pod: &Value) -> bool {
    let mirror = "/metadata/annotations/kubernetes.io~1config.mirror";
    ["/spec/serviceAccountName", "/spec/serviceAccount"]
        .iter()
        .all(|pointer| matches!(text(pod, pointer), "" | ACCOUNT))
        && text(pod, mirror).is_empty()
}

fn is_there(core: &Core, namespace: &str) -> bool {
    core.cache.get("", "serviceaccounts", Some(namespace), ACCOUNT).is_some()
}
