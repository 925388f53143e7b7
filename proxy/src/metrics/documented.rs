//! kube-proxy's metrics as Kubernetes documents them (the reference of metrics of release 1.36,
//! component kube-proxy): those that are here are made from this table, and a test holds what is
//! printed against it.

use crate::config::Mode;

use Kind::{Counter, Gauge, Histogram};
use Level::{Alpha, Beta, Stable};
use Where::{Always, In, Program, Slis};

/// A documented metric.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Documented {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) level: Level,
    pub(crate) labels: &'static [&'static str],
    pub(crate) place: Where,
}

/// What it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    /// With these buckets.
    Histogram(&'static [f64]),
}

/// How stable Kubernetes takes it to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Alpha,
    Beta,
    Stable,
}

impl Level {
    /// As `registered_metrics_total` calls it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Alpha => "ALPHA",
            Beta => "BETA",
            Stable => "STABLE",
        }
    }
}

/// Where it is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    /// At `/metrics`, in every mode.
    Always,
    /// At `/metrics` in this mode.
    In(Mode),
    /// At `/metrics`, counted by the program around the proxy: its client and its features.
    Program,
    /// At `/metrics/slis`.
    Slis,
}

/// The one with this name.
pub(crate) fn find(name: &str) -> Option<&'static Documented> {
    TABLE.iter().find(|row| row.name == name)
}

/// The levels of all that are there in a mode.
pub(crate) fn levels(mode: Mode) -> impl Iterator<Item = &'static str> {
    TABLE
        .iter()
        .filter(move |row| !matches!(row.place, In(other) if other != mode))
        .map(|row| row.level.as_str())
}

const SYNC: [f64; 15] = [
    0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096,
    8.192, 16.384,
];

const PROGRAMMING: [f64; 80] = [
    0.25, 0.5, 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15., 16., 17., 18.,
    19., 20., 21., 22., 23., 24., 25., 26., 27., 28., 29., 30., 31., 32., 33., 34., 35., 36., 37.,
    38., 39., 40., 41., 42., 43., 44., 45., 46., 47., 48., 49., 50., 51., 52., 53., 54., 55., 56.,
    57., 58., 59., 60., 65., 70., 75., 80., 85., 90., 95., 100., 105., 110., 115., 120., 150.,
    180., 210., 240., 270., 300.,
];

const REQUEST: [f64; 12] = [0.005, 0.025, 0.1, 0.25, 0.5, 1., 2., 4., 8., 15., 30., 60.];

const BYTES: [f64; 11] =
    [64., 256., 512., 1024., 4096., 16384., 65536., 262144., 1048576., 4194304., 16777216.];

const fn row(
    name: &'static str,
    kind: Kind,
    level: Level,
    labels: &'static [&'static str],
    place: Where,
) -> Documented {
    Documented { name, kind, level, labels, place }
}

const FAMILY: &[&str] = &["ip_family"];
const FAMILY_TABLE: &[&str] = &["ip_family", "table"];
const NFTABLES: Where = In(Mode::Nftables);
const IPTABLES: Where = In(Mode::Iptables);

