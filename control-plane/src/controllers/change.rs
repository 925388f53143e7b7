//! Small writes: only what differs is sent, and only if nobody wrote in between.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api, Resource,
    api::{Patch, PatchParams},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::error::{ControllerError, Doing};

/// The JSON merge patch (RFC 7386) that makes `after` of `before`; `None` if they are equal.
pub(crate) fn merge_patch(before: &Value, after: &Value) -> Option<Value> {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            let mut patch = Map::new();
            for key in before.keys().filter(|key| !after.contains_key(*key)) {
                patch.insert(key.clone(), Value::Null);
            }
            for (key, value) in after {
                match before.get(key) {
                    None => {
                        patch.insert(key.clone(), value.clone());
                    }
                    Some(old) => {
                        if let Some(change) = merge_patch(old, value) {
                            patch.insert(key.clone(), change);
                        }
                    }
                }
            }
            (!patch.is_empty()).then_some(Value::Object(patch))
        }
        (before, after) if before == after => None,
        (_, after) => Some(after.clone()),
    }
}

/// What part of an object is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// All but the status.
    Main,
    /// The status.
    Status,
}

/// Writes what `after` has other than `before`, if anything, on condition that `before` is still
/// the object's state. Returns the object if it was written.
///
/// # Errors
/// As the API server says: 409 if the object was changed meanwhile.
pub(crate) async fn write<K>(
    api: &Api<K>,
    before: &K,
    after: &K,
    part: Part,
) -> Result<Option<K>, ControllerError>
where
    K: Resource<DynamicType = ()> + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
{
    let metadata: &ObjectMeta = before.meta();
    let name = metadata.name.clone().unwrap_or_default();
    let what = || format!("update {} {name}", K::kind(&()).to_lowercase());
    let (Ok(old), Ok(new)) = (serde_json::to_value(before), serde_json::to_value(after)) else {
        return Err(ControllerError::Object(format!("{}: not representable as JSON", what())));
    };
    let Some(mut patch) = merge_patch(&old, &new) else { return Ok(None) };
    patch["metadata"]["resourceVersion"] = json!(metadata.resource_version);
    patch["metadata"]["uid"] = json!(metadata.uid);
    let params = PatchParams::default();
    let patch = Patch::Merge(patch);
    let written = match part {
        Part::Main => api.patch(&name, &params, &patch).await,
        Part::Status => api.patch_status(&name, &params, &patch).await,
    };
    written.doing(what).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_holds_the_difference() {
        let table = [
            (json!({"a": 1}), json!({"a": 1}), None),
            (json!({"a": 1}), json!({"a": 2}), Some(json!({"a": 2}))),
            (json!({"a": 1, "b": 2}), json!({"a": 1}), Some(json!({"b": null}))),
            (json!({}), json!({"a": [1]}), Some(json!({"a": [1]}))),
            (json!({"a": [1, 2]}), json!({"a": [2]}), Some(json!({"a": [2]}))),
            (
                json!({"a": {"b": {"c": 1}, "d": 1}}),
                json!({"a": {"b": {"c": 2}, "d": 1}}),
                Some(json!({"a": {"b": {"c": 2}}})),
            ),
        ];
        for (before, after, patch) in table {
            assert_eq!(merge_patch(&before, &after), patch, "{before} to {after}");
        }
    }
}
