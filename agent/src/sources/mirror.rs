//! Mirror pods: the API's picture of static pods.
//!
//! A static pod is run from its file alone. So that it can be seen, the agent makes a pod in the API
//! that looks like it, marked by an annotation, and writes its status there. Deleting that picture
//! does not stop the static pod: it is made anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{
    api::core::v1::Pod,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use keelson_api::{backoff::Backoff, client_error, object::ObjectKey};
use kube::{
    Api, Client,
    api::{DeleteParams, PostParams, Preconditions},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::labels;

/// What there is and what there should be.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mirrors {
    /// The static pods that run here.
    pub(crate) wanted: BTreeMap<ObjectKey, Arc<Pod>>,
    /// The mirror pods in the API.
    pub(crate) found: BTreeMap<ObjectKey, Arc<Pod>>,
    /// Whether the API's pods are known: before, nothing can be missing.
    pub(crate) listed: bool,
    /// Whether the manifests were read: before, nothing can be too many.
    pub(crate) static_known: bool,
    /// The Node object's UID, the owner of all mirror pods.
    pub(crate) node_uid: Option<String>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    Create(Box<Pod>),
    Delete { key: ObjectKey, uid: String },
}

/// Whether a pod of the API is a mirror.
pub(crate) fn is_mirror(pod: &Pod) -> bool {
    annotation(pod, labels::CONFIG_MIRROR).is_some()
}

fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a String> {
    pod.metadata.annotations.as_ref()?.get(key)
}

fn plan(mirrors: &Mirrors, node: &str) -> Vec<Step> {
    if !mirrors.listed || !mirrors.static_known {
        return Vec::new();
    }
    let mut steps = Vec::new();
    for (key, pod) in &mirrors.found {
        let wanted = mirrors.wanted.get(key);
        let same = wanted.is_some_and(|wanted| {
            annotation(pod, labels::CONFIG_MIRROR) == annotation(wanted, labels::CONFIG_HASH)
        });
        if !same || pod.metadata.deletion_timestamp.is_some() {
            let uid = pod.metadata.uid.clone().unwrap_or_default();
            steps.push(Step::Delete { key: key.clone(), uid });
        }
    }
    let Some(node_uid) = &mirrors.node_uid else { return steps };
    for (key, pod) in &mirrors.wanted {
        if !mirrors.found.contains_key(key) {
            steps.push(Step::Create(Box::new(mirror_of(pod, node, node_uid))));
        }
    }
    steps
}

fn mirror_of(pod: &Pod, node: &str, node_uid: &str) -> Pod {
    let mut annotations = pod.metadata.annotations.clone().unwrap_or_default();
    if let Some(hash) = annotations.get(labels::CONFIG_HASH).cloned() {
        annotations.insert(labels::CONFIG_MIRROR.to_owned(), hash);
    }
    Pod {
        metadata: ObjectMeta {
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            labels: pod.metadata.labels.clone(),
            annotations: Some(annotations),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Node".to_owned(),
                name: node.to_owned(),
                uid: node_uid.to_owned(),
                controller: Some(true),
                block_owner_deletion: None,
            }]),
            ..Default::default()
        },
        spec: pod.spec.clone(),
        status: None,
    }
}

/// Keeps the mirror pods as they should be, until `shutdown`.
pub(crate) async fn run(
    client: Client,
    node: String,
    mut mirrors: watch::Receiver<Arc<Mirrors>>,
    shutdown: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));
    let mut told: BTreeSet<String> = BTreeSet::new();
    loop {
        let now = Arc::clone(&mirrors.borrow_and_update());
        let mut failed = false;
        for step in plan(&now, &node) {
            if let Err(error) = apply(&client, &step).await {
                failed = true;
                let message = client_error::shown(&error);
                if told.insert(message.clone()) {
                    tracing::warn!(message, "mirror pod not made or removed, trying again");
                }
            }
        }
        if !failed {
            told.clear();
            backoff.reset();
        }
        let again = async {
            if failed {
                tokio::time::sleep(backoff.next_wait()).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = again => {}
            changed = mirrors.changed() => if changed.is_err() { return },
        }
    }
}

async fn apply(client: &Client, step: &Step) -> Result<(), kube::Error> {
    match step {
        Step::Create(pod) => {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
            let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
            match pods.create(&PostParams::default(), pod).await {
                Ok(_) => Ok(()),
                // the watch will say what it is
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
                Err(error) => Err(error),
            }
        }
        Step::Delete { key, uid } => {
            let pods: Api<Pod> = Api::namespaced(client.clone(), key.namespace());
            let params = DeleteParams {
                grace_period_seconds: Some(0),
                preconditions: Some(Preconditions {
                    uid: Some(uid.clone()),
                    resource_version: None,
                }),
                ..Default::default()
            };
            match pods.delete(key.name(), &params).await {
                Ok(_) => Ok(()),
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
                Err(error) => Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::sources::static_pod;

    fn pod(image: &str) -> Arc<Pod> {
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec:\n  containers: [{{name: a, image: '{image}'}}]\n"
        );
        let path = std::path::Path::new("/m/a.yaml");
        let mut pods =
            static_pod::parse(text.as_bytes(), 4096, path, "n", Timestamp::UNIX_EPOCH).unwrap();
        Arc::new(pods.remove(0))
    }

    fn found(pod: &Pod) -> Arc<Pod> {
        let mut mirror = mirror_of(pod, "n", "node-uid");
        mirror.metadata.uid = Some("mirror-uid".to_owned());
        Arc::new(mirror)
    }

    fn mirrors(wanted: Option<&Arc<Pod>>, found: Option<Arc<Pod>>) -> Mirrors {
        let map = |pod: Option<Arc<Pod>>| {
            pod.into_iter().map(|pod| (ObjectKey::of(&pod.metadata), pod)).collect()
        };
        Mirrors {
            wanted: map(wanted.cloned()),
            found: map(found),
            listed: true,
            static_known: true,
            node_uid: Some("node-uid".to_owned()),
        }
    }

    #[test]
    fn mirrors_follow_the_static_pods() {
        let (old, new) = (pod("app:1"), pod("app:2"));
        let delete = |step: &Step| matches!(step, Step::Delete { uid, .. } if uid == "mirror-uid");
        let steps = plan(&mirrors(Some(&old), None), "n");
        assert!(matches!(&steps[..], [Step::Create(pod)] if is_mirror(pod)), "{steps:?}");
        assert_eq!(plan(&mirrors(Some(&old), Some(found(&old))), "n"), []);
        let steps = plan(&mirrors(Some(&new), Some(found(&old))), "n");
        assert!(matches!(&steps[..], [step] if delete(step)), "an outdated one goes first");
        let steps = plan(&mirrors(None, Some(found(&old))), "n");
        assert!(matches!(&steps[..], [step] if delete(step)));
        let unknown = Mirrors { listed: false, ..mirrors(Some(&old), None) };
        assert_eq!(plan(&unknown, "n"), [], "before the API was listed nothing is missing");
        let unread = Mirrors { static_known: false, ..mirrors(None, Some(found(&old))) };
        assert_eq!(plan(&unread, "n"), [], "before the manifests were read nothing is too many");
    }
}
