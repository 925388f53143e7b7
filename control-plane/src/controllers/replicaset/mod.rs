//! ReplicaSets: as many pods as asked for.
//!
//! A pass looks at the pods that are the set's own ([`super::claim`]), plans ([`plan`]) how many to
//! make or which to delete, does it in batches that grow while all goes well, and writes the
//! status. While something that it did has not been seen yet ([`super::expectations`]) it only writes the
//! status.

mod plan;

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::{
    FutureExt, StreamExt,
    future::{BoxFuture, join_all},
};
use jiff::Timestamp;
use k8s_openapi::api::{apps::v1::ReplicaSet, core::v1::Pod};
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

use self::plan::{Failure, Plan};
use super::{
    change::{self, Part},
    claim,
    error::{ControllerError, code, reason},
    expectations::Expectations,
    names, pods,
    queue::WorkQueue,
};
use crate::informers::{Change, Informers};

const WORKERS: usize = 5;
/// How many deletions are asked for at a time.
const DELETIONS: usize = 16;

struct Controller {
    client: Client,
    events: EventRecorder,
    informers: Arc<Informers>,
    expectations: Expectations,
    queue: Arc<WorkQueue<ObjectKey>>,
}

/// Keeps all ReplicaSets until `shutdown`.
pub(crate) async fn run(
    client: Client,
    informers: Arc<Informers>,
    events: EventRecorder,
    shutdown: CancellationToken,
) {
    let queue = WorkQueue::new();
    let controller = Arc::new(Controller {
        client,
        events,
        informers,
        expectations: Expectations::default(),
        queue: queue.clone(),
    });
    let informers = &controller.informers;
    if !(informers.replica_sets.synced(&shutdown).await && informers.pods.synced(&shutdown).await) {
        return;
    }
    let this = controller.clone();
    informers.replica_sets.on_change(move |change| this.queue.add(change.key()));
    let this = controller.clone();
    informers.pods.on_change(move |change| this.pod_changed(change));
    let work = |key| {
        let this = controller.clone();
        async move { this.reconcile(key).await }
    };
    queue.run("replicaset", WORKERS, shutdown, work).await;
}

fn set_of(pod: &Pod) -> Option<ObjectKey> {
    let owner = controller_of(&pod.metadata)?;
    (owner.kind == "ReplicaSet" && owner.api_version.starts_with("apps/"))
        .then(|| ObjectKey::new(pod.metadata.namespace.clone().unwrap_or_default(), &owner.name))
}

impl Controller {
    fn pod_changed(&self, change: &Change<Pod>) {
        for pod in change.before.iter().chain(&change.after) {
            if let Some(set) = set_of(pod) {
                let name = pod.metadata.name.as_deref().unwrap_or_default();
                self.expectations.created(&set, name);
                if change.after.is_none() || pods::is_terminating(pod) {
                    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
                    self.expectations.deleted(&set, uid);
                }
                self.queue.add(set);
            } else if controller_of(&pod.metadata).is_none() && change.after.is_some() {
                self.add_possible_owners(pod);
            }
        }
    }

    /// An orphan may be one to adopt.
    fn add_possible_owners(&self, pod: &Pod) {
        let Some(labels) = &pod.metadata.labels else { return };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        for set in self.informers.replica_sets.list_in(namespace) {
            if selector(&set).is_some_and(|selector| selector.matches(labels)) {
                self.queue.add(ObjectKey::of(&set.metadata));
            }
        }
    }

