//! From values to HTTP answers.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::negotiate::{Accepted, Encoding, Shape};
use crate::{
    registry::Resource,
    status::Status,
    table::{self, IncludeObject},
};

/// What goes wrong in the middle of a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// The body of an answer.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;
/// An answer.
pub(crate) type Answer = Response<Body>;

pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn respond(code: StatusCode, content_type: &'static str, body: Body) -> Answer {
    let mut answer = Response::new(body);
    *answer.status_mut() = code;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    // Answers depend on who asks and when.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    answer
}

pub(crate) fn text(code: StatusCode, text: impl Into<Bytes>) -> Answer {
    let mut answer = respond(code, "text/plain; charset=utf-8", full(text));
    let nosniff = HeaderValue::from_static("nosniff");
    answer.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, nosniff);
    answer
}

/// A document as the client wants it.
pub(crate) fn document(code: StatusCode, value: &Value, accepted: Accepted) -> Answer {
    match accepted.encoding {
        Encoding::Yaml => match serde_saphyr::to_string(value) {
            Ok(yaml) => respond(code, "application/yaml", full(yaml)),
            Err(error) => status(&Status::internal(error), Accepted::default()),
        },
        Encoding::Json => {
            let json = if accepted.pretty {
                serde_json::to_vec_pretty(value).map(|mut json| {
                    json.push(b'\n');
                    json
                })
            } else {
                serde_json::to_vec(value).map(|mut json| {
                    json.push(b'\n');
                    json
                })
            };
            // Values have no keys but strings: that is all that could fail.
            respond(code, "application/json", full(json.unwrap_or_default()))
        }
    }
}

/// A failure.
pub(crate) fn status(status: &Status, accepted: Accepted) -> Answer {
    let code = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut answer = document(code, &status.to_value(), accepted);
    if let Some(seconds) = status.retry_after_seconds() {
        answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    answer
}

/// What a table shows of each object besides its cells (`includeObject`).
pub(crate) fn include_object(parameter: Option<&str>) -> Result<IncludeObject, Status> {
    match parameter {
        None | Some("Metadata") => Ok(IncludeObject::Metadata),
        Some("Object") => Ok(IncludeObject::Object),
        Some("None") => Ok(IncludeObject::None),
        Some(other) => {
            Err(Status::bad_request(format!("unrecognized includeObject value: {other:?}")))
        }
    }
}

/// An object's metadata alone.
pub(crate) fn partial(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata").unwrap_or(&Value::Null),
    })
}

/// One object.
pub(crate) fn object(
    code: StatusCode,
    resource: &Resource,
    object: &Arc<Value>,
    accepted: Accepted,
    include: IncludeObject,
) -> Answer {
    match accepted.shape {
        Shape::Table => {
            let version = object.pointer("/metadata/resourceVersion").cloned();
            let metadata = json!({ "resourceVersion": version.unwrap_or_else(|| "".into()) });
            let items = std::slice::from_ref(object);
            let table = table::render(resource, items, include, Timestamp::now(), metadata);
            document(code, &table, accepted)
        }
        Shape::Partial => document(code, &partial(object), accepted),
        _ => document(code, object, accepted),
    }
}

/// A list's own metadata.
#[derive(Clone, Debug, Default)]
pub(crate) struct ListMeta {
    pub(crate) resource_version: String,
    pub(crate) continue_token: Option<String>,
    pub(crate) remaining: Option<usize>,
}

impl ListMeta {
    fn to_value(&self) -> Value {
        let mut meta = Map::new();
        meta.insert("resourceVersion".to_owned(), self.resource_version.as_str().into());
        if let Some(token) = &self.continue_token {
            meta.insert("continue".to_owned(), token.as_str().into());
        }
        if let Some(remaining) = self.remaining {
            meta.insert("remainingItemCount".to_owned(), remaining.into());
        }
        Value::Object(meta)
    }
}

/// A list of objects.
pub(crate) fn list(
    resource: &Resource,
    items: &[Arc<Value>],
    meta: &ListMeta,
    accepted: Accepted,
    include: IncludeObject,
) -> Answer {
    let meta = meta.to_value();
    if accepted.shape == Shape::Table {
        let table = table::render(resource, items, include, Timestamp::now(), meta);
        return document(StatusCode::OK, &table, accepted);
    }
    let (kind, version) = match accepted.shape {
        Shape::Partial => ("PartialObjectMetadataList", "meta.k8s.io/v1".into()),
        _ => (resource.list_kind.as_str(), resource.api_version()),
    };
    if accepted.encoding == Encoding::Yaml || accepted.pretty || accepted.shape == Shape::Partial {
        let items: Vec<Value> = match accepted.shape {
            Shape::Partial => items.iter().map(|item| partial(item)).collect(),
            _ => items.iter().map(|item| Value::clone(item)).collect(),
        };
        let whole =
            json!({ "kind": kind, "apiVersion": version, "metadata": meta, "items": items });
        return document(StatusCode::OK, &whole, accepted);
    }
    // Written straight from the shared objects, without a copy of them.
    let mut json = Vec::with_capacity(256 + items.len() * 1024);
    json.extend_from_slice(
        format!(r#"{{"kind":"{kind}","apiVersion":"{version}","metadata":{meta},"items":["#)
            .as_bytes(),
    );
    for (n, item) in items.iter().enumerate() {
        if n > 0 {
            json.push(b',');
        }
        // Values have no keys but strings, and memory does not fail to be written to.
        let _ = serde_json::to_writer(&mut json, &**item);
    }
    json.extend_from_slice(b"]}\n");
    respond(StatusCode::OK, "application/json", full(json))
}

/// Adds what the client should know although the request succeeded (RFC 7234 `Warning: 299`).
pub(crate) fn warn(answer: &mut Answer, warnings: &[String]) {
    for warning in warnings.iter().take(32) {
        let clean: String = warning
            .chars()
            .filter(|c| !c.is_control())
            .flat_map(|c| {
                let escape = matches!(c, '"' | '\\').then_some('\\');
                escape.into_iter().chain(Some(c))
            })
            .take(2048)
            .collect();
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{clean}\"")) {
            answer.headers_mut().append(header::WARNING, value);
        }
    }
}
