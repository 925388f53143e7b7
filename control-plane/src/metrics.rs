//! What the API server measures, by Kubernetes' own names.

use std::{sync::Arc, time::Duration};

use keelson_api::metrics::exponential_buckets;
use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::{cache::Cache, registry::Resource, server::request::RequestInfo};

/// As `apiserver_request_duration_seconds` has them.
const DURATIONS: [f64; 23] = [
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0,
    10.0, 15.0, 20.0, 30.0, 45.0, 60.0,
];

const COMPONENT: &str = "apiserver";

/// The API server's metrics.
#[derive(Clone)]
pub(crate) struct Metrics {
    requests: IntCounterVec,
    durations: HistogramVec,
    sizes: HistogramVec,
    long_running: IntGaugeVec,
    in_flight: IntGaugeVec,
    rejected: IntCounterVec,
    watch_events: IntCounterVec,
    watch_sizes: HistogramVec,
    initial_events: IntCounterVec,
    terminated_watchers: IntCounterVec,
    store_durations: HistogramVec,
    store_requests: IntCounterVec,
    store_errors: IntCounterVec,
    authentications: IntCounterVec,
    authorizations: IntCounterVec,
    tls_errors: prometheus::IntCounter,
}

fn counters(name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
    IntCounterVec::new(Opts::new(name, help), labels)
}

fn gauges(name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
    IntGaugeVec::new(Opts::new(name, help), labels)
}

fn histograms(
    name: &str,
    help: &str,
    labels: &[&str],
    buckets: Vec<f64>,
) -> Result<HistogramVec, prometheus::Error> {
    HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), labels)
}

