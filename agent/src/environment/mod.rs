//! A container's environment: literal values, ConfigMaps, Secrets, the downward API, Services.
//!
//! ```text
//!   pod, container ─► plan::needed ─► ObjectSource ─► plan::plan ─► variables
//!                                     (watch or get)    (pure)
//! ```
//!
//! * `plan`: which objects are needed, and what the variables are
//! * `expand`: `$(VAR)`
//! * `downward`: fields and resources of the pod itself; files of `volumes` have them too
//! * `services`: variables that name Services
//! * `objects`: where ConfigMaps, Secrets, Services and tokens come from; `kube_objects`: from an
//!   API server
//!
//! It must never start a container with less than its pod asks for: what is missing and not
//! optional is an error with the kubelet's own words.

mod downward;
mod expand;
mod kube_objects;
mod objects;
mod plan;
mod services;

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Container, Pod};
use keelson_api::{
    events::{EventRecorder, EventType},
    object::object_reference,
};

pub use downward::Allocatable;
pub(crate) use downward::{Place, field, resource};
pub use expand::{expand, expand_all, expand_sub_path};
pub use kube_objects::KubeObjects;
pub use objects::{Data, DataKind, DataName, ObjectError, ObjectSource, Token, TokenWish, Watched};
pub use plan::Environment;

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

/// Says what the node's pods may use together, as of now.
pub type AllocatableNow = Arc<dyn Fn() -> Allocatable + Send + Sync>;

/// Environments from the objects of an [`ObjectSource`].
pub struct KubeEnvironment {
    objects: Arc<dyn ObjectSource>,
    events: EventRecorder,
    allocatable: AllocatableNow,
}

impl KubeEnvironment {
    /// `objects` answers for ConfigMaps, Secrets and Services; `events` gets the warning
    /// `InvalidEnvironmentVariableNames`; `allocatable` is what limits default to in
    /// `resourceFieldRef`.
    pub fn new(
        objects: Arc<dyn ObjectSource>,
        events: EventRecorder,
        allocatable: AllocatableNow,
    ) -> Self {
        Self { objects, events, allocatable }
    }

    /// As [`ContainerEnvironment::resolve`], with the keys that could not become variables.
    ///
    /// # Errors
    /// Something that is not optional is missing or can't be had.
    pub async fn resolve_all(
        &self,
        pod: &Pod,
        container: &Container,
        addresses: &PodAddresses,
    ) -> Result<Environment, EnvironmentError> {
        let mut objects = HashMap::new();
        for name in plan::needed(pod, container) {
            match self.objects.data(&name).await {
                Ok(data) => drop(objects.insert(name, data)),
                // Whether that matters is the plan's to say.
                Err(ObjectError::NotFound(_)) => {}
                Err(error) => return Err(EnvironmentError(error.to_string())),
            }
        }
        let links = pod.spec.as_ref().and_then(|spec| spec.enable_service_links).unwrap_or(true);
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let all = match self.objects.services().await {
            Ok(services) => services,
            // Without an API server there are no Services to tell of.
            Err(ObjectError::NoApi(_)) => Vec::new(),
            Err(error) => {
                return Err(EnvironmentError(format!(
                    "services have not yet been read at least once, cannot construct envvars: \
                     {error}"
                )));
            }
        };
        let services = services::variables(all.iter().map(Arc::as_ref), namespace, links);
        let allocatable = (self.allocatable)();
        plan::plan(&plan::Given {
            pod,
            container,
            addresses,
            services,
            objects: &objects,
            allocatable: &allocatable,
        })
        .map_err(EnvironmentError)
    }
}

#[async_trait]
impl ContainerEnvironment for KubeEnvironment {
    async fn resolve(
        &self,
        pod: &Pod,
        container: &Container,
        addresses: &PodAddresses,
    ) -> Result<Vec<(String, String)>, EnvironmentError> {
        let found = self.resolve_all(pod, container, addresses).await?;
        let mut skipped: HashMap<&DataName, Vec<&str>> = HashMap::new();
        for (object, key) in &found.skipped {
            skipped.entry(object).or_default().push(key);
        }
        for (object, keys) in skipped {
            let message = format!(
                "Keys [{}] from the EnvFrom {} {}/{} were skipped since they are considered \
                 invalid environment variable names.",
                keys.join(", "),
                object.kind.as_str().to_lowercase(),
                object.namespace,
                object.name
            );
            let reason = "InvalidEnvironmentVariableNames";
            self.events.event(&object_reference(pod), EventType::Warning, reason, message);
        }
        Ok(found.variables)
    }
}
