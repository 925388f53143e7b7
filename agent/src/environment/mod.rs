//! A container's environment: literal values, ConfigMaps, Secrets, the downward API, Services.

use std::net::IpAddr;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Container, Pod};

/// Why a container's environment can't be made. Its text is the message of the waiting reason
/// `CreateContainerConfigError`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct EnvironmentError(pub String);

/// What only the node knows of a pod when its containers are made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodAddresses {
    /// `status.hostIPs`, the primary one first.
    pub host_ips: Vec<IpAddr>,
    /// `status.podIPs`, the primary one first.
    pub pod_ips: Vec<IpAddr>,
}

/// Resolves a container's `env` and `envFrom`.
#[async_trait]
pub trait ContainerEnvironment: Send + Sync + 'static {
    /// The variables in order: service variables first, then `envFrom`, then `env` with `$(VAR)`
    /// expanded; a later one of the same name replaces an earlier one.
    async fn resolve(
        &self,
        pod: &Pod,
        container: &Container,
        addresses: &PodAddresses,
    ) -> Result<Vec<(String, String)>, EnvironmentError>;
}
