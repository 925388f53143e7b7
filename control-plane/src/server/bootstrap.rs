//! What a cluster can't be without, put into the store at start: namespaces, the `kubernetes`
//! Service and its endpoints, and what else the configuration names (the default roles).
//!
//! All of it goes through the same handlers as the requests of clients, as the user
//! `system:apiserver`.

use std::{net::IpAddr, sync::Arc};

use http::Method;
use serde_json::{Value, json};

use super::{
    core::{Call, Core, Target, text},
    objects::write::{self, Changed, WriteOptions},
    request::RequestInfo,
};
use crate::{auth::UserInfo, lookup::Lookup as _, registry::FieldValidation, status::Status};

const NAMESPACES: [&str; 4] = ["kube-system", "default", "kube-public", "kube-node-lease"];
const AUTO_UPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";

/// The API server as a user of itself.
pub(crate) fn own_user() -> UserInfo {
    UserInfo {
        username: "system:apiserver".to_owned(),
        groups: vec!["system:masters".to_owned(), "system:authenticated".to_owned()],
        ..UserInfo::default()
    }
}

/// Where the API server is reached from inside the cluster.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Endpoint {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
}

/// Makes what is missing, and mends what is not as it must be.
pub(crate) async fn reconcile(
    core: &Arc<Core>,
    endpoint: Endpoint,
    objects: &[Value],
) -> Result<(), Status> {
    core.catch_up().await?;
    for name in NAMESPACES {
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        ensure(core, &namespace, |_| None).await?;
    }
    for object in objects {
        ensure(core, object, |present| mended(present, object)).await?;
    }
    for class in priority_classes() {
        ensure(core, &class, |_| None).await?;
    }
    let service = kubernetes_service(core, endpoint.port);
    ensure(core, &service, |present| {
        let ports = &service["spec"]["ports"];
        replaced(present, "/spec/ports", ports)
    })
    .await?;
    if endpoint.address.is_loopback() {
        // The API allows no such endpoint: each pod has a loopback of its own.
        tracing::warn!(
            address = %endpoint.address,
            "pods cannot reach the API server: advertise an address that is not loopback"
        );
        return Ok(());
    }
    let endpoints = kubernetes_endpoints(endpoint);
    ensure(core, &endpoints, |present| replaced(present, "/subsets", &endpoints["subsets"]))
        .await?;
    let slice = kubernetes_slice(endpoint);
    ensure(core, &slice, |present| {
        let half = replaced(present, "/endpoints", &slice["endpoints"]);
        let whole = replaced(half.as_ref().unwrap_or(present), "/ports", &slice["ports"]);
        whole.or(half)
    })
    .await
}

/// Creates an object, or changes the one there is if `mend` has something to change.
async fn ensure(
    core: &Arc<Core>,
    object: &Value,
    mend: impl Fn(&Value) -> Option<Value> + Send + Sync,
) -> Result<(), Status> {
    let (group, version) =
        text(object, "/apiVersion").rsplit_once('/').unwrap_or(("", text(object, "/apiVersion")));
    let kind = text(object, "/kind");
    let Some(resource) = core.registry.kind(group, version, kind).cloned() else {
        return Err(Status::internal(format!(
            "cannot make {kind} {}: there is no such resource",
            text(object, "/metadata/name")
        )));
    };
    let namespace = text(object, "/metadata/namespace");
    let name = text(object, "/metadata/name");
    let info = RequestInfo::of(&Method::POST, "/", None);
    let call = Call { info, user: own_user(), headers: http::HeaderMap::new() };
    let options = WriteOptions {
        dry_run: false,
        manager: "kube-apiserver".to_owned(),
        validation: FieldValidation::Strict,
        force: false,
    };
    let target = Target { namespace, name, ..Target::default() };
    let present = core.cache.get(&resource.storage.group, &resource.plural, Some(namespace), name);
    let result = match present {
        Some(present) if mend(&present).is_none() => return Ok(()),
        Some(_) => {
            let change = |old: &Arc<Value>| {
                let object = mend(old).unwrap_or_else(|| Value::clone(old));
                Ok(Changed { object, warnings: Vec::new(), applied: false })
            };
            write::update_object(core, &call, &resource, target, &change, &options).await.map(drop)
        }
        None => {
            let create = target;
            write::create_object(core, &call, &resource, create, object.clone(), &options, true)
                .await
                .map(drop)
        }
    };
    result.map_err(|status| {
        Status::internal(format!("cannot make {kind} {name}: {}", status.message))
    })
}

