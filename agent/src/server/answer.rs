//! Answers: bodies that are whole, and bodies that are streamed.

use std::{convert::Infallible, pin::Pin};

use bytes::Bytes;
use futures::Stream;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use serde::Serialize;

/// An answer's body.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;
/// An answer.
pub(super) type Answer = Response<Body>;

fn whole(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()).boxed_unsync());
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

/// Plain text.
pub(super) fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    whole(status, "text/plain; charset=utf-8", body)
}

/// A refusal in plain text, as the kubelet words its own.
pub(super) fn refused(status: StatusCode, why: &str) -> Answer {
    text(status, format!("{why}\n"))
}

/// JSON.
pub(super) fn json(value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(body) => whole(StatusCode::OK, "application/json", body),
        Err(error) => refused(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// Metrics.
pub(super) fn metrics(body: String) -> Answer {
    whole(StatusCode::OK, keelson_api::metrics::CONTENT_TYPE, body)
}

/// Plain text that comes bit by bit.
pub(super) fn streamed(pieces: Pin<Box<dyn Stream<Item = Bytes> + Send>>) -> Answer {
    use futures::StreamExt;
    let frames = pieces.map(|piece| Ok(Frame::data(piece)));
    let mut answer = Response::new(StreamBody::new(frames).boxed_unsync());
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}
