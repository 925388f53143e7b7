//! The API's answer when something goes wrong: kind `Status`, as an error type.
//!
//! Codes, reasons and the wording of messages are those that Kubernetes documents and that clients
//! look at (`apimachinery/pkg/api/errors`, `apimachinery/pkg/util/validation/field`).

use std::fmt;

use serde_json::{Map, Value, json};

use crate::admission::Refusal;

/// Why a request failed, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Status {
    /// HTTP status code.
    pub code: u16,
    /// The reason in one word (`NotFound`, `Conflict`, …).
    pub reason: &'static str,
    /// What to tell the user.
    pub message: String,
    /// What it is about.
    pub details: Option<Box<Details>>,
}

/// What a [`Status`] is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// Object name, or empty.
    pub name: String,
    /// API group, or empty.
    pub group: String,
    /// The plural resource name, or the kind where the object itself is bad.
    pub kind: String,
    /// The object's UID, or empty.
    pub uid: String,
    /// Each single thing that is wrong.
    pub causes: Vec<Cause>,
    /// When to try again; 0 if there is nothing to say.
    pub retry_after_seconds: u32,
}

/// One thing that is wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cause {
    /// In one word (`FieldValueInvalid`, `FieldManagerConflict`, …), or empty.
    pub reason: String,
    /// In words.
    pub message: String,
    /// The field's path, or empty.
    pub field: String,
}

fn qualified(group: &str, plural: &str) -> String {
    if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") }
}

impl Status {
    /// A status without details.
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: None }
    }

    fn about(mut self, group: &str, kind: &str, name: &str) -> Self {
        let details = self.details.get_or_insert_default();
        details.group = group.to_owned();
        details.kind = kind.to_owned();
        details.name = name.to_owned();
        self
    }

    /// The same with its causes.
    #[must_use]
    pub fn with_causes(mut self, causes: Vec<Cause>) -> Self {
        self.details.get_or_insert_default().causes = causes;
        self
    }

    /// The same with a time after which to try again.
    #[must_use]
    pub fn with_retry_after(mut self, seconds: u32) -> Self {
        self.details.get_or_insert_default().retry_after_seconds = seconds;
        self
    }

    /// When to try again (the `Retry-After` header), if there is something to say.
    pub fn retry_after_seconds(&self) -> Option<u32> {
        self.details.as_ref().map(|d| d.retry_after_seconds).filter(|s| *s > 0)
    }

    /// 404: the object does not exist.
    pub fn not_found(group: &str, plural: &str, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} \"{name}\" not found", qualified(group, plural)))
            .about(group, plural, name)
    }

    /// 404: no such path or resource.
    pub fn unknown_path() -> Self {
        let mut status =
            Self::new(404, "NotFound", "the server could not find the requested resource");
        status.details = Some(Box::default());
        status
    }

    /// 409: an object of this name exists.
    pub fn already_exists(group: &str, plural: &str, name: &str) -> Self {
        let resource = qualified(group, plural);
        Self::new(409, "AlreadyExists", format!("{resource} \"{name}\" already exists"))
            .about(group, plural, name)
    }

    /// 409: the request can't be carried out on the object as it is now.
    pub fn conflict(group: &str, plural: &str, name: &str, why: &str) -> Self {
        let resource = qualified(group, plural);
        let message = format!("Operation cannot be fulfilled on {resource} \"{name}\": {why}");
        Self::new(409, "Conflict", message).about(group, plural, name)
    }

    /// 409: the `resourceVersion` that came with an update is no longer the newest.
    pub fn stale(group: &str, plural: &str, name: &str) -> Self {
        Self::conflict(
            group,
            plural,
            name,
            "the object has been modified; please apply your changes to the latest version and \
             try again",
        )
    }

    /// 422: the object breaks rules of its kind.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Self {
        let list = match errors {
            [one] => one.to_string(),
            many => {
                // As the aggregate of apimachinery: each message once.
                let mut seen: Vec<String> = Vec::with_capacity(many.len());
                for error in many {
                    let text = error.to_string();
                    if !seen.contains(&text) {
                        seen.push(text);
                    }
                }
                if seen.len() == 1 { seen.remove(0) } else { format!("[{}]", seen.join(", ")) }
            }
        };
        let message = format!("{} \"{name}\" is invalid: {list}", qualified(group, kind));
        let causes = errors
            .iter()
            .map(|error| Cause {
                reason: error.kind.reason().to_owned(),
                message: error.body(),
                field: error.field.clone(),
            })
            .collect();
        Self::new(422, "Invalid", message).about(group, kind, name).with_causes(causes)
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 403 on a resource: may not, because. `name` may be empty.
    pub fn forbidden(group: &str, plural: &str, name: &str, why: &str) -> Self {
        let resource = qualified(group, plural);
        let message = if name.is_empty() {
            format!("{resource} is forbidden: {why}")
        } else {
            format!("{resource} \"{name}\" is forbidden: {why}")
        };
        Self::new(403, "Forbidden", message).about(group, plural, name)
    }

    /// 403 on a path that is no resource.
    pub fn forbidden_path(why: &str) -> Self {
        let mut status = Self::new(403, "Forbidden", format!("forbidden: {why}"));
        status.details = Some(Box::default());
        status
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource";
        let mut status = Self::new(405, "MethodNotAllowed", message);
        status.details = Some(Box::default());
        status
    }

    /// 410: the resource version that was asked for is no longer kept. The client must list anew.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 410: a watch or list from a revision older than what is kept.
    pub fn too_old(requested: u64, oldest: u64) -> Self {
        Self::expired(format!("too old resource version: {requested} ({oldest})"))
    }

    /// 415: the body has a type that is not read.
    pub fn unsupported_media_type(accepted: &[&str]) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 406: no type that the client accepts is written.
    pub fn not_acceptable(offered: &[&str]) -> Self {
        let message =
            format!("only the following media types are accepted: {}", offered.join(", "));
        Self::new(406, "NotAcceptable", message)
    }

    /// 413.
    pub fn too_large(message: &str) -> Self {
        Self::new(413, "RequestEntityTooLarge", format!("Request entity is too large: {message}"))
    }

    /// 429: try again after so many seconds.
    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        Self::new(429, "TooManyRequests", message).with_retry_after(retry_after_seconds)
    }

    /// 500.
    pub fn internal(why: impl fmt::Display) -> Self {
        let cause = Cause { message: why.to_string(), ..Cause::default() };
        Self::new(500, "InternalError", format!("Internal error occurred: {why}"))
            .with_causes(vec![cause])
    }

    /// 503: can't be served right now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "ServiceUnavailable", message)
    }

    /// 504: took longer than the request may.
    pub fn timeout(message: &str, retry_after_seconds: u32) -> Self {
        let message = format!("Timeout: {message}");
        Self::new(504, "Timeout", message).with_retry_after(retry_after_seconds)
    }

    /// The object that is sent: `kind: Status`, `status: Failure`.
    pub fn to_value(&self) -> Value {
        let mut value = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        });
        if let (Some(details), Some(object)) = (&self.details, value.as_object_mut()) {
            object.insert("details".to_owned(), details.to_value());
        }
        value
    }

    /// The answer to a delete that took effect: `status: Success`, with what was deleted.
    pub fn deleted(group: &str, plural: &str, name: &str, uid: &str) -> Value {
        let details = Details {
            name: name.to_owned(),
            group: group.to_owned(),
            kind: plural.to_owned(),
            uid: uid.to_owned(),
            ..Details::default()
        };
        json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Success",
            "details": details.to_value(),
        })
    }
}

