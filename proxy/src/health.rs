//! `/healthz` and `/livez` on one port; `/metrics`, `/proxyMode` and `/configz` on another.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use prometheus::Registry;
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{config::Mode, metrics::Metrics};

/// A change that isn't written after so long means that the proxy is ill.
const OVERDUE: Duration = Duration::from_secs(120);
/// How long to wait before a port that is taken is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How many may be connected at a time.
const CONNECTIONS: usize = 256;
/// How long a client may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether the proxy keeps up. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Health(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    updated: Option<Timestamp>,
    waiting_since: Option<Timestamp>,
    eligible: bool,
}

impl Default for State {
    fn default() -> Self {
        Self { updated: None, waiting_since: None, eligible: true }
    }
}

/// What `/healthz` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Report {
    updated: Timestamp,
    now: Timestamp,
    keeps_up: bool,
    eligible: bool,
}

impl Health {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change came in.
    pub(crate) fn queued(&self) {
        self.state().waiting_since.get_or_insert_with(Timestamp::now);
    }

    /// Everything that came in is in the kernel.
    pub(crate) fn updated(&self) {
        let mut state = self.state();
        state.waiting_since = None;
        state.updated = Some(Timestamp::now());
    }

    /// Whether load balancers should send traffic to this node.
    pub(crate) fn set_eligible(&self, eligible: bool) {
        self.state().eligible = eligible;
    }

    /// Whether everything was written, and nothing waits for long.
    pub(crate) fn keeps_up(&self) -> bool {
        self.report(Timestamp::now()).keeps_up
    }

    fn report(&self, now: Timestamp) -> Report {
        let state = self.state();
        let late = state
            .waiting_since
            .is_some_and(|since| now.duration_since(since).unsigned_abs() > OVERDUE);
        Report {
            // With nothing waiting the rules are as fresh as can be.
            updated: match state.waiting_since {
                None => now,
                Some(_) => state.updated.unwrap_or(Timestamp::UNIX_EPOCH),
            },
            now,
            keeps_up: state.updated.is_some() && !late,
            eligible: state.eligible,
        }
    }
}

/// What the two servers have to tell.
#[derive(Clone)]
pub(crate) struct Pages {
    pub(crate) health: Health,
    pub(crate) metrics: Metrics,
    pub(crate) registry: Registry,
    /// The mode in force.
    pub(crate) mode: Mode,
    /// The body of `/configz`.
    pub(crate) configz: Arc<str>,
}

/// Which of the two servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    /// `/healthz` and `/livez`.
    Health,
    /// `/metrics`, `/proxyMode`, `/configz` and `/healthz`.
    Metrics,
}

impl Pages {
    /// The page at a path of one of the servers.
    pub(crate) fn answer(&self, server: Server, path: &str) -> Response<Full<Bytes>> {
        let report = self.health.report(Timestamp::now());
        match (server, path) {
            (Server::Health, "/healthz") => {
                let response = health_page(report, report.keeps_up && report.eligible);
                self.metrics.healthz.with_label_values(&[response.status().as_str()]).inc();
                response
            }
            (Server::Health, "/livez") => {
                let response = health_page(report, report.keeps_up);
                self.metrics.livez.with_label_values(&[response.status().as_str()]).inc();
                response
            }
            (Server::Metrics, "/healthz") => page(StatusCode::OK, "text/plain", "ok"),
            (Server::Metrics, "/proxyMode") => {
                page(StatusCode::OK, "text/plain", self.mode.as_str())
            }
            (Server::Metrics, "/configz") => {
                page(StatusCode::OK, "application/json", self.configz.to_string())
            }
            (Server::Metrics, "/metrics") => match keelson_api::metrics::encode(&self.registry) {
                Ok(text) => page(StatusCode::OK, keelson_api::metrics::CONTENT_TYPE, text),
                Err(error) => {
                    page(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error.to_string())
                }
            },
            _ => page(StatusCode::NOT_FOUND, "text/plain", "404 page not found\n"),
        }
    }
}

/// The documented form: when rules were last brought up to date, the time now, and whether the node
/// should get traffic from load balancers.
fn health_page(report: Report, healthy: bool) -> Response<Full<Bytes>> {
    let body = serde_json::json!({
        "lastUpdated": report.updated.to_string(),
        "currentTime": report.now.to_string(),
        "nodeEligible": report.eligible,
    });
    let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    page(status, "application/json", body.to_string())
}

/// An answer in full.
pub(crate) fn page(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    response
}

/// Takes an address, now or, where that is not a reason to end, as soon as it can be had.
///
/// # Errors
/// When it can't be had and `hard_fail` is set, or `shutdown` comes first.
pub(crate) async fn bind(
    address: SocketAddr,
    hard_fail: bool,
    shutdown: &CancellationToken,
) -> io::Result<TcpListener> {
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Err(error) if !hard_fail && !shutdown.is_cancelled() => {
                if !told {
                    tracing::error!(%error, %address, "can't listen; trying again");
                    told = true;
                }
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => {}
                    () = shutdown.cancelled() => return Err(error),
                }
            }
            result => return result,
        }
    }
}

/// Answers GET requests by their path until `shutdown`.
pub(crate) async fn serve(
    listener: TcpListener,
    answer: impl Fn(&str) -> Response<Full<Bytes>> + Clone + Send + 'static,
    shutdown: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    // They end with this task.
    let mut connections = JoinSet::new();
    loop {
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place,
            () = shutdown.cancelled() => break,
        };
        let Ok(place) = place else { break };
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: give others time to close theirs.
                tracing::warn!(%error, "a connection could not be taken");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (answer, shutdown) = (answer.clone(), shutdown.clone());
        connections.spawn(async move {
            let _place = place;
            let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                let response = answer(request.uri().path());
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // A client that goes away is no news.
                _ = connection => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
    while connections.join_next().await.is_some() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_is_whether_changes_are_written_in_time() {
        let health = Health::default();
        let now = Timestamp::now();
        assert!(!health.report(now).keeps_up, "nothing was written yet");
        health.updated();
        assert!(health.report(now).keeps_up);
        health.queued();
        let later = Timestamp::now() + jiff::SignedDuration::from_secs(60);
        assert!(health.report(later).keeps_up, "it may take a while");
        let late = Timestamp::now() + jiff::SignedDuration::from_secs(130);
        assert!(!health.report(late).keeps_up);
        health.updated();
        health.set_eligible(false);
        let report = health.report(Timestamp::now());
        assert!(report.keeps_up && !report.eligible);
        assert_eq!(health_page(report, false).status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}
