//! What is served, for clients that ask before they do anything: the lists of versions, groups and
//! resources, and all of them in one document (`apidiscovery.k8s.io`).

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::registry::{Registry, Resource, Subresource};

/// Which form of the aggregated document a client takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AggregatedVersion {
    /// `apidiscovery.k8s.io/v2`.
    V2,
    /// `apidiscovery.k8s.io/v2beta1`, for clients before 1.30.
    V2Beta1,
}

impl AggregatedVersion {
    /// The content type of the document.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::V2 => "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
            Self::V2Beta1 => {
                "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"
            }
        }
    }

    fn api_version(self) -> &'static str {
        match self {
            Self::V2 => "apidiscovery.k8s.io/v2",
            Self::V2Beta1 => "apidiscovery.k8s.io/v2beta1",
        }
    }
}

/// `/api`: the versions of the core group. `server` is where clients find the API server
/// (`host:port`).
pub fn api_versions(registry: &Registry, server: &str) -> Value {
    json!({
        "kind": "APIVersions",
        "versions": versions(registry, ""),
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": server}],
    })
}

/// `/apis`: the groups besides the core one.
pub fn api_group_list(registry: &Registry) -> Value {
    let groups: Vec<Value> =
        groups(registry).into_iter().filter_map(|group| group_body(registry, group)).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `/apis/{group}`; `None` if there is no such group.
pub fn api_group(registry: &Registry, group: &str) -> Option<Value> {
    let mut body = group_body(registry, group)?;
    body["kind"] = "APIGroup".into();
    body["apiVersion"] = "v1".into();
    Some(body)
}

/// `/api/v1` and `/apis/{group}/{version}`; `None` if there is no such version.
pub fn api_resource_list(registry: &Registry, group: &str, version: &str) -> Option<Value> {
    let mut resources = Vec::new();
    for resource in of_version(registry, group, version) {
        resources.push(resource_entry(resource));
        resources.extend(resource.subresources.iter().map(|sub| subresource_entry(resource, sub)));
    }
    if resources.is_empty() {
        return None;
    }
    resources.sort_by(|a, b| a["name"].as_str().cmp(&b["name"].as_str()));
    let group_version =
        if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Some(json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": group_version,
        "resources": resources,
    }))
}

/// All that `/api` (`core`) or `/apis` serve, in one document.
pub fn aggregated(registry: &Registry, core: bool, version: AggregatedVersion) -> Value {
    let groups = if core { vec![""] } else { groups(registry) };
    let items: Vec<Value> = groups
        .into_iter()
        .map(|group| {
            let versions: Vec<Value> = versions(registry, group)
                .into_iter()
                .map(|version| {
                    let resources: Vec<Value> =
                        of_version(registry, group, version).map(aggregated_resource).collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            let mut metadata = json!({"creationTimestamp": null});
            if !group.is_empty() {
                metadata["name"] = group.into();
            }
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": version.api_version(),
        "metadata": {},
        "items": items,
    })
}

/// The `ETag` of a document, in its quotes.
pub fn etag(document: &[u8]) -> String {
    let digest = Sha256::digest(document);
    let hex: String = digest.iter().map(|byte| format!("{byte:02X}")).collect();
    format!("\"{hex}\"")
}

/// Groups in the order in which clients prefer them where a name is in several.
fn groups(registry: &Registry) -> Vec<&str> {
    const PREFERRED: [&str; 4] =
        ["apps", "events.k8s.io", "authentication.k8s.io", "authorization.k8s.io"];
    let mut out: Vec<&str> = registry
        .resources()
        .map(|resource| resource.group.as_str())
        .filter(|group| !group.is_empty())
        .collect();
    out.sort_by_key(|group| {
        (PREFERRED.iter().position(|p| p == group).unwrap_or(PREFERRED.len()), *group)
    });
    out.dedup();
    out
}

fn versions<'a>(registry: &'a Registry, group: &str) -> Vec<&'a str> {
    let mut out: Vec<&str> = registry
        .resources()
        .filter(|resource| resource.group == group)
        .map(|resource| resource.version.as_str())
        .collect();
    out.sort_unstable();
    out.dedup();
    out
}

fn of_version<'a>(
    registry: &'a Registry,
    group: &str,
    version: &str,
) -> impl Iterator<Item = &'a Resource> {
    registry
        .resources()
        .map(AsRef::as_ref)
        .filter(move |resource| resource.group == group && resource.version == version)
}

fn group_body(registry: &Registry, group: &str) -> Option<Value> {
    let versions: Vec<Value> = versions(registry, group)
        .into_iter()
        .map(|version| json!({"groupVersion": format!("{group}/{version}"), "version": version}))
        .collect();
    let preferred = versions.first().filter(|_| !group.is_empty())?.clone();
    Some(json!({"name": group, "versions": versions, "preferredVersion": preferred}))
}

