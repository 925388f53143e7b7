//! An API server in a few lines: objects in a map, conditional merge patches, watches. Just enough
//! for the controllers to be run together.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tokio::sync::mpsc;

const KINDS: [(&str, &str, &str, bool); 14] = [
    ("api/v1", "pods", "Pod", true),
    ("api/v1", "services", "Service", true),
    ("api/v1", "endpoints", "Endpoints", true),
    ("api/v1", "configmaps", "ConfigMap", true),
    ("api/v1", "serviceaccounts", "ServiceAccount", true),
    ("api/v1", "namespaces", "Namespace", false),
    ("api/v1", "nodes", "Node", false),
    ("api/v1", "events", "Event", true),
    ("apis/apps/v1", "deployments", "Deployment", true),
    ("apis/apps/v1", "replicasets", "ReplicaSet", true),
    ("apis/discovery.k8s.io/v1", "endpointslices", "EndpointSlice", true),
    ("apis/coordination.k8s.io/v1", "leases", "Lease", true),
    ("apis/events.k8s.io/v1", "events", "Event", true),
    ("apis/rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole", false),
];

type Key = (String, String, String);
type Answer = UnsyncBoxBody<Bytes, Infallible>;

struct Watcher {
    plural: String,
    namespace: String,
    name: Option<String>,
    events: mpsc::UnboundedSender<Bytes>,
}

#[derive(Default)]
struct State {
    revision: u64,
    /// By plural, namespace and name.
    objects: BTreeMap<Key, Value>,
    watchers: Vec<Watcher>,
    /// How many objects of each kind were ever made.
    made: BTreeMap<String, usize>,
}

#[derive(Clone, Default)]
pub(super) struct FakeApi {
    state: Arc<Mutex<State>>,
}

struct Target {
    plural: String,
    kind: &'static str,
    api_version: String,
    namespace: String,
    name: Option<String>,
    subresource: Option<String>,
}

fn target(path: &str) -> Option<Target> {
    let path = path.trim_start_matches('/');
    let (base, rest) = KINDS.iter().find_map(|(base, ..)| {
        path.strip_prefix(base).and_then(|rest| rest.strip_prefix('/')).map(|rest| (*base, rest))
    })?;
    let mut parts: Vec<&str> = rest.split('/').collect();
    let mut namespace = "";
    let of_namespace =
        parts.len() > 2 && KINDS.iter().any(|(b, p, ..)| *b == base && *p == parts[2]);
    if parts[0] == "namespaces" && of_namespace {
        namespace = parts[1];
        parts.drain(..2);
    }
    let (_, _, kind, _) = KINDS.iter().find(|(b, p, ..)| *b == base && *p == parts[0])?;
    Some(Target {
        plural: parts[0].to_owned(),
        kind,
        api_version: base.trim_start_matches("apis/").trim_start_matches("api/").to_owned(),
        namespace: namespace.to_owned(),
        name: parts.get(1).map(|name| (*name).to_owned()),
        subresource: parts.get(2).map(|name| (*name).to_owned()),
    })
}

fn failure(code: u16, reason: &str) -> (u16, Value) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
        "reason": reason, "message": reason, "metadata": {}});
    (code, status)
}

fn merge(target: &mut Value, patch: &Value, strategic: bool) {
    let Some(patch) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        let by = match key.as_str() {
            "conditions" => "type",
            "ownerReferences" => "uid",
            _ => "",
        };
        if value.is_null() {
            target.as_object_mut().unwrap().remove(key);
        } else if strategic && !by.is_empty() {
            let mut list = target[key].as_array().cloned().unwrap_or_default();
            for item in value.as_array().unwrap() {
                let place = list.iter_mut().find(|known| known[by] == item[by]);
                match place {
                    Some(_) if item["$patch"] == "delete" => {
                        list.retain(|known| known[by] != item[by]);
                    }
                    Some(known) => merge(known, item, true),
                    None if item["$patch"] == "delete" => {}
                    None => list.push(item.clone()),
                }
            }
            target[key] = json!(list);
        } else {
            merge(&mut target[key], value, strategic);
        }
    }
}

