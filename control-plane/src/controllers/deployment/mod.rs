//! Deployments: ReplicaSets that follow each other without the pods ever being too few.
//!
//! * [`revision`]: which set belongs to which template, and the annotations that say so.
//! * [`sizes`]: how large each set is to be.
//! * [`status`]: numbers and conditions.
//! * [`plan`]: the one step that is next. Every step is seen through the watch before the next is
//!   planned, and written on condition that nothing changed meanwhile.

mod plan;
mod revision;
mod sizes;
mod status;

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::{Deployment, ReplicaSet},
    core::v1::Pod,
};
use keelson_api::{
    events::{EventRecorder, EventType},
    object::{ObjectKey, controller_of, controller_reference, object_reference},
    selector::LabelSelector,
};
use kube::{
    Api, Client,
    api::{DeleteParams, PostParams, Preconditions},
};
use tokio_util::sync::CancellationToken;

use self::plan::{Observed, Plan};
use super::{
    change::{self, Part},
    claim,
    error::{ControllerError, Doing, code, reason},
    pods,
    queue::WorkQueue,
};
use crate::informers::{Change, Informers};

const WORKERS: usize = 5;

struct Controller {
    client: Client,
    events: EventRecorder,
    informers: Arc<Informers>,
    queue: Arc<WorkQueue<ObjectKey>>,
}

/// Keeps all Deployments until `shutdown`.
pub(crate) async fn run(
    client: Client,
    informers: Arc<Informers>,
    events: EventRecorder,
    shutdown: CancellationToken,
) {
    let queue = WorkQueue::new();
    let controller = Arc::new(Controller { client, events, informers, queue: queue.clone() });
    let informers = &controller.informers;
    if !(informers.deployments.synced(&shutdown).await
        && informers.replica_sets.synced(&shutdown).await
        && informers.pods.synced(&shutdown).await)
    {
        return;
    }
    let this = controller.clone();
    informers.deployments.on_change(move |change| this.queue.add(change.key()));
    let this = controller.clone();
    informers.replica_sets.on_change(move |change| this.set_changed(change));
    let this = controller.clone();
    informers.pods.on_change(move |change| this.pod_changed(change));
    let work = |key| {
        let this = controller.clone();
        async move { this.reconcile(key).await }
    };
    queue.run("deployment", WORKERS, shutdown, work).await;
}

fn deployment_of(set: &ReplicaSet) -> Option<ObjectKey> {
    let owner = controller_of(&set.metadata)?;
    (owner.kind == "Deployment" && owner.api_version.starts_with("apps/"))
        .then(|| ObjectKey::new(set.metadata.namespace.clone().unwrap_or_default(), &owner.name))
}

impl Controller {
    fn set_changed(&self, change: &Change<ReplicaSet>) {
        for set in change.before.iter().chain(&change.after) {
            if let Some(deployment) = deployment_of(set) {
                self.queue.add(deployment);
            } else if controller_of(&set.metadata).is_none() && change.after.is_some() {
                let Some(labels) = &set.metadata.labels else { continue };
                let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
                for deployment in self.informers.deployments.list_in(namespace) {
                    if selector(&deployment).is_some_and(|s| s.matches(labels)) {
                        self.queue.add(ObjectKey::of(&deployment.metadata));
                    }
                }
            }
        }
    }

    /// Only a Deployment that replaces its pods all at once waits for pods to be gone.
    fn pod_changed(&self, change: &Change<Pod>) {
        let Some(pod) = change.newest() else { return };
        if change.after.is_some() && !pods::is_over(pod) {
            return;
        }
        let Some(owner) = controller_of(&pod.metadata).filter(|o| o.kind == "ReplicaSet") else {
            return;
        };
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let set = self.informers.replica_sets.get(&ObjectKey::new(namespace, &owner.name));
        let Some(key) = set.and_then(|set| deployment_of(&set)) else { return };
        if self.informers.deployments.get(&key).is_some_and(|d| sizes::recreates(&d)) {
            self.queue.add(key);
        }
    }

