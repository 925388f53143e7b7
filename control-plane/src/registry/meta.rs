//! Object metadata: what the server sets on create and keeps on update.

use jiff::Timestamp;
use rand::RngExt as _;
use serde_json::{Map, Value};

use super::{CreateContext, Resource, value};
use crate::status::Status;

/// As `apimachinery/pkg/util/rand`: no vowels and nothing that reads as one, so that no words
/// come out.
const SUFFIX_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LENGTH: usize = 5;
/// A generated name is at most 63 characters long.
const GENERATE_NAME_LENGTH: usize = 63 - SUFFIX_LENGTH;

/// A time as the API writes it, in whole seconds.
pub fn timestamp(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A name that starts with `base` and is very likely not taken.
pub fn generate_name(base: &str) -> String {
    let mut end = base.len().min(GENERATE_NAME_LENGTH);
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    let mut name = base[..end].to_owned();
    let mut random = rand::rng();
    for _ in 0..SUFFIX_LENGTH {
        let pick = random.random_range(0..SUFFIX_ALPHABET.len());
        name.push(char::from(SUFFIX_ALPHABET[pick]));
    }
    name
}

pub(super) fn metadata_of(object: &mut Value) -> Result<&mut Map<String, Value>, Status> {
    value::object_at(object, "metadata")
        .ok_or_else(|| Status::bad_request("metadata must be an object"))
}

pub(super) fn prepare_create(
    resource: &Resource,
    object: &mut Value,
    context: &CreateContext<'_>,
) -> Result<(), Status> {
    let metadata = metadata_of(object)?;
    set_namespace(resource, metadata, context.namespace)?;
    set_name(metadata, context.name)?;
    let version = metadata.get("resourceVersion").and_then(Value::as_str).unwrap_or_default();
    if !matches!(version, "" | "0") {
        return Err(Status::bad_request(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    for field in [
        "resourceVersion",
        "selfLink",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
    ] {
        metadata.remove(field);
    }
    metadata.insert("uid".to_owned(), uuid::Uuid::new_v4().to_string().into());
    metadata.insert("creationTimestamp".to_owned(), timestamp(context.now).into());
    if resource.has_generation {
        metadata.insert("generation".to_owned(), 1.into());
    }
    Ok(())
}

fn set_namespace(
    resource: &Resource,
    metadata: &mut Map<String, Value>,
    requested: &str,
) -> Result<(), Status> {
    let given = metadata.get("namespace").and_then(Value::as_str).unwrap_or_default();
    if !resource.namespaced {
        metadata.remove("namespace");
        return Ok(());
    }
    if !given.is_empty() && given != requested {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    metadata.insert("namespace".to_owned(), requested.into());
    Ok(())
}

fn set_name(metadata: &mut Map<String, Value>, requested: Option<&str>) -> Result<(), Status> {
    let text = |field| metadata.get(field).and_then(Value::as_str).unwrap_or_default();
    let (given, base) = (text("name"), text("generateName"));
    let name = match requested {
        Some(requested) if given.is_empty() => requested.to_owned(),
        Some(requested) if requested != given => {
            return Err(name_mismatch(given, requested));
        }
        _ if given.is_empty() && !base.is_empty() => generate_name(base),
        _ => return Ok(()),
    };
    metadata.insert("name".to_owned(), name.into());
    Ok(())
}

fn name_mismatch(given: &str, requested: &str) -> Status {
    Status::bad_request(format!(
        "the name of the object ({given}) does not match the name on the URL ({requested})"
    ))
}

pub(super) fn prepare_update(
    resource: &Resource,
    new: &mut Value,
    old: &Value,
) -> Result<(), Status> {
    let old_metadata = old.get("metadata").unwrap_or(&Value::Null);
    let metadata = metadata_of(new)?;
    let old_text = |field: &str| value::text(old_metadata, &[field]);
    let text = |field: &str| metadata.get(field).and_then(Value::as_str).unwrap_or_default();
    if !text("name").is_empty() && text("name") != old_text("name") {
        return Err(name_mismatch(text("name"), old_text("name")));
    }
    if resource.namespaced
        && !text("namespace").is_empty()
        && text("namespace") != old_text("namespace")
    {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    let uid = text("uid");
    if !uid.is_empty() && uid != old_text("uid") {
        let why = format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            old_text("uid")
        );
        return Err(Status::conflict(&resource.group, &resource.plural, old_text("name"), &why));
    }
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generateName",
        "generation",
    ] {
        value::copy_field(metadata, old_metadata, field);
    }
    metadata.remove("selfLink");
    Ok(())
}

/// One more than the old generation, where a change asks for new work.
pub(super) fn bump_generation(new: &mut Value, old: &Value) {
    let generation = value::int(old, &["metadata", "generation"]).unwrap_or(0) + 1;
    if let Some(metadata) = value::object_at(new, "metadata") {
        metadata.insert("generation".to_owned(), generation.into());
    }
}
