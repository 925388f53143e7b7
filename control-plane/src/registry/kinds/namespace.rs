//! Namespaces.

use serde_json::{Value, json};

use crate::{
    registry::{
        Strategy,
        value::{self, object_at},
    },
    status::FieldError,
};

/// Namespaces.
pub(in crate::registry) static NAMESPACE: Strategy = Strategy {
    default,
    prepare_create,
    prepare_update,
    validate,
    fields: &[("status.phase", |o| value::text(o, &["status", "phase"]).to_owned())],
    columns: &crate::table::NAMESPACE,
    ..Strategy::PLAIN
};

/// The label that says a namespace's name, so that selectors can ask for it.
const NAME_LABEL: &str = "kubernetes.io/metadata.name";
/// The finalizer that waits until the namespace is empty.
const FINALIZER: &str = "kubernetes";

fn default(namespace: &mut Value) {
    let name = value::text(namespace, &["metadata", "name"]).to_owned();
    if !name.is_empty()
        && let Some(metadata) = object_at(namespace, "metadata")
    {
        metadata.entry("labels").or_insert_with(|| json!({}))[NAME_LABEL] = name.into();
    }
}

fn prepare_create(namespace: &mut Value) {
    // A generated name is known only now.
    default(namespace);
    let mut finalizers = value::list(namespace, &["spec", "finalizers"]).to_vec();
    if !finalizers.iter().any(|f| f == FINALIZER) {
        finalizers.push(FINALIZER.into());
    }
    namespace["spec"] = json!({ "finalizers": finalizers });
    namespace["status"] = json!({"phase": "Active"});
}

fn prepare_update(new: &mut Value, old: &Value, subresource: &str) {
    if subresource.is_empty()
        && let Some(object) = new.as_object_mut()
    {
        // Only `finalize` takes finalizers away.
        value::copy_field(object, old, "spec");
    }
}

fn validate(new: &Value, _: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    for (index, finalizer) in value::list(new, &["spec", "finalizers"]).iter().enumerate() {
        let name = finalizer.as_str().unwrap_or_default();
        if name != FINALIZER && !name.contains('/') {
            errors.push(FieldError::invalid(
                format_args!("spec.finalizers[{index}]"),
                name,
                "name is neither a standard finalizer name nor is it fully qualified",
            ));
        }
    }
}
