//! What cluster DNS counts.

use std::time::Duration;

use hickory_proto::op::ResponseCode;
use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts, Registry, exponential_buckets};

/// Counters of cluster DNS, under CoreDNS' names where the meaning is the same.
#[derive(Clone, Debug)]
pub struct DnsMetrics {
    responses: IntCounterVec,
    duration: Histogram,
}

impl DnsMetrics {
    /// Makes the metrics and registers them.
    ///
    /// # Errors
    /// When one of the names is taken in the registry.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            responses: IntCounterVec::new(
                Opts::new("coredns_dns_responses_total", "Counter of response status codes."),
                &["rcode", "plugin"],
            )?,
            duration: Histogram::with_opts(
                HistogramOpts::new(
                    "coredns_dns_request_duration_seconds",
                    "Histogram of the time (in seconds) each request took.",
                )
                .buckets(exponential_buckets(0.000_25, 2.0, 16)?),
            )?,
        };
        registry.register(Box::new(metrics.responses.clone()))?;
        registry.register(Box::new(metrics.duration.clone()))?;
        Ok(metrics)
    }

    pub(crate) fn count(&self, code: ResponseCode, from_zone: bool, took: Duration) {
        let code = match code {
            ResponseCode::NoError => "NOERROR",
            ResponseCode::FormErr => "FORMERR",
            ResponseCode::ServFail => "SERVFAIL",
            ResponseCode::NXDomain => "NXDOMAIN",
            ResponseCode::NotImp => "NOTIMP",
            ResponseCode::Refused => "REFUSED",
            _ => "OTHER",
        };
        let source = if from_zone { "kubernetes" } else { "forward" };
        self.responses.with_label_values(&[code, source]).inc();
        self.duration.observe(took.as_secs_f64());
    }
}
