//! What a Deployment needs: a pure function of it, its ReplicaSets and the time.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentStatus, ReplicaSet, ReplicaSetSpec},
        core::v1::PodTemplateSpec,
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};
use keelson_api::object::controller_reference;

use super::{
    revision::{self, HASH_LABEL, REVISION},
    sizes::{self, Rollout},
    status::{self, Conditions, PROGRESSING, Saying},
};
use crate::controllers::names;

/// What is known of a Deployment.
#[derive(Debug)]
pub(crate) struct Observed<'a> {
    pub(crate) deployment: &'a Deployment,
    /// Its own sets.
    pub(crate) sets: Vec<ReplicaSet>,
    /// Sets (by UID) of which pods still run or end; only asked for when pods are replaced all at
    /// once.
    pub(crate) sets_with_pods: Vec<String>,
}

/// What is to be done, in this order.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// A set to make.
    pub(crate) create: Option<ReplicaSet>,
    /// Sets to change, as they are to be: sizes and annotations.
    pub(crate) change: Vec<ReplicaSet>,
    /// Names of sets to delete.
    pub(crate) delete: Vec<String>,
    /// The Deployment's revision annotation.
    pub(crate) revision: Option<String>,
    /// Its status.
    pub(crate) status: DeploymentStatus,
    /// When to look again.
    pub(crate) again: Option<Duration>,
}

/// Decides what to do next.
pub(crate) fn plan(observed: &Observed<'_>, now: Timestamp) -> Plan {
    let deployment = observed.deployment;
    let spec = deployment.spec.clone().unwrap_or_default();
    let (surge, unavailable) = sizes::bounds(deployment);
    let recreate = sizes::recreates(deployment);
    let mut model = Rollout {
        newest: revision::newest_set(deployment, &observed.sets),
        sets: observed.sets.clone(),
        wanted: spec.replicas.unwrap_or(1),
        surge,
        unavailable,
    };
    let mut conditions = Conditions::of(deployment);
    let mut plan = Plan::default();
    let mut judge = false;
    if deployment.metadata.deletion_timestamp.is_none() {
        status::note_pause(deployment, &mut conditions, now);
        let paused = spec.paused == Some(true);
        let status_replicas = deployment.status.as_ref().and_then(|s| s.replicas).unwrap_or(0);
        if paused || model.was_resized() {
            keep_revision(observed, &mut model, &mut plan);
            model.scale_in_proportion(recreate, status_replicas);
        } else {
            judge = true;
            roll(observed, &mut model, &mut plan, &mut conditions, recreate, now);
        }
        if !paused && is_complete(deployment, &model) {
            plan.delete = superfluous(&model, spec.revision_history_limit.unwrap_or(10));
        }
    }
    let status = status::numbers(deployment, &model.sets, model.newest, &mut conditions, now);
    if judge {
        plan.again =
            status::progress(deployment, &model.sets, model.newest, &status, &mut conditions, now);
    }
    plan.status = status::with_conditions(status, conditions);
    for (before, after) in observed.sets.iter().zip(&model.sets) {
        let goes = after.metadata.name.as_ref().is_some_and(|name| plan.delete.contains(name));
        if before != after && !goes {
            plan.change.push(after.clone());
        }
    }
    plan
}

/// Goes on with the update, one step.
fn roll(
    observed: &Observed<'_>,
    model: &mut Rollout,
    plan: &mut Plan,
    conditions: &mut Conditions,
    recreate: bool,
    now: Timestamp,
) {
    if recreate {
        keep_revision(observed, model, plan);
        if model.empty_old() {
            return;
        }
        let busy = model.old().into_iter().any(|i| {
            let uid = model.sets[i].metadata.uid.as_ref();
            uid.is_some_and(|uid| observed.sets_with_pods.contains(uid))
        });
        if busy {
            return;
        }
    }
    ensure_newest(observed, model, plan, conditions, recreate, now);
    if plan.create.is_some() {
        return;
    }
    if !model.scale_newest(recreate) && !recreate {
        model.scale_down_old();
    }
}

/// One more than the highest revision of the old sets.
fn next_revision(model: &Rollout) -> i64 {
    model.old().into_iter().map(|i| revision::revision(&model.sets[i])).max().unwrap_or(0) + 1
}

