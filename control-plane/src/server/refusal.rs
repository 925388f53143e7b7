//! A kubelet's plain-text refusal, as clients of the API know refusals.

use http::Response;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Bytes};

use crate::status::Status;

/// The most of a refusal's text that is shown.
const TEXT_BYTES: usize = 50_000;

/// The refusal as a `Status` with the kubelet's text as its message.
pub(super) async fn status<B>(answer: Response<B>) -> Status
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let code = answer.status();
    let body = Limited::new(answer.into_body(), TEXT_BYTES).collect().await;
    let text = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).trim().to_owned());
    let message = text.unwrap_or_default();
    let reason = match code.as_u16() {
        400 => "BadRequest",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        405 => "MethodNotAllowed",
        422 => "Invalid",
        503 => "ServiceUnavailable",
        504 => "Timeout",
        _ => "InternalError",
    };
    if message.is_empty() {
        let message = format!("the kubelet answered with {code}");
        return Status::new(code.as_u16(), reason, message);
    }
    Status::new(code.as_u16(), reason, message)
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;

    use super::*;

    #[tokio::test]
    async fn the_kubelets_words_become_the_message() {
        let refused = |code: u16, text: &'static str| {
            Response::builder().status(code).body(Full::new(Bytes::from(text))).unwrap()
        };
        let said = status(refused(400, "previous terminated container \"c\" not found\n")).await;
        assert_eq!((said.code, said.reason), (400, "BadRequest"));
        assert_eq!(said.message, "previous terminated container \"c\" not found");
        assert_eq!(
            status(refused(404, "")).await.message,
            "the kubelet answered with 404 Not Found"
        );
    }
}
