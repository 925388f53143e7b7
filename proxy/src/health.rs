//! `/healthz` and `/livez` on one port; `/metrics`, `/proxyMode` and `/configz` on another.
//!
//! A family is late when a change of it waits for longer than twice the configured `syncPeriod`, as
//! with kube-proxy. What the kernel refuses by itself doesn't count: it was tried. Nor does a family
//! in which nothing could be written since the start: a proxy is healthy while it starts, as kube-proxy
//! is, and to start again would not help it.

use std::{
    collections::BTreeMap,
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
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Mode,
    listen::listen,
    metrics::{Metrics, packets::Freshener},
    model::Family,
};

/// How long to wait before a port that is taken is tried again.
const RETRY: Duration = Duration::from_secs(5);
const TEXT: &str = "text/plain; charset=utf-8";
/// How many may be connected at a time.
const CONNECTIONS: usize = 256;
/// How long a client may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether the proxy keeps up. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Health {
    /// A change that isn't written after so long means that the proxy is ill.
    overdue: Duration,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    families: BTreeMap<Family, Progress>,
    eligible: bool,
}

/// How far the rules of a family are.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    updated: Option<Timestamp>,
    waiting_since: Option<Timestamp>,
}

/// What `/healthz` says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Report {
    /// `None` before anything was written.
    updated: Option<Timestamp>,
    now: Timestamp,
    keeps_up: bool,
    eligible: bool,
    families: BTreeMap<Family, FamilyReport>,
}

/// What it says of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FamilyReport {
    /// `None` before anything was written.
    updated: Option<Timestamp>,
    keeps_up: bool,
}

impl Health {
    /// Nothing was written yet in these families, and rules are compared this often.
    pub(crate) fn new(families: &[Family], sync_period: Duration) -> Self {
        let families = families.iter().map(|family| (*family, Progress::default())).collect();
        Self {
            overdue: sync_period * 2,
            state: Arc::new(Mutex::new(State { families, eligible: true })),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change of this family's rules came in.
    pub(crate) fn queued(&self, family: Family) {
        let mut state = self.state();
        let progress = state.families.entry(family).or_default();
        progress.waiting_since.get_or_insert_with(Timestamp::now);
    }

    /// Everything that came in was tried in this family.
    pub(crate) fn updated(&self, family: Family) {
        let progress = Progress { updated: Some(Timestamp::now()), waiting_since: None };
        self.state().families.insert(family, progress);
    }

    /// Whether load balancers should send traffic to this node.
    pub(crate) fn set_eligible(&self, eligible: bool) {
        self.state().eligible = eligible;
    }

    /// Whether nothing waits for long.
    pub(crate) fn keeps_up(&self) -> bool {
        self.report(Timestamp::now()).keeps_up
    }

    fn report(&self, now: Timestamp) -> Report {
        let state = self.state();
        let late = |progress: &Progress| {
            let waits = progress.waiting_since.map(|since| now.duration_since(since));
            waits.is_some_and(|waits| waits.unsigned_abs() > self.overdue)
        };
        let begun = || state.families.values().filter(|progress| progress.updated.is_some());
        let families = state.families.iter().map(|(family, progress)| {
            // With nothing waiting the rules are as fresh as can be.
            let fresh = progress.waiting_since.is_none();
            let updated = progress.updated.map(|updated| if fresh { now } else { updated });
            (*family, FamilyReport { updated, keeps_up: !late(progress) })
        });
        let families: BTreeMap<Family, FamilyReport> = families.collect();
        // Before anything was written it is starting: to start again would not help.
        let keeps_up = !begun().any(late);
        let late_since = begun().filter(|progress| late(progress)).filter_map(|p| p.updated).min();
        let last = families.values().filter_map(|family| family.updated).max();
        Report { updated: late_since.or(last), now, keeps_up, eligible: state.eligible, families }
    }
}

/// What the two servers have to tell.
#[derive(Clone)]
pub(crate) struct Pages {
    pub(crate) health: Health,
    pub(crate) metrics: Metrics,
    /// What rules count, which the registry shows once it was read.
    pub(crate) packets: Freshener,
    pub(crate) registry: Registry,
    /// What is at `/metrics/slis`.
    pub(crate) slis: Slis,
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
    pub(crate) async fn answer(&self, server: Server, path: &str) -> Response<Full<Bytes>> {
        let report = self.health.report(Timestamp::now());
        match (server, path) {
            (Server::Health, "/healthz") => {
                let healthy = report.keeps_up && report.eligible;
                let response = health_page(&report, healthy, Some(report.eligible));
                self.metrics.healthz.with_label_values(&[response.status().as_str()]).inc();
                response
            }
            (Server::Health, "/livez") => {
                let response = health_page(&report, report.keeps_up, None);
                self.metrics.livez.with_label_values(&[response.status().as_str()]).inc();
                response
            }
            (Server::Metrics, "/healthz") => {
                self.slis.checked();
                page(StatusCode::OK, TEXT, "ok")
            }
            (Server::Metrics, "/proxyMode") => page(StatusCode::OK, TEXT, self.mode.as_str()),
            (Server::Metrics, "/configz") => {
                page(StatusCode::OK, "application/json", self.configz.to_string())
            }
            (Server::Metrics, "/metrics") => {
                self.packets.refresh().await;
                metrics_page(&self.registry)
            }
            (Server::Metrics, "/metrics/slis") => metrics_page(&self.slis.registry),
            _ => page(StatusCode::NOT_FOUND, TEXT, "404 page not found\n"),
        }
    }
}

/// What `/metrics/slis` tells: how often the one check of `/healthz` at the port of metrics was made,
/// which says no more than that somebody answers. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Slis {
    registry: Registry,
    healthy: IntGaugeVec,
    checks: IntCounterVec,
}

impl Slis {
    /// With a registry of their own.
    ///
    /// # Errors
    /// Never with these names.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        Self::register(&Registry::new())
    }

