//! What the proxy measures, under kube-proxy's names, which [`documented`] lists.

pub(crate) mod documented;
pub(crate) mod packets;

use std::time::Duration;

use jiff::Timestamp;
use keelson_api::metrics::exponential_buckets;
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, core::Collector,
};

use crate::{backend::TableRules, config::Mode, iptables::counters::Packets, model::Family};
use documented::{Documented, Kind};

const NO_LOCAL_ENDPOINTS: &str = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";

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
    units: IntGaugeVec,
    commit: Histogram,
}

/// Metrics that only one mode has.
#[derive(Clone, Debug)]
enum Own {
    Nftables {
        sync_failures: IntCounterVec,
        cleanup_failures: IntCounterVec,
    },
    Iptables {
        restore_failures: IntCounterVec,
        partial_restore_failures: IntCounterVec,
        rules: IntGaugeVec,
        rules_written: IntGaugeVec,
        invalid_dropped: IntCounter,
        localhost_accepted: IntCounter,
    },
    Userspace {
        failures: IntCounterVec,
    },
}

impl Own {
    fn register(registry: &Registry, mode: Mode) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
            // A rate needs the zero before the first failure.
            for family in [Family::V4, Family::V6] {
                counter.with_label_values(&[family.as_str()]).inc_by(0);
            }
            kept(registry, counter)
        };
        let known = |name: &str, help: &str| counter(name, help, row(name)?.labels);
        let gauge = |name: &str, help: &str| {
            kept(registry, IntGaugeVec::new(Opts::new(name, help), row(name)?.labels)?)
        };
        Ok(match mode {
            Mode::Nftables => Self::Nftables {
                sync_failures: known(
                    "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
                    "Transactions that the kernel refused.",
                )?,
                cleanup_failures: known(
                    "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
                    "Removals of what is not needed any more that the kernel refused.",
                )?,
            },
            Mode::Iptables => Self::Iptables {
                restore_failures: known(
                    "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
                    "Times that iptables-restore failed.",
                )?,
                partial_restore_failures: known(
                    "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
                    "Times that iptables-restore of single Services failed.",
                )?,
                rules: gauge(
                    "kubeproxy_sync_proxy_rules_iptables_total",
                    "Rules of the proxy that are in a table.",
                )?,
                rules_written: gauge(
                    "kubeproxy_sync_proxy_rules_iptables_last",
                    "Rules that the last change wrote to a table.",
                )?,
                invalid_dropped: kept(
                    registry,
                    IntCounter::new(
                        "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
                        "Packets that were dropped because the connection table can't place them.",
                    )?,
                )?,
                localhost_accepted: kept(
                    registry,
                    IntCounter::new(
                        "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
                        "First packets of connections to node ports on loopback.",
                    )?,
                )?,
            },
            Mode::Userspace => Self::Userspace {
                failures: counter(
                    "keelson_proxy_userspace_sync_failures_total",
                    "Changes of routes and listeners that failed.",
                    &["ip_family"],
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
        let histogram = |name: &str, help: &str| {
            let row = row(name)?;
            let mut options = HistogramOpts::new(name, help);
            if let Kind::Histogram(buckets) = row.kind {
                options = options.buckets(buckets.to_vec());
            }
            kept(registry, HistogramVec::new(options, row.labels)?)
        };
        let counter = |name: &str, help: &str, labels: &[&str]| {
            kept(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
        };
        let known = |name: &str, help: &str| counter(name, help, row(name)?.labels);
        let gauge = |name: &str, help: &str| {
            kept(registry, GaugeVec::new(Opts::new(name, help), row(name)?.labels)?)
        };
        Ok(Self {
            sync: histogram(
                "kubeproxy_sync_proxy_rules_duration_seconds",
                "Time to write a change into the kernel.",
            )?,
            sync_full: histogram(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "Time to compare everything with the kernel and write the difference.",
            )?,
            sync_partial: histogram(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "Time to write a change of single services into the kernel.",
            )?,
            programming: histogram(
                "kubeproxy_network_programming_duration_seconds",
                "Time from a change of a pod or Service to the rules that follow it.",
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
                        NO_LOCAL_ENDPOINTS,
                        "Service ports with a Local traffic policy and no endpoint on this node.",
                    ),
                    row(NO_LOCAL_ENDPOINTS)?.labels,
                )?,
            )?,
            conntrack_deleted: known(
                "kubeproxy_conntrack_reconciler_deleted_entries_total",
                "Stale connections that were removed one by one.",
            )?,
            conntrack_duration: histogram(
                "kubeproxy_conntrack_reconciler_sync_duration_seconds",
                "Time to remove stale connections.",
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
            healthz: known("kubeproxy_proxy_healthz_total", "Answers of /healthz.")?,
            livez: known("kubeproxy_proxy_livez_total", "Answers of /livez.")?,
            units: kept(
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

    /// How many rules there are in each table now, and how many were written.
    pub(crate) fn rules(&self, family: Family, tables: &[TableRules]) {
        let Own::Iptables { rules, rules_written, .. } = &self.own else { return };
        for table in tables {
            let labels = &[family.as_str(), table.table];
            rules.with_label_values(labels).set(table.rules as i64);
            rules_written.with_label_values(labels).set(table.written as i64);
        }
    }

    /// So many packets more met the rules that count them.
    pub(crate) fn packets(&self, more: Packets) {
        let Own::Iptables { invalid_dropped, localhost_accepted, .. } = &self.own else { return };
        invalid_dropped.inc_by(more.invalid_dropped);
        localhost_accepted.inc_by(more.localhost_accepted);
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

    /// How many frontends and addresses are in the kernel.
    pub(crate) fn holds(&self, family: Family, units: usize) {
        self.units.with_label_values(&[family.as_str()]).set(units as i64);
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

/// What is documented of a metric.
fn row(name: &str) -> Result<&'static Documented, prometheus::Error> {
    documented::find(name)
        .ok_or_else(|| prometheus::Error::Msg(format!("{name} is not among what is documented")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_has_its_own_metrics_from_the_start() {
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
