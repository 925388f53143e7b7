//! Requests to the API server, under the names of Kubernetes' own client.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use kube::{Client, client::Body};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};

/// Buckets of durations, in seconds.
const SECONDS: [f64; 12] = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0];
/// Buckets of sizes, in bytes.
const BYTES: [f64; 11] = [
    64.0,
    256.0,
    512.0,
    1024.0,
    4096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
];

/// What is counted of requests. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RestClient {
    requests: IntCounterVec,
    duration: HistogramVec,
    request_size: HistogramVec,
    response_size: HistogramVec,
}

impl RestClient {
    /// Makes the metrics and registers them.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let histogram = HistogramVec::new(options, &["host", "verb"])?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let requests = IntCounterVec::new(
            Opts::new("rest_client_requests_total", "Requests by their answer."),
            &["code", "host", "method"],
        )?;
        registry.register(Box::new(requests.clone()))?;
        Ok(Self {
            requests,
            duration: histogram(
                "rest_client_request_duration_seconds",
                "Time until a request is answered; watches are answered when they begin.",
                &SECONDS,
            )?,
            request_size: histogram(
                "rest_client_request_size_bytes",
                "Bytes of requests' bodies.",
                &BYTES,
            )?,
            response_size: histogram(
                "rest_client_response_size_bytes",
                "Bytes of answers' bodies; watches, which never end, are left out.",
                &BYTES,
            )?,
        })
    }

    /// Counts a request that was answered.
    pub fn note(
        &self,
        code: &str,
        host: &str,
        method: &str,
        took: Duration,
        request_bytes: Option<u64>,
        response_bytes: Option<u64>,
    ) {
        self.requests.with_label_values(&[code, host, method]).inc();
        let labels = &[host, method];
        self.duration.with_label_values(labels).observe(took.as_secs_f64());
        for (size, bytes) in
            [(&self.request_size, request_bytes), (&self.response_size, response_bytes)]
        {
            if let Some(bytes) = bytes {
                size.with_label_values(labels).observe(bytes as f64);
            }
        }
    }

    /// Sends a request to a host by a client, and counts it.
    ///
    /// # Errors
    /// Those of the client.
    pub async fn send(
        &self,
        client: &Client,
        host: &str,
        request: Request<Body>,
    ) -> kube::Result<Response<Counted>> {
        let method = request.method().as_str().to_owned();
        let watch = request.uri().query().is_some_and(|query| {
            query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1" | "follow=true"))
        });
        let size = request.body().size_hint().exact();
        let begin = Instant::now();
        let answer = client.send(request).await;
        let code = match &answer {
            Ok(answer) => answer.status().as_str().to_owned(),
            Err(_) => "<error>".to_owned(),
        };
        self.note(&code, host, &method, begin.elapsed(), size, None);
        let size = (!watch).then(|| Size {
            bytes: 0,
            of: self.response_size.clone(),
            host: host.to_owned(),
            method,
        });
        Ok(answer?.map(|body| Counted { body, size }))
    }
}

/// The body of an answer, whose bytes are counted while it is read.
#[derive(Debug)]
pub struct Counted {
    body: Body,
    size: Option<Size>,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = <Body as HttpBody>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let (Poll::Ready(Some(Ok(frame))), Some(size)) = (&polled, &mut self.size) {
            size.bytes += frame.data_ref().map_or(0, Bytes::len);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Counts a body once it has been read, or given up.
#[derive(Debug)]
struct Size {
    bytes: usize,
    of: HistogramVec,
    host: String,
    method: String,
}

impl Drop for Size {
    fn drop(&mut self) {
        self.of.with_label_values(&[&self.host, &self.method]).observe(self.bytes as f64);
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[tokio::test]
    async fn requests_are_counted_by_answer_and_size_but_not_the_size_of_watches() {
        let service = tower::service_fn(|request: Request<Body>| async move {
            let status = if request.uri().path() == "/no" { 404 } else { 200 };
            let body = Body::from(br#"{"kind":"Status"}"#.to_vec());
            Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap())
        });
        let client = Client::new(service, "default");
        let registry = Registry::new();
        let metrics = RestClient::register(&registry).unwrap();
        let counted = tower::service_fn(move |request| {
            let (metrics, client) = (metrics.clone(), client.clone());
            async move { metrics.send(&client, "api:6443", request).await }
        });
        let client = Client::new(counted, "default");
        for path in ["/yes", "/no", "/yes?watch=true"] {
            let request = Request::get(path).body(Body::from(b"four".to_vec())).unwrap();
            let answer = client.send(request).await.unwrap();
            let read = answer.into_body().collect_bytes().await.unwrap();
            assert_eq!(read.len(), 17);
        }
        let text = crate::metrics::encode(&registry).unwrap();
        for line in [
            "rest_client_requests_total{code=\"200\",host=\"api:6443\",method=\"GET\"} 2",
            "rest_client_requests_total{code=\"404\",host=\"api:6443\",method=\"GET\"} 1",
            "rest_client_request_duration_seconds_count{host=\"api:6443\",verb=\"GET\"} 3",
            "rest_client_request_size_bytes_sum{host=\"api:6443\",verb=\"GET\"} 12",
            "rest_client_response_size_bytes_sum{host=\"api:6443\",verb=\"GET\"} 34",
            "rest_client_response_size_bytes_bucket{host=\"api:6443\",verb=\"GET\",le=\"64\"} 2",
        ] {
            assert!(text.contains(line), "{line} isn't in {text}");
        }
    }
}
