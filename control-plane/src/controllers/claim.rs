//! Which objects a controller's object has as its own: by controller reference, kept in step with
//! its selector.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use keelson_api::{object::controller_of, selector::LabelSelector};
use kube::{
    Api, Resource,
    api::{Patch, PatchParams},
};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::error::{ControllerError, Doing, code};

/// What is whose.
#[derive(Debug)]
pub(crate) struct Claims<T> {
    /// Its own, and selected.
    pub(crate) own: Vec<Arc<T>>,
    /// Nobody's, and selected: to be adopted.
    pub(crate) orphans: Vec<Arc<T>>,
    /// Its own, but no longer selected: to be released.
    pub(crate) strangers: Vec<Arc<T>>,
}

/// Sorts objects of the owner's namespace into claims.
pub(crate) fn claims<T: Resource>(
    owner: &ObjectMeta,
    selector: &LabelSelector,
    candidates: impl IntoIterator<Item = Arc<T>>,
) -> Claims<T> {
    static NONE: BTreeMap<String, String> = BTreeMap::new();
    let mut claims = Claims { own: Vec::new(), orphans: Vec::new(), strangers: Vec::new() };
    let owner_goes = owner.deletion_timestamp.is_some();
    for candidate in candidates {
        let metadata = candidate.meta();
        let selected = selector.matches(metadata.labels.as_ref().unwrap_or(&NONE));
        match controller_of(metadata) {
            Some(controller) if Some(&controller.uid) == owner.uid.as_ref() => {
                if selected {
                    claims.own.push(candidate);
                } else if !owner_goes {
                    claims.strangers.push(candidate);
                }
            }
            Some(_) => {}
            None if selected && !owner_goes && metadata.deletion_timestamp.is_none() => {
                claims.orphans.push(candidate);
            }
            None => {}
        }
    }
    claims
}

/// Adopts orphans and releases strangers; what was adopted comes back through the watch.
///
/// # Errors
/// When the API server refuses; objects that are gone meanwhile are passed over.
pub(crate) async fn settle<T, O>(
    objects: &Api<T>,
    owners: &Api<O>,
    owner: &OwnerReference,
    claims: &Claims<T>,
) -> Result<(), ControllerError>
where
    T: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
    O: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
{
    if !claims.orphans.is_empty() {
        // The cache may not know yet that the owner is being deleted.
        let fresh = owners.get(&owner.name).await.doing(|| format!("look up {}", owner.name))?;
        let meta = fresh.meta();
        if meta.uid.as_deref() != Some(&owner.uid) || meta.deletion_timestamp.is_some() {
            return Ok(());
        }
    }
    let adopt = json!([owner]);
    let release = json!([{"$patch": "delete", "uid": owner.uid}]);
    let changes = claims.orphans.iter().map(|o| (o, &adopt));
    for (object, references) in changes.chain(claims.strangers.iter().map(|o| (o, &release))) {
        let name = object.meta().name.clone().unwrap_or_default();
        let patch = json!({
            "metadata": {"uid": object.meta().uid, "ownerReferences": references},
        });
        let patch = Patch::Strategic(patch);
        match objects.patch(&name, &PatchParams::default(), &patch).await {
            Ok(_) => {}
            Err(error) if matches!(code(&error), 404 | 409 | 422) => {
                tracing::debug!(object = name, owner = owner.name, %error, "claiming");
            }
            Err(error) => return Err(error).doing(|| format!("claim {name} for {}", owner.name)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::Value;

    use super::*;

    #[test]
    fn objects_are_sorted_by_reference_and_selector() {
        let owner = ObjectMeta { uid: Some("me".into()), ..ObjectMeta::default() };
        let controlled = |uid: &str| {
            json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "x", "uid": uid,
                "controller": true}])
        };
        let pod = |name: &str, app: &str, owners: Value| {
            let pod = json!({"metadata":
                {"name": name, "labels": {"app": app}, "ownerReferences": owners}});
            Arc::new(serde_json::from_value::<Pod>(pod).unwrap())
        };
        let selector = LabelSelector::parse("app=web").unwrap();
        let claims = claims(
            &owner,
            &selector,
            [
                pod("own", "web", controlled("me")),
                pod("stranger", "db", controlled("me")),
                pod("orphan", "web", json!([])),
                pod("other", "web", controlled("you")),
                pod("unrelated", "db", json!([])),
            ],
        );
        let names = |pods: &[Arc<Pod>]| -> Vec<String> {
            pods.iter().filter_map(|p| p.metadata.name.clone()).collect()
        };
        assert_eq!(names(&claims.own), ["own"]);
        assert_eq!(names(&claims.orphans), ["orphan"]);
        assert_eq!(names(&claims.strangers), ["stranger"]);
    }
}
