//! The scheduler's metrics, under the names of Kubernetes' own.

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
    exponential_buckets,
};

use super::pending::Counts;

/// The profile's name in labels, which is the scheduler's.
pub(crate) const PROFILE: &str = super::SCHEDULER_NAME;

/// What the scheduler counts.
#[derive(Clone, Debug)]
pub struct SchedulerMetrics {
    pub(crate) attempts: IntCounterVec,
    pub(crate) attempt_duration: HistogramVec,
    pub(crate) algorithm_duration: Histogram,
    pub(crate) sli_duration: HistogramVec,
    pub(crate) attempts_per_pod: Histogram,
    pending: IntGaugeVec,
    cache: IntGaugeVec,
}

impl SchedulerMetrics {
    /// Makes the metrics and registers them.
    ///
    /// # Errors
    /// When one of the names is taken in the registry.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let to_16_seconds = exponential_buckets(0.001, 2.0, 15)?;
        let metrics = Self {
            attempts: IntCounterVec::new(
                Opts::new(
                    "scheduler_schedule_attempts_total",
                    "Number of attempts to schedule pods, by the result. 'unschedulable' means a \
                     pod could not be scheduled, while 'error' means an internal scheduler problem.",
                ),
                &["profile", "result"],
            )?,
            attempt_duration: HistogramVec::new(
                HistogramOpts::new(
                    "scheduler_scheduling_attempt_duration_seconds",
                    "Scheduling attempt latency in seconds (scheduling algorithm + binding)",
                )
                .buckets(to_16_seconds.clone()),
                &["profile", "result"],
            )?,
            algorithm_duration: Histogram::with_opts(
                HistogramOpts::new(
                    "scheduler_scheduling_algorithm_duration_seconds",
                    "Scheduling algorithm latency in seconds",
                )
                .buckets(to_16_seconds),
            )?,
            sli_duration: HistogramVec::new(
                HistogramOpts::new(
                    "scheduler_pod_scheduling_sli_duration_seconds",
                    "E2e latency for a pod being scheduled, from the time the pod enters the \
                     scheduling queue and might involve multiple scheduling attempts.",
                )
                .buckets(exponential_buckets(0.01, 2.0, 20)?),
                &["attempts"],
            )?,
            attempts_per_pod: Histogram::with_opts(
                HistogramOpts::new(
                    "scheduler_pod_scheduling_attempts",
                    "Number of attempts to successfully schedule a pod.",
                )
                .buckets(exponential_buckets(1.0, 2.0, 5)?),
            )?,
            pending: IntGaugeVec::new(
                Opts::new(
                    "scheduler_pending_pods",
                    "Number of pending pods, by the queue type: active, backoff, unschedulable, \
                     gated.",
                ),
                &["queue"],
            )?,
            cache: IntGaugeVec::new(
                Opts::new(
                    "scheduler_cache_size",
                    "Number of nodes, pods, and assumed (bound) pods in the scheduler cache.",
                ),
                &["type"],
            )?,
        };
        registry.register(Box::new(metrics.attempts.clone()))?;
        registry.register(Box::new(metrics.attempt_duration.clone()))?;
        registry.register(Box::new(metrics.algorithm_duration.clone()))?;
        registry.register(Box::new(metrics.sli_duration.clone()))?;
        registry.register(Box::new(metrics.attempts_per_pod.clone()))?;
        registry.register(Box::new(metrics.pending.clone()))?;
        registry.register(Box::new(metrics.cache.clone()))?;
        Ok(metrics)
    }

    pub(crate) fn show_queues(&self, counts: Counts) {
        for (queue, count) in [
            ("active", counts.active),
            ("backoff", counts.backoff),
            ("unschedulable", counts.unschedulable),
            ("gated", counts.gated),
        ] {
            self.pending.with_label_values(&[queue]).set(count);
        }
    }

    pub(crate) fn show_cache(&self, nodes: usize, pods: usize) {
        for (what, count) in [("nodes", nodes), ("pods", pods)] {
            self.cache.with_label_values(&[what]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
}
