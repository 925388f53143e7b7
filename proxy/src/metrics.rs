//! What the proxy measures, under kube-proxy's names.

use std::time::Duration;

use jiff::Timestamp;
use keelson_api::metrics::exponential_buckets;
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, core::Collector,
};

use crate::{config::Mode, model::Family};

/// What the proxy measures. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    sync: HistogramVec,
    sync_full: HistogramVec,
    sync_partial: HistogramVec,
    programming: HistogramVec,
    last_sync: GaugeVec,
    last_queued: GaugeVec,
    /// What the mode counts of itself.
    own: Own,
    no_local_endpoints: IntGaugeVec,
    conntrack_deleted: IntCounterVec,
    conntrack_duration: HistogramVec,
    drift: IntCounterVec,
    pub(crate) endpoint_changes: IntCounter,
    pub(crate) endpoint_changes_pending: IntGauge,
    pub(crate) service_changes: IntCounter,
    pub(crate) service_changes_pending: IntGauge,
    pub(crate) healthz: IntCounterVec,
    pub(crate) livez: IntCounterVec,
    elements: IntGaugeVec,
    commit: Histogram,
}

/// Metrics that only one mode has.
#[derive(Clone, Debug)]
enum Own {
    Nftables { sync_failures: IntCounterVec, cleanup_failures: IntCounterVec },
    Iptables { restore_failures: IntCounterVec, partial_restore_failures: IntCounterVec },
    Userspace { failures: IntCounterVec },
}

impl Own {
    fn register(registry: &Registry, mode: Mode) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| {
            let counter = IntCounterVec::new(Opts::new(name, help), &["ip_family"])?;
            // A rate needs the zero before the first failure.
            for family in [Family::V4, Family::V6] {
                counter.with_label_values(&[family.as_str()]).inc_by(0);
            }
            kept(registry, counter)
        };
        Ok(match mode {
            Mode::Nftables => Self::Nftables {
                sync_failures: counter(
                    "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
                    "Transactions that the kernel refused.",
                )?,
                cleanup_failures: counter(
                    "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
                    "Removals of what is not needed any more that the kernel refused.",
                )?,
            },
            Mode::Iptables => Self::Iptables {
                restore_failures: counter(
                    "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
                    "Times that iptables-restore failed.",
                )?,
                partial_restore_failures: counter(
                    "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
                    "Times that iptables-restore of single Services failed.",
                )?,
            },
            Mode::Userspace => Self::Userspace {
                failures: counter(
                    "keelson_proxy_userspace_sync_failures_total",
                    "Changes of routes and listeners that failed.",
                )?,
            },
        })
    }
}

