//! What a kubeconfig that Keelson issues says besides how to reach the API server: what a node must
//! know of the cluster, and the certificate of its kubelet's HTTPS port.
//!
//! It stands in the kubeconfig's `extensions`, which other programs pass over. So one file is all that
//! another machine needs.

use std::net::IpAddr;

use anyhow::Context;
use ipnet::IpNet;
use keelson_control_plane::pki::CertificateAndKey;
use kube::config::Kubeconfig;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The extension's name in the cluster's `extensions`.
pub(crate) const EXTENSION: &str = "keelson";

/// What a node must know of its cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ClusterFacts {
    /// The addresses of all pods.
    #[serde(rename = "clusterCIDR")]
    pub(crate) cluster_cidr: IpNet,
    /// The address of cluster DNS.
    #[serde(rename = "clusterDNS")]
    pub(crate) cluster_dns: IpAddr,
    /// The domain of the cluster's names.
    pub(crate) cluster_domain: String,
    /// What the node's kubelet shows on its HTTPS port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) serving: Option<Serving>,
}

/// A serving certificate with its key, in PEM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Serving {
    certificate: String,
    key: String,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serving").finish_non_exhaustive() // never the key
    }
}

impl From<CertificateAndKey> for Serving {
    fn from(files: CertificateAndKey) -> Self {
        Self { certificate: files.certificate_pem, key: files.key_pem }
    }
}

impl From<Serving> for CertificateAndKey {
    fn from(serving: Serving) -> Self {
        Self { certificate_pem: serving.certificate, key_pem: serving.key }
    }
}

impl ClusterFacts {
    /// What a kubeconfig says; `None` if Keelson did not issue it.
    ///
    /// # Errors
    /// What stands there can't be understood.
    pub(crate) fn of(kubeconfig: &Kubeconfig) -> anyhow::Result<Option<Self>> {
        let clusters = kubeconfig.clusters.iter().filter_map(|named| named.cluster.as_ref());
        let mut extensions = clusters.flat_map(|cluster| cluster.extensions.iter().flatten());
        extensions
            .find(|extension| extension.name == EXTENSION)
            .map(|extension| {
                serde_json::from_value(extension.extension.clone())
                    .with_context(|| format!("the extension {EXTENSION:?}"))
            })
            .transpose()
    }

    /// As it stands in a kubeconfig.
    ///
    /// # Errors
    /// It has no JSON form, which does not happen.
    pub(crate) fn extension(&self) -> anyhow::Result<Value> {
        serde_json::to_value(self).context("what a kubeconfig says of the cluster")
    }
}
