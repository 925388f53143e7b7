//! Which resources the API server has, asked from itself.

use std::collections::BTreeMap;

use kube::{Client, core::ApiResource};

use super::error::{ControllerError, Doing};

/// A resource that objects can be stored of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Discovered {
    pub(crate) resource: ApiResource,
    pub(crate) namespaced: bool,
    verbs: Vec<String>,
}

impl Discovered {
    /// Whether it can be used so.
    pub(crate) fn can(&self, verb: &str) -> bool {
        self.verbs.iter().any(|known| known == verb)
    }

    /// Its name as in `deployments.apps`.
    pub(crate) fn name(&self) -> String {
        if self.resource.group.is_empty() {
            self.resource.plural.clone()
        } else {
            format!("{}.{}", self.resource.plural, self.resource.group)
        }
    }
}

/// All resources, each in the version that its group prefers. Events appear once, since both of
/// their groups share the same objects.
///
/// # Errors
/// When the API server can't be asked; parts are not returned.
pub(crate) async fn resources(client: &Client) -> Result<Vec<Discovered>, ControllerError> {
    let mut found: BTreeMap<(String, String), Discovered> = BTreeMap::new();
    let doing = || "discover the API's resources".to_owned();
    let core = client.list_core_api_resources("v1").await.doing(doing)?;
    let mut lists = vec![("v1".to_owned(), core)];
    for group in client.list_api_groups().await.doing(doing)?.groups {
        let preferred = group.preferred_version.map(|v| v.group_version);
        let mut versions: Vec<String> =
            group.versions.into_iter().map(|v| v.group_version).collect();
        versions.sort_by_key(|version| Some(version) != preferred.as_ref());
        for version in versions {
            let list = client.list_api_group_resources(&version).await.doing(doing)?;
            lists.push((version, list));
        }
    }
    for (group_version, list) in lists {
        let (group, version) = group_version.split_once('/').unwrap_or(("", &group_version));
        for resource in list.resources {
            let shared = group == "events.k8s.io";
            if resource.name.contains('/') || shared {
                continue;
            }
            let key = (group.to_owned(), resource.name.clone());
            found.entry(key).or_insert_with(|| Discovered {
                resource: ApiResource {
                    group: group.to_owned(),
                    version: version.to_owned(),
                    api_version: group_version.clone(),
                    kind: resource.kind,
                    plural: resource.name,
                },
                namespaced: resource.namespaced,
                verbs: resource.verbs,
            });
        }
    }
    Ok(found.into_values().collect())
}