impl Metrics {
    /// Makes the metrics and registers them.
    pub(crate) fn register(
        registry: &Registry,
        cache: Arc<Cache>,
    ) -> Result<Self, prometheus::Error> {
        let request = ["verb", "group", "version", "resource", "subresource", "scope", "component"];
        let with = |more: &[&'static str]| -> Vec<&'static str> {
            request.iter().chain(more).copied().collect()
        };
        let store = ["operation", "group", "resource"];
        let metrics = Self {
            requests: counters(
                "apiserver_request_total",
                "Requests by verb, resource and HTTP code.",
                &with(&["code", "dry_run"]),
            )?,
            durations: histograms(
                "apiserver_request_duration_seconds",
                "Time to answer a request, other than watches and streams.",
                &with(&["dry_run"]),
                DURATIONS.to_vec(),
            )?,
            sizes: histograms(
                "apiserver_response_sizes",
                "Size of answers in bytes.",
                &request,
                exponential_buckets(1000.0, 10.0, 7),
            )?,
            long_running: gauges(
                "apiserver_longrunning_requests",
                "Watches and streams that are open.",
                &request,
            )?,
            in_flight: gauges(
                "apiserver_current_inflight_requests",
                "Requests being served, other than watches and streams.",
                &["request_kind"],
            )?,
            rejected: counters(
                "apiserver_request_terminations_total",
                "Requests that were refused to protect the server, or took too long.",
                &with(&["code"]),
            )?,
            watch_events: counters(
                "apiserver_watch_events_total",
                "Events sent to watchers.",
                &["group", "version", "resource"],
            )?,
            watch_sizes: histograms(
                "apiserver_watch_events_sizes",
                "Size of events sent to watchers, in bytes.",
                &["group", "version", "resource"],
                exponential_buckets(1024.0, 2.0, 8),
            )?,
            initial_events: counters(
                "apiserver_init_events_total",
                "Objects sent to watchers at the start of their watch.",
                &["group", "resource"],
            )?,
            terminated_watchers: counters(
                "apiserver_terminated_watchers_total",
                "Watchers that were cut off because they were too slow.",
                &["group", "resource"],
            )?,
            store_durations: histograms(
                "etcd_request_duration_seconds",
                "Time of writes to the store, as it looks from the API server.",
                &store,
                DURATIONS.to_vec(),
            )?,
            store_requests: counters("etcd_requests_total", "Writes to the store.", &store)?,
            store_errors: counters(
                "etcd_request_errors_total",
                "Writes to the store that failed for other reasons than a conflict.",
                &store,
            )?,
            authentications: counters(
                "authentication_attempts",
                "Requests by whether it was found out who asks.",
                &["result"],
            )?,
            authorizations: counters(
                "authorization_attempts_total",
                "Requests by whether they were allowed.",
                &["result"],
            )?,
            tls_errors: prometheus::IntCounter::new(
                "apiserver_tls_handshake_errors_total",
                "TLS handshakes that failed.",
            )?,
        };
        let collectors: [Box<dyn Collector>; 17] = [
            Box::new(metrics.requests.clone()),
            Box::new(metrics.durations.clone()),
            Box::new(metrics.sizes.clone()),
            Box::new(metrics.long_running.clone()),
            Box::new(metrics.in_flight.clone()),
            Box::new(metrics.rejected.clone()),
            Box::new(metrics.watch_events.clone()),
            Box::new(metrics.watch_sizes.clone()),
            Box::new(metrics.initial_events.clone()),
            Box::new(metrics.terminated_watchers.clone()),
            Box::new(metrics.store_durations.clone()),
            Box::new(metrics.store_requests.clone()),
            Box::new(metrics.store_errors.clone()),
            Box::new(metrics.authentications.clone()),
            Box::new(metrics.authorizations.clone()),
            Box::new(metrics.tls_errors.clone()),
            Box::new(ObjectCounts::new(cache)?),
        ];
        for collector in collectors {
            registry.register(collector)?;
        }
        Ok(metrics)
    }

    /// A request was answered. `took` is absent for watches and streams.
    pub(crate) fn request(
        &self,
        info: &RequestInfo,
        code: u16,
        took: Option<Duration>,
        size: Option<u64>,
    ) {
        let labels = Labels::of(info);
        let dry_run = if info.query.get("dryRun").is_some() { "All" } else { "" };
        let code = code.to_string();
        self.requests.with_label_values(&labels.and(&[code.as_str(), dry_run])).inc();
        if let Some(took) = took {
            let durations = self.durations.with_label_values(&labels.and(&[dry_run]));
            durations.observe(took.as_secs_f64());
        }
        if let Some(size) = size {
            self.sizes.with_label_values(&labels.and(&[])).observe(size as f64);
        }
    }

    /// A request was refused or cut off.
    pub(crate) fn rejected(&self, info: &RequestInfo, code: u16) {
        let code = code.to_string();
        self.rejected.with_label_values(&Labels::of(info).and(&[code.as_str()])).inc();
    }

    /// Counts a request as being served until dropped.
    pub(crate) fn in_flight(&self, mutating: bool) -> InFlight {
        let kind = if mutating { "mutating" } else { "readOnly" };
        let gauge = self.in_flight.with_label_values(&[kind]);
        gauge.inc();
        InFlight(gauge)
    }

    /// Counts a watch or stream as open until dropped.
    pub(crate) fn long_running(&self, info: &RequestInfo) -> LongRunning {
        let gauge = self.long_running.with_label_values(&Labels::of(info).and(&[]));
        gauge.inc();
        InFlight(gauge)
    }

    /// What a watch of this resource counts.
    pub(crate) fn watch(&self, resource: &Resource) -> WatchMetrics {
        let labels = [&*resource.group, &*resource.version, &*resource.plural];
        WatchMetrics {
            events: self.watch_events.with_label_values(&labels),
            sizes: self.watch_sizes.with_label_values(&labels),
            terminated: self
                .terminated_watchers
                .with_label_values(&[&*resource.group, &*resource.plural]),
        }
    }

    pub(crate) fn initial_events(&self, resource: &Resource, count: usize) {
        self.initial_events
            .with_label_values(&[&*resource.group, &*resource.plural])
            .inc_by(count as u64);
    }

    pub(crate) fn store_request(
        &self,
        operation: &str,
        group: &str,
        plural: &str,
        took: Duration,
        failed: bool,
    ) {
        let labels = [operation, group, plural];
        self.store_durations.with_label_values(&labels).observe(took.as_secs_f64());
        self.store_requests.with_label_values(&labels).inc();
        if failed {
            self.store_errors.with_label_values(&labels).inc();
        }
    }

    /// `success`, `failure` or `error`.
    pub(crate) fn authentication(&self, result: &str) {
        self.authentications.with_label_values(&[result]).inc();
    }

    /// `allowed`, `denied` or `no-opinion`.
    pub(crate) fn authorization(&self, result: &str) {
        self.authorizations.with_label_values(&[result]).inc();
    }

    pub(crate) fn tls_error(&self) {
        self.tls_errors.inc();
    }
}

/// The labels that all metrics of requests share. Only names of what exists become labels, so that
/// no client can make up new ones.
struct Labels<'a>([&'a str; 7]);

