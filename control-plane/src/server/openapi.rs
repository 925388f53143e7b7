//! `/openapi/…`: made once, off the async workers, and kept by clients: what the index names by a
//! hash never changes.

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, Method, StatusCode, header};
use jiff::Timestamp;

use super::{
    core::{Call, Core},
    negotiate::Encoding,
    nonresource::has_already,
    respond::{self, Answer},
    service::empty,
};
use crate::status::Status;

/// How long a document that is named by its hash is good.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

pub(super) async fn serve(
    core: &Arc<Core>,
    call: &Call,
    method: &Method,
    path: &str,
) -> Result<Answer, Status> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Err(Status::method_not_allowed());
    }
    let accepted = call.accept(&[])?;
    let path = path.trim_end_matches('/').to_owned();
    let (with, wanted) = (Arc::clone(core), path.clone());
    let make = move || with.documents.get(&with.registry, &wanted);
    let document = tokio::task::spawn_blocking(make).await.map_err(Status::internal)?;
    let document = document.ok_or_else(Status::unknown_path)?;
    let hash = document.tag.trim_matches('"');
    let asked = call.info.query.get("hash");
    if let Some(asked) = asked
        && path.starts_with("v3/")
        && asked != hash
    {
        // Of another version of this server: the client is told where its successor is.
        let mut moved = respond::respond(StatusCode::MOVED_PERMANENTLY, "text/plain", empty());
        let place = format!("/openapi/{path}?hash={hash}");
        let place = HeaderValue::try_from(place).map_err(Status::internal)?;
        moved.headers_mut().insert(header::LOCATION, place);
        return Ok(moved);
    }
    let mut answer = if has_already(call, &document.tag) {
        respond::respond(StatusCode::NOT_MODIFIED, "application/json", empty())
    } else if accepted.encoding == Encoding::Json && !accepted.pretty {
        let body = respond::full(document.body.clone());
        respond::respond(StatusCode::OK, "application/json", body)
    } else {
        let value = serde_json::from_slice(&document.body).map_err(Status::internal)?;
        respond::document(StatusCode::OK, &value, accepted)
    };
    let headers = answer.headers_mut();
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    headers.insert(header::ETAG, document.tag.parse().map_err(Status::internal)?);
    if asked == Some(hash) {
        let until = Timestamp::now().checked_add(FOREVER).unwrap_or(Timestamp::MAX);
        let until = until.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let keep = HeaderValue::from_static("public, immutable");
        headers.insert(header::CACHE_CONTROL, keep);
        headers.insert(header::EXPIRES, until.parse().map_err(Status::internal)?);
    }
    Ok(answer)
}
