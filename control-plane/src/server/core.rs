//! What all handlers share, and the way in and out of the store.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::HeaderMap;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    config::{Limits, Security},
    negotiate::{self, Accepted, Shape},
    request::RequestInfo,
    respond::{self},
    services::ServiceAllocator,
};
use crate::{
    admission::{AdmissionRequest, Operation},
    auth::UserInfo,
    cache::{self, Cache, ResourceCache},
    metrics::Metrics,
    openapi,
    registry::{Registry, Resource},
    status::Status,
    store::{Expect, Revision, Store, StoreError, Stored},
    table::IncludeObject,
};

/// How long a request waits for a revision that is yet to come.
const FUTURE_WAIT: Duration = Duration::from_secs(3);

/// The API server's insides.
pub(crate) struct Core {
    pub(crate) registry: Arc<Registry>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) security: Security,
    pub(crate) services: ServiceAllocator,
    pub(crate) limits: Limits,
    pub(crate) reads: Arc<Semaphore>,
    pub(crate) writes: Arc<Semaphore>,
    pub(crate) metrics: Metrics,
    pub(crate) documents: openapi::Documents,
    pub(crate) registered: prometheus::Registry,
    pub(crate) kubelet_tls: Option<Arc<rustls::ClientConfig>>,
    /// `address:port` by which others reach this server.
    pub(crate) advertised: String,
    /// Set once what a cluster can't be without is in the store.
    pub(crate) bootstrapped: AtomicBool,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

/// A request on its way to a handler.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) info: RequestInfo,
    pub(crate) user: UserInfo,
    pub(crate) headers: HeaderMap,
}

impl Call {
    pub(crate) fn accept(&self, shapes: &[Shape]) -> Result<Accepted, Status> {
        negotiate::accept(&self.headers, self.info.query.get("pretty"), shapes)
    }

    pub(crate) fn include(&self) -> Result<IncludeObject, Status> {
        respond::include_object(self.info.query.get("includeObject"))
    }

    /// The media type of the body, without its parameters.
    pub(crate) fn content_type(&self) -> Option<String> {
        let value = self.headers.get(http::header::CONTENT_TYPE)?.to_str().ok()?;
        Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
    }
}

/// The store did not take a write.
#[derive(Debug)]
pub(crate) enum Refused {
    /// The object is not as it was.
    Conflict,
    Failed(Status),
}

pub(crate) fn store_status(error: &StoreError) -> Status {
    match error {
        StoreError::Compacted { requested, compacted } => Status::too_old(requested.0, compacted.0),
        StoreError::Future { requested, current } => too_large(*requested, *current),
        StoreError::Closed { .. } => Status::unavailable("the server is shutting down"),
        error => Status::internal(error),
    }
}

/// 504 with the cause by which clients know to try again (`IsResourceVersionTooLarge`).
fn too_large(requested: Revision, current: Revision) -> Status {
    let cause = crate::status::Cause {
        reason: "ResourceVersionTooLarge".to_owned(),
        message: "Too large resource version".to_owned(),
        field: String::new(),
    };
    let message = format!("Too large resource version: {requested}, current: {current}");
    Status::timeout(&message, 1).with_causes(vec![cause]).with_retry_after(1)
}

/// The revision of an object out of the cache.
pub(crate) fn revision_of(object: &Value) -> Revision {
    let text = object.pointer("/metadata/resourceVersion").and_then(Value::as_str);
    Revision(text.and_then(|text| text.parse().ok()).unwrap_or(0))
}

/// Text at a path of an object, or nothing.
pub(crate) fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

impl Core {
    pub(crate) fn cache_of(&self, resource: &Resource) -> Result<&Arc<ResourceCache>, Status> {
        self.cache
            .resource(&resource.storage.group, &resource.storage.plural)
            .ok_or_else(Status::method_not_allowed)
    }

    pub(crate) fn is_bootstrapped(&self) -> bool {
        self.bootstrapped.load(Ordering::Acquire)
    }

    /// Waits until the cache holds all that was answered before now.
    pub(crate) async fn catch_up(&self) -> Result<(), Status> {
        let current = self.store.current_revision().await.map_err(|e| store_status(&e))?;
        self.cache.reach(current).await;
        Ok(())
    }