    /// In this registry.
    ///
    /// # Errors
    /// When a name is registered already.
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let options = Opts::new("kubernetes_healthcheck", "What the last check found.");
        let healthy = IntGaugeVec::new(options, &["name", "type"])?;
        let options = Opts::new("kubernetes_healthchecks_total", "Checks by what they found.");
        let checks = IntCounterVec::new(options, &["name", "status", "type"])?;
        registry.register(Box::new(healthy.clone()))?;
        registry.register(Box::new(checks.clone()))?;
        Ok(Self { registry: registry.clone(), healthy, checks })
    }

    /// A check was made, and answered.
    pub(crate) fn checked(&self) {
        self.healthy.with_label_values(&["ping", "healthz"]).set(1);
        self.checks.with_label_values(&["ping", "success", "healthz"]).inc();
    }
}

fn metrics_page(registry: &Registry) -> Response<Full<Bytes>> {
    match keelson_api::metrics::encode(registry) {
        Ok(text) => page(StatusCode::OK, keelson_api::metrics::CONTENT_TYPE, text),
        Err(error) => page(StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
    }
}

/// The documented form: when rules were last brought up to date, if they were, the time now, at `/healthz` alone
/// whether the node should get traffic from load balancers; and how far each family is.
fn health_page(report: &Report, healthy: bool, eligible: Option<bool>) -> Response<Full<Bytes>> {
    let status = report.families.iter().map(|(family, progress)| {
        let mut fields = serde_json::json!({ "healthy": progress.keeps_up });
        if let Some(updated) = progress.updated {
            fields["lastUpdated"] = updated.to_string().into();
        }
        (family.as_str().to_owned(), fields)
    });
    let status: serde_json::Map<_, _> = status.collect();
    let mut body = serde_json::json!({
        "currentTime": report.now.to_string(),
        "status": status,
    });
    if let Some(updated) = report.updated {
        body["lastUpdated"] = updated.to_string().into();
    }
    if let Some(eligible) = eligible {
        body["nodeEligible"] = eligible.into();
    }
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
        match listen(address).await {
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
pub(crate) async fn serve<F>(
    listener: TcpListener,
    answer: impl Fn(String) -> F + Clone + Send + 'static,
    shutdown: CancellationToken,
) where
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
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
                let response = answer(request.uri().path().to_owned());
                async move { Ok::<_, Infallible>(response.await) }
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

    const BOTH: [Family; 2] = [Family::V4, Family::V6];

    fn after(seconds: i64) -> Timestamp {
        Timestamp::now() + jiff::SignedDuration::from_secs(seconds)
    }

    #[test]
    fn health_is_whether_changes_are_written_in_time() {
        let health = Health::new(&[Family::V4], Duration::from_secs(30));
        let now = Timestamp::now();
        assert!(health.report(now).keeps_up, "it is starting");
        health.updated(Family::V4);
        assert!(health.report(now).keeps_up);
        health.queued(Family::V4);
        assert!(health.report(after(55)).keeps_up, "it may take a while");
        assert!(!health.report(after(65)).keeps_up, "twice the sync period is too long");
        health.updated(Family::V4);
        health.set_eligible(false);
        let report = health.report(Timestamp::now());
        assert!(report.keeps_up && !report.eligible);
        assert_eq!(health_page(&report, false, None).status(), StatusCode::SERVICE_UNAVAILABLE);
        let seldom = Health::new(&[Family::V4], Duration::from_secs(300));
        seldom.updated(Family::V4);
        seldom.queued(Family::V4);
        assert!(seldom.report(after(590)).keeps_up, "who compares seldom is late later");
        assert!(!seldom.report(after(610)).keeps_up);
    }

    #[test]
    fn a_family_that_never_began_is_told_and_one_that_falls_behind_counts() {
        let health = Health::new(&BOTH, Duration::from_secs(30));
        BOTH.iter().for_each(|family| health.queued(*family));
        health.updated(Family::V4);
        let report = health.report(after(65));
        assert!(report.keeps_up, "to start again would not help");
        assert!(!report.families[&Family::V6].keeps_up && report.families[&Family::V4].keeps_up);
        health.updated(Family::V6);
        health.queued(Family::V6);
        let report = health.report(after(65));
        assert!(!report.keeps_up && report.families[&Family::V4].keeps_up);
        assert_eq!(report.updated, report.families[&Family::V6].updated, "since when");
    }

    #[tokio::test]
    async fn a_node_that_goes_is_not_healthy_but_alive() {
        let registry = Registry::new();
        let metrics = Metrics::register(&registry).unwrap();
        let pages = Pages {
            health: Health::new(&[Family::V4], Duration::from_secs(30)),
            packets: Freshener::new(Vec::new(), metrics.clone()),
            metrics,
            registry,
            slis: Slis::new().unwrap(),
            mode: Mode::Nftables,
            configz: "{}".into(),
        };
        let ask = async |server, path| {
            let answer = pages.answer(server, path).await;
            let status = answer.status().as_u16();
            let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap();
            (status, String::from_utf8(body.to_bytes().to_vec()).unwrap())
        };
        let (status, body) = ask(Server::Health, "/healthz").await;
        let told: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(status, 200, "it is starting");
        assert_eq!(told["status"], serde_json::json!({"IPv4": {"healthy": true}}));
        assert_eq!(told.get("lastUpdated"), None, "nothing was written yet");
        pages.health.updated(Family::V4);
        pages.health.set_eligible(false);
        let (status, body) = ask(Server::Health, "/healthz").await;
        assert!(status == 503 && body.contains("\"nodeEligible\":false"), "{status} {body}");
        let (status, body) = ask(Server::Health, "/livez").await;
        assert!(status == 200 && !body.contains("nodeEligible"), "{status} {body}");
        assert_eq!(ask(Server::Metrics, "/healthz").await, (200, "ok".into()));
        assert_eq!(ask(Server::Metrics, "/proxyMode").await, (200, "nftables".into()));
        let (_, metrics) = ask(Server::Metrics, "/metrics").await;
        for line in [
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "kubeproxy_proxy_livez_total{code=\"200\"} 1",
        ] {
            assert!(metrics.contains(line), "{metrics}");
        }
        let (_, slis) = ask(Server::Metrics, "/metrics/slis").await;
        let line =
            "kubernetes_healthchecks_total{name=\"ping\",status=\"success\",type=\"healthz\"} 1";
        assert!(slis.contains(line), "{slis}");
        assert_eq!(ask(Server::Metrics, "/debug/pprof").await.0, 404);
    }
}
