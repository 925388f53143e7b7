//! Which ReplicaSet belongs to which state of a Deployment's template: template comparison,
//! revisions and the annotations that carry them.

use std::collections::BTreeMap;

use k8s_openapi::api::{
    apps::v1::{Deployment, ReplicaSet},
    core::v1::PodTemplateSpec,
};

/// The label that keeps the pods of a Deployment's ReplicaSets apart.
pub(crate) const HASH_LABEL: &str = "pod-template-hash";
/// How many times the template has changed.
pub(crate) const REVISION: &str = "deployment.kubernetes.io/revision";
/// Earlier revisions of a ReplicaSet that came back.
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
/// The Deployment's size when the ReplicaSet was last scaled.
pub(crate) const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
/// The most pods that were allowed then, surge included.
pub(crate) const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";
/// How long a revision history may get (the documented bound of Kubernetes' controller).
const HISTORY_BYTES: usize = 2_000;

/// Annotations of a Deployment that its ReplicaSets don't get.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED_REPLICAS,
    MAX_REPLICAS,
    "deprecated.deployment.rollback.to",
];

/// Whether two templates are the same but for the hash label.
pub(crate) fn same_template(a: &PodTemplateSpec, b: &PodTemplateSpec) -> bool {
    fn bare(template: &PodTemplateSpec) -> PodTemplateSpec {
        let mut template = template.clone();
        let mut metadata = template.metadata.take().unwrap_or_default();
        if let Some(labels) = &mut metadata.labels {
            labels.remove(HASH_LABEL);
        }
        metadata.labels = metadata.labels.filter(|labels| !labels.is_empty());
        metadata.annotations = metadata.annotations.filter(|a| !a.is_empty());
        metadata.creation_timestamp = None;
        template.metadata = Some(metadata);
        template
    }
    bare(a) == bare(b)
}

/// The ReplicaSet of the Deployment's present template: the oldest, if there are several.
pub(crate) fn newest_set(deployment: &Deployment, sets: &[ReplicaSet]) -> Option<usize> {
    let template = &deployment.spec.as_ref()?.template;
    (0..sets.len())
        .filter(|i| {
            let own = sets[*i].spec.as_ref().and_then(|s| s.template.as_ref());
            own.is_some_and(|own| same_template(own, template))
        })
        .min_by_key(|i| age_key(&sets[*i]))
}

/// Older sets first, by name where the time is the same.
pub(crate) fn age_key(set: &ReplicaSet) -> (i64, String) {
    let created = set.metadata.creation_timestamp.as_ref();
    (
        created.map_or(i64::MAX, |time| time.0.as_second()),
        set.metadata.name.clone().unwrap_or_default(),
    )
}

fn annotation<'a>(map: Option<&'a BTreeMap<String, String>>, key: &str) -> Option<&'a str> {
    map?.get(key).map(String::as_str)
}

/// A set's revision; 0 if it has none.
pub(crate) fn revision(set: &ReplicaSet) -> i64 {
    number(set, REVISION).unwrap_or(0)
}

/// A number in a set's annotation.
pub(crate) fn number(set: &ReplicaSet, key: &str) -> Option<i64> {
    annotation(set.metadata.annotations.as_ref(), key)?.parse().ok()
}

fn set_annotation(set: &mut ReplicaSet, key: &str, value: String) {
    set.metadata.annotations.get_or_insert_default().insert(key.to_owned(), value);
}

/// Notes the sizes that later proportional scaling reckons from.
pub(crate) fn note_sizes(set: &mut ReplicaSet, desired: i32, max: i32) {
    set_annotation(set, DESIRED_REPLICAS, desired.to_string());
    set_annotation(set, MAX_REPLICAS, max.to_string());
}

/// Gives the newest set the Deployment's annotations and its revision. A set that comes back (an
/// undo) gets a new revision and remembers the old.
pub(crate) fn annotate(deployment: &Deployment, set: &mut ReplicaSet, new_revision: i64) {
    for (key, value) in deployment.metadata.annotations.iter().flatten() {
        if !NOT_COPIED.contains(&key.as_str()) {
            set_annotation(set, key, value.clone());
        }
    }
    let old = revision(set);
    if old >= new_revision {
        return;
    }
    set_annotation(set, REVISION, new_revision.to_string());
    if old > 0 {
        let history = annotation(set.metadata.annotations.as_ref(), REVISION_HISTORY);
        let mut entries: Vec<String> =
            history.into_iter().flat_map(|h| h.split(',')).map(str::to_owned).collect();
        entries.push(old.to_string());
        while entries.len() > 1 && entries.join(",").len() > HISTORY_BYTES {
            entries.remove(0);
        }
        set_annotation(set, REVISION_HISTORY, entries.join(","));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_undone_set_remembers_its_revisions() {
        let deployment: Deployment = serde_json::from_value(json!({
            "metadata": {"name": "web", "annotations": {"note": "x",
                "kubectl.kubernetes.io/last-applied-configuration": "{}"}},
            "spec": {"selector": {}, "template": {}},
        }))
        .unwrap();
        let mut set = ReplicaSet::default();
        annotate(&deployment, &mut set, 1);
        annotate(&deployment, &mut set, 3);
        annotate(&deployment, &mut set, 5);
        let annotations = set.metadata.annotations.unwrap();
        assert_eq!(annotations[REVISION], "5");
        assert_eq!(annotations[REVISION_HISTORY], "1,3");
        assert_eq!(annotations["note"], "x");
        assert!(!annotations.contains_key("kubectl.kubernetes.io/last-applied-configuration"));
    }
}