    /// Waits until the cache holds a revision that a client has seen.
    pub(crate) async fn wait_for(&self, revision: Revision) -> Result<(), Status> {
        tokio::time::timeout(FUTURE_WAIT, self.cache.reach(revision))
            .await
            .map_err(|_| too_large(revision, self.cache.applied()))
    }

    /// The newest state of an object, as it is stored.
    pub(crate) async fn current(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> Result<Arc<Value>, Status> {
        self.catch_up().await?;
        self.cache_of(resource)?
            .get(&cache::object_key(namespace, name))
            .ok_or_else(|| Status::not_found(&resource.group, &resource.plural, name))
    }

    fn store_key(resource: &Resource, object: &Value) -> String {
        let namespace = if resource.namespaced { text(object, "/metadata/namespace") } else { "" };
        let key = cache::object_key(namespace, text(object, "/metadata/name"));
        format!("{}{key}", cache::prefix(&resource.storage))
    }

    /// Writes an object in its stored form; as it is then.
    pub(crate) async fn write(
        &self,
        resource: &Resource,
        mut object: Value,
        expect: Expect,
    ) -> Result<Arc<Value>, Refused> {
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("resourceVersion"); // it is where it is stored
        }
        let bytes = serde_json::to_vec(&object)
            .map_err(|error| Refused::Failed(Status::internal(error)))?;
        if bytes.len() > self.limits.max_body_bytes {
            let limit = self.limits.max_body_bytes;
            let status = Status::too_large(&format!("limit is {limit}"));
            return Err(Refused::Failed(status));
        }
        let key = Self::store_key(resource, &object);
        let operation = if expect == Expect::Absent { "create" } else { "update" };
        let written = self.store.put(&key, Bytes::from(bytes), expect);
        let revision = self.measured(resource, operation, written).await?;
        cache::set_resource_version(&mut object, revision);
        // Whoever is answered finds it in the cache: admission and authorization look there.
        self.cache.reach(revision).await;
        Ok(Arc::new(object))
    }

    /// Deletes an object; as it was last, at the deletion's revision.
    pub(crate) async fn remove(
        &self,
        resource: &Resource,
        object: &Value,
        expect: Revision,
    ) -> Result<Arc<Value>, Refused> {
        let key = Self::store_key(resource, object);
        let revision = self.measured(resource, "delete", self.store.delete(&key, expect)).await?;
        if resource.group.is_empty() && resource.plural == "services" {
            self.services.release(object);
        }
        let mut object = object.clone();
        cache::set_resource_version(&mut object, revision);
        self.cache.reach(revision).await;
        Ok(Arc::new(object))
    }

    async fn measured(
        &self,
        resource: &Resource,
        operation: &str,
        write: impl Future<Output = Result<Revision, StoreError>>,
    ) -> Result<Revision, Refused> {
        let began = Instant::now();
        let result = write.await;
        self.metrics.store_request(
            operation,
            &resource.storage.group,
            &resource.storage.plural,
            began.elapsed(),
            matches!(result, Err(ref error) if !matches!(error, StoreError::Conflict { .. })),
        );
        result.map_err(|error| match error {
            StoreError::Conflict { .. } => Refused::Conflict,
            error => Refused::Failed(store_status(&error)),
        })
    }

    /// A stored value out of the history.
    pub(crate) fn parse_stored(&self, stored: &Stored) -> Result<Arc<Value>, Status> {
        cache::parse(&stored.value, stored.modified).map(Arc::new).map_err(Status::internal)
    }

    pub(crate) fn admit(
        &self,
        call: &Call,
        resource: &Resource,
        operation: Operation,
        target: Target<'_>,
        dry_run: bool,
        object: Option<&mut Value>,
    ) -> Result<(), Status> {
        let request = AdmissionRequest {
            user: &call.user,
            operation,
            group: &resource.group,
            resource: &resource.plural,
            subresource: target.subresource,
            namespace: target.namespace,
            name: target.name,
            old: target.old,
            dry_run,
        };
        self.security.admission.admit(&request, object).map_err(Status::from)
    }
}

/// Which object a write is about.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Target<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) subresource: &'a str,
    pub(crate) old: Option<&'a Value>,
}
