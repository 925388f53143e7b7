//! EndpointSlices and legacy Endpoints: which pods stand behind each Service.
//!
//! This is in the path of every rolling update: a pod that turns ready or not ready must be in the
//! slice within milliseconds. So a change of a pod puts the Services that select it into the queue
//! at once, the plan is made from memory, and one small patch is written.

mod legacy;
mod members;
pub(super) mod plan;

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::{
    core::v1::{Endpoints, Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use keelson_api::{
    events::{EventRecorder, EventType},
    object::{ObjectKey, object_reference},
};
use kube::{
    Api, Client,
    api::{DeleteParams, PostParams},
};
use tokio_util::sync::CancellationToken;

use self::{members::Zones, plan::Plan};
use super::{
    change::{self, Part},
    error::{ControllerError, Doing, code},
    expectations::Expectations,
    queue::WorkQueue,
};
use crate::informers::{Change, Informers};

const WORKERS: usize = 8;
/// How long a pass waits for a slice that was made to be seen, before it looks again.
const UNSEEN: Duration = Duration::from_secs(1);
const ZONE: &str = "topology.kubernetes.io/zone";

struct Controller {
    client: Client,
    events: EventRecorder,
    informers: Arc<Informers>,
    expectations: Expectations,
    slices: Arc<WorkQueue<ObjectKey>>,
    endpoints: Arc<WorkQueue<ObjectKey>>,
}

/// Who writes EndpointSlices, and who Endpoints.
pub(crate) struct Clients {
    pub(crate) slices: Client,
    pub(crate) endpoints: Client,
}

/// Keeps all EndpointSlices and Endpoints of Services with selectors until `shutdown`.
pub(crate) async fn run(
    clients: Clients,
    informers: Arc<Informers>,
    events: EventRecorder,
    shutdown: CancellationToken,
) {
    let controller = Arc::new(Controller {
        client: clients.slices,
        events,
        informers,
        expectations: Expectations::default(),
        slices: WorkQueue::new(),
        endpoints: WorkQueue::new(),
    });
    let informers = &controller.informers;
    if !(informers.services.synced(&shutdown).await
        && informers.pods.synced(&shutdown).await
        && informers.nodes.synced(&shutdown).await
        && informers.endpoint_slices.synced(&shutdown).await
        && informers.endpoints.synced(&shutdown).await)
    {
        return;
    }
    controller.follow();
    let work = |key| {
        let this = controller.clone();
        async move { this.reconcile_slices(key).await }
    };
    let slices = controller.slices.clone().run("endpointslice", WORKERS, shutdown.clone(), work);
    let endpoints_client = clients.endpoints;
    let work = |key| {
        let this = controller.clone();
        let client = endpoints_client.clone();
        async move { this.reconcile_endpoints(&client, key).await }
    };
    let endpoints = controller.endpoints.clone().run("endpoints", WORKERS, shutdown, work);
    futures::future::join(Box::pin(slices), Box::pin(endpoints)).await;
}

impl Controller {
    fn add(&self, key: ObjectKey) {
        self.slices.add(key.clone());
        self.endpoints.add(key);
    }

    fn follow(self: &Arc<Self>) {
        let this = self.clone();
        self.informers.services.on_change(move |change| this.add(change.key()));
        let this = self.clone();
        self.informers.pods.on_change(move |change| this.pod_changed(change));
        let this = self.clone();
        self.informers.nodes.on_change(move |change| this.node_changed(change));
        let this = self.clone();
        self.informers.endpoint_slices.on_change(move |change| this.slice_changed(change));
        let this = self.clone();
        self.informers.endpoints.on_change(move |change| this.endpoints.add(change.key()));
    }

    fn pod_changed(&self, change: &Change<Pod>) {
        let labels = |pod: &Option<Arc<Pod>>| pod.as_ref().and_then(|p| p.metadata.labels.clone());
        let (before, after) = (labels(&change.before), labels(&change.after));
        for service in self.informers.services.list_in(change.key().namespace()) {
            if (change.before.is_some() && members::selects_labels(&service, before.as_ref()))
                || (change.after.is_some() && members::selects_labels(&service, after.as_ref()))
            {
                self.add(ObjectKey::of(&service.metadata));
            }
        }
    }

    fn node_changed(&self, change: &Change<Node>) {
        let zone = |node: &Option<Arc<Node>>| node.as_ref().and_then(|node| zone_of(node));
        if zone(&change.before) != zone(&change.after) {
            for service in self.informers.services.list() {
                self.slices.add(ObjectKey::of(&service.metadata));
            }
        }
    }

    fn slice_changed(&self, change: &Change<EndpointSlice>) {
        for slice in change.before.iter().chain(&change.after) {
            let label = |key| slice.metadata.labels.as_ref().and_then(|labels| labels.get(key));
            if label(plan::MANAGED_BY).map(String::as_str) != Some(plan::MANAGER) {
                continue;
            }
            let Some(service) = label(plan::SERVICE_NAME) else { continue };
            let key = change.key();
            let owner = ObjectKey::new(key.namespace(), service);
            self.expectations.created(&owner, key.name());
            self.slices.add(owner);
        }
    }

    fn selected(&self, service: &Service, namespace: &str) -> Vec<Arc<Pod>> {
        let mut pods = self.informers.pods.list_in(namespace);
        pods.retain(|pod| members::selects_labels(service, pod.metadata.labels.as_ref()));
        pods
    }

    fn zones(&self, pods: &[Arc<Pod>]) -> Zones {
        let mut zones = Zones::new();
        for name in pods.iter().filter_map(|pod| super::pods::node_name(pod)) {
            if !zones.contains_key(name)
                && let Some(node) = self.informers.nodes.get(&ObjectKey::new("", name))
                && let Some(zone) = zone_of(&node)
            {
                zones.insert(name.to_owned(), zone);
            }
        }
        zones
    }

    async fn reconcile_slices(&self, key: ObjectKey) -> Result<Option<Duration>, ControllerError> {
        let Some(service) = self.informers.services.get(&key) else {
            // Its slices go with it: it is their owner.
            self.expectations.forget(&key);
            return Ok(None);
        };
        if members::selects(&service).is_none() || service.metadata.deletion_timestamp.is_some() {
            return Ok(None);
        }
        if !self.expectations.are_met(&key) {
            return Ok(Some(UNSEEN));
        }
        let mut existing = self.informers.endpoint_slices.list_in(key.namespace());
        existing.retain(|slice| {
            let label = |key| slice.metadata.labels.as_ref().and_then(|labels| labels.get(key));
            label(plan::SERVICE_NAME).map(String::as_str) == Some(key.name())
                && label(plan::MANAGED_BY).map(String::as_str) == Some(plan::MANAGER)
                && slice.metadata.deletion_timestamp.is_none()
        });
        let selected = self.selected(&service, key.namespace());
        let plan = plan::plan(&service, &selected, &self.zones(&selected), &existing);
        let result = carry_out(&self.client, &self.expectations, &key, plan).await;
        if let Err(error) = &result
            && !matches!(error.code(), 403 | 404 | 409)
        {
            self.events.event(
                &object_reference(&*service),
                EventType::Warning,
                "FailedToUpdateEndpointSlices",
                format!("Error updating Endpoint Slices for Service {key}: {error}"),
            );
        }
        result.map(|()| None)
    }

    async fn reconcile_endpoints(
        &self,
        client: &Client,
        key: ObjectKey,
    ) -> Result<Option<Duration>, ControllerError> {
        let api: Api<Endpoints> = Api::namespaced(client.clone(), key.namespace());
        let known = self.informers.endpoints.get(&key);
        let Some(service) = self.informers.services.get(&key) else {
            let labels = known.as_ref().and_then(|known| known.metadata.labels.as_ref());
            let ours = labels
                .and_then(|labels| labels.get(legacy::MANAGED_BY))
                .is_some_and(|manager| manager == legacy::MANAGER);
            if ours {
                match api.delete(key.name(), &DeleteParams::default()).await {
                    Err(error) if code(&error) != 404 => {
                        return Err(error).doing(|| format!("delete endpoints {key}"));
                    }
                    _ => {}
                }
            }
            return Ok(None);
        };
        if members::selects(&service).is_none() || service.metadata.deletion_timestamp.is_some() {
            return Ok(None);
        }
        let selected = self.selected(&service, key.namespace());
        let wanted = legacy::wanted(&service, &selected, known.as_deref());
        match known {
            Some(known) => {
                change::write(&api, &*known, &wanted, Part::Main).await?;
            }
            None => {
                let created = api.create(&PostParams::default(), &wanted).await;
                created.doing(|| format!("create endpoints {key}"))?;
            }
        }
        Ok(None)
    }
}

/// Writes the slices of one Service, and notes in `expectations` what was made.
pub(super) async fn carry_out(
    client: &Client,
    expectations: &Expectations,
    key: &ObjectKey,
    plan: Plan,
) -> Result<(), ControllerError> {
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), key.namespace());
    for (before, after) in &plan.update {
        change::write(&slices, &**before, after, Part::Main).await?;
    }
    for slice in &plan.create {
        let name = slice.metadata.name.clone().unwrap_or_default();
        expectations.expect(key, [name.clone()], []);
        if let Err(error) = slices.create(&PostParams::default(), slice).await {
            expectations.created(key, &name);
            return Err(error).doing(|| format!("create endpointslice {name}"));
        }
    }
    for slice in &plan.delete {
        let name = slice.metadata.name.as_deref().unwrap_or_default();
        match slices.delete(name, &DeleteParams::default()).await {
            Err(error) if code(&error) != 404 => {
                return Err(error).doing(|| format!("delete endpointslice {name}"));
            }
            _ => {}
        }
    }
    Ok(())
}

fn zone_of(node: &Node) -> Option<String> {
    node.metadata.labels.as_ref()?.get(ZONE).cloned()
}