impl FakeApi {
    pub(super) fn client(&self) -> Client {
        let this = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let this = this.clone();
            async move { Ok::<_, Infallible>(this.serve(request).await) }
        });
        Client::new(service, "default")
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
        self.lock().objects.get(&key).cloned()
    }

    pub(super) fn list(&self, plural: &str) -> Vec<Value> {
        let state = self.lock();
        let of_kind = state.objects.iter().filter(|((known, ..), _)| known == plural);
        of_kind.map(|(_, object)| object.clone()).collect()
    }

    pub(super) fn made(&self, plural: &str) -> usize {
        self.lock().made.get(plural).copied().unwrap_or(0)
    }

    async fn serve(&self, request: Request<Body>) -> Response<Answer> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        let query: BTreeMap<String, String> = parts
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.replace("%3D", "=")))
            .collect();
        let body = body.collect().await.unwrap().to_bytes();
        let strategic = parts
            .headers
            .get("content-type")
            .is_some_and(|kind| kind.to_str().unwrap().contains("strategic"));
        if let Some(document) = discovery(&path) {
            return respond(200, &document);
        }
        let Some(target) = target(&path) else {
            let (code, status) = failure(404, "NotFound");
            return respond(code, &status);
        };
        let field = query.get("fieldSelector").and_then(|f| f.strip_prefix("metadata.name="));
        if query.contains_key("watch") {
            let from = query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
            return self.watch(&target, from, field);
        }
        let value: Value = serde_json::from_slice(&body).unwrap_or_default();
        let (code, answer) = match (&parts.method, &target.name) {
            (&Method::GET, None) => (200, self.list_of(&target, field)),
            (&Method::POST, None) => self.create(&target, value),
            (&Method::DELETE, None) => self.delete_all(&target),
            (method, Some(name)) => {
                let key = (target.plural.clone(), target.namespace.clone(), name.clone());
                self.one(method, &target, key, &value, strategic)
            }
            _ => failure(405, "MethodNotAllowed"),
        };
        respond(code, &answer)
    }

    fn list_of(&self, target: &Target, name: Option<&str>) -> Value {
        let state = self.lock();
        let items: Vec<Value> = state
            .objects
            .iter()
            .filter(|((plural, namespace, known), _)| {
                *plural == target.plural
                    && (target.namespace.is_empty() || *namespace == target.namespace)
                    && name.is_none_or(|name| name == known)
            })
            .map(|(_, object)| object.clone())
            .collect();
        json!({"kind": format!("{}List", target.kind), "apiVersion": target.api_version,
            "metadata": {"resourceVersion": state.revision.to_string()}, "items": items})
    }

    fn watch(&self, target: &Target, from: u64, name: Option<&str>) -> Response<Answer> {
        let (events, stream) = mpsc::unbounded_channel();
        let mut state = self.lock();
        for ((plural, namespace, known), object) in &state.objects {
            let revision: u64 =
                object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
            if *plural == target.plural
                && (target.namespace.is_empty() || *namespace == target.namespace)
                && name.is_none_or(|name| name == known)
                && revision > from
            {
                events.send(event("ADDED", object)).unwrap();
            }
        }
        state.watchers.push(Watcher {
            plural: target.plural.clone(),
            namespace: target.namespace.clone(),
            name: name.map(str::to_owned),
            events,
        });
        drop(state);
        let frames = tokio_stream::wrappers::UnboundedReceiverStream::new(stream);
        let frames = futures::StreamExt::map(frames, |b| Ok::<_, Infallible>(Frame::data(b)));
        Response::new(StreamBody::new(frames).boxed_unsync())
    }

    pub(super) fn put(&self, plural: &str, object: Value) {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
        let (base, _, kind, _) = KINDS.iter().find(|(_, known, ..)| *known == plural).unwrap();
        let target = Target {
            plural: plural.to_owned(),
            kind,
            api_version: base.trim_start_matches("apis/").trim_start_matches("api/").to_owned(),
            namespace: namespace.to_owned(),
            name: None,
            subresource: None,
        };
        let (code, answer) = self.create(&target, object);
        assert_eq!(code, 201, "{answer}");
    }

    pub(super) fn change(&self, plural: &str, namespace: &str, name: &str, patch: &Value) {
        let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
        let mut state = self.lock();
        let mut object = state.objects[&key].clone();
        merge(&mut object, patch, true);
        state.store(key, object, true);
    }

    fn create(&self, target: &Target, mut object: Value) -> (u16, Value) {
        let mut state = self.lock();
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let key = (target.plural.clone(), target.namespace.clone(), name);
        if state.objects.contains_key(&key) {
            return failure(409, "AlreadyExists");
        }
        object["kind"] = json!(target.kind);
        object["apiVersion"] = json!(target.api_version);
        let metadata = &mut object["metadata"];
        metadata["uid"] = json!(uuid::Uuid::new_v4().to_string());
        metadata["creationTimestamp"] = json!(jiff::Timestamp::now().to_string());
        metadata["generation"] = json!(1);
        if !target.namespace.is_empty() {
            metadata["namespace"] = json!(target.namespace);
        }
        *state.made.entry(target.plural.clone()).or_default() += 1;
        (201, state.store(key, object, false))
    }

    fn delete_all(&self, target: &Target) -> (u16, Value) {
        let mut state = self.lock();
        let keys: Vec<Key> = state
            .objects
            .keys()
            .filter(|(plural, namespace, _)| {
                *plural == target.plural && *namespace == target.namespace
            })
            .cloned()
            .collect();
        for key in keys {
            state.delete(&key);
        }
        (200, json!({"kind": "List", "apiVersion": "v1", "metadata": {}, "items": []}))
    }

    fn one(
        &self,
        method: &Method,
        target: &Target,
        key: Key,
        value: &Value,
        strategic: bool,
    ) -> (u16, Value) {
        let mut state = self.lock();
        let Some(known) = state.objects.get(&key).cloned() else {
            return failure(404, "NotFound");
        };
        let wanted = &value["metadata"];
        let wanted = if *method == Method::DELETE { &value["preconditions"] } else { wanted };
        for field in ["resourceVersion", "uid"] {
            if !wanted[field].is_null() && wanted[field] != known["metadata"][field] {
                return failure(409, "Conflict");
            }
        }
        match (method, target.subresource.as_deref()) {
            (&Method::GET, _) => (200, known),
            (&Method::DELETE, _) => {
                state.delete(&key);
                (200, known)
            }
            (&Method::POST, Some("binding")) => {
                let mut pod = known;
                pod["spec"]["nodeName"] = value["target"]["name"].clone();
                state.store(key, pod, true);
                (201, json!({"kind": "Status", "apiVersion": "v1", "status": "Success"}))
            }
            (&Method::PUT, Some("finalize")) => {
                state.remove(&key);
                (200, known)
            }
            (&Method::PATCH, subresource) => {
                let mut patch = value.clone();
                if subresource == Some("status") {
                    patch = json!({"status": patch["status"]});
                }
                let mut object = known.clone();
                merge(&mut object, &patch, strategic);
                if object["spec"] != known["spec"] {
                    let generation = known["metadata"]["generation"].as_i64().unwrap();
                    object["metadata"]["generation"] = json!(generation + 1);
                }
                (200, state.store(key, object, true))
            }
            _ => failure(405, "MethodNotAllowed"),
        }
    }
}