impl Metrics {
    /// Makes all metrics of the default mode and registers them.
    ///
    /// # Errors
    /// When a name is registered already.
    #[cfg(test)]
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        Self::for_mode(registry, Mode::default())
    }

    /// Makes all metrics that a mode has and registers them.
    ///
    /// # Errors
    /// When a name is registered already.
    pub(crate) fn for_mode(registry: &Registry, mode: Mode) -> Result<Self, prometheus::Error> {
        let family = &["ip_family"];
        let sync_buckets = exponential_buckets(0.001, 2.0, 15);
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            kept(registry, HistogramVec::new(options, family)?)
        };
        let counter = |name: &str, help: &str, labels: &[&str]| {
            kept(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
        };
        let gauge =
            |name: &str, help: &str| kept(registry, GaugeVec::new(Opts::new(name, help), family)?);
        Ok(Self {
            sync: histogram(
                "kubeproxy_sync_proxy_rules_duration_seconds",
                "Time to write a change into the kernel.",
                &sync_buckets,
            )?,
            sync_full: histogram(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "Time to compare everything with the kernel and write the difference.",
                &sync_buckets,
            )?,
            sync_partial: histogram(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "Time to write a change of single services into the kernel.",
                &sync_buckets,
            )?,
            programming: histogram(
                "kubeproxy_network_programming_duration_seconds",
                "Time from a change of a pod or Service to the rules that follow it.",
                &programming_buckets(),
            )?,
            last_sync: gauge(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "When rules were last written without an error.",
            )?,
            last_queued: gauge(
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "When a change was last taken in.",
            )?,
            own: Own::register(registry, mode)?,
            no_local_endpoints: kept(
                registry,
                IntGaugeVec::new(
                    Opts::new(
                        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
                        "Service ports with a Local traffic policy and no endpoint on this node.",
                    ),
                    &["ip_family", "traffic_policy"],
                )?,
            )?,
            conntrack_deleted: counter(
                "kubeproxy_conntrack_reconciler_deleted_entries_total",
                "Stale connections that were removed one by one.",
                family,
            )?,
            conntrack_duration: histogram(
                "kubeproxy_conntrack_reconciler_sync_duration_seconds",
                "Time to remove stale connections.",
                &sync_buckets,
            )?,
            drift: counter(
                "keelson_proxy_drift_total",
                "Times that another program was seen to change the proxy's rules.",
                &["cause"],
            )?,
            endpoint_changes: kept(
                registry,
                IntCounter::new(
                    "kubeproxy_sync_proxy_rules_endpoint_changes_total",
                    "Changes of EndpointSlices that were taken in.",
                )?,
            )?,
            endpoint_changes_pending: kept(
                registry,
                IntGauge::new(
                    "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
                    "Changes of EndpointSlices that are not in the kernel yet.",
                )?,
            )?,
            service_changes: kept(
                registry,
                IntCounter::new(
                    "kubeproxy_sync_proxy_rules_service_changes_total",
                    "Changes of Services that were taken in.",
                )?,
            )?,
            service_changes_pending: kept(
                registry,
                IntGauge::new(
                    "kubeproxy_sync_proxy_rules_service_changes_pending",
                    "Changes of Services that are not in the kernel yet.",
                )?,
            )?,
            healthz: counter("kubeproxy_proxy_healthz_total", "Answers of /healthz.", &["code"])?,
            livez: counter("kubeproxy_proxy_livez_total", "Answers of /livez.", &["code"])?,
            elements: kept(
                registry,
                IntGaugeVec::new(
                    Opts::new("keelson_proxy_units", "Frontends and addresses in the kernel."),
                    family,
                )?,
            )?,
            commit: kept(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "keelson_proxy_event_to_commit_seconds",
                        "Time from the arrival of a change to its commit.",
                    )
                    .buckets(exponential_buckets(0.000_05, 2.0, 16)),
                )?,
            )?,
        })
    }

    /// A change was taken in.
    pub(crate) fn queued(&self, family: Family) {
        self.last_queued.with_label_values(&[family.as_str()]).set(now_seconds());
    }

    /// Rules were written.
    pub(crate) fn synced(&self, family: Family, full: bool, took: Duration) {
        let label = &[family.as_str()];
        let seconds = took.as_secs_f64();
        self.sync.with_label_values(label).observe(seconds);
        let kind = if full { &self.sync_full } else { &self.sync_partial };
        kind.with_label_values(label).observe(seconds);
        self.last_sync.with_label_values(label).set(now_seconds());
    }

    /// A change is in the kernel so long after it came in.
    pub(crate) fn committed(&self, after: Duration) {
        self.commit.observe(after.as_secs_f64());
    }

    /// A change is in the kernel so long after its cause.
    pub(crate) fn programmed(&self, family: Family, triggered: Timestamp) {
        let took = Timestamp::now().duration_since(triggered).as_secs_f64();
        self.programming.with_label_values(&[family.as_str()]).observe(took.max(0.0));
    }

    /// A write was refused, of everything or of single Services.
    pub(crate) fn failed(&self, family: Family, full: bool) {
        let counter = match &self.own {
            Own::Nftables { sync_failures, .. } => sync_failures,
            Own::Iptables { restore_failures, .. } if full => restore_failures,
            Own::Iptables { partial_restore_failures, .. } => partial_restore_failures,
            Own::Userspace { failures } => failures,
        };
        counter.with_label_values(&[family.as_str()]).inc();
    }

    /// What another backend or an earlier run left could not be removed.
    pub(crate) fn cleanup_failed(&self, family: Family) {
        if let Own::Nftables { cleanup_failures, .. } = &self.own {
            cleanup_failures.with_label_values(&[family.as_str()]).inc();
        }
    }

    /// Another program was heard or found.
    pub(crate) fn drifted(&self, cause: &str) {
        self.drift.with_label_values(&[cause]).inc();
    }

    /// Stale connections were removed.
    pub(crate) fn conntrack_cleaned(&self, family: Family, deleted: u64, took: Duration) {
        self.conntrack_deleted.with_label_values(&[family.as_str()]).inc_by(deleted);
        self.conntrack_duration.with_label_values(&[family.as_str()]).observe(took.as_secs_f64());
    }

    /// How much there is in the kernel.
    pub(crate) fn holds(&self, family: Family, units: usize) {
        self.elements.with_label_values(&[family.as_str()]).set(units as i64);
    }

    /// How many service ports have a Local policy and no endpoint here.
    pub(crate) fn without_local_endpoints(&self, family: Family, internal: i64, external: i64) {
        for (policy, count) in [("internal", internal), ("external", external)] {
            self.no_local_endpoints.with_label_values(&[family.as_str(), policy]).set(count);
        }
    }
}

fn kept<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> Result<C, prometheus::Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

fn now_seconds() -> f64 {
    Timestamp::now().as_duration().as_secs_f64()
}

/// 0.25, 0.5, 1 to 60 by 1, 65 to 120 by 5, 150 to 300 by 30, as kube-proxy documents it.
fn programming_buckets() -> Vec<f64> {
    let mut buckets = vec![0.25, 0.5];
    buckets.extend((1..=60).map(f64::from));
    buckets.extend((65..=120).step_by(5).map(f64::from));
    buckets.extend((150..=300).step_by(30).map(f64::from));
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_the_documented_ones() {
        let buckets = programming_buckets();
        assert_eq!(buckets.len(), 80);
        assert_eq!((buckets[0], buckets[61], buckets[62], buckets[79]), (0.25, 60.0, 65.0, 300.0));
        let registry = Registry::new();
        let metrics = Metrics::register(&registry).unwrap();
        metrics.synced(Family::V4, true, Duration::from_millis(3));
        let text = keelson_api::metrics::encode(&registry).unwrap();
        assert!(text.contains("nftables_sync_failures_total{ip_family=\"IPv4\"} 0"), "{text}");
        assert!(!text.contains("iptables"), "only what the mode has: {text}");
        assert!(
            text.contains(
                "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 1"
            )
        );
    }
}
