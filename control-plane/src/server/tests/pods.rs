//! What is particular to pods.

use serde_json::{Value, json};

use super::fixture::world;
use crate::auth::UserInfo;

fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"containers": [{"name": "c", "image": "local/app:1"}]}})
}

const PODS: &str = "/api/v1/namespaces/default/pods";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_right_after_its_namespace_waits_for_the_account() {
    let world = world().await;
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}});
    world.must("POST", "/api/v1/namespaces", Some(namespace)).await;
    let create = world.ask("POST", "/api/v1/namespaces/n/pods", Some(pod("web")));
    // What the controller does a moment later.
    let account = async {
        tokio::task::yield_now().await;
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": "default"}});
        world.must("POST", "/api/v1/namespaces/n/serviceaccounts", Some(account)).await
    };
    let ((code, answer), _) = tokio::join!(create, account);
    assert_eq!(code, 201, "{answer}");
    assert_eq!(answer["spec"]["serviceAccountName"], "default");
    // Another's account is not waited for.
    let mut other = pod("other");
    other["spec"]["serviceAccountName"] = "other".into();
    let (code, status) = world.ask("POST", "/api/v1/namespaces/n/pods", Some(other)).await;
    assert_eq!(code, 403, "{status}");
    let details = json!({"name": "other", "kind": "pods"});
    assert_eq!(status["details"], details, "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ephemeral_containers_are_refused_and_change_nothing_else() {
    let world = world().await;
    world.service_account().await;
    let mut changed = world.must("POST", PODS, Some(pod("web"))).await;
    let url = format!("{PODS}/web/ephemeralcontainers");
    changed["metadata"]["labels"] = json!({"app": "other"});
    changed["metadata"]["annotations"] = json!({"a": "b"});
    changed["metadata"]["finalizers"] = json!(["example.com/x"]);
    let same = world.must("PUT", &url, Some(changed)).await;
    for field in ["labels", "annotations", "finalizers"] {
        assert!(same["metadata"].get(field).is_none(), "{field}: {same}");
    }
    let debug = json!({"spec": {"ephemeralContainers": [{"name": "d", "image": "local/app:1"}]}});
    let (code, status) = world.ask("PATCH", &url, Some(debug)).await;
    assert_eq!(code, 422, "{status}");
    let cause = &status["details"]["causes"][0];
    assert_eq!(cause["field"], "spec.ephemeralContainers");
    assert!(cause["message"].as_str().unwrap().contains("not supported by Keelson yet"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_without_a_node_has_said_nothing() {
    let world = world().await;
    world.service_account().await;
    world.must("POST", PODS, Some(pod("web"))).await;
    assert_eq!(world.ask("GET", &format!("{PODS}/web/log"), None).await, (200, json!("")));
    assert_eq!(world.ask("GET", &format!("{PODS}/web/log?container=x"), None).await.0, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gated_pod_says_so_from_the_start() {
    let world = world().await;
    world.service_account().await;
    let mut gated = pod("web");
    gated["spec"]["schedulingGates"] = json!([{"name": "example.com/wait"}]);
    let made = world.must("POST", PODS, Some(gated)).await;
    let condition = json!({"type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
        "message": "Scheduling is blocked due to non-empty scheduling gates"});
    assert_eq!(made["status"]["conditions"], json!([condition]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_are_proxied_to() {
    let world = world().await;
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"ports": [{"port": 80}]}});
    world.must("POST", "/api/v1/namespaces/default/services", Some(service)).await;
    let url = "/api/v1/namespaces/default/services/web/proxy/path";
    let (code, status) = world.ask("GET", url, None).await;
    assert_eq!((code, status["reason"].as_str()), (503, Some("ServiceUnavailable")), "{status}");
    assert!(status["message"].as_str().unwrap().contains("no endpoints available"), "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_say_what_they_are_about() {
    let world = world().await;
    let nobody = world.server.client(UserInfo::user("nobody", &[]));
    let request = http::Request::get(format!("{PODS}/web")).body(Vec::new()).unwrap();
    let kube::Error::Api(status) = nobody.request_text(request).await.unwrap_err() else {
        panic!("not an answer")
    };
    let details = status.details.unwrap();
    assert_eq!((details.kind.as_str(), details.name.as_str()), ("pods", "web"));

    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}});
    world.must("POST", "/api/v1/namespaces", Some(namespace)).await;
    world.must("DELETE", "/api/v1/namespaces/n", None).await;
    let (code, status) = world.ask("POST", "/api/v1/namespaces/n/pods", Some(pod("web"))).await;
    assert_eq!(code, 403);
    let cause = json!({"reason": "NamespaceTerminating", "field": "metadata.namespace",
        "message": "namespace n is being terminated"});
    assert_eq!(status["details"]["causes"], json!([cause]), "{status}");
}
