//! What the agent counts and times, under the kubelet's own names.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use keelson_api::metrics::exponential_buckets;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, core::Collector,
};

/// Buckets of the kubelet's pod start metrics, in seconds.
const START_BUCKETS: [f64; 25] = [
    0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0,
    300.0, 360.0, 480.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0,
];
/// Buckets of image pulls, in seconds.
const PULL_BUCKETS: [f64; 18] = [
    1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0,
    1200.0, 1800.0, 2700.0, 3600.0,
];
/// Buckets of status writes, in seconds.
const STATUS_BUCKETS: [f64; 11] = [0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0];

/// The agent's metrics.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    running_pods: IntGauge,
    running_containers: IntGaugeVec,
    desired_pods: IntGaugeVec,
    mirror_pods: IntGauge,
    started_pods: IntCounter,
    started_containers: IntCounterVec,
    started_containers_errors: IntCounterVec,
    pod_start: Histogram,
    pod_worker: HistogramVec,
    pod_status_sync: Histogram,
    runtime_operations: IntCounterVec,
    runtime_operations_errors: IntCounterVec,
    runtime_operations_duration: HistogramVec,
    image_pull: HistogramVec,
    probe_total: IntCounterVec,
    probe_duration: HistogramVec,
    node_name: IntGaugeVec,
}

impl Metrics {
    /// Makes the metrics and hands them to `registry`; those of probes to `probes`, which are
    /// served at a path of their own.
    pub(crate) fn new(registry: &Registry, probes: &Registry) -> Result<Self, prometheus::Error> {
        let (make, make_probes) = (Maker(registry), Maker(probes));
        Ok(Self {
            running_pods: make
                .gauge("kubelet_running_pods", "Number of pods that have a running pod sandbox")?,
            running_containers: make.gauges(
                "kubelet_running_containers",
                "Number of containers by their state",
                &["container_state"],
            )?,
            desired_pods: make.gauges(
                "kubelet_desired_pods",
                "Number of pods the node is to run, by whether they are static",
                &["static"],
            )?,
            mirror_pods: make.gauge("kubelet_mirror_pods", "Number of mirror pods in the API")?,
            started_pods: make
                .counter("kubelet_started_pods_total", "Cumulative number of pods started")?,
            started_containers: make.counters(
                "kubelet_started_containers_total",
                "Cumulative number of containers started",
                &["container_type"],
            )?,
            started_containers_errors: make.counters(
                "kubelet_started_containers_errors_total",
                "Cumulative number of errors when starting containers",
                &["code", "container_type"],
            )?,
            pod_start: make.histogram(
                "kubelet_pod_start_duration_seconds",
                "Duration in seconds from the agent seeing a pod for the first time to its \
                 containers running",
                &START_BUCKETS,
            )?,
            pod_worker: make.histograms(
                "kubelet_pod_worker_duration_seconds",
                "Duration in seconds of one step of a pod's worker",
                &["operation_type"],
                prometheus::DEFAULT_BUCKETS,
            )?,
            pod_status_sync: make.histogram(
                "kubelet_pod_status_sync_duration_seconds",
                "Duration in seconds of writing a pod's status update",
                &STATUS_BUCKETS,
            )?,
            runtime_operations: make.counters(
                "kubelet_runtime_operations_total",
                "Cumulative number of runtime operations by operation type",
                &["operation_type"],
            )?,
            runtime_operations_errors: make.counters(
                "kubelet_runtime_operations_errors_total",
                "Cumulative number of runtime operation errors by operation type",
                &["operation_type"],
            )?,
            runtime_operations_duration: make.histograms(
                "kubelet_runtime_operations_duration_seconds",
                "Duration in seconds of runtime operations by operation type",
                &["operation_type"],
                &exponential_buckets(0.005, 2.5, 14),
            )?,
            image_pull: make.histograms(
                "kubelet_image_pull_duration_seconds",
                "Duration in seconds to pull an image, by its size",
                &["image_size_in_bytes"],
                &PULL_BUCKETS,
            )?,
            probe_total: make_probes.counters(
                "prober_probe_total",
                "Cumulative number of a liveness, readiness or startup probe by result",
                &["container", "namespace", "pod", "pod_uid", "probe_type", "result"],
            )?,
            probe_duration: make_probes.histograms(
                "prober_probe_duration_seconds",
                "Duration in seconds for a probe response",
                &["container", "namespace", "pod", "probe_type"],
                prometheus::DEFAULT_BUCKETS,
            )?,
            node_name: make.gauges("kubelet_node_name", "The node's name", &["node"])?,
        })
    }

    /// Names the node.
    pub(crate) fn set_node(&self, name: &str) {
        self.node_name.with_label_values(&[name]).set(1);
    }