impl State {
    fn store(&mut self, key: Key, mut object: Value, known: bool) -> Value {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        self.objects.insert(key.clone(), object.clone());
        self.tell(&key, if known { "MODIFIED" } else { "ADDED" }, &object);
        object
    }

    fn delete(&mut self, key: &Key) {
        if key.0 == "namespaces" {
            let mut object = self.objects[key].clone();
            object["metadata"]["deletionTimestamp"] = json!(jiff::Timestamp::now().to_string());
            self.store(key.clone(), object, true);
        } else {
            self.remove(key);
        }
    }

    fn remove(&mut self, key: &Key) {
        self.revision += 1;
        if let Some(mut object) = self.objects.remove(key) {
            object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
            self.tell(key, "DELETED", &object);
        }
    }

    fn tell(&mut self, (plural, namespace, name): &Key, kind: &str, object: &Value) {
        self.watchers.retain(|watcher| {
            let wanted = watcher.plural == *plural
                && (watcher.namespace.is_empty() || watcher.namespace == *namespace)
                && watcher.name.as_ref().is_none_or(|wanted| wanted == name);
            !wanted || watcher.events.send(event(kind, object)).is_ok()
        });
    }
}

fn event(kind: &str, object: &Value) -> Bytes {
    let mut line = json!({"type": kind, "object": object}).to_string();
    line.push('\n');
    line.into()
}

fn discovery(path: &str) -> Option<Value> {
    let path = path.trim_start_matches('/');
    let bases: BTreeSet<&str> = KINDS.iter().map(|(base, ..)| *base).collect();
    if path == "apis" {
        let groups: Vec<Value> = bases
            .iter()
            .filter_map(|base| base.strip_prefix("apis/"))
            .map(|gv| {
                let version = json!({"groupVersion": gv, "version": "v1"});
                json!({"name": gv.split('/').next().unwrap(), "versions": [version],
                    "preferredVersion": version})
            })
            .collect();
        return Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}));
    }
    let base = bases.iter().find(|base| **base == path)?;
    let resources: Vec<Value> = KINDS
        .iter()
        .filter(|(known, ..)| known == base)
        .map(|(_, plural, kind, namespaced)| {
            json!({"name": plural, "singularName": "", "kind": kind, "namespaced": namespaced,
                "verbs": ["create", "delete", "deletecollection", "get", "list", "patch",
                    "update", "watch"]})
        })
        .collect();
    let version = base.trim_start_matches("apis/").trim_start_matches("api/");
    Some(json!({"kind": "APIResourceList", "groupVersion": version, "resources": resources}))
}

fn respond(code: u16, value: &Value) -> Response<Answer> {
    let mut response = Response::new(Full::from(value.to_string()).boxed_unsync());
    *response.status_mut() = code.try_into().unwrap();
    response
}