impl Details {
    fn to_value(&self) -> Value {
        let mut out = Map::new();
        let texts = [
            ("name", &self.name),
            ("group", &self.group),
            ("kind", &self.kind),
            ("uid", &self.uid),
        ];
        for (key, text) in texts {
            if !text.is_empty() {
                out.insert(key.to_owned(), Value::from(text.as_str()));
            }
        }
        if !self.causes.is_empty() {
            out.insert("causes".to_owned(), self.causes.iter().map(Cause::to_value).collect());
        }
        if self.retry_after_seconds > 0 {
            out.insert("retryAfterSeconds".to_owned(), Value::from(self.retry_after_seconds));
        }
        Value::Object(out)
    }
}

impl Cause {
    fn to_value(&self) -> Value {
        let mut out = Map::new();
        let texts = [("reason", &self.reason), ("message", &self.message), ("field", &self.field)];
        for (key, text) in texts {
            if !text.is_empty() {
                out.insert(key.to_owned(), Value::from(text.as_str()));
            }
        }
        Value::Object(out)
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let Refusal { code, reason, message, details } = refusal;
        Self { code, reason, message, details }
    }
}

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldErrorKind {
    /// Refers to something that isn't there.
    NotFound,
    /// Missing.
    Required,
    /// Twice in what must be unique.
    Duplicate,
    /// Breaks a rule.
    Invalid,
    /// Not one of the values that are allowed.
    NotSupported,
    /// May not be set here and now.
    Forbidden,
    /// Longer than it may be.
    TooLong,
    /// More items than there may be.
    TooMany,
}

impl FieldErrorKind {
    fn reason(self) -> &'static str {
        match self {
            Self::NotFound => "FieldValueNotFound",
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::NotFound => "Not found",
            Self::Required => "Required value",
            Self::Duplicate => "Duplicate value",
            Self::Invalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
        }
    }
}

