//! What may change of a pod that exists.

use serde_json::Value;

use crate::{
    registry::{path::Path, value},
    status::FieldError,
};

const ALLOWED: &str = "pod updates may not change fields other than \
    `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
    `spec.tolerations` (only additions to existing tolerations),\
    `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

const EPHEMERAL: &str = "ephemeral containers are not supported by Keelson yet";

/// Keeps what the path of an update does not write.
pub(super) fn prepare(new: &mut Value, old: &Value, subresource: &str) {
    match subresource {
        "status" => {
            // How memory is shared was decided when the pod came.
            if let Some(status) = value::object_at(new, "status") {
                value::copy_field(status, old.get("status").unwrap_or(&Value::Null), "qosClass");
            }
        }
        "ephemeralcontainers" => {
            let added = new.pointer("/spec/ephemeralContainers").cloned();
            // Nothing else comes from the request, metadata neither: whoever may add a container
            // to debug by may not therefore take over the pod.
            *new = old.clone();
            if let (Some(spec), Some(added)) = (value::object_at(new, "spec"), added) {
                spec.insert("ephemeralContainers".to_owned(), added);
            }
        }
        _ => {}
    }
}

/// Checks an update.
pub(super) fn validate(new: &Value, old: &Value, subresource: &str, errors: &mut Vec<FieldError>) {
    match subresource {
        "" => main(new, old, errors),
        "ephemeralcontainers" => ephemeral(new, old, errors),
        _ => {}
    }
}

fn main(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let spec = Path::Root.field("spec");
    for list in ["containers", "initContainers"] {
        let (after, before) =
            (value::list(new, &["spec", list]), value::list(old, &["spec", list]));
        let root = spec.field(list);
        if after.len() != before.len() {
            errors
                .push(FieldError::forbidden(root, "pod updates may not add or remove containers"));
            return;
        }
        for (index, container) in after.iter().enumerate() {
            let image = value::text(container, &["image"]);
            let at = root.index(index);
            if image.is_empty() {
                errors.push(FieldError::required(at.field("image"), ""));
            } else if image.trim() != image {
                let detail = "must not have leading or trailing whitespace";
                errors.push(FieldError::invalid(at.field("image"), image, detail));
            }
        }
    }
    deadline(new, old, errors);
    tolerations(new, old, errors);
    let (after, before) = (new.get("spec"), old.get("spec"));
    let (Some(after), Some(before)) = (after, before) else { return };
    if !value::same(Some(&without_mutable(after, before)), Some(before)) {
        errors.push(FieldError::forbidden("spec", ALLOWED));
    }
}

/// The new specification with what may change put back.
fn without_mutable(after: &Value, before: &Value) -> Value {
    let mut out = after.clone();
    for list in ["containers", "initContainers"] {
        let containers = out.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten();
        for (container, old) in containers.zip(value::list(before, &[list])) {
            if let Some(container) = container.as_object_mut() {
                value::copy_field(container, old, "image");
            }
        }
    }
    let negative = value::int(before, &["terminationGracePeriodSeconds"]).is_some_and(|s| s < 0);
    let gated = !value::list(before, &["schedulingGates"]).is_empty();
    if let Some(spec) = out.as_object_mut() {
        value::copy_field(spec, before, "activeDeadlineSeconds");
        value::copy_field(spec, before, "tolerations");
        if negative && spec.get("terminationGracePeriodSeconds") == Some(&Value::from(1)) {
            value::copy_field(spec, before, "terminationGracePeriodSeconds");
        }
        // Gates may be taken away, and a gated pod may still be narrowed to fewer nodes.
        let kept = value::list(before, &["schedulingGates"]);
        let left = spec.get("schedulingGates").and_then(Value::as_array);
        if left.is_none_or(|left| left.iter().all(|gate| kept.contains(gate))) {
            value::copy_field(spec, before, "schedulingGates");
        }
        if gated && narrows(spec.get("nodeSelector"), before.get("nodeSelector")) {
            value::copy_field(spec, before, "nodeSelector");
        }
    }
    out
}

fn narrows(after: Option<&Value>, before: Option<&Value>) -> bool {
    let before = before.and_then(Value::as_object).into_iter().flatten();
    let after = after.unwrap_or(&Value::Null);
    before.into_iter().all(|(key, label)| after.get(key) == Some(label))
}

fn deadline(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let path = ["spec", "activeDeadlineSeconds"];
    let (after, before) = (value::int(new, &path), value::int(old, &path));
    let field = "spec.activeDeadlineSeconds";
    match (after, before) {
        (None, Some(_)) => {
            let detail = "must not update from a positive integer to nil value";
            errors.push(FieldError::invalid(field, Value::Null, detail));
        }
        (Some(after), _) if !(1..=i64::from(i32::MAX)).contains(&after) => {
            let detail = "must be between 1 and 2147483647, inclusive";
            errors.push(FieldError::invalid(field, after, detail));
        }
        (Some(after), Some(before)) if after > before => {
            let detail = format!("must be less than or equal to previous value {before}");
            errors.push(FieldError::invalid(field, after, detail));
        }
        _ => {}
    }
}

fn tolerations(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let (after, before) =
        (value::list(new, &["spec", "tolerations"]), value::list(old, &["spec", "tolerations"]));
    let same_but_seconds = |a: &Value, b: &Value| {
        ["key", "operator", "value", "effect"].iter().all(|f| value::same(a.get(*f), b.get(*f)))
    };
    let all_there = before.iter().all(|old| after.iter().any(|new| same_but_seconds(new, old)));
    if !all_there {
        errors.push(FieldError::forbidden(
            "spec.tolerations",
            "existing toleration can not be modified except its tolerationSeconds",
        ));
    }
}

/// What may come through `ephemeralcontainers`: nothing yet, since no node runs them.
fn ephemeral(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let of = |pod| value::list(pod, &["spec", "ephemeralContainers"]);
    if of(new) != of(old) {
        errors.push(FieldError::forbidden("spec.ephemeralContainers", EPHEMERAL));
    }
}