    /// How many pods and containers there are.
    pub(crate) fn set_counts(&self, counts: &Counts) {
        self.running_pods.set(counts.running_pods);
        self.desired_pods.with_label_values(&["true"]).set(counts.static_pods);
        self.desired_pods.with_label_values(&["false"]).set(counts.api_pods);
        self.mirror_pods.set(counts.mirror_pods);
        for (state, number) in [
            ("created", counts.created),
            ("running", counts.running),
            ("exited", counts.exited),
            ("unknown", counts.unknown),
        ] {
            self.running_containers.with_label_values(&[state]).set(number);
        }
    }

    /// A sandbox was made for a pod.
    pub(crate) fn pod_started(&self) {
        self.started_pods.inc();
    }

    /// All containers of a pod ran for the first time.
    pub(crate) fn pod_ran(&self, after: Duration) {
        self.pod_start.observe(after.as_secs_f64());
    }

    /// A container's start was tried.
    pub(crate) fn container_started(&self, kind: &str, failure: Option<&str>) {
        self.started_containers.with_label_values(&[kind]).inc();
        if let Some(code) = failure {
            self.started_containers_errors.with_label_values(&[code, kind]).inc();
        }
    }

    /// A worker took one step.
    pub(crate) fn worker_step(&self, operation: &str, took: Duration) {
        self.pod_worker.with_label_values(&[operation]).observe(took.as_secs_f64());
    }

    /// A status was written.
    pub(crate) fn status_written(&self, took: Duration) {
        self.pod_status_sync.observe(took.as_secs_f64());
    }

    /// The runtime was asked for something.
    pub(crate) fn runtime_operation(&self, operation: &str, took: Duration, failed: bool) {
        self.runtime_operations.with_label_values(&[operation]).inc();
        self.runtime_operations_duration
            .with_label_values(&[operation])
            .observe(took.as_secs_f64());
        if failed {
            self.runtime_operations_errors.with_label_values(&[operation]).inc();
        }
    }

    /// An image was pulled.
    pub(crate) fn image_pulled(&self, bytes: u64, took: Duration) {
        const MIB: u64 = 1024 * 1024;
        let size = match bytes / MIB {
            0..10 => "0-10MB",
            10..100 => "10MB-100MB",
            100..500 => "100MB-500MB",
            500..1024 => "500MB-1GB",
            1024..5120 => "1GB-5GB",
            5120..10240 => "5GB-10GB",
            10240..20480 => "10GB-20GB",
            20480..30720 => "20GB-30GB",
            30720..40960 => "30GB-40GB",
            40960..61440 => "40GB-60GB",
            61440..102_400 => "60GB-100GB",
            _ => "GT100GB",
        };
        self.image_pull.with_label_values(&[size]).observe(took.as_secs_f64());
    }

    /// A probe was tried.
    pub(crate) fn probed(
        &self,
        pod: &Pod,
        container: &str,
        kind: &str,
        result: &str,
        took: Duration,
    ) {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let (name, namespace, uid) =
            (text(&pod.metadata.name), text(&pod.metadata.namespace), text(&pod.metadata.uid));
        self.probe_total
            .with_label_values(&[container, &namespace, &name, &uid, kind, result])
            .inc();
        self.probe_duration
            .with_label_values(&[container, &namespace, &name, kind])
            .observe(took.as_secs_f64());
    }

    /// Forgets the probes of a pod that is gone.
    pub(crate) fn forget_probes(&self, pod: &Pod) {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let (name, namespace, uid) =
            (text(&pod.metadata.name), text(&pod.metadata.namespace), text(&pod.metadata.uid));
        for (_, container) in crate::worker::view::containers(pod) {
            let container = container.name.as_str();
            for kind in ["Liveness", "Readiness", "Startup"] {
                for result in ["successful", "failed"] {
                    let labels = [container, &namespace, &name, &uid, kind, result];
                    // one that was never counted is not there to be forgotten
                    let _ = self.probe_total.remove_label_values(&labels);
                }
                let labels = [container, &namespace, &name, kind];
                let _ = self.probe_duration.remove_label_values(&labels);
            }
        }
    }
}

/// How many pods and containers there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Pods with a ready sandbox.
    pub(crate) running_pods: i64,
    /// Static pods.
    pub(crate) static_pods: i64,
    /// Pods from the API.
    pub(crate) api_pods: i64,
    /// Mirror pods.
    pub(crate) mirror_pods: i64,
    /// Containers that were made and not let go.
    pub(crate) created: i64,
    /// Containers that run.
    pub(crate) running: i64,
    /// Containers that ended.
    pub(crate) exited: i64,
    /// Containers that the runtime lost track of.
    pub(crate) unknown: i64,
}

struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    fn add<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C, prometheus::Error> {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.add(IntGauge::new(name, help)?)
    }

    fn gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntGaugeVec, prometheus::Error> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.add(IntCounter::new(name, help)?)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> Result<Histogram, prometheus::Error> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.add(Histogram::with_opts(options)?)
    }

    fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, prometheus::Error> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.add(HistogramVec::new(options, labels)?)
    }
}
