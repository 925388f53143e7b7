//! Reading JSON objects by path without ceremony.

use serde_json::{Map, Value};

/// The value at a path of field names; `None` if any is missing or null.
pub(crate) fn at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    let mut here = value;
    for name in path {
        here = here.get(name)?;
    }
    (!here.is_null()).then_some(here)
}

/// The text at a path; empty if there is none.
pub(crate) fn text<'a>(value: &'a Value, path: &[&str]) -> &'a str {
    at(value, path).and_then(Value::as_str).unwrap_or_default()
}

/// The whole number at a path.
pub(crate) fn int(value: &Value, path: &[&str]) -> Option<i64> {
    at(value, path).and_then(Value::as_i64)
}

/// The truth at a path; false if there is none.
pub(crate) fn flag(value: &Value, path: &[&str]) -> bool {
    at(value, path).and_then(Value::as_bool).unwrap_or_default()
}

/// The list at a path; empty if there is none.
pub(crate) fn list<'a>(value: &'a Value, path: &[&str]) -> &'a [Value] {
    at(value, path).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// The entries of the map at a path.
pub(crate) fn entries<'a>(
    value: &'a Value,
    path: &[&str],
) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
    at(value, path).and_then(Value::as_object).into_iter().flatten()
}

/// The object at a field, made if there is none (or null).
pub(crate) fn object_at<'a>(
    value: &'a mut Value,
    name: &str,
) -> Option<&'a mut Map<String, Value>> {
    let field = value.as_object_mut()?.entry(name).or_insert(Value::Null);
    if field.is_null() {
        *field = Value::Object(Map::new());
    }
    field.as_object_mut()
}

/// Sets a field if it is missing or null.
pub(crate) fn set_default(object: &mut Map<String, Value>, name: &str, value: impl Into<Value>) {
    let field = object.entry(name).or_insert(Value::Null);
    if field.is_null() {
        *field = value.into();
    }
}

/// Sets a text field if it is missing, null or empty.
pub(crate) fn set_default_text(object: &mut Map<String, Value>, name: &str, value: &str) {
    let field = object.entry(name).or_insert(Value::Null);
    if field.is_null() || field.as_str() == Some("") {
        *field = Value::from(value);
    }
}

/// Makes a field of `to` what it is in `from`, which may be absent.
pub(crate) fn copy_field(to: &mut Map<String, Value>, from: &Value, name: &str) {
    match from.get(name) {
        Some(value) => {
            to.insert(name.to_owned(), value.clone());
        }
        None => {
            to.remove(name);
        }
    }
}

/// Whether two values mean the same: absent, null, empty text, empty list and empty map are one
/// (apimachinery's semantic equality).
pub(crate) fn same(a: Option<&Value>, b: Option<&Value>) -> bool {
    fn empty(value: Option<&Value>) -> bool {
        match value {
            None | Some(Value::Null) => true,
            Some(Value::String(text)) => text.is_empty(),
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Object(fields)) => fields.is_empty(),
            Some(_) => false,
        }
    }
    if empty(a) && empty(b) {
        return true;
    }
    match (a, b) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            a.iter().all(|(key, value)| same(Some(value), b.get(key)))
                && b.iter().all(|(key, value)| a.contains_key(key) || same(None, Some(value)))
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(Some(a), Some(b)))
        }
        _ => a == b,
    }
}
