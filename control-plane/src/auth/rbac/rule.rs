//! One rule of a role.

use serde_json::{Value, json};

use crate::auth::{Attributes, fields::texts};

/// What a role allows (`PolicyRule`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Verbs, or `*`.
    pub verbs: Vec<String>,
    /// API groups, or `*`.
    pub api_groups: Vec<String>,
    /// Resources: `pods`, `pods/log`, `*/scale`, `*`.
    pub resources: Vec<String>,
    /// Names of objects; empty means all.
    pub resource_names: Vec<String>,
    /// Paths, which may end in `*`.
    pub non_resource_urls: Vec<String>,
}

const ALL: &str = "*";

fn any(list: &[String], value: &str) -> bool {
    list.iter().any(|item| item == ALL || item == value)
}

impl Rule {
    /// As it is written in a role.
    pub(crate) fn from_value(value: &Value) -> Self {
        Self {
            verbs: texts(value, &["verbs"]),
            api_groups: texts(value, &["apiGroups"]),
            resources: texts(value, &["resources"]),
            resource_names: texts(value, &["resourceNames"]),
            non_resource_urls: texts(value, &["nonResourceURLs"]),
        }
    }

    /// As it is written in a role.
    pub(crate) fn to_value(&self) -> Value {
        let mut value = json!({ "verbs": self.verbs });
        for (field, list) in [
            ("apiGroups", &self.api_groups),
            ("resources", &self.resources),
            ("resourceNames", &self.resource_names),
            ("nonResourceURLs", &self.non_resource_urls),
        ] {
            if !list.is_empty() {
                value[field] = json!(list);
            }
        }
        value
    }

    /// Whether it allows the request.
    pub(crate) fn allows(&self, request: &Attributes) -> bool {
        if !any(&self.verbs, &request.verb) {
            return false;
        }
        if request.resource_request {
            any(&self.api_groups, &request.group)
                && self.matches_resource(&request.resource, &request.subresource)
                && self.matches_name(&request.name)
        } else {
            self.matches_url(&request.path)
        }
    }

    fn matches_resource(&self, resource: &str, subresource: &str) -> bool {
        self.resources.iter().any(|rule| {
            if rule == ALL {
                return true;
            }
            match rule.split_once('/') {
                None => subresource.is_empty() && rule == resource,
                Some((ALL, sub)) => !subresource.is_empty() && sub == subresource,
                Some((main, sub)) => main == resource && sub == subresource,
            }
        })
    }

    fn matches_name(&self, name: &str) -> bool {
        self.resource_names.is_empty() || self.resource_names.iter().any(|rule| rule == name)
    }

    fn matches_url(&self, path: &str) -> bool {
        self.non_resource_urls.iter().any(|rule| match rule.strip_suffix('*') {
            Some(start) => path.starts_with(start.trim_end_matches('*')),
            None => rule == path,
        })
    }

    /// The same as rules of one verb and one resource or path each.
    pub(crate) fn break_down(&self) -> Vec<Self> {
        let mut parts = Vec::new();
        for verb in &self.verbs {
            let one = Self { verbs: vec![verb.clone()], ..Self::default() };
            for group in &self.api_groups {
                for resource in &self.resources {
                    let part = Self {
                        api_groups: vec![group.clone()],
                        resources: vec![resource.clone()],
                        ..one.clone()
                    };
                    if self.resource_names.is_empty() {
                        parts.push(part);
                        continue;
                    }
                    parts.extend(
                        self.resource_names.iter().map(|name| Self {
                            resource_names: vec![name.clone()],
                            ..part.clone()
                        }),
                    );
                }
            }
            parts.extend(
                self.non_resource_urls
                    .iter()
                    .map(|url| Self { non_resource_urls: vec![url.clone()], ..one.clone() }),
            );
        }
        parts
    }

    /// Whether it allows all that `part`, a rule [broken down](Self::break_down), does.
    pub(crate) fn covers(&self, part: &Self) -> bool {
        let Some(verb) = part.verbs.first() else { return true };
        if !any(&self.verbs, verb) {
            return false;
        }
        if let Some(url) = part.non_resource_urls.first() {
            return self.non_resource_urls.contains(url) || self.matches_url(url);
        }
        let (Some(group), Some(resource)) = (part.api_groups.first(), part.resources.first())
        else {
            return false;
        };
        // `*/scale` is covered by itself and by `*`: as text it matches like any other.
        let (main, sub) = resource.split_once('/').unwrap_or((resource, ""));
        any(&self.api_groups, group)
            && self.matches_resource(main, sub)
            && match part.resource_names.first() {
                Some(name) => self.matches_name(name),
                None => self.resource_names.is_empty(),
            }
    }

    /// As Kubernetes writes it in the message about permissions that are not held.
    pub(crate) fn describe(&self) -> String {
        let quote = |list: &[String]| {
            let list: Vec<_> = list.iter().map(|item| format!("{item:?}")).collect();
            format!("[{}]", list.join(" "))
        };
        let mut parts = Vec::new();
        for (field, list) in [
            ("APIGroups", &self.api_groups),
            ("Resources", &self.resources),
            ("ResourceNames", &self.resource_names),
            ("NonResourceURLs", &self.non_resource_urls),
            ("Verbs", &self.verbs),
        ] {
            if !list.is_empty() {
                parts.push(format!("{field}:{}", quote(list)));
            }
        }
        format!("{{{}}}", parts.join(", "))
    }
}
