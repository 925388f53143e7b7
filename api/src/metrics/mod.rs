//! Metrics in Prometheus' text form.
//!
//! Each part registers what it measures in a registry that it is handed; whoever serves
//! `/metrics` prints that registry with [`encode`].
//!
//! * [`component`]: what every component of Kubernetes tells of itself.
//! * [`process`]: what the kernel counts of the process.
//! * [`rest_client`]: requests to the API server.

pub mod component;
pub mod process;
pub mod rest_client;

use prometheus::{Encoder, Registry, TextEncoder};

/// The content type of what [`encode`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics of a registry as text.
///
/// # Errors
/// When a collector hands out a family without a name or of mixed types, which is a mistake in the
/// collector.
pub fn encode(registry: &Registry) -> Result<String, prometheus::Error> {
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Buckets that grow by `factor` from `start`, as Prometheus' `ExponentialBuckets`.
pub fn exponential_buckets(start: f64, factor: f64, count: u32) -> Vec<f64> {
    std::iter::successors(Some(start), |bound| Some(bound * factor)).take(count as usize).collect()
}

#[cfg(test)]
mod tests {
    use prometheus::IntCounter;

    use super::*;

    #[test]
    fn prints_what_is_registered() {
        let registry = Registry::new();
        let counter = IntCounter::new("kubelet_test_total", "A test.").unwrap();
        registry.register(Box::new(counter.clone())).unwrap();
        counter.inc();
        assert!(encode(&registry).unwrap().contains("\nkubelet_test_total 1\n"));
        assert_eq!(exponential_buckets(1.0, 2.0, 3), [1.0, 2.0, 4.0]);
    }
}
