//! The `grpc` probe: one call of `grpc.health.v1.Health/Check` over HTTP/2 without TLS.
//!
//! The call and its answer are two fields of protobuf, so they are written and read by hand.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, header};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use super::Outcome;

/// The largest answer that is read: a frame's head and a status need seven bytes.
const ANSWER_BYTES: usize = 4 * 1024;

/// Asks the server at `address` for the health of `service`.
pub(crate) async fn check(address: SocketAddr, service: &str, timeout: Duration) -> Outcome {
    match tokio::time::timeout(timeout, call(address, service)).await {
        Ok(Ok(ServingStatus::Serving)) => Outcome::Success,
        Ok(Ok(status)) => {
            Outcome::Failure(format!("service unhealthy (responded with \"{}\")", status.as_str()))
        }
        Ok(Err(reason)) => Outcome::Failure(reason),
        Err(_) => Outcome::Failure(format!(
            "timeout: failed to connect service \"{address}\" within {}s: context deadline exceeded",
            timeout.as_secs()
        )),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServingStatus {
    Unknown,
    Serving,
    NotServing,
    ServiceUnknown,
}

impl ServingStatus {
    fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "UNKNOWN",
            Self::Serving => "SERVING",
            Self::NotServing => "NOT_SERVING",
            Self::ServiceUnknown => "SERVICE_UNKNOWN",
        }
    }
}

async fn call(address: SocketAddr, service: &str) -> Result<ServingStatus, String> {
    let unreachable =
        |error: String| format!("error: failed to connect service \"{address}\": {error}");
    let stream =
        TcpStream::connect(address).await.map_err(|error| unreachable(error.to_string()))?;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(|error| unreachable(error.to_string()))?;
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, "kube-probe/1.36")
        .body(Full::new(request_frame(service)))
        .map_err(|error| error.to_string())?;
    let exchange = async move {
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let (head, body) = answer.into_parts();
        let body =
            Limited::new(body, ANSWER_BYTES).collect().await.map_err(|error| error.to_string())?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        let field = |name| {
            let value = trailers.get(name).or(head.headers.get(name));
            value.and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        match field("grpc-status").as_deref() {
            Some("0") | None if head.status.is_success() => answer_status(&body.to_bytes()),
            Some("12") => Err("error: this server does not implement the grpc health protocol \
                               (grpc.health.v1.Health)"
                .to_owned()),
            code => Err(format!(
                "error: health rpc failed: rpc error: code = {} desc = {}",
                code.unwrap_or("unknown"),
                field("grpc-message").unwrap_or_default()
            )),
        }
    };
    tokio::select! {
        answer = exchange => answer,
        Err(error) = connection => Err(unreachable(error.to_string())),
    }
}

/// A gRPC frame (not compressed, length, message) around `HealthCheckRequest { service = 1 }`.
fn request_frame(service: &str) -> Bytes {
    let mut message = Vec::with_capacity(service.len() + 6);
    if !service.is_empty() {
        message.push(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            message.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend_from_slice(service.as_bytes());
    }
    let mut frame = vec![0];
    frame.extend_from_slice(&(message.len() as u32).to_be_bytes());
    frame.extend(message);
    frame.into()
}

/// The status in a frame around `HealthCheckResponse { status = 1 }`.
fn answer_status(frame: &[u8]) -> Result<ServingStatus, String> {
    let broken = || "error: the answer of the health service could not be read".to_owned();
    let (head, message) = frame.split_at_checked(5).ok_or_else(broken)?;
    if head[0] != 0 || head[1..] != (message.len() as u32).to_be_bytes() {
        return Err(broken());
    }
    match message {
        [] | [0x08, 0] => Ok(ServingStatus::Unknown),
        [0x08, 1] => Ok(ServingStatus::Serving),
        [0x08, 2] => Ok(ServingStatus::NotServing),
        [0x08, 3] => Ok(ServingStatus::ServiceUnknown),
        _ => Err(broken()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_a_frame_with_the_service_name() {
        assert_eq!(request_frame("").as_ref(), [0, 0, 0, 0, 0]);
        assert_eq!(request_frame("ab").as_ref(), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        let long = request_frame(&"x".repeat(200));
        assert_eq!(&long[5..8], [0x0a, 0xc8, 0x01]);
    }

    #[test]
    fn an_answer_is_a_frame_with_the_status() {
        let rows: [(&[u8], Option<ServingStatus>); 6] = [
            (&[0, 0, 0, 0, 2, 8, 1], Some(ServingStatus::Serving)),
            (&[0, 0, 0, 0, 2, 8, 2], Some(ServingStatus::NotServing)),
            (&[0, 0, 0, 0, 0], Some(ServingStatus::Unknown)),
            (&[0, 0, 0, 0, 9, 8, 1], None),
            (&[1, 0, 0, 0, 2, 8, 1], None),
            (&[0, 0], None),
        ];
        for (frame, expected) in rows {
            assert_eq!(answer_status(frame).ok(), expected, "{frame:?}");
        }
    }
}
