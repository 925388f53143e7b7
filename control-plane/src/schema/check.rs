//! Checks a value against its type, and puts times and quantities into the form that the API
//! writes.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use keelson_api::quantity::Quantity;
use serde_json::Value;

use super::{Shape, TypeId, schema};
use crate::registry::path::Path;

/// No more than this many unknown fields are told of.
const MOST_UNKNOWN: usize = 100;

/// A value of the wrong type, in the words of Go's JSON decoder.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct TypeMismatch(String);

/// Checks an object and removes what does not belong: fields that are unknown (their paths are
/// given in `unknown`) and those that are null.
///
/// # Errors
/// If a value has the wrong type.
pub(crate) fn check(
    id: TypeId,
    object: &mut Value,
    unknown: &mut Vec<String>,
) -> Result<(), TypeMismatch> {
    Checker { unknown }.structure(id, object, &Path::Root, "")
}

struct Checker<'a> {
    unknown: &'a mut Vec<String>,
}

impl Checker<'_> {
    fn structure(
        &mut self,
        id: TypeId,
        value: &mut Value,
        path: &Path<'_>,
        parent: &str,
    ) -> Result<(), TypeMismatch> {
        let structure = schema().get(id);
        let Some(object) = value.as_object_mut() else {
            let shape = Shape::Object(id);
            return Err(mismatch(value, path, parent, &shape));
        };
        object.retain(|name, field| {
            if structure.field(name).is_some() {
                return !field.is_null();
            }
            if self.unknown.len() < MOST_UNKNOWN {
                self.unknown.push(path.field(name).as_go());
            }
            false
        });
        for (name, field) in object.iter_mut() {
            if let Some(definition) = structure.field(name) {
                self.value(&definition.shape, field, &path.field(name), structure.short_name())?;
            }
        }
        Ok(())
    }

    fn value(
        &mut self,
        shape: &Shape,
        value: &mut Value,
        path: &Path<'_>,
        parent: &str,
    ) -> Result<(), TypeMismatch> {
        match (shape, &mut *value) {
            (Shape::Any, _)
            | (Shape::String, Value::String(_))
            | (Shape::Boolean, Value::Bool(_)) => Ok(()),
            (Shape::Object(id), _) => self.structure(*id, value, path, parent),
            (Shape::Int32 | Shape::IntOrString, Value::Number(n))
                if n.as_i64().is_some_and(|n| i32::try_from(n).is_ok()) =>
            {
                Ok(())
            }
            (Shape::Int64, Value::Number(n)) if n.is_i64() => Ok(()),
            (Shape::Double, Value::Number(_)) | (Shape::IntOrString, Value::String(_)) => Ok(()),
            (Shape::Bytes, Value::String(text)) => canonical_bytes(text),
            (Shape::Time, Value::String(text)) => canonical_time(text, "%Y-%m-%dT%H:%M:%SZ"),
            (Shape::MicroTime, Value::String(text)) => {
                canonical_time(text, "%Y-%m-%dT%H:%M:%S.%6fZ")
            }
            (Shape::Quantity, Value::String(_) | Value::Number(_)) => canonical_quantity(value),
            (Shape::List(list), Value::Array(items)) => {
                for (index, item) in items.iter_mut().enumerate() {
                    if item.is_null() {
                        *item = zero(&list.items);
                    }
                    self.value(&list.items, item, &path.index(index), parent)?;
                }
                Ok(())
            }
            (Shape::Map(map), Value::Object(entries)) => {
                for (key, entry) in entries.iter_mut() {
                    if entry.is_null() {
                        *entry = zero(&map.values);
                    }
                    self.value(&map.values, entry, &path.key(key), parent)?;
                }
                Ok(())
            }
            _ => Err(mismatch(value, path, parent, shape)),
        }
    }
}

/// What Go makes of a null in a list or map.
fn zero(shape: &Shape) -> Value {
    match shape {
        Shape::String | Shape::Bytes => "".into(),
        Shape::Boolean => false.into(),
        Shape::Int32 | Shape::Int64 | Shape::Double | Shape::IntOrString => 0.into(),
        Shape::Quantity => "0".into(),
        Shape::Object(_) | Shape::Map(_) => Value::Object(serde_json::Map::new()),
        Shape::List(_) => Value::Array(Vec::new()),
        Shape::Any | Shape::Time | Shape::MicroTime => Value::Null,
    }
}

fn canonical_bytes(text: &mut String) -> Result<(), TypeMismatch> {
    text.retain(|c| c != '\n' && c != '\r');
    match STANDARD.decode(text.as_bytes()) {
        Ok(_) => Ok(()),
        Err(error) => {
            let at = match error {
                base64::DecodeError::InvalidByte(at, _)
                | base64::DecodeError::InvalidLastSymbol(at, _) => at,
                _ => text.len(),
            };
            Err(TypeMismatch(format!("illegal base64 data at input byte {at}")))
        }
    }
}

fn canonical_time(text: &mut String, layout: &str) -> Result<(), TypeMismatch> {
    // A time zone is required and the date is in full: what jiff takes besides is refused.
    let full = text.as_bytes().get(10).is_some_and(|b| matches!(b, b'T' | b't'));
    match text.parse::<Timestamp>() {
        Ok(time) if full => {
            *text = time.strftime(layout).to_string();
            Ok(())
        }
        _ => Err(TypeMismatch(format!(
            "parsing time {:?} as \"2006-01-02T15:04:05Z07:00\": cannot parse it",
            text.as_str()
        ))),
    }
}

