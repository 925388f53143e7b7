//! OpenAPI documents, by which clients learn the fields (`kubectl explain`), merge lists
//! (`kubectl apply`) and check objects.
//!
//! A document is made when it is asked for, from the table of types and the descriptions that the
//! client library carries, and is kept for as long as clients ask for it: it takes megabytes, and
//! clients keep what they got by its hash.

mod describe;
mod paths;
mod types;

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use self::types::{Dialect, Types};
use crate::registry::{Registry, Resource};

/// The version of Kubernetes whose API this is.
const API: &str = "v1.36.0";

/// `/openapi/v2`: all groups in one document.
pub fn v2(registry: &Registry) -> Value {
    let resources: Vec<&Resource> = registry.resources().map(AsRef::as_ref).collect();
    json!({
        "swagger": "2.0",
        "info": {"title": "Kubernetes", "version": API},
        "paths": paths::of(&resources, Dialect::V2),
        "definitions": schemas(&resources, Dialect::V2),
    })
}

/// `/openapi/v3`: where the document of each group and version is.
pub fn v3_index(registry: &Registry) -> Value {
    let mut paths = Map::new();
    for resource in registry.resources() {
        let path = document_path(resource);
        if !paths.contains_key(&path) {
            let url = format!("/openapi/v3/{path}?hash={}", hash(registry, &path));
            paths.insert(path, json!({ "serverRelativeURL": url }));
        }
    }
    json!({ "paths": paths })
}

/// `/openapi/v3/{path}` (`api/v1`, `apis/apps/v1`); `None` if there is no such group and version.
pub fn v3(registry: &Registry, path: &str) -> Option<Value> {
    let resources: Vec<&Resource> = registry
        .resources()
        .map(AsRef::as_ref)
        .filter(|resource| document_path(resource) == path)
        .collect();
    if resources.is_empty() {
        return None;
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": API},
        "paths": paths::of(&resources, Dialect::V3),
        "components": {"schemas": schemas(&resources, Dialect::V3)},
    }))
}

/// A document as it is sent, and what it is known by.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    pub(crate) body: bytes::Bytes,
    /// In quotes, as in `ETag`.
    pub(crate) tag: String,
}

/// The documents that were asked for lately, and when: each is made once, since the resources do not
/// change while the server runs.
#[derive(Debug, Default)]
pub(crate) struct Documents(Mutex<BTreeMap<String, (Document, Instant)>>);

impl Documents {
    /// The document at a path below `/openapi/`. Takes milliseconds the first time.
    pub(crate) fn get(&self, registry: &Registry, path: &str) -> Option<Document> {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((document, used)) = made.get_mut(path) {
            *used = Instant::now();
            return Some(document.clone());
        }
        let value = match path {
            "v2" => v2(registry),
            "v3" => v3_index(registry),
            path => v3(registry, path.strip_prefix("v3/")?)?,
        };
        let body = bytes::Bytes::from(format!("{value}\n"));
        let tag = match path.strip_prefix("v3/") {
            Some(path) => format!("\"{}\"", hash(registry, path)),
            None => crate::discovery::etag(&body),
        };
        let document = Document { body, tag };
        made.insert(path.to_owned(), (document.clone(), Instant::now()));
        Some(document)
    }

    /// Forgets what nobody asked for in so long a time.
    pub(crate) fn forget(&self, unused: Duration) {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        made.retain(|_, (_, used)| used.elapsed() < unused);
    }
}

/// The hash that the index gives for a document, by which a client may keep it for good.
pub fn hash(registry: &Registry, path: &str) -> String {
    let mut hasher = Sha256::new();
    hasher.update(env!("CARGO_PKG_VERSION"));
    hasher.update(API);
    hasher.update(path);
    for resource in registry.resources().filter(|resource| document_path(resource) == path) {
        hasher.update(format!(
            "{} {:?} {:?}",
            resource.plural, resource.verbs, resource.subresources
        ));
    }
    for part in crate::schema::schema().types() {
        hasher.update(part.name.as_bytes());
        for field in &part.fields {
            hasher.update(field.name.as_bytes());
        }
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02X}")).collect()
}

fn document_path(resource: &Resource) -> String {
    if resource.group.is_empty() {
        format!("api/{}", resource.version)
    } else {
        format!("apis/{}/{}", resource.group, resource.version)
    }
}

fn schemas(resources: &[&Resource], dialect: Dialect) -> Value {
    let mut types = Types::new(dialect);
    for resource in resources {
        types.add_kind(&resource.group, &resource.version, &resource.kind);
        if !resource.virtual_only {
            types.add_list(resource);
        }
        for sub in resource.subresources.iter().filter(|sub| !sub.version.is_empty()) {
            types.add_kind(sub.group, sub.version, sub.kind);
        }
    }
    types.add_kind("", "v1", "DeleteOptions");
    types.add_kind("", "v1", "Status");
    let mut out = types.finish();
    describe::add(&mut out);
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All references of a document.
    fn references(value: &Value, out: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                for (key, value) in fields {
                    if key == "$ref" {
                        out.extend(value.as_str().map(str::to_owned));
                    }
                    references(value, out);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, out)),
            _ => {}
        }
    }

    #[test]
    fn each_reference_leads_somewhere() {
        let registry = Registry::builtin();
        let index = v3_index(&registry);
        let paths: Vec<&String> = index["paths"].as_object().unwrap().keys().collect();
        assert!(paths.iter().any(|p| *p == "apis/apps/v1"), "{paths:?}");
        let documents =
            paths.iter().map(|path| v3(&registry, path).unwrap()).chain([v2(&registry)]);
        for document in documents {
            let mut all = Vec::new();
            references(&document, &mut all);
            assert!(!all.is_empty());
            for reference in all {
                let pointer = reference.trim_start_matches('#');
                assert!(document.pointer(pointer).is_some(), "{reference}");
            }
        }
    }

    #[test]
    fn fields_are_described_and_say_how_lists_merge() {
        let document = v3(&Registry::builtin(), "api/v1").unwrap();
        let spec = &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"];
        let containers = &spec["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert_eq!(containers["x-kubernetes-patch-strategy"], "merge");
        assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
        assert!(containers["description"].as_str().is_some_and(|d| d.contains("containers")));
        let pod = &document["components"]["schemas"]["io.k8s.api.core.v1.Pod"];
        assert_eq!(
            pod["x-kubernetes-group-version-kind"],
            json!([{"group": "", "kind": "Pod", "version": "v1"}])
        );
        let patch = &document["paths"]["/api/v1/namespaces/{namespace}/pods/{name}"]["patch"];
        assert_eq!(patch["x-kubernetes-group-version-kind"]["kind"], "Pod");
        let names: Vec<&str> = patch["parameters"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|p| p["name"].as_str())
            .collect();
        assert!(names.contains(&"fieldValidation") && names.contains(&"dryRun"), "{names:?}");
    }
}
