//! Rules of metadata that all kinds share.

use serde_json::Value;

use super::rules;
use crate::{
    registry::{Resource, path::Path, value},
    status::FieldError,
};

/// All annotations of an object together.
const ANNOTATIONS_LIMIT: usize = 256 << 10;

/// Checks names, labels, annotations, owners and finalizers.
pub(in crate::registry) fn validate(
    resource: &Resource,
    new: &Value,
    old: Option<&Value>,
    errors: &mut Vec<FieldError>,
) {
    let root = Path::Root.field("metadata");
    let metadata = new.get("metadata").unwrap_or(&Value::Null);
    if old.is_none() {
        name(resource, value::text(metadata, &["name"]), &root, errors);
    }
    rules::labels(metadata.get("labels"), &root.field("labels"), errors);
    annotations(metadata, &root, errors);
    owners(metadata, &root, errors);
    finalizers(metadata, old, &root, errors);
}

/// Which names a kind's objects may have.
fn name(resource: &Resource, name: &str, root: &Path<'_>, errors: &mut Vec<FieldError>) {
    let path = root.field("name");
    if name.is_empty() {
        errors.push(FieldError::required(path, "name or generateName is required"));
        return;
    }
    let why = match (resource.group.as_str(), resource.plural.as_str()) {
        ("", "namespaces") => rules::dns_label(name),
        ("", "services") => rules::dns_1035_label(name),
        ("rbac.authorization.k8s.io", _) => rules::path_segment(name),
        _ => rules::dns_subdomain(name),
    };
    errors.extend(why.map(|why| FieldError::invalid(path, name, why)));
}

fn annotations(metadata: &Value, root: &Path<'_>, errors: &mut Vec<FieldError>) {
    let path = root.field("annotations");
    let mut size = 0;
    for (key, text) in value::entries(metadata, &["annotations"]) {
        for why in rules::qualified_name(&key.to_lowercase()) {
            errors.push(FieldError::invalid(path, key.as_str(), why));
        }
        size += key.len() + text.as_str().unwrap_or_default().len();
    }
    if size > ANNOTATIONS_LIMIT {
        errors.push(FieldError::too_long(path, ANNOTATIONS_LIMIT));
    }
}

fn owners(metadata: &Value, root: &Path<'_>, errors: &mut Vec<FieldError>) {
    let path = root.field("ownerReferences");
    let mut controllers = Vec::new();
    for (index, owner) in value::list(metadata, &["ownerReferences"]).iter().enumerate() {
        let at = path.index(index);
        for field in ["apiVersion", "kind", "name", "uid"] {
            let text = value::text(owner, &[field]);
            if text.is_empty() {
                errors.push(FieldError::invalid(at.field(field), text, "must not be empty"));
            }
        }
        if value::flag(owner, &["controller"]) {
            let (kind, name) = (value::text(owner, &["kind"]), value::text(owner, &["name"]));
            controllers.push(format!("{kind}/{name}"));
        }
    }
    if controllers.len() > 1 {
        let references = metadata.get("ownerReferences").cloned().unwrap_or_default();
        let detail = format!(
            "Only one reference can have Controller set to true. Found {}",
            controllers.join(" and ")
        );
        errors.push(FieldError::invalid(path, references, detail));
    }
}

fn finalizers(
    metadata: &Value,
    old: Option<&Value>,
    root: &Path<'_>,
    errors: &mut Vec<FieldError>,
) {
    let path = root.field("finalizers");
    let list = value::list(metadata, &["finalizers"]);
    for (index, finalizer) in list.iter().enumerate() {
        let text = finalizer.as_str().unwrap_or_default();
        for why in rules::qualified_name(text) {
            errors.push(FieldError::invalid(path.index(index), text, why));
        }
    }
    // What is on its way out may only lose finalizers.
    if let Some(old) = old
        && value::at(old, &["metadata", "deletionTimestamp"]).is_some()
    {
        let before = value::list(old, &["metadata", "finalizers"]);
        let added: Vec<&str> =
            list.iter().filter(|f| !before.contains(f)).filter_map(Value::as_str).collect();
        if !added.is_empty() {
            errors.push(FieldError::forbidden(
                path,
                format!(
                    "no new finalizers can be added if the object is being deleted, found new \
                     finalizers []string{{{}}}",
                    added.iter().map(|f| format!("{f:?}")).collect::<Vec<_>>().join(", ")
                ),
            ));
        }
    }
}