fn insert_names(out: &mut Map<String, Value>, resource: &Resource) {
    if !resource.short_names.is_empty() {
        out.insert("shortNames".to_owned(), resource.short_names.clone().into());
    }
    if !resource.categories.is_empty() {
        out.insert("categories".to_owned(), resource.categories.clone().into());
    }
}

fn resource_entry(resource: &Resource) -> Value {
    let mut out = Map::new();
    out.insert("name".to_owned(), resource.plural.as_str().into());
    out.insert("singularName".to_owned(), resource.singular.as_str().into());
    out.insert("namespaced".to_owned(), resource.namespaced.into());
    out.insert("kind".to_owned(), resource.kind.as_str().into());
    out.insert("verbs".to_owned(), resource.verbs.clone().into());
    insert_names(&mut out, resource);
    Value::Object(out)
}

fn subresource_entry(resource: &Resource, sub: &Subresource) -> Value {
    let mut out = json!({
        "name": format!("{}/{}", resource.plural, sub.name),
        "singularName": "",
        "namespaced": resource.namespaced,
        "kind": sub.kind,
        "verbs": sub.verbs,
    });
    if !sub.version.is_empty() && sub.group != resource.group {
        out["group"] = sub.group.into();
        out["version"] = sub.version.into();
    }
    out
}

fn aggregated_resource(resource: &Resource) -> Value {
    let mut out = Map::new();
    out.insert("resource".to_owned(), resource.plural.as_str().into());
    let kind = json!({
        "group": resource.group, "version": resource.version, "kind": resource.kind,
    });
    out.insert("responseKind".to_owned(), kind);
    let scope = if resource.namespaced { "Namespaced" } else { "Cluster" };
    out.insert("scope".to_owned(), scope.into());
    out.insert("singularResource".to_owned(), resource.singular.as_str().into());
    out.insert("verbs".to_owned(), resource.verbs.clone().into());
    insert_names(&mut out, resource);
    if !resource.subresources.is_empty() {
        let subresources = resource
            .subresources
            .iter()
            .map(|sub| {
                let (group, version) = if sub.version.is_empty() {
                    (resource.group.as_str(), resource.version.as_str())
                } else {
                    (sub.group, sub.version)
                };
                json!({
                    "subresource": sub.name,
                    "responseKind": {"group": group, "version": version, "kind": sub.kind},
                    "verbs": sub.verbs,
                })
            })
            .collect();
        out.insert("subresources".to_owned(), Value::Array(subresources));
    }
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_in_the_core_list_with_what_is_under_them() {
        let registry = Registry::builtin();
        let list = api_resource_list(&registry, "", "v1").unwrap();
        let find = |name: &str| {
            list["resources"].as_array().unwrap().iter().find(|r| r["name"] == name).cloned()
        };
        assert_eq!(
            find("pods").unwrap(),
            json!({
                "name": "pods", "singularName": "pod", "namespaced": true, "kind": "Pod",
                "verbs": ["create", "delete", "deletecollection", "get", "list", "patch",
                          "update", "watch"],
                "shortNames": ["po"], "categories": ["all"],
            })
        );
        assert_eq!(find("pods/eviction").unwrap()["group"], "policy");
        assert_eq!(find("pods/status").unwrap().get("group"), None);
        assert!(api_resource_list(&registry, "nope", "v1").is_none());
    }

    #[test]
    fn groups_are_listed_once_and_in_order() {
        let registry = Registry::builtin();
        let list = api_group_list(&registry);
        let names: Vec<&str> =
            list["groups"].as_array().unwrap().iter().filter_map(|g| g["name"].as_str()).collect();
        assert_eq!(names[0], "apps");
        let mut once = names.clone();
        once.dedup();
        assert_eq!(names, once);
        assert_eq!(api_group(&registry, "apps").unwrap()["kind"], "APIGroup");
        assert!(api_group(&registry, "").is_none());
    }

    #[test]
    fn one_document_tells_all() {
        let registry = Registry::builtin();
        let all = aggregated(&registry, false, AggregatedVersion::V2);
        let apps = &all["items"][0];
        assert_eq!(apps["metadata"]["name"], "apps");
        let deployments = &apps["versions"][0]["resources"][0];
        assert_eq!(deployments["responseKind"]["kind"], "Deployment");
        assert_eq!(deployments["scope"], "Namespaced");
        assert_eq!(
            deployments["subresources"][0]["responseKind"],
            json!({"group": "autoscaling", "version": "v1", "kind": "Scale"})
        );
        assert_eq!(etag(b"a").len(), 66);
    }
}