/// All that are here, by their names.
#[rustfmt::skip]
const TABLE: &[Documented] = &[
    row("disabled_metrics_total", Counter, Beta, &[], Always),
    row("hidden_metrics_total", Counter, Beta, &[], Always),
    row("kubeproxy_conntrack_reconciler_deleted_entries_total", Counter, Alpha, FAMILY, Always),
    row("kubeproxy_conntrack_reconciler_sync_duration_seconds", Histogram(&SYNC), Alpha, FAMILY, Always),
    row("kubeproxy_iptables_ct_state_invalid_dropped_packets_total", Counter, Alpha, &[], IPTABLES),
    row("kubeproxy_iptables_localhost_nodeports_accepted_packets_total", Counter, Alpha, &[], IPTABLES),
    row("kubeproxy_network_programming_duration_seconds", Histogram(&PROGRAMMING), Alpha, FAMILY, Always),
    row("kubeproxy_proxy_healthz_total", Counter, Alpha, &["code"], Always),
    row("kubeproxy_proxy_livez_total", Counter, Alpha, &["code"], Always),
    row("kubeproxy_sync_full_proxy_rules_duration_seconds", Histogram(&SYNC), Alpha, FAMILY, Always),
    row("kubeproxy_sync_partial_proxy_rules_duration_seconds", Histogram(&SYNC), Alpha, FAMILY, Always),
    row("kubeproxy_sync_proxy_rules_duration_seconds", Histogram(&SYNC), Alpha, FAMILY, Always),
    row("kubeproxy_sync_proxy_rules_endpoint_changes_pending", Gauge, Alpha, &[], Always),
    row("kubeproxy_sync_proxy_rules_endpoint_changes_total", Counter, Alpha, &[], Always),
    row("kubeproxy_sync_proxy_rules_iptables_last", Gauge, Alpha, FAMILY_TABLE, IPTABLES),
    row("kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total", Counter, Alpha, FAMILY, IPTABLES),
    row("kubeproxy_sync_proxy_rules_iptables_restore_failures_total", Counter, Alpha, FAMILY, IPTABLES),
    row("kubeproxy_sync_proxy_rules_iptables_total", Gauge, Alpha, FAMILY_TABLE, IPTABLES),
    row("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", Gauge, Alpha, FAMILY, Always),
    row("kubeproxy_sync_proxy_rules_last_timestamp_seconds", Gauge, Alpha, FAMILY, Always),
    row("kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total", Counter, Alpha, FAMILY, NFTABLES),
    row("kubeproxy_sync_proxy_rules_nftables_sync_failures_total", Counter, Alpha, FAMILY, NFTABLES),
    row("kubeproxy_sync_proxy_rules_no_local_endpoints_total", Gauge, Alpha, &["ip_family", "traffic_policy"], Always),
    row("kubeproxy_sync_proxy_rules_service_changes_pending", Gauge, Alpha, &[], Always),
    row("kubeproxy_sync_proxy_rules_service_changes_total", Counter, Alpha, &[], Always),
    row("kubernetes_build_info", Gauge, Beta,
        &["build_date", "compiler", "git_commit", "git_tree_state", "git_version", "go_version", "major", "minor", "platform"], Always),
    row("kubernetes_feature_enabled", Gauge, Beta, &["name", "stage"], Program),
    row("kubernetes_healthcheck", Gauge, Stable, &["name", "type"], Slis),
    row("kubernetes_healthchecks_total", Counter, Stable, &["name", "status", "type"], Slis),
    row("registered_metrics_total", Counter, Beta, &["deprecated_version", "stability_level"], Always),
    row("rest_client_request_duration_seconds", Histogram(&REQUEST), Alpha, &["host", "verb"], Program),
    row("rest_client_request_size_bytes", Histogram(&BYTES), Alpha, &["host", "verb"], Program),
    row("rest_client_requests_total", Counter, Alpha, &["code", "host", "method"], Program),
    row("rest_client_response_size_bytes", Histogram(&BYTES), Alpha, &["host", "verb"], Program),
    row("version_info", Gauge, Alpha, &["binary", "component", "emulation", "min_compat"], Always),
];

