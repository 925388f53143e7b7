//! The API's side: Services, and endpoints that come and go without pause.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use futures::{StreamExt, stream};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use keelson_tests::Machine;
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

use crate::node::{PORT, TALK, in_namespace, pod_address};

/// How many Services a burst makes or changes.
pub(crate) const BURST: u8 = 100;
/// Between two changes of the endpoints.
const ROLL: Duration = Duration::from_millis(10);
/// How many requests of a burst are under way at a time.
const AT_ONCE: usize = 16;

/// Changes things until it is dropped.
#[derive(Debug)]
pub(crate) struct Changes {
    stop: Arc<AtomicBool>,
    bursts: Arc<AtomicUsize>,
    changed: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Changes {
    /// Makes the Services, and begins to roll the endpoints of the first.
    pub(crate) fn start(machine: &Machine) -> Self {
        let path = machine.data_dir().join("admin.conf");
        let (stop, bursts, changed) = (Arc::default(), Arc::default(), Arc::default());
        let mut changes = Self { stop, bursts, changed, thread: None };
        let (stop, bursts) = (Arc::clone(&changes.stop), Arc::clone(&changes.bursts));
        let changed = Arc::clone(&changes.changed);
        let (ready, made) = std::sync::mpsc::channel();
        let thread = in_namespace(&machine.netns(), move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let kubeconfig = Kubeconfig::read_from(path).expect("a kubeconfig");
                let options = KubeConfigOptions::default();
                let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
                let client = Client::try_from(config.expect("a config")).expect("a client");
                let api = Objects::new(client);
                api.service("web", "10.96.0.80", json!({"port": 80, "nodePort": 30080}), PORT)
                    .await;
                api.endpoints("web", PORT, &[1, 2]).await;
                api.service("talk", "10.96.0.90", json!({"port": 90, "nodePort": 30090}), TALK)
                    .await;
                api.endpoints("talk", TALK, &[4]).await;
                ready.send(()).expect("the test");
                tokio::join!(roll(&api, &stop, &changed), burst(&api, &stop, &bursts));
                api.endpoints("web", PORT, &[LAST]).await;
            });
        });
        made.recv().expect("the first Services");
        changes.thread = Some(thread);
        changes
    }

    /// Has many more Services changed at once, beside the rolling.
    pub(crate) fn burst(&self) {
        self.bursts.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends them. Pod [`LAST`] is the endpoint that stays. Returns how often endpoints changed.
    pub(crate) fn stop(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the changes");
        }
        self.changed.load(Ordering::Relaxed)
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The endpoint that stays in the end.
pub(crate) const LAST: u8 = 2;

/// Endpoints come and go, and at least one is always there.
async fn roll(api: &Objects, stop: &AtomicBool, changed: &AtomicUsize) {
    let sets: [&[u8]; 6] = [&[2, 4], &[4], &[1, 2, 4], &[1], &[1, 3], &[1, 2]];
    for set in sets.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        api.endpoints("web", PORT, set).await;
        changed.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(ROLL).await;
    }
}

/// The address of a Service of the bursts.
pub(crate) fn burst_address(n: u8) -> std::net::Ipv4Addr {
    [10, 96, 1, n].into()
}

async fn burst(api: &Objects, stop: &AtomicBool, wanted: &AtomicUsize) {
    let mut done = 0;
    while !stop.load(Ordering::Relaxed) {
        if wanted.load(Ordering::Relaxed) == done {
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        }
        done += 1;
        let pod = 1 + u8::try_from(done % 3).expect("a small number");
        let each = stream::iter(0..BURST).map(|n| async move {
            let name = format!("burst-{n}");
            let address = burst_address(n).to_string();
            api.service(&name, &address, json!({"port": 80}), PORT).await;
            api.endpoints(&name, PORT, &[pod, 4]).await;
        });
        each.buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
    }
}

struct Objects {
    services: Api<Service>,
    slices: Api<EndpointSlice>,
}

impl Objects {
    fn new(client: Client) -> Self {
        let services = Api::default_namespaced(client.clone());
        Self { services, slices: Api::default_namespaced(client) }
    }

    async fn service(&self, name: &str, address: &str, port: Value, target: u16) {
        let mut ports = Vec::new();
        for protocol in ["TCP", "UDP"] {
            let mut one = port.clone();
            one["name"] = protocol.to_lowercase().into();
            one["protocol"] = protocol.into();
            one["targetPort"] = target.into();
            ports.push(one);
        }
        let kind = if port["nodePort"].is_null() { "ClusterIP" } else { "NodePort" };
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"clusterIP": address, "type": kind, "ports": ports},
        });
        let applied = self.services.patch(name, &force(), &Patch::Apply(service)).await;
        applied.unwrap_or_else(|error| panic!("Service {name}: {error}"));
    }

    async fn endpoints(&self, service: &str, port: u16, pods: &[u8]) {
        let name = format!("{service}-1");
        let endpoints: Vec<Value> =
            pods.iter().map(|n| json!({"addresses": [pod_address(*n).to_string()]})).collect();
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "tcp", "protocol": "TCP", "port": port},
                      {"name": "udp", "protocol": "UDP", "port": port}],
        });
        let applied = self.slices.patch(&name, &force(), &Patch::Apply(slice)).await;
        applied.unwrap_or_else(|error| panic!("EndpointSlice {name}: {error}"));
    }
}

fn force() -> PatchParams {
    PatchParams::apply("proxy-load").force()
}
