//! Semantics, over the in-process client.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams},
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::{Value, json};

use super::fixture::{world, world_with};
use crate::{auth::UserInfo, server::Limits};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": name, "labels": {"app": value}}, "data": {"k": value}})
}

fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"containers": [{"name": "c", "image": "local/app:1"}]}})
}

fn service(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_live_through_their_life() {
    let world = world().await;
    let created = world.must("POST", MAPS, Some(map("a", "1"))).await;
    assert!(created["metadata"]["uid"].is_string());
    let (code, status) = world.ask("POST", MAPS, Some(map("a", "1"))).await;
    assert_eq!((code, status["reason"].as_str()), (409, Some("AlreadyExists")));

    let mut newer = created.clone();
    newer["data"]["k"] = "2".into();
    let path = format!("{MAPS}/a");
    let updated = world.must("PUT", &path, Some(newer.clone())).await;
    assert_ne!(updated["metadata"]["resourceVersion"], created["metadata"]["resourceVersion"]);
    // The version it was made from is no longer the newest.
    newer["data"]["k"] = "3".into();
    let (code, status) = world.ask("PUT", &path, Some(newer)).await;
    assert_eq!((code, status["reason"].as_str()), (409, Some("Conflict")));
    // Nothing changes: nothing is written.
    let same = world.must("PUT", &path, Some(updated.clone())).await;
    assert_eq!(same["metadata"]["resourceVersion"], updated["metadata"]["resourceVersion"]);

    let patched = world.must("PATCH", &path, Some(json!({"data": {"k": null, "l": "4"}}))).await;
    assert_eq!(patched["data"], json!({"l": "4"}));
    let (code, _) =
        world.send("PATCH", &path, &[("content-type", "application/json")], b"{}".to_vec()).await;
    assert_eq!(code, 415);
    let dry = format!("{path}?dryRun=All");
    let dry = world.must("PATCH", &dry, Some(json!({"data": {"l": "5"}}))).await;
    assert_eq!(dry["data"]["l"], "5");
    assert_eq!(world.must("GET", &path, None).await["data"]["l"], "4");

    let wrong = json!({"preconditions": {"uid": "another"}});
    assert_eq!(world.ask("DELETE", &path, Some(wrong)).await.0, 409);
    let gone = world.must("DELETE", &path, None).await;
    assert_eq!(gone["status"], "Success");
    let (code, status) = world.ask("GET", &path, None).await;
    assert_eq!((code, status["message"].as_str()), (404, Some("configmaps \"a\" not found")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_are_told_what_is_wrong() {
    let world = world().await;
    let headers = |accept: &'static str| [("accept", accept)];
    let protobuf = "application/vnd.kubernetes.protobuf";
    assert_eq!(world.send("GET", MAPS, &headers(protobuf), Vec::new()).await.0, 406);
    let typed = [("content-type", protobuf)];
    assert_eq!(world.send("POST", MAPS, &typed, b"{}".to_vec()).await.0, 400);
    let cbor = [("content-type", "application/cbor")];
    assert_eq!(world.send("POST", MAPS, &cbor, b"{}".to_vec()).await.0, 415);
    let json = [("content-type", "application/json")];
    assert_eq!(world.send("POST", MAPS, &json, b"{".to_vec()).await.0, 400);
    assert_eq!(world.send("POST", MAPS, &json, vec![b' '; 4 << 20]).await.0, 413);
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(world.send("POST", MAPS, &json, deep.into_bytes()).await.0, 400);
    let (code, status) = world
        .ask(
            "POST",
            MAPS,
            Some(json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "Not A Name"}})),
        )
        .await;
    assert_eq!(code, 422);
    assert_eq!(status["details"]["causes"][0]["field"], "metadata.name");
    let unknown = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"},
        "nonsense": 1});
    let strict = format!("{MAPS}?fieldValidation=Strict");
    assert_eq!(world.ask("POST", &strict, Some(unknown)).await.0, 400);
    assert_eq!(world.ask("GET", "/api/v1/nonsense", None).await.0, 404);
    assert_eq!(world.ask("PATCH", "/version", None).await.0, 405);
    assert_eq!(world.ask("GET", &format!("{MAPS}?labelSelector=a%20b"), None).await.0, 400);
    assert_eq!(world.ask("GET", &format!("{MAPS}?fieldSelector=data.k=1"), None).await.0, 400);
    let missing = "/api/v1/namespaces/missing/configmaps";
    assert_eq!(world.ask("POST", missing, Some(map("a", "1"))).await.0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_have_selectors_and_consistent_pages() {
    let world = world().await;
    for n in 0..7 {
        let value = if n % 2 == 0 { "even" } else { "odd" };
        world.must("POST", MAPS, Some(map(&format!("m{n}"), value))).await;
    }
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().unwrap();
        items.iter().map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let odd = world.must("GET", &format!("{MAPS}?labelSelector=app%3Dodd"), None).await;
    assert_eq!(names(&odd), ["m1", "m3", "m5"]);
    let one = world.must("GET", &format!("{MAPS}?fieldSelector=metadata.name%3Dm2"), None).await;
    assert_eq!(names(&one), ["m2"]);
    let first = world.must("GET", &format!("{MAPS}?limit=3"), None).await;
    assert_eq!(names(&first), ["m0", "m1", "m2"]);
    assert_eq!(first["metadata"]["remainingItemCount"], 4);
    // What changes meanwhile does not change the list's later pages.
    world.must("DELETE", &format!("{MAPS}/m4"), None).await;
    world.must("POST", MAPS, Some(map("m31", "new"))).await;
    let token = first["metadata"]["continue"].as_str().unwrap();
    let rest = world.must("GET", &format!("{MAPS}?limit=10&continue={token}"), None).await;
    assert_eq!(names(&rest), ["m3", "m4", "m5", "m6"]);
    assert_eq!(rest["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    assert!(rest["metadata"].get("continue").is_none());
    let accept = [("accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1")];
    let (_, partial) = world.send("GET", MAPS, &accept, Vec::new()).await;
    assert_eq!(partial["kind"], "PartialObjectMetadataList");
    assert!(partial["items"][0].get("data").is_none());
    let accept = [("accept", "application/json;as=Table;g=meta.k8s.io;v=v1")];
    let (_, table) = world.send("GET", MAPS, &accept, Vec::new()).await;
    assert_eq!(table["rows"].as_array().unwrap().len(), 7);
    let (code, _) = world.ask("GET", &format!("{MAPS}?resourceVersion=999999"), None).await;
    assert_eq!(code, 504);
    let deleted = world.must("DELETE", &format!("{MAPS}?labelSelector=app%3Deven"), None).await;
    assert_eq!(names(&deleted), ["m0", "m2", "m6"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_begin_go_on_and_end_as_documented() {
    let limits = Limits { bookmark_interval: Duration::from_millis(100), ..Limits::default() };
    let world = world_with(limits).await;
    let maps: Api<ConfigMap> = Api::namespaced(world.client.clone(), "default");
    let typed = |value: Value| serde_json::from_value::<ConfigMap>(value).unwrap();
    maps.create(&PostParams::default(), &typed(map("a", "x"))).await.unwrap();
    let start = maps.list(&ListParams::default()).await.unwrap().metadata.resource_version.unwrap();
    let mut changes =
        maps.watch(&WatchParams::default().labels("app=x"), &start).await.unwrap().boxed();
    maps.create(&PostParams::default(), &typed(map("b", "x"))).await.unwrap();
    let began = Instant::now();
    let event = changes.try_next().await.unwrap().unwrap();
    assert!(matches!(event, WatchEvent::Added(ref m) if m.name_any() == "b"), "{event:?}");
    assert!(began.elapsed() < Duration::from_secs(1));
    let merge = |app: &str| Patch::Merge(json!({"metadata": {"labels": {"app": app}}}));
    maps.patch("b", &PatchParams::default(), &merge("y")).await.unwrap();
    // Bookmarks come in between.
    let event = loop {
        match changes.try_next().await.unwrap().unwrap() {
            WatchEvent::Bookmark(_) => {}
            event => break event,
        }
    };
    assert!(matches!(event, WatchEvent::Deleted(ref m) if m.name_any() == "b"), "{event:?}");
    let bookmark = changes.try_next().await.unwrap().unwrap();
    assert!(matches!(bookmark, WatchEvent::Bookmark(_)), "{bookmark:?}");

    // From a version that is long gone.
    world.server.core.store.compact(world.server.core.cache.applied()).await.unwrap();
    let world = world.restart().await;
    let url = format!("{MAPS}?watch=true&resourceVersion=1&timeoutSeconds=1");
    let too_old = world.must("GET", &url, None).await;
    assert_eq!((&too_old["type"], &too_old["object"]["code"]), (&json!("ERROR"), &json!(410)));

    // Objects that are there, their end, and then the time is over.
    let url = format!(
        "{MAPS}?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan\
         &allowWatchBookmarks=true&timeoutSeconds=1"
    );
    let lines = world.must("GET", &url, None).await;
    let lines: Vec<Value> =
        lines.as_str().unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        (lines[0]["type"].as_str(), lines[1]["type"].as_str()),
        (Some("ADDED"), Some("ADDED"))
    );
    assert_eq!(lines[2]["type"], "BOOKMARK");
    assert_eq!(lines[2]["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    assert_eq!(lines.last().unwrap()["type"], "BOOKMARK");
    let tables = [("accept", "application/json;as=Table;g=meta.k8s.io;v=v1")];
    let url = format!("{MAPS}?watch=true&timeoutSeconds=1");
    let (_, lines) = world.send("GET", &url, &tables, Vec::new()).await;
    let lines: Vec<Value> =
        lines.as_str().unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines[0]["object"]["columnDefinitions"].is_array());
    assert!(!lines[1]["object"]["columnDefinitions"].is_array());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reflectors_follow_with_and_without_streaming_lists() {
    let world = world().await;
    let maps: Api<ConfigMap> = Api::namespaced(world.client.clone(), "default");
    world.must("POST", MAPS, Some(map("a", "x"))).await;
    for config in [watcher::Config::default(), watcher::Config::default().streaming_lists()] {
        let mut stream = watcher(maps.clone(), config).applied_objects().boxed();
        let first = stream.try_next().await.unwrap().unwrap();
        assert_eq!(first.name_any(), "a");
        let value = world.must("GET", &format!("{MAPS}/a"), None).await["data"]["k"].clone();
        let next = format!("{}x", value.as_str().unwrap());
        let began = Instant::now();
        world.must("PATCH", &format!("{MAPS}/a"), Some(json!({"data": {"k": next}}))).await;
        let answered = began.elapsed();
        let second = stream.try_next().await.unwrap().unwrap();
        println!("answered after {answered:?}, seen after {:?}", began.elapsed());
        assert_eq!(second.data.unwrap()["k"], next);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_generated_and_conflicts_retried() {
    let world = world().await;
    let maps: Api<ConfigMap> = Api::namespaced(world.client.clone(), "default");
    let mut generated = ConfigMap::default();
    generated.metadata.generate_name = Some("gen-".into());
    let created = maps.create(&PostParams::default(), &generated).await.unwrap();
    assert!(created.name_any().starts_with("gen-") && created.name_any().len() == 9);
    world.must("POST", MAPS, Some(map("race", "0"))).await;
    // Patches that say nothing of a version never fail for a conflict.
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8 {
        let maps = maps.clone();
        tasks.spawn(async move {
            for n in 0..5 {
                let patch = Patch::Merge(json!({"data": {format!("{task}-{n}"): "x"}}));
                maps.patch("race", &PatchParams::default(), &patch).await.unwrap();
            }
        });
    }
    while let Some(joined) = tasks.join_next().await {
        joined.unwrap();
    }
    assert_eq!(maps.get("race").await.unwrap().data.unwrap().len(), 41);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn apply_owns_fields_and_reports_conflicts() {
    let world = world().await;
    let maps: Api<ConfigMap> = Api::namespaced(world.client.clone(), "default");
    let apply = |value: &str| {
        Patch::Apply(json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "a"}, "data": {"k": value}}))
    };
    let one = PatchParams::apply("one");
    maps.patch("a", &one, &apply("1")).await.unwrap();
    let error = maps.patch("a", &PatchParams::apply("two"), &apply("2")).await.unwrap_err();
    assert!(matches!(&error, kube::Error::Api(s) if s.code == 409), "{error}");
    let forced = maps.patch("a", &PatchParams::apply("two").force(), &apply("2")).await.unwrap();
    assert_eq!(forced.data.unwrap()["k"], "2");
    assert_eq!(forced.metadata.managed_fields.unwrap().len(), 2 - 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_are_bound_evicted_and_deleted_with_grace() {
    let world = world().await;
    world.service_account().await;
    let pods = "/api/v1/namespaces/default/pods";
    let created = world.must("POST", pods, Some(pod("web"))).await;
    assert_eq!(created["status"]["phase"], "Pending");
    assert_eq!(created["spec"]["restartPolicy"], "Always");
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "web"},
        "target": {"kind": "Node", "name": "node-1"}});
    world.must("POST", &format!("{pods}/web/binding"), Some(binding.clone())).await;
    assert_eq!(world.ask("POST", &format!("{pods}/web/binding"), Some(binding)).await.0, 409);
    let on_node = format!("{pods}?fieldSelector=spec.nodeName%3Dnode-1");
    let bound = world.must("GET", &on_node, None).await;
    assert_eq!(bound["items"].as_array().unwrap().len(), 1);

    let api: Api<Pod> = Api::namespaced(world.client.clone(), "default");
    let status = json!({"status": {"phase": "Running", "podIP": "10.244.0.5"}});
    let patch = Patch::Merge(status);
    let running = api.patch_status("web", &PatchParams::default(), &patch).await.unwrap();
    assert_eq!(running.status.unwrap().phase.as_deref(), Some("Running"));
    // The spec's update leaves the status alone.
    let labelled = json!({"metadata": {"labels": {"a": "b"}}, "status": {"phase": "Failed"}});
    let labelled = world.must("PATCH", &format!("{pods}/web"), Some(labelled)).await;
    assert_eq!(labelled["status"]["phase"], "Running");

    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": {"name": "web"}, "deleteOptions": {"gracePeriodSeconds": 7}});
    world.must("POST", &format!("{pods}/web/eviction"), Some(eviction)).await;
    let ending = world.must("GET", &format!("{pods}/web"), None).await;
    assert_eq!(ending["metadata"]["deletionGracePeriodSeconds"], 7);
    world.must("DELETE", &format!("{pods}/web?gracePeriodSeconds=0"), None).await;
    assert_eq!(world.ask("GET", &format!("{pods}/web"), None).await.0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn finalizers_and_namespaces_wait_for_their_keepers() {
    let world = world().await;
    let mut held = map("held", "x");
    held["metadata"]["finalizers"] = json!(["example.com/keeper"]);
    world.must("POST", MAPS, Some(held)).await;
    let ending = world.must("DELETE", &format!("{MAPS}/held"), None).await;
    assert!(ending["metadata"]["deletionTimestamp"].is_string());
    world.must("GET", &format!("{MAPS}/held"), None).await;
    let free = json!({"metadata": {"finalizers": null}});
    world.must("PATCH", &format!("{MAPS}/held"), Some(free)).await;
    assert_eq!(world.ask("GET", &format!("{MAPS}/held"), None).await.0, 404);

    let namespaces: Api<Namespace> = Api::all(world.client.clone());
    let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}});
    let created = world.must("POST", "/api/v1/namespaces", Some(body)).await;
    assert_eq!(created["spec"]["finalizers"], json!(["kubernetes"]));
    namespaces.delete("team", &DeleteParams::default()).await.unwrap();
    let mut ending = world.must("GET", "/api/v1/namespaces/team", None).await;
    assert_eq!(ending["status"]["phase"], "Terminating");
    let (code, status) =
        world.ask("POST", "/api/v1/namespaces/team/configmaps", Some(map("a", "x"))).await;
    assert_eq!(code, 403, "{status}");
    ending["spec"]["finalizers"] = json!([]);
    world.must("PUT", "/api/v1/namespaces/team/finalize", Some(ending)).await;
    assert_eq!(world.ask("GET", "/api/v1/namespaces/team", None).await.0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_get_addresses_and_ports_and_give_them_back() {
    let world = world().await;
    let services = "/api/v1/namespaces/default/services";
    let kubernetes = world.must("GET", &format!("{services}/kubernetes"), None).await;
    assert_eq!(kubernetes["spec"]["clusterIP"], "10.96.0.1");
    let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes";
    assert_eq!(world.must("GET", slices, None).await["endpoints"][0]["addresses"][0], "192.0.2.7");
    let fixed = json!({"type": "NodePort", "clusterIP": "10.96.0.77",
        "ports": [{"port": 80, "nodePort": 31000}], "selector": {"a": "b"}});
    let made = world.must("POST", services, Some(service("a", fixed.clone()))).await;
    assert_eq!(made["spec"]["sessionAffinity"], "None");
    assert_eq!(made["spec"]["ports"][0]["nodePort"], 31000);
    let (code, status) = world.ask("POST", services, Some(service("b", fixed.clone()))).await;
    assert_eq!(code, 422, "{status}");
    // The address of the refused one is not lost with the refusal.
    let world = world.restart().await;
    assert_eq!(world.ask("POST", services, Some(service("b", fixed.clone()))).await.0, 422);
    world.must("DELETE", &format!("{services}/a"), None).await;
    world.must("POST", services, Some(service("b", fixed))).await;
    let api: Api<Service> = Api::namespaced(world.client.clone(), "default");
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..20 {
        let api = api.clone();
        tasks.spawn(async move {
            let spec = json!({"type": "NodePort", "ports": [{"port": 80}]});
            let new = serde_json::from_value(service(&format!("s{n}"), spec)).unwrap();
            let made = api.create(&PostParams::default(), &new).await.unwrap().spec.unwrap();
            (made.cluster_ip.unwrap(), made.ports.unwrap()[0].node_port.unwrap())
        });
    }
    let mut seen = BTreeMap::new();
    while let Some(joined) = tasks.join_next().await {
        let (address, port) = joined.unwrap();
        assert!(seen.insert(address, port).is_none());
    }
    let ports: std::collections::BTreeSet<_> = seen.values().collect();
    assert_eq!(ports.len(), 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scales_read_and_write_replicas() {
    let world = world().await;
    let path = "/apis/apps/v1/namespaces/default/deployments";
    let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web"}, "spec": {"replicas": 2,
        "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c", "image": "local/app:1"}]}}}});
    world.must("POST", path, Some(deployment)).await;
    let scale = world.must("GET", &format!("{path}/web/scale"), None).await;
    assert_eq!(
        (scale["spec"]["replicas"].as_i64(), scale["kind"].as_str()),
        (Some(2), Some("Scale"))
    );
    let patch = json!({"spec": {"replicas": 5}});
    world.must("PATCH", &format!("{path}/web/scale"), Some(patch)).await;
    let scaled = world.must("GET", &format!("{path}/web"), None).await;
    assert_eq!(
        (&scaled["spec"]["replicas"], &scaled["metadata"]["generation"]),
        (&json!(5), &json!(2))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_may_do_what_they_were_given() {
    let world = world().await;
    let nobody = world.server.client(UserInfo::user("nobody", &[]));
    let maps: Api<ConfigMap> = Api::namespaced(nobody, "default");
    let error = maps.list(&ListParams::default()).await.unwrap_err();
    assert!(error.to_string().contains("cannot list resource"), "{error}");
    let node = world.server.client(UserInfo::user("system:node:node-1", &["system:nodes"]));
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(node);
    let new = serde_json::from_value(json!({"metadata": {"name": "node-1"}})).unwrap();
    nodes.create(&PostParams::default(), &new).await.unwrap();
    world.service_account().await;
    let path = "/api/v1/namespaces/default/serviceaccounts/default/token";
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"expirationSeconds": 600}});
    let token = world.must("POST", path, Some(request)).await;
    let token = token["status"]["token"].as_str().unwrap();
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
        "spec": {"token": token}});
    let reviewed =
        world.must("POST", "/apis/authentication.k8s.io/v1/tokenreviews", Some(review)).await;
    assert_eq!(reviewed["status"]["user"]["username"], "system:serviceaccount:default:default");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_version_and_metrics_are_served() {
    let world = world().await;
    for probe in ["/healthz", "/livez", "/readyz"] {
        assert_eq!(world.must("GET", probe, None).await, "ok");
    }
    let verbose = world.must("GET", "/readyz?verbose", None).await;
    assert!(verbose.as_str().unwrap().contains("[+]etcd ok\n"), "{verbose}");
    let version = world.must("GET", "/version", None).await;
    assert_eq!((&version["major"], &version["minor"]), (&json!("1"), &json!("36")));
    world.must("GET", MAPS, None).await;
    let metrics = world.must("GET", "/metrics", None).await;
    let metrics = metrics.as_str().unwrap();
    for name in [
        "apiserver_request_total{",
        "apiserver_request_duration_seconds_bucket{",
        "apiserver_storage_objects{resource=\"namespaces\"} 4",
        "etcd_request_duration_seconds_bucket{",
    ] {
        assert!(metrics.contains(name), "{name}\n{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_requests_are_turned_away() {
    let limits = Limits { max_reads_in_flight: 0, ..Limits::default() };
    let world = world_with(limits).await;
    let viewer = world.server.client(UserInfo::user("viewer", &[]));
    let request = http::Request::get("/version").body(Vec::new()).unwrap();
    let error = viewer.request_text(request).await.unwrap_err();
    assert!(matches!(&error, kube::Error::Api(s) if s.code == 429), "{error}");
    // Administrators get through.
    world.must("GET", "/version", None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_all_and_watches_go_on() {
    let world = world().await;
    let made = world.must("POST", MAPS, Some(map("a", "1"))).await;
    let version = made["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    world.must("PATCH", &format!("{MAPS}/a"), Some(json!({"data": {"k": "2"}}))).await;
    let world = world.restart().await;
    assert_eq!(world.must("GET", &format!("{MAPS}/a"), None).await["data"]["k"], "2");
    let url = format!("{MAPS}?watch=true&resourceVersion={version}&timeoutSeconds=1");
    let event = world.must("GET", &url, None).await;
    assert_eq!(event["type"], "MODIFIED", "{event}");
}
