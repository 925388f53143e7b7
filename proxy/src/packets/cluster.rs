//! A stand-in for the API server whose objects change, and whole proxies that watch it.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::IpAddr,
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use futures::StreamExt;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Frame};
use kube::{Client, client::Body};
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::fixture::Addresses;
use crate::{ProxyConfig, ProxyError, model::Family, netns::Namespace, run_with_registry};

/// A change, and what it was about.
#[derive(Clone)]
struct Event {
    path: &'static str,
    event: Value,
}

#[derive(Default)]
struct Objects {
    /// By path and name.
    now: BTreeMap<(&'static str, String), Value>,
    /// All changes; an object's version is its place.
    log: Vec<Event>,
    /// What the proxy told about Services: name, reason and message.
    told: Vec<(String, String, String)>,
}

/// The API server's objects.
#[derive(Clone)]
pub(super) struct Api {
    objects: Arc<Mutex<Objects>>,
    version: Arc<watch::Sender<usize>>,
}

impl Api {
    /// One that knows of the node `here` only.
    pub(super) fn new() -> Self {
        let api = Self { objects: Arc::default(), version: Arc::new(watch::Sender::new(0)) };
        api.set_node("zone-a", [Family::V4, Family::V6].map(|family| Addresses(family).node()));
        api
    }

    /// Creates or changes the node `here`.
    pub(super) fn set_node(&self, zone: &str, addresses: [IpAddr; 2]) {
        let addresses = addresses.map(|address| json!({"type": "InternalIP", "address": address}));
        self.set(json!({"kind": "Node", "metadata": {"name": "here",
            "labels": {"topology.kubernetes.io/zone": zone}},
            "status": {"addresses": addresses}}));
    }

    /// Creates or changes an object.
    pub(super) fn set(&self, mut object: Value) {
        let mut objects = self.objects.lock().unwrap();
        let path = match object["kind"].as_str().unwrap() {
            "Service" => SERVICES,
            "EndpointSlice" => SLICES,
            "Node" => NODES,
            "ServiceCIDR" => SERVICE_CIDRS,
            other => panic!("{other} is not served"),
        };
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let version = objects.log.len() + 1;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let before = objects.now.insert((path, name), object.clone());
        let kind = if before.is_some() { "MODIFIED" } else { "ADDED" };
        objects.log.push(Event { path, event: json!({"type": kind, "object": object}) });
        self.version.send_replace(version);
    }