/// A field that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// In what way.
    pub kind: FieldErrorKind,
    /// The field's path (`spec.containers[0].name`).
    pub field: String,
    /// The value, where it is shown.
    pub bad_value: Option<Value>,
    /// The rule.
    pub detail: String,
}

impl FieldError {
    fn new(
        kind: FieldErrorKind,
        field: impl fmt::Display,
        bad_value: Option<Value>,
        detail: impl Into<String>,
    ) -> Self {
        Self { kind, field: field.to_string(), bad_value, detail: detail.into() }
    }

    /// The field must be set.
    pub fn required(field: impl fmt::Display, detail: impl Into<String>) -> Self {
        Self::new(FieldErrorKind::Required, field, None, detail)
    }

    /// The value breaks a rule.
    pub fn invalid(
        field: impl fmt::Display,
        value: impl Into<Value>,
        detail: impl Into<String>,
    ) -> Self {
        Self::new(FieldErrorKind::Invalid, field, Some(value.into()), detail)
    }

    /// The value was there before.
    pub fn duplicate(field: impl fmt::Display, value: impl Into<Value>) -> Self {
        Self::new(FieldErrorKind::Duplicate, field, Some(value.into()), "")
    }

    /// What the value refers to isn't there.
    pub fn not_found(field: impl fmt::Display, value: impl Into<Value>) -> Self {
        Self::new(FieldErrorKind::NotFound, field, Some(value.into()), "")
    }

    /// The field may not be set, or not be changed.
    pub fn forbidden(field: impl fmt::Display, detail: impl Into<String>) -> Self {
        Self::new(FieldErrorKind::Forbidden, field, None, detail)
    }

    /// The value is none of those allowed.
    pub fn not_supported(
        field: impl fmt::Display,
        value: impl Into<Value>,
        supported: &[&str],
    ) -> Self {
        let mut sorted = supported.to_vec();
        sorted.sort_unstable();
        let quoted: Vec<String> = sorted.iter().map(|v| format!("\"{v}\"")).collect();
        let detail = format!("supported values: {}", quoted.join(", "));
        Self::new(FieldErrorKind::NotSupported, field, Some(value.into()), detail)
    }

    /// The value is longer than `limit` bytes.
    pub fn too_long(field: impl fmt::Display, limit: usize) -> Self {
        let detail = format!("may not be more than {limit} bytes");
        Self::new(FieldErrorKind::TooLong, field, None, detail)
    }

    /// There are more than `limit` items.
    pub fn too_many(field: impl fmt::Display, actual: usize, limit: usize) -> Self {
        let detail = format!("must have at most {limit} items");
        Self::new(FieldErrorKind::TooMany, field, Some(actual.into()), detail)
    }

    /// The message without the field's path.
    pub fn body(&self) -> String {
        let mut out = self.kind.title().to_owned();
        if let Some(value) = &self.bad_value {
            out.push_str(": ");
            out.push_str(&value.to_string());
        }
        if !self.detail.is_empty() {
            out.push_str(": ");
            out.push_str(&self.detail);
        }
        out
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.body())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_that_kubectl_users_know() {
        let rows = [
            (Status::not_found("", "pods", "web"), 404, "pods \"web\" not found"),
            (
                Status::already_exists("apps", "deployments", "web"),
                409,
                "deployments.apps \"web\" already exists",
            ),
            (
                Status::stale("", "pods", "web"),
                409,
                "Operation cannot be fulfilled on pods \"web\": the object has been modified; \
                 please apply your changes to the latest version and try again",
            ),
            (
                Status::invalid(
                    "apps",
                    "Deployment",
                    "web",
                    &[FieldError::required("spec.selector", "")],
                ),
                422,
                "Deployment.apps \"web\" is invalid: spec.selector: Required value",
            ),
            (
                Status::invalid(
                    "",
                    "Pod",
                    "web",
                    &[
                        FieldError::invalid("metadata.name", "A_b", "no"),
                        FieldError::not_supported("spec.restartPolicy", "x", &["B", "A"]),
                    ],
                ),
                422,
                "Pod \"web\" is invalid: [metadata.name: Invalid value: \"A_b\": no, \
                 spec.restartPolicy: Unsupported value: \"x\": supported values: \"A\", \"B\"]",
            ),
        ];
        for (status, code, message) in rows {
            assert_eq!(status.code, code);
            assert_eq!(status.to_string(), message);
        }
    }

    #[test]
    fn causes_carry_field_and_reason() {
        let status = Status::invalid("", "Pod", "p", &[FieldError::duplicate("spec.x[1]", "a")]);
        assert_eq!(
            status.to_value()["details"],
            json!({"name": "p", "kind": "Pod", "causes": [{
                "reason": "FieldValueDuplicate",
                "message": "Duplicate value: \"a\"",
                "field": "spec.x[1]"
            }]})
        );
    }
}
