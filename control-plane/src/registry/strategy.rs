//! What a kind may bring of its own, and what all kinds with a status share.

use serde_json::{Map, Value};

use super::{Resource, value};
use crate::{status::FieldError, table::Columns};

/// Reads the value of a field for selectors.
pub(crate) type FieldLabel = (&'static str, fn(&Value) -> String);

/// The rules of a kind.
#[derive(Debug)]
pub(crate) struct Strategy {
    /// Fills in documented defaults.
    pub(crate) default: fn(&mut Value),
    /// Resets what a client may not set in a new object.
    pub(crate) prepare_create: fn(&mut Value),
    /// Keeps what an update may not touch.
    pub(crate) prepare_update: fn(&mut Value, &Value, &str),
    /// Says what is wrong.
    pub(crate) validate: fn(&Value, Option<&Value>, &str, &mut Vec<FieldError>),
    /// What field selectors may name besides name and namespace.
    pub(crate) fields: &'static [FieldLabel],
    /// What is printed.
    pub(crate) columns: &'static Columns,
    /// From the form that is stored.
    pub(crate) from_stored: Option<fn(&Value) -> Value>,
    /// Whether an update of an object that is not there creates it (`AllowCreateOnUpdate`).
    pub(crate) create_on_update: bool,
    /// To the form that is stored.
    pub(crate) to_stored: Option<fn(&Value) -> Value>,
}

impl Strategy {
    /// A kind without rules of its own.
    pub(crate) const PLAIN: Self = Self {
        default: |_| {},
        prepare_create: |_| {},
        prepare_update: |_, _, _| {},
        validate: |_, _, _, _| {},
        fields: &[],
        columns: &crate::table::GENERIC,
        from_stored: None,
        create_on_update: false,
        to_stored: None,
    };
}

/// An update of the object leaves `status` as it was; an update of the status leaves the rest.
pub(super) fn split_status(resource: &Resource, new: &mut Value, old: &Value, subresource: &str) {
    if !resource.has_status() {
        return;
    }
    let Some(object) = new.as_object_mut() else { return };
    match subresource {
        "status" => keep_all_but_status(object, old),
        // A binding writes a condition together with the node.
        "binding" => {}
        _ => value::copy_field(object, old, "status"),
    }
}

fn keep_all_but_status(object: &mut Map<String, Value>, old: &Value) {
    let stay = ["apiVersion", "kind", "metadata", "status"];
    let gone: Vec<String> =
        object.keys().filter(|k| !stay.contains(&k.as_str())).cloned().collect();
    for key in gone {
        object.remove(&key);
    }
    for (key, field) in old.as_object().into_iter().flatten() {
        if !stay.contains(&key.as_str()) {
            object.insert(key.clone(), field.clone());
        }
    }
    let old_metadata = old.get("metadata").unwrap_or(&Value::Null);
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        // Whoever may write a status may not hand the object to another owner.
        value::copy_field(metadata, old_metadata, "ownerReferences");
    }
}

/// Whether more than metadata and status differ.
pub(super) fn asks_for_new_work(new: &Value, old: &Value) -> bool {
    let skip = ["metadata", "status", "apiVersion", "kind"];
    let keys = |v: &Value| -> Vec<String> {
        v.as_object().into_iter().flatten().map(|(k, _)| k.clone()).collect()
    };
    keys(new)
        .iter()
        .chain(&keys(old))
        .filter(|key| !skip.contains(&key.as_str()))
        .any(|key| !value::same(new.get(key), old.get(key)))
}