    /// A client for the runtime that this is called on.
    fn client(&self) -> Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move {
                if request.method() == Method::POST {
                    return Ok::<_, Infallible>(Response::new(api.hear(request).await));
                }
                Ok(Response::new(api.answer(&request)))
            }
        });
        Client::new(service, "default")
    }

    /// Takes in that an object of this kind is gone.
    pub(super) fn remove(&self, kind: &str, name: &str) {
        let mut objects = self.objects.lock().unwrap();
        let path = match kind {
            "Service" => SERVICES,
            "ServiceCIDR" => SERVICE_CIDRS,
            _ => SLICES,
        };
        let version = objects.log.len() + 1;
        let mut object = objects.now.remove(&(path, name.to_owned())).unwrap();
        object["metadata"]["resourceVersion"] = version.to_string().into();
        objects.log.push(Event { path, event: json!({"type": "DELETED", "object": object}) });
        self.version.send_replace(version);
    }

    /// What was told about a Service: reasons and messages.
    pub(super) fn told(&self, service: &str) -> Vec<(String, String)> {
        let objects = self.objects.lock().unwrap();
        let about = objects.told.iter().filter(|(name, ..)| name == service);
        about.map(|(_, reason, message)| (reason.clone(), message.clone())).collect()
    }

    /// Takes an event.
    async fn hear(&self, request: Request<Body>) -> Answer {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let event: Value = serde_json::from_slice(&body).unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let told = (
            text(&event["involvedObject"]["name"]),
            text(&event["reason"]),
            text(&event["message"]),
        );
        self.objects.lock().unwrap().told.push(told);
        whole(&event)
    }

    fn answer(&self, request: &Request<Body>) -> Answer {
        let Some(path) = [SERVICES, SLICES, NODES, SERVICE_CIDRS]
            .into_iter()
            .find(|path| *path == request.uri().path())
        else {
            return whole(&json!({}));
        };
        let query = request.uri().query().unwrap_or_default();
        let parameter = |name: &str| {
            query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
        };
        if parameter("watch") == Some("true") {
            let since = parameter("resourceVersion").and_then(|v| v.parse().ok());
            return self.watch(path, since.unwrap_or(0));
        }
        let objects = self.objects.lock().unwrap();
        let items: Vec<&Value> =
            objects.now.iter().filter(|((p, _), _)| *p == path).map(|(_, object)| object).collect();
        let list = json!({"kind": "List", "apiVersion": "v1", "items": items,
            "metadata": {"resourceVersion": objects.log.len().to_string()}});
        whole(&list)
    }

    fn watch(&self, path: &'static str, since: usize) -> Answer {
        let state = (self.clone(), self.version.subscribe(), since);
        let lines =
            futures::stream::unfold(state, move |(api, mut version, mut sent)| async move {
                loop {
                    version.borrow_and_update();
                    let new: Vec<Event> = api.objects.lock().unwrap().log[sent..].to_vec();
                    sent += new.len();
                    let lines: Vec<u8> = new
                        .iter()
                        .filter(|event| event.path == path)
                        .flat_map(|event| {
                            [event.event.to_string().into_bytes(), vec![b'\n']].concat()
                        })
                        .collect();
                    if !lines.is_empty() {
                        return Some((lines, (api, version, sent)));
                    }
                    version.changed().await.ok()?;
                }
            });
        let frames = lines.map(|lines| Ok::<_, Infallible>(Frame::data(Bytes::from(lines))));
        StreamBody::new(frames).boxed_unsync()
    }
}

fn whole(answer: &Value) -> Answer {
    Full::new(Bytes::from(answer.to_string())).boxed_unsync()
}

type Answer = UnsyncBoxBody<Bytes, Infallible>;

const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const NODES: &str = "/api/v1/nodes";
const SERVICE_CIDRS: &str = "/apis/networking.k8s.io/v1/servicecidrs";

/// A whole proxy in a host's namespace.
pub(super) struct Running {
    shutdown: CancellationToken,
    registry: Registry,
    thread: JoinHandle<Result<(), ProxyError>>,
}

impl Running {
    /// Starts one.
    pub(super) fn start(host: &Namespace, config: ProxyConfig, api: &Api) -> Self {
        let (shutdown, registry, api) = (CancellationToken::new(), Registry::new(), api.clone());
        let (token, metrics) = (shutdown.clone(), registry.clone());
        let thread = host.run(move || {
            std::thread::spawn(move || {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    run_with_registry(config, api.client(), metrics, token).await
                })
            })
        });
        Self { shutdown, registry, thread }
    }

    /// Whether its metrics have a line that begins so.
    pub(super) fn has_metric(&self, begin: &str) -> bool {
        let text = keelson_api::metrics::encode(&self.registry).unwrap();
        text.lines().any(|line| line.starts_with(begin))
    }

    /// The sum of a counter over its labels.
    pub(super) fn count(&self, name: &str) -> u64 {
        let text = keelson_api::metrics::encode(&self.registry).unwrap();
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with(['{', ' ']).then(|| rest.rsplit(' ').next())?
        });
        values.map(|value| value.parse::<u64>().unwrap()).sum()
    }

    /// Stops it and waits until it has ended.
    pub(super) fn stop(self) {
        self.shutdown.cancel();
        self.thread.join().unwrap().unwrap();
    }
}
