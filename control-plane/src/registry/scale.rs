//! The `scale` subresource: an `autoscaling/v1` Scale seen in an object with replicas.

use serde_json::{Value, json};

use super::value;
use crate::status::{FieldError, Status};

/// The Scale of a Deployment or ReplicaSet.
pub fn of(object: &Value) -> Value {
    let metadata = object.get("metadata").unwrap_or(&Value::Null);
    let mut scale = json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {},
        "spec": {},
        "status": { "replicas": value::int(object, &["status", "replicas"]).unwrap_or(0) },
    });
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(field_value) = metadata.get(field) {
            scale["metadata"][field] = field_value.clone();
        }
    }
    if let Some(replicas) = value::int(object, &["spec", "replicas"]).filter(|r| *r != 0) {
        scale["spec"]["replicas"] = replicas.into();
    }
    if let Some(selector) = value::at(object, &["spec", "selector"]) {
        scale["status"]["selector"] = crate::table::selector_text(selector).into();
    }
    scale
}

/// Sets the replicas of an object to those of a Scale.
///
/// # Errors
/// 422 if the number is negative, 400 if the name is another, 409 if UID or resource version are
/// not those of the object.
pub fn apply(object: &mut Value, scale: &Value) -> Result<(), Status> {
    let name = value::text(object, &["metadata", "name"]).to_owned();
    let given = value::text(scale, &["metadata", "name"]);
    if !given.is_empty() && given != name {
        return Err(Status::bad_request(format!(
            "the name of the object ({given}) does not match the name on the URL ({name})"
        )));
    }
    let replicas = value::int(scale, &["spec", "replicas"]).unwrap_or(0);
    if replicas < 0 || replicas > i64::from(i32::MAX) {
        let error =
            FieldError::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
        return Err(Status::invalid("autoscaling", "Scale", &name, &[error]));
    }
    if let Some(spec) = value::object_at(object, "spec") {
        spec.insert("replicas".to_owned(), replicas.into());
    }
    for field in ["uid", "resourceVersion"] {
        let wanted = value::text(scale, &["metadata", field]);
        if !wanted.is_empty()
            && let Some(metadata) = value::object_at(object, "metadata")
        {
            // Whoever writes the object checks both against what is stored.
            metadata.insert(field.to_owned(), wanted.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_reads_and_writes_replicas() {
        let mut object = json!({
            "metadata": {"name": "web", "namespace": "d", "uid": "u", "resourceVersion": "5"},
            "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}}},
            "status": {"replicas": 2},
        });
        let mut scale = of(&object);
        assert_eq!(scale["spec"]["replicas"], 3);
        assert_eq!(scale["status"], json!({"replicas": 2, "selector": "app=web"}));
        scale["spec"]["replicas"] = 7.into();
        apply(&mut object, &scale).unwrap();
        assert_eq!(object["spec"]["replicas"], 7);
        scale["spec"]["replicas"] = (-1).into();
        assert_eq!(apply(&mut object, &scale).unwrap_err().code, 422);
    }
}
