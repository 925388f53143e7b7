//! From a body to an object of a kind.

use std::fmt;

use serde_json::Value;

use super::{Resource, value};
use crate::{
    schema::{check, parse_with_duplicates, schema},
    status::{FieldError, Status},
};

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
                let error = FieldError::not_supported("fieldValidation", other, supported);
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
    mut problems: Vec<String>,
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    check_kind(resource, &mut body)?;
    if let Some(id) = schema().kind(&resource.group, &resource.version, &resource.kind) {
        let mut unknown = Vec::new();
        check(id, &mut body, &mut unknown).map_err(|error| cannot_be_handled(resource, &error))?;
        problems.extend(unknown.iter().map(|path| format!("unknown field {path:?}")));
    }
    finish(resource, body, problems, validation)
}

pub(super) fn decode_bytes(
    resource: &Resource,
    body: &[u8],
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    let (body, duplicates) = parse_with_duplicates(body).map_err(|e| {
        Status::bad_request(format!("couldn't get version/kind; json parse error: {e}"))
    })?;
    let problems = duplicates.iter().map(|path| format!("duplicate field {path:?}")).collect();
    decode(resource, body, problems, validation)
}

fn cannot_be_handled(resource: &Resource, why: impl fmt::Display) -> Status {
    let (kind, version) = (&resource.kind, &resource.version);
    Status::bad_request(format!(
        "{kind} in version {version:?} cannot be handled as a {kind}: {why}"
    ))
}

fn finish(
    resource: &Resource,
    body: Value,
    problems: Vec<String>,
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    match validation {
        FieldValidation::Strict if !problems.is_empty() => {
            let why = format!("strict decoding error: {}", problems.join(", "));
            Err(cannot_be_handled(resource, why))
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Registry;

    fn decode(body: &str, validation: FieldValidation) -> Result<Decoded, String> {
        let registry = Registry::builtin();
        let pods = registry.resource("", "v1", "pods").unwrap();
        pods.decode_bytes(body.as_bytes(), validation).map_err(|e| e.message)
    }

    #[test]
    fn unknown_and_duplicate_fields_warn_or_fail() {
        let body = r#"{"kind":"Pod","spec":{"foo":1,"hostname":"a","hostname":"b"}}"#;
        let decoded = decode(body, FieldValidation::Warn).unwrap();
        let expected = ["duplicate field \"spec.hostname\"", "unknown field \"spec.foo\""];
        assert_eq!(decoded.warnings, expected);
        assert_eq!(decoded.object["apiVersion"], "v1");
        assert!(decode(body, FieldValidation::Ignore).unwrap().warnings.is_empty());
        assert_eq!(
            decode(body, FieldValidation::Strict).unwrap_err(),
            "Pod in version \"v1\" cannot be handled as a Pod: strict decoding error: duplicate \
             field \"spec.hostname\", unknown field \"spec.foo\""
        );
    }

    #[test]
    fn bodies_of_another_kind_are_refused() {
        let rows = [
            (r#"{"kind":"Service"}"#, "the expected kind (Pod)"),
            (r#"{"apiVersion":"v2"}"#, "does not match the expected API version (v1)"),
            (r"[]", "must be a JSON object"),
            (r"{", "json parse error"),
        ];
        for (body, part) in rows {
            let message = decode(body, FieldValidation::Warn).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }
}