/// Keeps annotations, revision and `minReadySeconds` of the newest set in step, if there is one.
fn keep_revision(observed: &Observed<'_>, model: &mut Rollout, plan: &mut Plan) {
    let Some(newest) = model.newest else { return };
    let new_revision = next_revision(model);
    let deployment = observed.deployment;
    let set = &mut model.sets[newest];
    revision::annotate(deployment, set, new_revision);
    if let Some(spec) = &mut set.spec {
        let min_ready = deployment.spec.as_ref().and_then(|s| s.min_ready_seconds);
        if spec.min_ready_seconds.unwrap_or(0) != min_ready.unwrap_or(0) {
            spec.min_ready_seconds = min_ready;
        }
    }
    let revision = revision::revision(set).to_string();
    let known = deployment.metadata.annotations.as_ref().and_then(|a| a.get(REVISION));
    if known != Some(&revision) {
        plan.revision = Some(revision);
    }
}

/// Sees that the present template has its set.
fn ensure_newest(
    observed: &Observed<'_>,
    model: &mut Rollout,
    plan: &mut Plan,
    conditions: &mut Conditions,
    recreate: bool,
    now: Timestamp,
) {
    let deployment = observed.deployment;
    let saying = |reason: &'static str, message: String| Saying { status: "True", reason, message };
    if let Some(newest) = model.newest {
        keep_revision(observed, model, plan);
        if conditions.get(PROGRESSING).is_none() {
            let name = model.sets[newest].metadata.name.as_deref().unwrap_or_default();
            let message = format!("Found new replica set \"{name}\"");
            conditions.set(PROGRESSING, saying("FoundNewReplicaSet", message), now);
        }
        return;
    }
    let size = model.newest_size(0, recreate);
    let mut set = new_set(deployment, size);
    let new_revision = next_revision(model);
    revision::annotate(deployment, &mut set, new_revision);
    revision::note_sizes(&mut set, model.wanted, model.wanted + model.surge);
    let name = set.metadata.name.as_deref().unwrap_or_default();
    let message = format!("Created new replica set \"{name}\"");
    conditions.set(PROGRESSING, saying("NewReplicaSetCreated", message), now);
    plan.revision = Some(new_revision.to_string());
    plan.create = Some(set);
}

/// The set of the Deployment's present template.
fn new_set(deployment: &Deployment, size: i32) -> ReplicaSet {
    let spec = deployment.spec.clone().unwrap_or_default();
    let collisions = deployment.status.as_ref().and_then(|s| s.collision_count).unwrap_or_default();
    let hash = names::template_hash(&spec.template, collisions);
    let deployment_name = deployment.metadata.name.as_deref().unwrap_or_default();
    let mut template: PodTemplateSpec = spec.template;
    let mut labels: BTreeMap<String, String> =
        template.metadata.as_ref().and_then(|m| m.labels.clone()).unwrap_or_default();
    labels.insert(HASH_LABEL.to_owned(), hash.clone());
    template.metadata.get_or_insert_default().labels = Some(labels.clone());
    let mut selector: LabelSelector = spec.selector;
    selector.match_labels.get_or_insert_default().insert(HASH_LABEL.to_owned(), hash.clone());
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{deployment_name}-{hash}")),
            namespace: deployment.metadata.namespace.clone(),
            labels: Some(labels),
            owner_references: Some(vec![controller_reference::<Deployment>(&deployment.metadata)]),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(size),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        }),
        status: None,
    }
}

fn is_complete(deployment: &Deployment, model: &Rollout) -> bool {
    let n = |number: Option<i32>| number.unwrap_or(0);
    deployment.status.as_ref().is_some_and(|status| {
        n(status.updated_replicas) == model.wanted
            && n(status.replicas) == model.wanted
            && n(status.available_replicas) == model.wanted
            && status.observed_generation >= deployment.metadata.generation
    })
}

