//! Which objects a list, watch or deletecollection is about.

use std::sync::Arc;

use keelson_api::selector::{FieldSelector, LabelSelector};
use serde_json::Value;

use crate::{
    registry::Resource,
    server::request::{Query, RequestInfo},
    status::Status,
};

/// Selectors, read and checked.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    resource: Arc<Resource>,
    labels: Option<LabelSelector>,
    fields: Option<FieldSelector>,
    /// Of deprecated watches of one object.
    name: String,
}

/// The field selector of a query as authorizers see it; nothing if it can't be read.
pub(crate) fn required_fields(query: &Query) -> Vec<(String, String)> {
    let Some(selector) = query.get("fieldSelector").and_then(|s| FieldSelector::parse(s).ok())
    else {
        return Vec::new();
    };
    selector
        .requirements()
        .iter()
        .filter(|requirement| requirement.equal)
        .map(|requirement| (requirement.field.clone(), requirement.value.clone()))
        .collect()
}

impl Selection {
    pub(crate) fn parse(resource: &Arc<Resource>, info: &RequestInfo) -> Result<Self, Status> {
        let (label_text, field_text) =
            (info.query.get("labelSelector"), info.query.get("fieldSelector"));
        let labels = label_text
            .map(LabelSelector::parse)
            .transpose()
            .map_err(|error| {
                Status::bad_request(format!("unable to parse labelSelector: {error}"))
            })?
            .filter(|selector| !selector.is_empty());
        let fields = field_text
            .map(FieldSelector::parse)
            .transpose()
            .map_err(|error| {
                Status::bad_request(format!("unable to parse fieldSelector: {error}"))
            })?
            .filter(|selector| !selector.is_empty());
        for requirement in fields.iter().flat_map(FieldSelector::requirements) {
            if !resource.supports_field(&requirement.field) {
                return Err(resource.unsupported_field(
                    label_text.unwrap_or_default(),
                    field_text.unwrap_or_default(),
                    &requirement.field,
                ));
            }
        }
        Ok(Self { resource: Arc::clone(resource), labels, fields, name: info.name.clone() })
    }

    /// Whether it lets all objects through.
    pub(crate) fn is_everything(&self) -> bool {
        self.labels.is_none() && self.fields.is_none() && self.name.is_empty()
    }

    /// Whether a stored object is wanted.
    pub(crate) fn matches(&self, stored: &Arc<Value>) -> bool {
        if !self.name.is_empty()
            && stored.pointer("/metadata/name").and_then(Value::as_str) != Some(&self.name)
        {
            return false;
        }
        if let Some(labels) = &self.labels {
            let given = stored.pointer("/metadata/labels").and_then(Value::as_object);
            if !labels.matches_with(|key| given?.get(key)?.as_str()) {
                return false;
            }
        }
        let Some(fields) = &self.fields else { return true };
        let object = self.resource.convert(stored);
        fields.matches(|field| self.resource.field_value(&object, field))
    }
}
