//! What is particular to some kinds, and documents about all.

use std::time::{Duration, Instant};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{Request, StatusCode, header};
use kube::client::Body;
use serde_json::{Value, json};

use super::fixture::{World, world};

async fn until(world: &World, path: &str, holds: impl Fn(u16, &Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let (code, answer) = world.ask("GET", path, None).await;
        if holds(code, &answer) {
            return answer;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{path}: {code} {answer}");
        tokio::task::yield_now().await;
    }
}

const SECRET: &str = "/api/v1/namespaces/default/secrets/s";

async fn as_bearer(world: &World, token: &str) -> u16 {
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
        "spec": {"token": token}});
    let path = "/apis/authentication.k8s.io/v1/tokenreviews";
    let answer = world.must("POST", path, Some(review)).await;
    match answer["status"]["authenticated"] == json!(true) {
        true => {
            assert_eq!(
                answer["status"]["user"]["username"],
                "system:serviceaccount:default:default"
            );
            200
        }
        false => 401,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_accounts_secret_holds_a_token_and_goes_with_the_account() {
    let world = world().await;
    world.service_account().await;
    let authority = json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": "PEM"}});
    world.must("POST", "/api/v1/namespaces/default/configmaps", Some(authority)).await;
    let secret = json!({"apiVersion": "v1", "kind": "Secret",
        "type": "kubernetes.io/service-account-token", "metadata": {"name": "s",
        "annotations": {"kubernetes.io/service-account.name": "default"}}});
    world.must("POST", "/api/v1/namespaces/default/secrets", Some(secret)).await;
    let filled = until(&world, SECRET, |_, secret| secret["data"]["token"].is_string()).await;
    let data = |key: &str| {
        let text = filled["data"][key].as_str().unwrap_or_default();
        String::from_utf8(STANDARD.decode(text).unwrap()).unwrap()
    };
    assert_eq!((data("ca.crt").as_str(), data("namespace").as_str()), ("PEM", "default"));
    assert!(filled["metadata"]["annotations"]["kubernetes.io/service-account.uid"].is_string());
    let token = data("token");
    assert_eq!(as_bearer(&world, &token).await, 200);
    // Who takes it out gets another, and the first is worth nothing.
    world.must("PATCH", SECRET, Some(json!({"data": {"token": null}}))).await;
    let is_new = |_, secret: &Value| {
        secret["data"]["token"].as_str().is_some_and(|t| t != filled["data"]["token"])
    };
    let again = until(&world, SECRET, is_new).await;
    assert_eq!(as_bearer(&world, &token).await, 401);
    let again = STANDARD.decode(again["data"]["token"].as_str().unwrap()).unwrap();
    assert_eq!(as_bearer(&world, &String::from_utf8(again).unwrap()).await, 200);
    let account = "/api/v1/namespaces/default/serviceaccounts/default";
    world.must("DELETE", account, None).await;
    until(&world, SECRET, |code, _| code == 404).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn some_kinds_are_created_by_an_update() {
    let world = world().await;
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "l"}, "spec": {"holderIdentity": "a"}});
    let path = "/apis/coordination.k8s.io/v1/namespaces/default/leases/l";
    assert_eq!(world.ask("PUT", path, Some(lease.clone())).await.0, 201);
    assert_eq!(world.ask("PUT", path, Some(lease.clone())).await.0, 200);
    let mut gone = lease;
    gone["metadata"] = json!({"name": "m", "resourceVersion": "5"});
    let other = "/apis/coordination.k8s.io/v1/namespaces/default/leases/m";
    assert_eq!(world.ask("PUT", other, Some(gone)).await.0, 404);
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}});
    let path = "/api/v1/namespaces/default/configmaps/c";
    assert_eq!(world.ask("PUT", path, Some(map)).await.0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_that_are_named_by_their_hash_are_kept() {
    let world = world().await;
    let index = world.must("GET", "/openapi/v3", None).await;
    let url = index["paths"]["api/v1"]["serverRelativeURL"].as_str().unwrap().to_owned();
    let get = async |url: &str, tag: Option<&str>| {
        let mut request = Request::get(url);
        if let Some(tag) = tag {
            request = request.header(header::IF_NONE_MATCH, tag);
        }
        world.client.send(request.body(Body::empty()).unwrap()).await.unwrap()
    };
    let answer = get(&url, None).await;
    assert_eq!(answer.status(), StatusCode::OK);
    let headers = answer.headers();
    assert_eq!(headers[header::CACHE_CONTROL], "public, immutable");
    assert!(headers[header::EXPIRES].to_str().unwrap().ends_with(" GMT"));
    assert_eq!(headers[header::VARY], "Accept");
    let tag = headers[header::ETAG].to_str().unwrap().to_owned();
    assert!(url.ends_with(tag.trim_matches('"')));
    let again = get("/openapi/v3/api/v1", Some(&tag)).await;
    assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
    let old = get("/openapi/v3/api/v1?hash=OLD", None).await;
    assert_eq!(old.status(), StatusCode::MOVED_PERMANENTLY);
    assert_eq!(old.headers()[header::LOCATION].to_str().unwrap(), url);
    let second = get("/openapi/v2", None).await.headers()[header::ETAG].clone();
    let same = get("/openapi/v2", Some(second.to_str().unwrap())).await;
    assert_eq!(same.status(), StatusCode::NOT_MODIFIED);
}
