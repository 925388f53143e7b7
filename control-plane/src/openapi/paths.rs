//! Paths and what may be done there, as far as clients look at them: which kind an operation is
//! about, and which parameters it takes.

use serde_json::{Map, Value, json};

use super::types::{Dialect, kind_name};
use crate::registry::Resource;

const READ: &[&str] = &["pretty"];
const LIST: &[&str] = &[
    "pretty",
    "allowWatchBookmarks",
    "continue",
    "fieldSelector",
    "labelSelector",
    "limit",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "timeoutSeconds",
    "watch",
];
const WRITE: &[&str] = &["pretty", "dryRun", "fieldManager", "fieldValidation"];
const PATCH: &[&str] = &["pretty", "dryRun", "fieldManager", "fieldValidation", "force"];
const DELETE: &[&str] =
    &["pretty", "dryRun", "gracePeriodSeconds", "orphanDependents", "propagationPolicy"];

/// The verb of Kubernetes, the method of HTTP, the action's name, its parameters.
type Operation = (&'static str, &'static str, &'static str, &'static [&'static str]);
const ON_COLLECTION: [Operation; 3] = [
    ("list", "get", "list", LIST),
    ("create", "post", "post", WRITE),
    ("deletecollection", "delete", "deletecollection", DELETE),
];
const ON_OBJECT: [Operation; 4] = [
    ("get", "get", "get", READ),
    ("update", "put", "put", WRITE),
    ("patch", "patch", "patch", PATCH),
    ("delete", "delete", "delete", DELETE),
];
const ON_SUBRESOURCE: [Operation; 4] = [
    ("get", "get", "get", READ),
    ("create", "post", "post", WRITE),
    ("update", "put", "put", WRITE),
    ("patch", "patch", "patch", PATCH),
];

/// What an operation is about.
struct Kind<'a> {
    group: &'a str,
    version: &'a str,
    kind: &'a str,
}

/// The paths of resources.
pub(super) fn of(resources: &[&Resource], dialect: Dialect) -> Value {
    let mut out = Map::new();
    for resource in resources {
        let root = if resource.group.is_empty() {
            format!("/api/{}", resource.version)
        } else {
            format!("/apis/{}/{}", resource.group, resource.version)
        };
        let plural = &resource.plural;
        let kind =
            Kind { group: &resource.group, version: &resource.version, kind: &resource.kind };
        let allowed = |verb: &str| resource.allows(verb);
        let collection = if resource.namespaced {
            let everywhere = operations(dialect, &ON_COLLECTION[..1], &kind, allowed, &[]);
            insert(&mut out, format!("{root}/{plural}"), everywhere);
            format!("{root}/namespaces/{{namespace}}/{plural}")
        } else {
            format!("{root}/{plural}")
        };
        let namespace: &[&str] = if resource.namespaced { &["namespace"] } else { &[] };
        let object: &[&str] = if resource.namespaced { &["name", "namespace"] } else { &["name"] };
        let on_all = operations(dialect, &ON_COLLECTION, &kind, allowed, namespace);
        insert(&mut out, collection.clone(), on_all);
        let on_one = operations(dialect, &ON_OBJECT, &kind, allowed, object);
        insert(&mut out, format!("{collection}/{{name}}"), on_one);
        for sub in &resource.subresources {
            let kind = if sub.version.is_empty() {
                Kind { group: &resource.group, version: &resource.version, kind: sub.kind }
            } else {
                Kind { group: sub.group, version: sub.version, kind: sub.kind }
            };
            let allowed = |verb: &str| sub.verbs.contains(&verb);
            let on_sub = operations(dialect, &ON_SUBRESOURCE, &kind, allowed, object);
            insert(&mut out, format!("{collection}/{{name}}/{}", sub.name), on_sub);
        }
    }
    Value::Object(out)
}

fn insert(out: &mut Map<String, Value>, path: String, operations: Map<String, Value>) {
    if !operations.is_empty() {
        out.insert(path, Value::Object(operations));
    }
}

fn operations(
    dialect: Dialect,
    table: &[Operation],
    kind: &Kind<'_>,
    allowed: impl Fn(&str) -> bool,
    in_path: &[&str],
) -> Map<String, Value> {
    let mut out = Map::new();
    for (verb, method, action, parameters) in table {
        if allowed(verb) {
            out.insert((*method).to_owned(), operation(dialect, action, kind, parameters, in_path));
        }
    }
    if !in_path.is_empty() && !out.is_empty() {
        let list = in_path.iter().map(|name| parameter(dialect, name, "path")).collect();
        out.insert("parameters".to_owned(), Value::Array(list));
    }
    out
}

fn parameter(dialect: Dialect, name: &str, place: &str) -> Value {
    let kind = match name {
        "limit" | "timeoutSeconds" | "gracePeriodSeconds" => "integer",
        "watch" | "force" | "allowWatchBookmarks" | "sendInitialEvents" | "orphanDependents" => {
            "boolean"
        }
        _ => "string",
    };
    let mut out = json!({"name": name, "in": place});
    if place == "path" {
        out["required"] = true.into();
    }
    match dialect {
        Dialect::V2 => {
            out["type"] = kind.into();
            out["uniqueItems"] = true.into();
        }
        Dialect::V3 => out["schema"] = json!({"type": kind, "uniqueItems": true}),
    }
    out
}

fn operation(
    dialect: Dialect,
    action: &str,
    kind: &Kind<'_>,
    query: &[&str],
    in_path: &[&str],
) -> Value {
    let mut parameters: Vec<Value> =
        query.iter().map(|name| parameter(dialect, name, "query")).collect();
    let name = match action {
        "list" => kind_name(kind.group, kind.version, kind.kind).map(|name| format!("{name}List")),
        "deletecollection" | "delete" => kind_name("", "v1", "Status"),
        _ => kind_name(kind.group, kind.version, kind.kind),
    };
    let reference = name.map_or_else(|| json!({"type": "string"}), |n| dialect.reference(&n));
    let response = match dialect {
        Dialect::V2 => json!({"description": "OK", "schema": reference}),
        Dialect::V3 => json!({
            "description": "OK", "content": {"application/json": {"schema": reference}},
        }),
    };
    let mut out = json!({
        "operationId": operation_id(action, kind, in_path),
        "responses": {"200": response},
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": {
            "group": kind.group, "version": kind.version, "kind": kind.kind,
        },
    });
    if matches!(action, "post" | "put" | "patch") {
        let body = if action == "patch" { json!({"type": "object"}) } else { reference };
        match dialect {
            Dialect::V2 => {
                parameters
                    .push(json!({"name": "body", "in": "body", "required": true, "schema": body}));
            }
            Dialect::V3 => {
                let media: &[&str] = if action == "patch" {
                    &[
                        "application/apply-patch+yaml",
                        "application/json-patch+json",
                        "application/merge-patch+json",
                        "application/strategic-merge-patch+json",
                    ]
                } else {
                    &["application/json", "application/yaml"]
                };
                let content: Map<String, Value> = media
                    .iter()
                    .map(|media| ((*media).to_owned(), json!({"schema": body.clone()})))
                    .collect();
                out["requestBody"] = json!({"required": true, "content": content});
            }
        }
    }
    out["parameters"] = Value::Array(parameters);
    out
}

fn operation_id(action: &str, kind: &Kind<'_>, in_path: &[&str]) -> String {
    let group = match kind.group.split('.').next().unwrap_or_default() {
        "" => "core",
        first => first,
    };
    let capital = |text: &str| {
        let mut letters = text.chars();
        letters.next().map_or_else(String::new, |first| {
            first.to_uppercase().chain(letters).collect::<String>()
        })
    };
    let scope = if in_path.contains(&"namespace") { "Namespaced" } else { "" };
    format!("{action}{}{}{scope}{}", capital(group), capital(kind.version), kind.kind)
}