/// The object with a part of it replaced; `None` if that is so already.
fn replaced(present: &Value, pointer: &str, wanted: &Value) -> Option<Value> {
    if present.pointer(pointer) == Some(wanted) {
        return None;
    }
    let mut object = present.clone();
    let (parent, field) = pointer.rsplit_once('/')?;
    object.pointer_mut(parent)?.as_object_mut()?.insert(field.to_owned(), wanted.clone());
    Some(object)
}

/// A default role or binding with what it lacks; what an administrator added stays, and all stays
/// where they turned this off.
fn mended(present: &Value, wanted: &Value) -> Option<Value> {
    let annotations = present.pointer("/metadata/annotations");
    let auto = annotations.and_then(|a| a.get(AUTO_UPDATE)).and_then(Value::as_str);
    if auto != Some("true") {
        return None;
    }
    let mut object = present.clone();
    let mut changed = false;
    for field in ["rules", "subjects"] {
        let Some(wanted) = wanted.get(field).and_then(Value::as_array) else { continue };
        if !object.get(field).is_some_and(Value::is_array) {
            object[field] = json!([]);
        }
        let Some(present) = object.get_mut(field).and_then(Value::as_array_mut) else { continue };
        for item in wanted {
            if !present.contains(item) {
                present.push(item.clone());
                changed = true;
            }
        }
    }
    changed.then_some(object)
}

fn priority_classes() -> [Value; 2] {
    let class = |name: &str, value: i64, description: &str| {
        json!({
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": { "name": name },
            "value": value,
            "description": description,
        })
    };
    [
        class(
            "system-cluster-critical",
            2_000_000_000,
            "Used for system critical pods that must run in the cluster, but can be moved to \
             another node if necessary.",
        ),
        class(
            "system-node-critical",
            2_000_001_000,
            "Used for system critical pods that must not be moved from their current node.",
        ),
    ]
}

fn kubernetes_service(core: &Core, port: u16) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": { "component": "apiserver", "provider": "kubernetes" },
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": core.services.first_address().map(|address| address.to_string()),
            "ipFamilyPolicy": "SingleStack",
            "sessionAffinity": "None",
            "ports": [{ "name": "https", "port": 443, "protocol": "TCP", "targetPort": port }],
        },
    })
}

fn kubernetes_endpoints(endpoint: Endpoint) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            // The slice is made here too, with the name that clients know.
            "labels": { "endpointslice.kubernetes.io/skip-mirror": "true" },
        },
        "subsets": [{
            "addresses": [{ "ip": endpoint.address.to_string() }],
            "ports": [{ "name": "https", "port": endpoint.port, "protocol": "TCP" }],
        }],
    })
}

fn kubernetes_slice(endpoint: Endpoint) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": { "kubernetes.io/service-name": "kubernetes" },
        },
        "addressType": if endpoint.address.is_ipv4() { "IPv4" } else { "IPv6" },
        "endpoints": [{
            "addresses": [endpoint.address.to_string()],
            "conditions": { "ready": true },
        }],
        "ports": [{ "name": "https", "port": endpoint.port, "protocol": "TCP" }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_roles_get_what_they_lack_and_keep_what_was_added() {
        let wanted = json!({"rules": [{"verbs": ["get"]}, {"verbs": ["list"]}]});
        let present = json!({"metadata": {"annotations": {AUTO_UPDATE: "true"}},
            "rules": [{"verbs": ["get"]}, {"verbs": ["own"]}]});
        let rules = mended(&present, &wanted).unwrap()["rules"].clone();
        assert_eq!(rules, json!([{"verbs": ["get"]}, {"verbs": ["own"]}, {"verbs": ["list"]}]));
        let whole = json!({"metadata": present["metadata"], "rules": rules});
        assert!(mended(&whole, &wanted).is_none());
        let mut off = present;
        off["metadata"]["annotations"][AUTO_UPDATE] = "false".into();
        assert!(mended(&off, &wanted).is_none());
    }
}
