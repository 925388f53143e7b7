//! Changes that come as patches, in the four kinds that Kubernetes has: JSON patch (RFC 6902),
//! merge patch (RFC 7386), strategic merge patch, and server-side apply ([`apply`]).

pub mod apply;
mod strategic;

use json_patch::{Patch, PatchOperation};
use serde_json::Value;

pub use self::strategic::strategic_merge;
use crate::status::{Cause, Status};

/// Kubernetes' bound on the operations of a JSON patch.
const MOST_OPERATIONS: usize = 10_000;
/// What all `copy` operations of a JSON patch may copy together, in bytes of JSON: as much as a
/// request may hold.
const MOST_COPIED: usize = 3 << 20;

/// Applies a JSON patch.
///
/// # Errors
/// 400 if it is no JSON patch, 413 if it is too long or copies too much, 422 if an operation can't
/// be carried out or a `test` fails.
pub fn json_patch(target: &Value, patch: &Value) -> Result<Value, Status> {
    let operations = patch.as_array().map_or(0, Vec::len);
    if operations > MOST_OPERATIONS {
        return Err(Status::too_large(&format!(
            "The allowed maximum operations in a JSON patch is {MOST_OPERATIONS}, got {operations}"
        )));
    }
    let patch: Patch = serde_json::from_value(patch.clone())
        .map_err(|error| Status::bad_request(format!("error decoding patch: {error}")))?;
    let mut out = target.clone();
    let mut copied = 0;
    for (index, operation) in patch.0.into_iter().enumerate() {
        if let PatchOperation::Copy(copy) = &operation {
            copied += copy.from.resolve(&out).map_or(0, weight);
            if copied > MOST_COPIED {
                return Err(Status::too_large(&format!(
                    "the copy operations of a JSON patch may copy at most {MOST_COPIED} bytes"
                )));
            }
        }
        json_patch::patch(&mut out, std::slice::from_ref(&operation))
            .map_err(|error| rejected(&format!("operation {index}: {}", error.kind)))?;
    }
    Ok(out)
}

/// About how many bytes of JSON a value is.
fn weight(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 2,
        Value::Array(items) => items.iter().map(|item| weight(item) + 1).sum::<usize>() + 2,
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| key.len() + 4 + weight(value)).sum::<usize>() + 2
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => 5,
    }
}

fn rejected(why: &str) -> Status {
    let message = "the server rejected our request due to an error in our request";
    let cause = Cause {
        reason: "UnexpectedServerResponse".to_owned(),
        message: why.to_owned(),
        field: String::new(),
    };
    Status::new(422, "Invalid", message).with_causes(vec![cause])
}

/// Applies a JSON merge patch.
///
/// # Errors
/// 400 if the patch is no object.
pub fn merge_patch(target: &Value, patch: &Value) -> Result<Value, Status> {
    if !patch.is_object() {
        return Err(Status::bad_request("error decoding patch: a merge patch must be an object"));
    }
    let mut out = target.clone();
    json_patch::merge(&mut out, patch);
    Ok(out)
}

#[cfg(test)]
pub(crate) mod testing {
    use proptest::prelude::*;
    use serde_json::Value;

    /// Small JSON values.
    pub(crate) fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (0..5_i64).prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-d]", inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn json_patches_apply_or_are_refused() {
        let target = json!({"a": 1, "b": [1]});
        let add =
            json!([{"op": "add", "path": "/b/-", "value": 2}, {"op": "remove", "path": "/a"}]);
        assert_eq!(json_patch(&target, &add).unwrap(), json!({"b": [1, 2]}));
        let test = json!([{"op": "test", "path": "/a", "value": 2}]);
        let refused = json_patch(&target, &test).unwrap_err();
        assert_eq!(refused.code, 422);
        let message = "the server rejected our request due to an error in our request";
        assert_eq!(refused.message, message);
        let causes = refused.details.unwrap().causes;
        assert_eq!(causes[0].reason, "UnexpectedServerResponse");
        assert_eq!(json_patch(&target, &json!({"a": 1})).unwrap_err().code, 400);
        let many = Value::Array(vec![json!({"op": "remove", "path": "/a"}); 10_001]);
        assert_eq!(json_patch(&target, &many).unwrap_err().code, 413);
    }

    #[test]
    fn copies_that_double_are_stopped() {
        let target = json!({"a": "x".repeat(1000)});
        let operations: Vec<Value> =
            (0..64).map(|i| json!({"op": "copy", "from": "", "path": format!("/b{i}")})).collect();
        assert_eq!(json_patch(&target, &Value::Array(operations)).unwrap_err().code, 413);
    }

    proptest! {
        #[test]
        fn a_merge_patch_twice_is_once(target in testing::json(), patch in testing::json()) {
            prop_assume!(patch.is_object());
            let once = merge_patch(&target, &patch).unwrap();
            prop_assert_eq!(&merge_patch(&once, &patch).unwrap(), &once);
        }

        #[test]
        fn nulls_of_a_merge_patch_are_gone(target in testing::json(), patch in testing::json()) {
            prop_assume!(patch.is_object());
            let out = merge_patch(&target, &patch).unwrap();
            for (key, value) in patch.as_object().unwrap() {
                prop_assert_eq!(out.get(key).is_none(), value.is_null());
            }
        }
    }
}