    async fn reconcile(&self, key: ObjectKey) -> Result<Option<Duration>, ControllerError> {
        let Some(set) = self.informers.replica_sets.get(&key) else {
            self.expectations.forget(&key);
            return Ok(None);
        };
        let Some(selector) = selector(&set) else { return Ok(None) };
        let may_act = self.expectations.are_met(&key);
        let claims =
            claim::claims(&set.metadata, &selector, self.informers.pods.list_in(key.namespace()));
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), key.namespace());
        let sets: Api<ReplicaSet> = Api::namespaced(self.client.clone(), key.namespace());
        if !claims.orphans.is_empty() || !claims.strangers.is_empty() {
            let owner = controller_reference::<ReplicaSet>(&set.metadata);
            claim::settle(&pods, &sets, &owner, &claims).await?;
        }
        // What was adopted counts at once, or its place would be filled twice.
        let mut own = claims.own;
        own.extend(claims.orphans);

        let mut failure = None;
        if may_act {
            let plan = plan::plan(&set, &own, &self.crowd(&set));
            failure = self.carry_out(&key, &set, &pods, plan).await;
        }
        let (status, soonest) = plan::status(&set, &own, failure.as_ref(), Timestamp::now());
        let mut after = (*set).clone();
        after.status = Some(status);
        change::write(&sets, &*set, &after, Part::Status).await?;
        match failure {
            Some(failure) => Err(ControllerError::Object(failure.message)),
            None => Ok(soonest),
        }
    }

    /// How many active pods of the same controller are on each node.
    fn crowd(&self, set: &ReplicaSet) -> HashMap<String, usize> {
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        let parent = controller_of(&set.metadata).map(|o| o.uid.clone());
        let related: Vec<String> = self
            .informers
            .replica_sets
            .list_in(namespace)
            .iter()
            .filter(|other| {
                other.metadata.uid == set.metadata.uid
                    || (parent.is_some()
                        && controller_of(&other.metadata).map(|o| &o.uid) == parent.as_ref())
            })
            .filter_map(|other| other.metadata.uid.clone())
            .collect();
        let mut crowd = HashMap::new();
        for pod in self.informers.pods.list_in(namespace) {
            let of_ours = controller_of(&pod.metadata).is_some_and(|o| related.contains(&o.uid));
            if let Some(node) = pods::node_name(&pod).filter(|_| of_ours && pods::is_active(&pod)) {
                *crowd.entry(node.to_owned()).or_default() += 1;
            }
        }
        crowd
    }

    async fn carry_out(
        &self,
        key: &ObjectKey,
        set: &ReplicaSet,
        pods: &Api<Pod>,
        plan: Plan,
    ) -> Option<Failure> {
        if plan.create > 0 {
            return self.create(key, set, pods, plan.create).await;
        }
        if plan.delete.is_empty() {
            return None;
        }
        let uids = plan.delete.iter().filter_map(|pod| pod.metadata.uid.clone());
        self.expectations.expect(key, [], uids);
        let deletions: Vec<BoxFuture<'_, Result<(), kube::Error>>> =
            plan.delete.iter().map(|pod| self.delete(key, set, pods, pod).boxed()).collect();
        let results: Vec<Result<(), kube::Error>> =
            futures::stream::iter(deletions).buffer_unordered(DELETIONS).collect().await;
        let error = results.into_iter().find_map(Result::err)?;
        Some(Failure { reason: "FailedDelete", message: reason(&error) })
    }

    /// Makes pods in batches of 1, 2, 4, … so that what fails, fails once and not a hundred times.
    async fn create(
        &self,
        key: &ObjectKey,
        set: &ReplicaSet,
        pods: &Api<Pod>,
        count: usize,
    ) -> Option<Failure> {
        let prefix = plan::pod_prefix(set);
        let mut left = count;
        let mut batch = 1;
        while left > 0 {
            let names: Vec<String> = (0..batch.min(left)).map(|_| names::random(&prefix)).collect();
            self.expectations.expect(key, names.iter().cloned(), []);
            let mut made: Vec<BoxFuture<'_, Result<Pod, kube::Error>>> = Vec::new();
            for name in &names {
                let pod = plan::new_pod(set, &prefix, name.clone());
                made.push(async move { pods.create(&PostParams::default(), &pod).await }.boxed());
            }
            let mut failure = None;
            for (name, result) in names.iter().zip(join_all(made).await) {
                match result {
                    Ok(_) => self.events.event(
                        &object_reference(set),
                        EventType::Normal,
                        "SuccessfulCreate",
                        format!("Created pod: {name}"),
                    ),
                    Err(error) => {
                        self.expectations.created(key, name);
                        failure = failure.or(self.creation_failed(set, &error, name, &prefix));
                    }
                }
            }
            if failure.is_some() {
                return failure;
            }
            left -= names.len();
            batch *= 2;
        }
        None
    }

    fn creation_failed(
        &self,
        set: &ReplicaSet,
        error: &kube::Error,
        name: &str,
        prefix: &str,
    ) -> Option<Failure> {
        if let kube::Error::Api(status) = error {
            let causes = status.details.iter().flat_map(|details| &details.causes);
            // Everything here is about to go; trying again would be in vain.
            if causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating") {
                return None;
            }
        }
        // Each try has another name: with it in the text, each would be an event of its own.
        let message = reason(error).replace(name, prefix);
        self.events.event(
            &object_reference(set),
            EventType::Warning,
            "FailedCreate",
            format!("Error creating: {message}"),
        );
        Some(Failure { reason: "FailedCreate", message })
    }

    async fn delete(
        &self,
        key: &ObjectKey,
        set: &ReplicaSet,
        pods: &Api<Pod>,
        pod: &Pod,
    ) -> Result<(), kube::Error> {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let uid = pod.metadata.uid.clone();
        let params = DeleteParams::default()
            .preconditions(Preconditions { uid: uid.clone(), resource_version: None });
        match pods.delete(name, &params).await {
            Ok(_) => {
                self.events.event(
                    &object_reference(set),
                    EventType::Normal,
                    "SuccessfulDelete",
                    format!("Deleted pod: {name}"),
                );
                Ok(())
            }
            Err(error) => {
                self.expectations.deleted(key, uid.as_deref().unwrap_or_default());
                if matches!(code(&error), 404 | 409) {
                    return Ok(());
                }
                self.events.event(
                    &object_reference(set),
                    EventType::Warning,
                    "FailedDelete",
                    format!("Error deleting: {}", reason(&error)),
                );
                Err(error)
            }
        }
    }
}

/// The set's selector; `None` if it selects nothing that a controller may take.
fn selector(set: &ReplicaSet) -> Option<LabelSelector> {
    let selector = LabelSelector::from_k8s(&set.spec.as_ref()?.selector).ok()?;
    (!selector.is_empty()).then_some(selector)
}