impl<'a> Labels<'a> {
    fn of(info: &'a RequestInfo) -> Self {
        let verb = match info.verb {
            "get" => "GET",
            "list" => "LIST",
            "watch" => "WATCH",
            "create" | "post" => "POST",
            "update" | "put" => "PUT",
            "patch" => "PATCH",
            "delete" => "DELETE",
            "deletecollection" => "DELETECOLLECTION",
            "head" => "HEAD",
            _ => "other",
        };
        let known = crate::registry::Registry::builtin();
        let exists = known.resource(&info.group, &info.version, &info.resource).is_some_and(|r| {
            info.subresource.is_empty() || r.subresource(&info.subresource).is_some()
        });
        if info.resource_request && exists {
            Self([
                verb,
                &info.group,
                &info.version,
                &info.resource,
                &info.subresource,
                info.scope(),
                COMPONENT,
            ])
        } else {
            Self([verb, "", "", "", "", "", COMPONENT])
        }
    }

    fn and(&self, more: &[&'a str]) -> Vec<&'a str> {
        self.0.iter().chain(more).copied().collect()
    }
}

/// Holds a gauge up by one.
pub(crate) struct InFlight(prometheus::IntGauge);

/// Holds the gauge of open watches and streams up by one.
pub(crate) type LongRunning = InFlight;

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What a watch counts.
pub(crate) struct WatchMetrics {
    events: prometheus::IntCounter,
    sizes: prometheus::Histogram,
    terminated: prometheus::IntCounter,
}

impl WatchMetrics {
    pub(crate) fn sent(&self, bytes: usize) {
        self.events.inc();
        self.sizes.observe(bytes as f64);
    }

    pub(crate) fn terminated(&self) {
        self.terminated.inc();
    }
}

/// How many objects there are, counted when asked.
struct ObjectCounts {
    cache: Arc<Cache>,
    storage: GaugeVec,
    resources: GaugeVec,
    applied: Gauge,
}

impl ObjectCounts {
    fn new(cache: Arc<Cache>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            cache,
            storage: GaugeVec::new(
                Opts::new("apiserver_storage_objects", "Stored objects by resource."),
                &["resource"],
            )?,
            resources: GaugeVec::new(
                Opts::new("apiserver_resource_objects", "Stored objects by group and resource."),
                &["group", "resource"],
            )?,
            applied: Gauge::new(
                "keelson_apiserver_watch_cache_revision",
                "The newest revision of the store that the watch cache has.",
            )?,
        })
    }
}

impl Collector for ObjectCounts {
    fn desc(&self) -> Vec<&Desc> {
        let mut all = self.storage.desc();
        all.extend(self.resources.desc());
        all.extend(self.applied.desc());
        all
    }

    fn collect(&self) -> Vec<MetricFamily> {
        for (group, plural, cache) in self.cache.resources() {
            let count = cache.count() as f64;
            let qualified =
                if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") };
            self.storage.with_label_values(&[qualified.as_str()]).set(count);
            self.resources.with_label_values(&[group, plural]).set(count);
        }
        self.applied.set(self.cache.applied().0 as f64);
        let mut all = self.storage.collect();
        all.extend(self.resources.collect());
        all.extend(self.applied.collect());
        all
    }
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;

    #[test]
    fn clients_cannot_make_up_labels() {
        let of = |path: &str| {
            let info = RequestInfo::of(&Method::GET, path, None);
            Labels::of(&info).0.map(str::to_owned)
        };
        assert_eq!(of("/api/v1/pods")[3], "pods");
        assert_eq!(of("/api/v1/nonsense")[3], "");
        assert_eq!(of("/api/v1/namespaces/a/pods/b/nonsense")[4], "");
    }
}
