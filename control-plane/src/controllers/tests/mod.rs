//! All loops together against an API server in memory, with a node that runs every pod at once.

mod fake;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use self::fake::FakeApi;
use super::ControllersConfig;
use crate::{informers::Informers, scheduler};

struct Cluster {
    api: FakeApi,
    shutdown: CancellationToken,
    tasks: tokio::task::JoinSet<()>,
}

impl Cluster {
    fn start() -> Self {
        let api = FakeApi::default();
        let shutdown = CancellationToken::new();
        for name in ["kube-system", "default"] {
            let namespace = json!({"metadata": {"name": name},
                "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}});
            api.put("namespaces", namespace);
        }
        let informers = Informers::start(&api.client(), &shutdown);
        let mut tasks = tokio::task::JoinSet::new();
        let registry = prometheus::Registry::new();
        let metrics = scheduler::SchedulerMetrics::register(&registry).unwrap();
        tasks.spawn(scheduler::run(api.client(), informers.clone(), metrics, shutdown.clone()));
        let config = ControllersConfig::new("PEM".into(), vec!["10.244.0.0/16".parse().unwrap()]);
        let (clients, with, until) = (api.clone(), informers.clone(), shutdown.clone());
        tasks.spawn(async move {
            super::run(move |_| clients.client(), with, config, until).await;
        });
        run_pods(&api, &informers);
        Self { api, shutdown, tasks }
    }

    async fn stop(mut self) {
        self.shutdown.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
    }

    async fn until(&self, what: &str, holds: impl Fn(&FakeApi) -> bool) -> Duration {
        let started = Instant::now();
        while !holds(&self.api) {
            assert!(started.elapsed() < Duration::from_secs(10), "{what}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        started.elapsed()
    }
}

/// The node's agent: pods that are bound to it run and are ready at once.
fn run_pods(api: &FakeApi, informers: &Arc<Informers>) {
    let api = api.clone();
    let next = std::sync::atomic::AtomicU32::new(2);
    informers.pods.on_change(move |change| {
        let Some(pod) = &change.after else { return };
        let bound = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        let runs = pod.status.as_ref().is_some_and(|status| status.pod_ip.is_some());
        if !bound || runs {
            return;
        }
        let number = next.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let status = json!({"status": {"phase": "Running", "podIP": format!("10.244.0.{number}"),
            "conditions": [{"type": "Ready", "status": "True",
                "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
        let key = change.key();
        api.change("pods", key.namespace(), key.name(), &status);
    });
}

fn deployment(image: &str) -> Value {
    json!({
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"replicas": 3, "progressDeadlineSeconds": 600,
            "selector": {"matchLabels": {"app": "web"}},
            "strategy": {"type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {"metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "c", "image": image}]}}},
    })
}

fn node() -> Value {
    json!({"metadata": {"name": "n1"}, "status": {
        "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"},
        "conditions": [{"type": "Ready", "status": "True"}]}})
}

fn ready_endpoints(api: &FakeApi) -> usize {
    let slices = api.list("endpointslices");
    let endpoints = slices.iter().filter_map(|slice| slice["endpoints"].as_array()).flatten();
    endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_lives_from_creation_to_collection() {
    let cluster = Cluster::start();
    let api = &cluster.api;
    cluster
        .until("each namespace is furnished", |api| {
            ["default", "kube-system"].iter().all(|namespace| {
                api.get("serviceaccounts", namespace, "default").is_some()
                    && api.get("configmaps", namespace, "kube-root-ca.crt").is_some()
            })
        })
        .await;

    // Without a node the pods wait, and say so.
    api.put("deployments", deployment("a"));
    let service = json!({"metadata": {"name": "web", "namespace": "default"},
        "spec": {"selector": {"app": "web"}, "ipFamilies": ["IPv4"],
            "ports": [{"port": 80, "protocol": "TCP"}]}});
    api.put("services", service);
    cluster
        .until("pods wait for a node", |api| {
            let pods = api.list("pods");
            pods.len() == 3
                && pods.iter().all(|pod| {
                    pod["status"]["conditions"][0]["message"]
                        == "no nodes available to schedule pods"
                })
        })
        .await;

    api.put("nodes", node());
    cluster
        .until("all are available", |api| {
            let status = api.get("deployments", "default", "web").unwrap()["status"].clone();
            status["availableReplicas"] == 3 && ready_endpoints(api) == 3
        })
        .await;
    assert_eq!(api.made("pods"), 3);
    assert_eq!(api.get("nodes", "", "n1").unwrap()["spec"]["podCIDR"], "10.244.0.0/24");
    cluster
        .until("the legacy object has them too", |api| {
            let legacy = api.get("endpoints", "default", "web").unwrap_or_default();
            legacy["subsets"][0]["addresses"].as_array().is_some_and(|all| all.len() == 3)
        })
        .await;

    // A pod that turns unready is out of the slice at once.
    let name = api.list("pods")[0]["metadata"]["name"].as_str().unwrap().to_owned();
    let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    api.change("pods", "default", &name, &unready);
    let took = cluster.until("it is out", |api| ready_endpoints(api) == 2).await;
    assert!(took < Duration::from_millis(200), "{took:?}");
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    api.change("pods", "default", &name, &ready);
    cluster.until("it is in again", |api| ready_endpoints(api) == 3).await;

    // An update replaces all pods, and makes no more than needed.
    let update = json!({"metadata": {"generation": 2}, "spec": {"template": {"spec":
        {"containers": [{"name": "c", "image": "b"}]}}}});
    api.change("deployments", "default", "web", &update);
    cluster
        .until("the update is complete", |api| {
            let status = api.get("deployments", "default", "web").unwrap()["status"].clone();
            status["updatedReplicas"] == 3
                && status["replicas"] == 3
                && status["availableReplicas"] == 3
                && status["observedGeneration"] == 2
        })
        .await;
    assert_eq!(api.made("pods"), 6);
    let images: Vec<Value> =
        api.list("pods").iter().map(|p| p["spec"]["containers"][0]["image"].clone()).collect();
    assert_eq!(images, ["b", "b", "b"]);

    // What the Deployment owned goes with it.
    let client = api.client();
    let deployments: kube::Api<k8s_openapi::api::apps::v1::Deployment> =
        kube::Api::namespaced(client.clone(), "default");
    deployments.delete("web", &kube::api::DeleteParams::background()).await.unwrap();
    cluster
        .until("all is collected", |api| {
            api.list("replicasets").is_empty() && api.list("pods").is_empty()
        })
        .await;

    // A namespace goes with all that is in it.
    let namespaces: kube::Api<k8s_openapi::api::core::v1::Namespace> = kube::Api::all(client);
    namespaces.delete("default", &kube::api::DeleteParams::default()).await.unwrap();
    cluster
        .until("the namespace is gone", |api| {
            api.get("namespaces", "", "default").is_none()
                && api.get("services", "default", "web").is_none()
                && api.get("configmaps", "default", "kube-root-ca.crt").is_none()
        })
        .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_written_by_hand_and_aggregated_roles_are_followed() {
    let cluster = Cluster::start();
    let api = &cluster.api;
    let service = json!({"metadata": {"name": "db", "namespace": "default"},
        "spec": {"ports": [{"port": 5432}]}});
    api.put("services", service);
    let endpoints = json!({"metadata": {"name": "db", "namespace": "default"},
        "subsets": [{"addresses": [{"ip": "192.0.2.1"}], "ports": [{"port": 5432}]}]});
    api.put("endpoints", endpoints);
    cluster.until("they are mirrored", |api| ready_endpoints(api) == 1).await;
    let manager = "endpointslice.kubernetes.io/managed-by";
    assert_eq!(
        api.list("endpointslices")[0]["metadata"]["labels"][manager],
        "endpointslicemirroring-controller.k8s.io"
    );
    let skip = json!({"metadata": {"labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}}});
    api.change("endpoints", "default", "db", &skip);
    cluster.until("they are not", |api| api.list("endpointslices").is_empty()).await;

    let rule = |verb: &str| json!([{"verbs": [verb], "apiGroups": [""], "resources": ["pods"]}]);
    let whole = json!({"metadata": {"name": "whole"}, "aggregationRule":
        {"clusterRoleSelectors": [{"matchLabels": {"to": "whole"}}]}, "rules": rule("own")});
    api.put("clusterroles", whole);
    let part =
        json!({"metadata": {"name": "part", "labels": {"to": "whole"}}, "rules": rule("get")});
    api.put("clusterroles", part);
    cluster
        .until("the role has its part's rules", |api| {
            api.get("clusterroles", "", "whole").unwrap()["rules"] == rule("get")
        })
        .await;
    cluster.stop().await;
}
