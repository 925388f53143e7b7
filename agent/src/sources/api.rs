//! The pods that the API server has for this node.

use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event},
    },
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Change;

/// Watches the pods of `node` until `shutdown`, and says what changes.
pub(crate) async fn run(
    client: Client,
    node: String,
    changes: mpsc::Sender<Change>,
    shutdown: CancellationToken,
) {
    let pods: Api<Pod> = Api::all(client);
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let mut stream = std::pin::pin!(watcher::watcher(pods, config).default_backoff());
    let mut listed: Vec<Arc<Pod>> = Vec::new();
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => return,
            event = stream.next() => event,
        };
        let change = match event {
            None => return,
            Some(Err(error)) => {
                tracing::warn!(%error, "pods of this node not watched, trying again");
                continue;
            }
            Some(Ok(Event::Init)) => {
                listed.clear();
                continue;
            }
            Some(Ok(Event::InitApply(pod))) => {
                listed.push(lean(pod));
                continue;
            }
            Some(Ok(Event::InitDone)) => Change::ApiAll(std::mem::take(&mut listed)),
            Some(Ok(Event::Apply(pod))) => Change::ApiPod(lean(pod)),
            Some(Ok(Event::Delete(pod))) => Change::ApiGone(lean(pod)),
        };
        if changes.send(change).await.is_err() {
            return;
        }
    }
}

/// The pod without what nobody here reads.
fn lean(mut pod: Pod) -> Arc<Pod> {
    pod.metadata.managed_fields = None;
    Arc::new(pod)
}