/// Old sets beyond the history that is kept, lowest revisions first.
fn superfluous(model: &Rollout, limit: i32) -> Vec<String> {
    let mut empty: Vec<&ReplicaSet> = model
        .old()
        .into_iter()
        .map(|i| &model.sets[i])
        .filter(|set| {
            let status = set.status.clone().unwrap_or_default();
            sizes::size(set) == 0
                && status.replicas == 0
                && status.observed_generation >= set.metadata.generation
                && set.metadata.deletion_timestamp.is_none()
        })
        .collect();
    empty.sort_by_key(|set| revision::revision(set));
    let kept = usize::try_from(limit).unwrap_or(0);
    let count = empty.len().saturating_sub(kept);
    empty.iter().take(count).filter_map(|set| set.metadata.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:10:00Z".parse().unwrap()
    }

    fn deployment(image: &str, replicas: i32, extra: Value) -> Deployment {
        let mut value = json!({
            "metadata": {"name": "web", "namespace": "d", "uid": "u", "generation": 1},
            "spec": {
                "replicas": replicas, "progressDeadlineSeconds": 600,
                "selector": {"matchLabels": {"app": "web"}},
                "strategy": {"type": "RollingUpdate",
                    "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
                "template": {"metadata": {"labels": {"app": "web"}},
                    "spec": {"containers": [{"name": "c", "image": image}]}},
            },
        });
        for (path, new) in extra.as_object().unwrap() {
            let (parent, key) = path.rsplit_once('/').unwrap();
            value.pointer_mut(parent).unwrap()[key] = new.clone();
        }
        serde_json::from_value(value).unwrap()
    }

    fn run(deployment: &Deployment, sets: &[ReplicaSet]) -> Plan {
        let observed = Observed { deployment, sets: sets.to_vec(), sets_with_pods: Vec::new() };
        plan(&observed, now())
    }

    /// What the API server and the ReplicaSet controller would make of it.
    fn settled(mut set: ReplicaSet) -> ReplicaSet {
        let size = sizes::size(&set);
        set.metadata.uid = set.metadata.name.clone();
        set.metadata.generation = Some(1);
        set.status = serde_json::from_value(json!({"replicas": size, "readyReplicas": size,
            "availableReplicas": size, "observedGeneration": 1}))
        .unwrap();
        set
    }

    /// Applies plans, with pods that become available at once, until nothing is left to do.
    fn until_stable(mut deployment: Deployment, mut sets: Vec<ReplicaSet>) -> Outcome {
        for _ in 0..50 {
            let plan = run(&deployment, &sets);
            let total: i32 = sets.iter().map(sizes::size).sum();
            assert!(total <= 4, "more pods than replicas and surge allow");
            let idle = plan.create.is_none()
                && plan.change.is_empty()
                && plan.delete.is_empty()
                && deployment.status.as_ref() == Some(&plan.status);
            if idle {
                return (deployment, sets);
            }
            for changed in plan.change {
                let place = sets.iter_mut().find(|s| s.metadata.name == changed.metadata.name);
                *place.unwrap() = settled(changed);
            }
            sets.retain(|set| !plan.delete.contains(set.metadata.name.as_ref().unwrap()));
            sets.extend(plan.create.map(settled));
            if let Some(revision) = plan.revision {
                let annotations = deployment.metadata.annotations.get_or_insert_default();
                annotations.insert(REVISION.to_owned(), revision);
            }
            deployment.status = Some(plan.status);
        }
        panic!("does not come to rest");
    }

    type Outcome = (Deployment, Vec<ReplicaSet>);

    fn reason(deployment: &Deployment, kind: &str) -> String {
        let conditions = Conditions::of(deployment);
        conditions.get(kind).and_then(|c| c.reason.clone()).unwrap_or_default()
    }

    #[test]
    fn a_new_deployment_makes_its_set() {
        let deployment = deployment("a", 3, json!({}));
        let plan = run(&deployment, &[]);
        let set = plan.create.unwrap();
        assert_eq!(sizes::size(&set), 3);
        let hash = set.metadata.labels.as_ref().unwrap()[HASH_LABEL].clone();
        assert_eq!(set.metadata.name.unwrap(), format!("web-{hash}"));
        let spec = set.spec.unwrap();
        assert_eq!(spec.selector.match_labels.unwrap()[HASH_LABEL], hash);
        assert_eq!(plan.revision.as_deref(), Some("1"));
        let progressing = &plan.status.conditions.unwrap();
        assert!(progressing.iter().any(|c| c.reason.as_deref() == Some("NewReplicaSetCreated")));
    }

    #[test]
    fn an_update_and_its_undo_come_to_rest() {
        let (first, sets) = until_stable(deployment("a", 3, json!({})), vec![]);
        assert_eq!(reason(&first, PROGRESSING), "NewReplicaSetAvailable");
        assert_eq!(reason(&first, "Available"), "MinimumReplicasAvailable");
        let old_template = first.spec.as_ref().unwrap().template.clone();

        let mut second = first;
        second.spec.as_mut().unwrap().template =
            deployment("b", 3, json!({})).spec.unwrap().template;
        let (second, sets) = until_stable(second, sets);
        assert_eq!(sets.iter().map(sizes::size).collect::<Vec<_>>(), [0, 3]);
        assert_eq!(second.metadata.annotations.as_ref().unwrap()[REVISION], "2");

        let mut undone = second;
        undone.spec.as_mut().unwrap().template = old_template;
        let (undone, sets) = until_stable(undone, sets);
        assert_eq!(sets.iter().map(sizes::size).collect::<Vec<_>>(), [3, 0]);
        assert_eq!(undone.metadata.annotations.as_ref().unwrap()[REVISION], "3");
        assert_eq!(undone.status.unwrap().updated_replicas, Some(3));
    }

    #[test]
    fn only_so_much_history_is_kept() {
        let limit = json!({"/spec/revisionHistoryLimit": 1});
        let (mut current, mut sets) = until_stable(deployment("a", 3, limit), vec![]);
        for image in ["b", "c", "d"] {
            current.spec.as_mut().unwrap().template =
                deployment(image, 3, json!({})).spec.unwrap().template;
            (current, sets) = until_stable(current, sets);
        }
        assert_eq!(sets.len(), 2);
    }

    #[test]
    fn a_paused_update_does_not_go_on_but_still_scales() {
        let (first, sets) = until_stable(deployment("a", 3, json!({})), vec![]);
        let mut paused = first;
        {
            let spec = paused.spec.as_mut().unwrap();
            spec.paused = Some(true);
            spec.template = deployment("b", 3, json!({})).spec.unwrap().template;
            spec.replicas = Some(4);
        }
        let plan = run(&paused, &sets);
        assert!(plan.create.is_none());
        assert_eq!(sizes::size(&plan.change[0]), 4);
        let conditions = plan.status.conditions.unwrap();
        assert!(conditions.iter().any(|c| c.reason.as_deref() == Some("DeploymentPaused")));
    }

    #[test]
    fn all_at_once_waits_for_the_old_pods() {
        let recreate = json!({"/spec/strategy": {"type": "Recreate"}});
        let (first, sets) = until_stable(deployment("a", 3, recreate), vec![]);
        let mut second = first;
        second.spec.as_mut().unwrap().template =
            deployment("b", 3, json!({})).spec.unwrap().template;
        let emptied = run(&second, &sets).change;
        assert_eq!(sizes::size(&emptied[0]), 0);
        let mut observed = Observed {
            deployment: &second,
            sets: emptied.clone(),
            sets_with_pods: vec![emptied[0].metadata.uid.clone().unwrap()],
        };
        assert!(plan(&observed, now()).create.is_none());
        observed.sets_with_pods.clear();
        assert_eq!(sizes::size(&plan(&observed, now()).create.unwrap()), 3);
    }

    #[test]
    fn no_progress_for_too_long_is_said() {
        let (first, sets) = until_stable(deployment("a", 3, json!({})), vec![]);
        let mut second = first;
        second.spec.as_mut().unwrap().template =
            deployment("b", 3, json!({})).spec.unwrap().template;
        let plan_1 = run(&second, &sets);
        second.status = Some(plan_1.status);
        let mut sets = sets;
        let mut stuck = settled(plan_1.create.unwrap());
        stuck.status = serde_json::from_value(json!({"replicas": 1})).unwrap();
        sets.push(stuck);
        let plan_2 = run(&second, &sets);
        assert!(plan_2.again.is_some());
        second.status = Some(plan_2.status);
        let observed = Observed { deployment: &second, sets, sets_with_pods: Vec::new() };
        let late = now().checked_add(jiff::SignedDuration::from_secs(601)).unwrap();
        second.status = Some(plan(&observed, late).status);
        assert_eq!(reason(&second, PROGRESSING), "ProgressDeadlineExceeded");
    }
}
