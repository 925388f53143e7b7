//! From a body to an object of a kind.

use serde_json::Value;

use super::{Resource, value};
use crate::status::Status;

/// What becomes of fields that do not exist, or come twice (`fieldValidation` of a request).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldValidation {
    /// Dropped silently.
    Ignore,
    /// Dropped, with a warning each.
    #[default]
    Warn,
    /// Refused.
    Strict,
}

impl FieldValidation {
    /// From the query parameter; absent or empty means [`Self::Warn`].
    ///
    /// # Errors
    /// 422 if it is none of the three.
    pub fn parse(parameter: Option<&str>) -> Result<Self, Status> {
        match parameter {
            None | Some("" | "Warn") => Ok(Self::Warn),
            Some("Ignore") => Ok(Self::Ignore),
            Some("Strict") => Ok(Self::Strict),
            Some(other) => {
                let supported = &["Ignore", "Warn", "Strict", ""];
                let error =
                    crate::status::FieldError::not_supported("fieldValidation", other, supported);
                Err(Status::invalid("meta.k8s.io", "CreateOptions", "", &[error]))
            }
        }
    }
}

/// A body that is an object of its kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// The object, without fields that do not exist.
    pub object: Value,
    /// What to send in `Warning` headers.
    pub warnings: Vec<String>,
}

pub(super) fn decode(
    resource: &Resource,
    mut body: Value,
    problems: Vec<String>,
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    check_kind(resource, &mut body)?;
    finish(resource, body, problems, validation)
}

pub(super) fn decode_bytes(
    resource: &Resource,
    body: &[u8],
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    let body = serde_json::from_slice(body)
        .map_err(|e| Status::bad_request(format!("couldn't get version/kind; json parse error: {e}")))?;
    decode(resource, body, Vec::new(), validation)
}

fn finish(
    resource: &Resource,
    body: Value,
    problems: Vec<String>,
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    match validation {
        FieldValidation::Strict if !problems.is_empty() => Err(Status::bad_request(format!(
            "{} in version {:?} cannot be handled as a {}: strict decoding error: {}",
            resource.kind,
            resource.version,
            resource.kind,
            problems.join(", "),
        ))),
        FieldValidation::Ignore => Ok(Decoded { object: body, warnings: Vec::new() }),
        _ => Ok(Decoded { object: body, warnings: problems }),
    }
}

/// The body must be an object of this kind and version; without either it is taken for one.
fn check_kind(resource: &Resource, body: &mut Value) -> Result<(), Status> {
    let (given_version, given_kind) =
        (value::text(body, &["apiVersion"]).to_owned(), value::text(body, &["kind"]).to_owned());
    let Some(object) = body.as_object_mut() else {
        return Err(Status::bad_request(format!(
            "couldn't get version/kind; the body must be a JSON object of kind {}",
            resource.kind
        )));
    };
    let expected = resource.api_version();
    if !given_version.is_empty() && given_version != expected {
        return Err(Status::bad_request(format!(
            "the API version in the data ({given_version}) does not match the expected API version ({expected})"
        )));
    }
    if !given_kind.is_empty() && given_kind != resource.kind {
        return Err(Status::bad_request(format!(
            "{given_kind} in version {:?} cannot be handled as a {}: the kind in the data ({given_kind}) \
             does not match the expected kind ({})",
            resource.version, resource.kind, resource.kind
        )));
    }
    object.insert("apiVersion".to_owned(), expected.as_ref().into());
    object.insert("kind".to_owned(), resource.kind.as_str().into());
    Ok(())
}