/// What is documented and never here, and why: nothing of the kind happens.
#[cfg(test)]
const NEVER: &[(&str, &[&str])] = &[
    (
        "there are no informers, and nothing is queued for them",
        &["informer_processing_latency_seconds", "informer_queued_items"],
    ),
    (
        "the proxy is not elected",
        &["leader_election_master_status", "leader_election_slowpath_total"],
    ),
    (
        "credentials are read from files",
        &[
            "rest_client_exec_plugin_call_total",
            "rest_client_exec_plugin_certificate_rotation_age",
            "rest_client_exec_plugin_policy_call_total",
            "rest_client_exec_plugin_ttl_seconds",
        ],
    ),
    ("requests are not held back", &["rest_client_rate_limiter_duration_seconds"]),
    (
        "an answer that asks to come again is an error to who asked",
        &["rest_client_request_retries_total"],
    ),
    ("names are looked up by the system", &["rest_client_dns_resolution_duration_seconds"]),
    (
        "one connection carries everything",
        &["rest_client_transport_cache_entries", "rest_client_transport_create_calls_total"],
    ),
    ("there are no controllers", &["running_managed_controllers"]),
    (
        "there are no work queues",
        &[
            "workqueue_adds_total",
            "workqueue_depth",
            "workqueue_longest_running_processor_seconds",
            "workqueue_queue_duration_seconds",
            "workqueue_retries_total",
            "workqueue_unfinished_work_seconds",
            "workqueue_work_duration_seconds",
        ],
    ),
];

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use jiff::Timestamp;
    use keelson_api::metrics::{component, rest_client::RestClient};
    use prometheus::{Registry, proto::MetricType};

    use super::*;
    use crate::{backend::TableRules, health::Slis, metrics::Metrics, model::Family};

    /// Everything that is printed once all has happened that is counted.
    fn printed(mode: Mode) -> BTreeMap<String, prometheus::proto::MetricFamily> {
        let registry = Registry::new();
        let metrics = Metrics::for_mode(&registry, mode).unwrap();
        component::register(&registry).unwrap();
        component::register_counts(&registry, levels(mode)).unwrap();
        component::register_features(&registry, [("F", "ALPHA", true)]).unwrap();
        let client = RestClient::register(&registry).unwrap();
        client.note("200", "host", "GET", Duration::ZERO, Some(0), Some(0));
        let slis = Slis::register(&registry).unwrap();
        slis.checked();
        let took = Duration::from_millis(1);
        for family in [Family::V4, Family::V6] {
            metrics.queued(family);
            metrics.synced(family, true, took);
            metrics.synced(family, false, took);
            metrics.programmed(family, Timestamp::now());
            metrics.failed(family, true);
            metrics.cleanup_failed(family);
            metrics.conntrack_cleaned(family, 1, took);
            metrics.without_local_endpoints(family, 0, 0);
            metrics.rules(family, &[TableRules { table: "nat", rules: 1, written: 1 }]);
        }
        metrics.healthz.with_label_values(&["200"]).inc();
        metrics.livez.with_label_values(&["200"]).inc();
        registry.gather().into_iter().map(|family| (family.name().to_owned(), family)).collect()
    }

    #[test]
    fn what_is_printed_is_what_is_documented() {
        for mode in [Mode::Nftables, Mode::Iptables, Mode::Userspace] {
            let printed = printed(mode);
            for row in TABLE {
                if matches!(row.place, In(other) if other != mode) {
                    assert!(!printed.contains_key(row.name), "{mode:?}: {}", row.name);
                    continue;
                }
                let found = printed.get(row.name);
                let found = found.unwrap_or_else(|| panic!("{mode:?}: no {}", row.name));
                let kind = match row.kind {
                    Counter => MetricType::COUNTER,
                    Gauge => MetricType::GAUGE,
                    Histogram(_) => MetricType::HISTOGRAM,
                };
                assert_eq!(found.get_field_type(), kind, "{}", row.name);
                let metric = &found.get_metric()[0];
                let labels: Vec<&str> = metric.get_label().iter().map(|l| l.name()).collect();
                assert_eq!(labels, row.labels, "{}", row.name);
                if let Histogram(buckets) = row.kind {
                    let found = metric.get_histogram().get_bucket();
                    let found: Vec<f64> = found.iter().map(|bucket| bucket.upper_bound()).collect();
                    assert_eq!(found, buckets, "{}", row.name);
                }
            }
            let undocumented: Vec<&String> = printed
                .keys()
                .filter(|name| !name.starts_with("keelson_") && !name.starts_with("process_"))
                .filter(|name| find(name).is_none())
                .collect();
            assert!(undocumented.is_empty(), "{mode:?}: {undocumented:?}");
        }
    }

    #[test]
    fn nothing_stands_twice_and_nothing_is_both_here_and_not() {
        assert!(TABLE.windows(2).all(|pair| pair[0].name < pair[1].name));
        for name in NEVER.iter().flat_map(|(_, names)| *names) {
            assert!(find(name).is_none(), "{name}");
        }
    }
}
