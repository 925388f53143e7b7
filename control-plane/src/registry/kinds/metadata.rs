//! Rules of metadata that all kinds share.

use serde_json::Value;

use crate::{
    registry::{Resource, value},
    status::FieldError,
};

pub(crate) fn validate(
    _resource: &Resource,
    new: &Value,
    _old: Option<&Value>,
    errors: &mut Vec<FieldError>,
) {
    if value::text(new, &["metadata", "name"]).is_empty() {
        errors.push(FieldError::required("metadata.name", "name or generateName is required"));
    }
}
