//! What the scheduler writes: bindings, and why a pod has none.

use k8s_openapi::{
    api::core::v1::{Binding, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use keelson_api::{
    events::{EventRecorder, EventType},
    object::object_reference,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;

/// Gives a pod its node.
///
/// # Errors
/// When the API server refuses, or the pod is gone or bound already.
pub(crate) async fn bind(client: &Client, pod: &Pod, node: &str) -> Result<(), kube::Error> {
    let metadata = &pod.metadata;
    let namespace = metadata.namespace.clone().unwrap_or_default();
    let name = metadata.name.clone().unwrap_or_default();
    let binding = Binding {
        metadata: ObjectMeta {
            namespace: Some(namespace.clone()),
            name: Some(name.clone()),
            // The server refuses to bind another pod of the same name.
            uid: metadata.uid.clone(),
            ..ObjectMeta::default()
        },
        target: ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(node.to_owned()),
            ..ObjectReference::default()
        },
    };
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let _answer: serde_json::Value =
        pods.create_subresource("binding", &name, &PostParams::default(), &binding).await?;
    Ok(())
}

/// Says in an event which node a pod got.
pub(crate) fn report_bound(events: &EventRecorder, pod: &Pod, node: &str) {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    events.event(
        &object_reference(pod),
        EventType::Normal,
        "Scheduled",
        format!("Successfully assigned {namespace}/{name} to {node}"),
    );
}

/// Says in the pod's condition `PodScheduled` why it has no node, if it does not say so already.
///
/// # Errors
/// As the API server says; the next attempt tries again.
pub(crate) async fn report_condition(
    client: &Client,
    pod: &Pod,
    reason: &str,
    message: &str,
) -> Result<(), kube::Error> {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let known = conditions.into_iter().flatten().find(|c| c.type_ == "PodScheduled");
    let said = known.is_some_and(|c| {
        c.status == "False"
            && c.reason.as_deref() == Some(reason)
            && c.message.as_deref() == Some(message)
    });
    if said {
        return Ok(());
    }
    let since = known
        .filter(|c| c.status == "False")
        .and_then(|c| c.last_transition_time.as_ref())
        .map_or_else(jiff::Timestamp::now, |time| time.0);
    let patch = json!({
        "metadata": {"uid": pod.metadata.uid},
        "status": {"conditions": [{
            "type": "PodScheduled",
            "status": "False",
            "reason": reason,
            "message": message,
            "lastTransitionTime": k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(since),
            "lastProbeTime": null,
        }]},
    });
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    pods.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await?;
    Ok(())
}
