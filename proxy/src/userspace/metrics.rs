//! What relays count.

use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};

use crate::model::{Family, Protocol};

/// What relays count. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct RelayMetrics {
    connections: IntGaugeVec,
    refused: IntCounterVec,
    lost_routes: IntCounterVec,
}

impl RelayMetrics {
    /// Makes the metrics.
    ///
    /// # Errors
    /// Never: their names are valid.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        Ok(Self {
            connections: IntGaugeVec::new(
                Opts::new(
                    "keelson_proxy_relayed_connections",
                    "TCP connections and UDP clients that are being relayed.",
                ),
                &["ip_family", "protocol"],
            )?,
            refused: IntCounterVec::new(
                Opts::new(
                    "keelson_proxy_relay_refused_total",
                    "Connections and UDP clients that were not relayed: limit, source or endpoint.",
                ),
                &["ip_family", "reason"],
            )?,
            lost_routes: IntCounterVec::new(
                Opts::new(
                    "keelson_proxy_relay_lost_routes_total",
                    "Local routes to services that another program removed, and that were mended.",
                ),
                &["ip_family"],
            )?,
        })
    }

    /// Registers them.
    ///
    /// # Errors
    /// When a name is registered already.
    pub(crate) fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.connections.clone()))?;
        registry.register(Box::new(self.refused.clone()))?;
        registry.register(Box::new(self.lost_routes.clone()))
    }

    /// One more connection, until what is returned is dropped.
    pub(super) fn connection(&self, family: Family, protocol: Protocol) -> Counted {
        let protocol = if protocol == Protocol::Udp { "UDP" } else { "TCP" };
        let gauge = self.connections.with_label_values(&[family.as_str(), protocol]);
        gauge.inc();
        Counted(gauge)
    }

    /// So many routes were removed by others.
    pub(super) fn lost_routes(&self, family: Family, lost: usize) {
        self.lost_routes.with_label_values(&[family.as_str()]).inc_by(lost as u64);
    }

    /// One was not relayed.
    pub(super) fn refused(&self, family: Family, reason: &str) {
        self.refused.with_label_values(&[family.as_str(), reason]).inc();
    }
}

/// A connection that counts as long as this lives.
#[derive(Debug)]
pub(super) struct Counted(prometheus::IntGauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