    async fn reconcile(&self, key: ObjectKey) -> Result<Option<Duration>, ControllerError> {
        let Some(deployment) = self.informers.deployments.get(&key) else { return Ok(None) };
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), key.namespace());
        let sets: Api<ReplicaSet> = Api::namespaced(self.client.clone(), key.namespace());
        let Some(selector) = selector(&deployment) else {
            self.events.event(
                &object_reference(&*deployment),
                EventType::Warning,
                "SelectingAll",
                "This deployment is selecting all pods. A non-empty selector is required.",
            );
            return Ok(None);
        };
        let claims = claim::claims(
            &deployment.metadata,
            &selector,
            self.informers.replica_sets.list_in(key.namespace()),
        );
        if !claims.orphans.is_empty() || !claims.strangers.is_empty() {
            let owner = controller_reference::<Deployment>(&deployment.metadata);
            claim::settle(&sets, &deployments, &owner, &claims).await?;
        }
        let mut own: Vec<ReplicaSet> = claims.own.iter().map(|set| (**set).clone()).collect();
        own.extend(claims.orphans.iter().map(|set| (**set).clone()));
        let observed = Observed {
            deployment: &deployment,
            sets_with_pods: self.sets_with_pods(&deployment),
            sets: own,
        };
        let plan = plan::plan(&observed, Timestamp::now());
        let again = plan.again;
        self.carry_out(&deployment, &deployments, &sets, &observed.sets, plan).await?;
        Ok(again)
    }

    fn sets_with_pods(&self, deployment: &Deployment) -> Vec<String> {
        if !sizes::recreates(deployment) {
            return Vec::new();
        }
        let namespace = deployment.metadata.namespace.as_deref().unwrap_or_default();
        let pods = self.informers.pods.list_in(namespace);
        pods.iter()
            .filter(|pod| !pods::is_over(pod))
            .filter_map(|pod| controller_of(&pod.metadata).map(|owner| owner.uid.clone()))
            .collect()
    }

    async fn carry_out(
        &self,
        deployment: &Deployment,
        deployments: &Api<Deployment>,
        sets: &Api<ReplicaSet>,
        before: &[ReplicaSet],
        plan: Plan,
    ) -> Result<(), ControllerError> {
        let mut status = plan.status;
        if let Some(set) = &plan.create
            && !self.create(deployment, sets, set).await?
        {
            // The hash is somebody else's: the next one gives another name.
            let count = status.collision_count.unwrap_or(0);
            status.collision_count = Some(count.saturating_add(1));
        }
        for after in &plan.change {
            let old = before.iter().find(|set| set.metadata.name == after.metadata.name);
            if let Some(old) = old
                && change::write(sets, old, after, Part::Main).await?.is_some()
            {
                self.report_scaled(deployment, after, sizes::size(old), sizes::size(after));
            }
        }
        for name in &plan.delete {
            let uid = before
                .iter()
                .find(|set| set.metadata.name.as_ref() == Some(name))
                .and_then(|set| set.metadata.uid.clone());
            let params = DeleteParams::background()
                .preconditions(Preconditions { uid, resource_version: None });
            match sets.delete(name, &params).await {
                Err(error) if code(&error) != 404 => {
                    return Err(error).doing(|| format!("delete replicaset {name}"));
                }
                _ => {}
            }
        }
        let mut current = deployment.clone();
        if let Some(revision) = plan.revision {
            let mut after = current.clone();
            let annotations = after.metadata.annotations.get_or_insert_default();
            annotations.insert(revision::REVISION.to_owned(), revision);
            if let Some(written) = change::write(deployments, &current, &after, Part::Main).await? {
                current = written;
            }
        }
        let mut after = current.clone();
        after.status = Some(status);
        change::write(deployments, &current, &after, Part::Status).await?;
        Ok(())
    }

    /// Makes a set; `false` if its name belongs to a set of another template.
    async fn create(
        &self,
        deployment: &Deployment,
        sets: &Api<ReplicaSet>,
        set: &ReplicaSet,
    ) -> Result<bool, ControllerError> {
        let name = set.metadata.name.as_deref().unwrap_or_default();
        match sets.create(&PostParams::default(), set).await {
            Ok(_) => {
                self.report_scaled(deployment, set, 0, sizes::size(set));
                Ok(true)
            }
            Err(error) if code(&error) == 409 => {
                let there = sets.get(name).await.doing(|| format!("look up replicaset {name}"))?;
                let template = |s: &ReplicaSet| s.spec.as_ref().and_then(|s| s.template.clone());
                let ours =
                    keelson_api::object::is_controlled_by(&there.metadata, &deployment.metadata);
                let same = match (template(&there), template(set)) {
                    (Some(a), Some(b)) => revision::same_template(&a, &b),
                    _ => false,
                };
                Ok(ours && same)
            }
            Err(error) => {
                self.events.event(
                    &object_reference(deployment),
                    EventType::Warning,
                    "ReplicaSetCreateError",
                    format!("Failed to create new replica set \"{name}\": {}", reason(&error)),
                );
                Err(error).doing(|| format!("create replicaset {name}"))
            }
        }
    }

    fn report_scaled(&self, deployment: &Deployment, set: &ReplicaSet, from: i32, to: i32) {
        if from == to {
            return;
        }
        let way = if to > from { "up" } else { "down" };
        let name = set.metadata.name.as_deref().unwrap_or_default();
        self.events.event(
            &object_reference(deployment),
            EventType::Normal,
            "ScalingReplicaSet",
            format!("Scaled {way} replica set {name} from {from} to {to}"),
        );
    }
}

/// The Deployment's selector; `None` if it would select everything.
fn selector(deployment: &Deployment) -> Option<LabelSelector> {
    let selector = LabelSelector::from_k8s(&deployment.spec.as_ref()?.selector).ok()?;
    (!selector.is_empty()).then_some(selector)
}