fn canonical_quantity(value: &mut Value) -> Result<(), TypeMismatch> {
    let parsed = match &*value {
        Value::String(text) => Quantity::parse(text.trim()),
        other => Quantity::parse(&other.to_string()),
    };
    match parsed {
        Ok(quantity) => {
            *value = quantity.to_string().into();
            Ok(())
        }
        Err(_) => Err(TypeMismatch(
            "quantities must match the regular expression \
             '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
                .to_owned(),
        )),
    }
}

fn mismatch(value: &Value, path: &Path<'_>, parent: &str, shape: &Shape) -> TypeMismatch {
    let found = match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "bool".to_owned(),
        Value::Number(n) if matches!(shape, Shape::Int32 | Shape::Int64 | Shape::IntOrString) => {
            format!("number {n}")
        }
        Value::Number(_) => "number".to_owned(),
        Value::String(_) => "string".to_owned(),
        Value::Array(_) => "array".to_owned(),
        Value::Object(_) => "object".to_owned(),
    };
    let wanted = go_type(shape);
    let place = path.as_go_fields();
    if place.is_empty() {
        TypeMismatch(format!("json: cannot unmarshal {found} into Go value of type {wanted}"))
    } else {
        TypeMismatch(format!(
            "json: cannot unmarshal {found} into Go struct field {parent}.{place} of type {wanted}"
        ))
    }
}

fn go_type(shape: &Shape) -> String {
    match shape {
        Shape::String | Shape::IntOrString => "string".to_owned(),
        Shape::Boolean => "bool".to_owned(),
        Shape::Int32 => "int32".to_owned(),
        Shape::Int64 => "int64".to_owned(),
        Shape::Double => "float64".to_owned(),
        Shape::Bytes => "[]uint8".to_owned(),
        Shape::Time => "v1.Time".to_owned(),
        Shape::MicroTime => "v1.MicroTime".to_owned(),
        Shape::Quantity => "resource.Quantity".to_owned(),
        Shape::Any => "interface {}".to_owned(),
        Shape::Object(id) => {
            let name = &schema().get(*id).name;
            let mut parts = name.rsplit('.');
            let (kind, package) =
                (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            format!("{package}.{kind}")
        }
        Shape::List(list) => format!("[]{}", go_type(&list.items)),
        Shape::Map(map) => format!("map[string]{}", go_type(&map.values)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(value: &Value) -> Result<(Value, Vec<String>), String> {
        let mut value = value.clone();
        let mut unknown = Vec::new();
        check(schema().named("api.core.v1.Pod").unwrap(), &mut value, &mut unknown)
            .map_err(|e| e.to_string())?;
        Ok((value, unknown))
    }

    #[test]
    fn wrong_types_are_told_as_by_go() {
        let rows = [
            (
                json!({"spec": {"terminationGracePeriodSeconds": "x"}}),
                "json: cannot unmarshal string into Go struct field \
                 PodSpec.spec.terminationGracePeriodSeconds of type int64",
            ),
            (
                json!({"spec": {"containers": [{"env": [{"name": "A", "value": 1}]}]}}),
                "json: cannot unmarshal number into Go struct field \
                 EnvVar.spec.containers.env.value of type string",
            ),
            (
                json!({"spec": {"containers": {}}}),
                "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of \
                 type []v1.Container",
            ),
            (
                json!({"spec": {"priority": 3_000_000_000_i64}}),
                "json: cannot unmarshal number 3000000000 into Go struct field \
                 PodSpec.spec.priority of type int32",
            ),
            (
                json!({"metadata": {"labels": {"a": true}}}),
                "json: cannot unmarshal bool into Go struct field ObjectMeta.metadata.labels of \
                 type string",
            ),
            (json!([]), "json: cannot unmarshal array into Go value of type v1.Pod"),
        ];
        for (value, message) in rows {
            assert_eq!(pod(&value).unwrap_err(), message);
        }
    }

    #[test]
    fn unknown_fields_go_with_their_paths() {
        let value = json!({"spec": {"containers": [{"name": "a", "foo": 1}], "bar": {}}, "x": 1});
        let (value, mut unknown) = pod(&value).unwrap();
        unknown.sort();
        assert_eq!(unknown, ["spec.bar", "spec.containers[0].foo", "x"]);
        assert_eq!(value, json!({"spec": {"containers": [{"name": "a"}]}}));
    }

    #[test]
    fn times_and_quantities_get_one_form() {
        let value = json!({
            "metadata": {"creationTimestamp": "2026-01-02T05:04:05.7+02:00", "labels": null},
            "spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": 0.5, "memory": "1024Mi"}}}]}
        });
        let (value, _) = pod(&value).unwrap();
        assert_eq!(value["metadata"], json!({"creationTimestamp": "2026-01-02T03:04:05Z"}));
        let limits = &value["spec"]["containers"][0]["resources"]["limits"];
        assert_eq!(*limits, json!({"cpu": "500m", "memory": "1Gi"}));
    }
}
