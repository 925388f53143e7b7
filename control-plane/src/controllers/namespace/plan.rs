//! What a namespace on its way out says about itself: a pure function of what is left in it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Namespace, NamespaceCondition, NamespaceStatus},
    apimachinery::pkg::apis::meta::v1::Time,
};

/// What a pass over a namespace's content found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    /// Why the resources are not known, if so.
    pub(crate) discovery_error: Option<String>,
    /// Why something could not be deleted.
    pub(crate) deletion_errors: Vec<String>,
    /// How many objects there still are of each resource (`deployments.apps`).
    pub(crate) objects: BTreeMap<String, usize>,
    /// How many of them wait for each finalizer.
    pub(crate) finalizers: BTreeMap<String, usize>,
}

impl Left {
    /// Whether all is known to be gone.
    pub(crate) fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// The status with the documented conditions.
pub(crate) fn status(namespace: &Namespace, left: &Left, now: Timestamp) -> NamespaceStatus {
    let listed = |counts: &BTreeMap<String, usize>, word: &str| {
        let parts: Vec<String> = counts
            .iter()
            .map(|(name, count)| format!("{name} {word} {count} resource instances"))
            .collect();
        parts.join(", ")
    };
    let resources =
        listed(&left.objects.iter().map(|(name, n)| (dotted(name), *n)).collect(), "has");
    let finalizers = listed(&left.finalizers, "in");
    let rows = [
        (
            "NamespaceDeletionDiscoveryFailure",
            left.discovery_error.as_ref().map(|error| ("DiscoveryFailed", error.clone())),
            ("ResourcesDiscovered", "All resources successfully discovered"),
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            None,
            ("ParsedGroupVersions", "All legacy kube types successfully parsed"),
        ),
        (
            "NamespaceDeletionContentFailure",
            (!left.deletion_errors.is_empty()).then(|| {
                let errors = left.deletion_errors.join(", ");
                (
                    "ContentDeletionFailed",
                    format!(
                        "Failed to delete all resource types, {} remaining: {errors}",
                        left.deletion_errors.len()
                    ),
                )
            }),
            ("ContentDeleted", "All content successfully deleted, may be waiting on finalization"),
        ),
        (
            "NamespaceContentRemaining",
            (!left.objects.is_empty()).then(|| {
                ("SomeResourcesRemain", format!("Some resources are remaining: {resources}"))
            }),
            ("ContentRemoved", "All content successfully removed"),
        ),
        (
            "NamespaceFinalizersRemaining",
            (!left.finalizers.is_empty()).then(|| {
                (
                    "SomeFinalizersRemain",
                    format!("Some content in the namespace has finalizers remaining: {finalizers}"),
                )
            }),
            ("ContentHasNoFinalizers", "All content-preserving finalizers finished"),
        ),
    ];
    let known = namespace.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
    let mut conditions: Vec<NamespaceCondition> = known
        .iter()
        .filter(|c| !rows.iter().any(|(kind, _, _)| *kind == c.type_))
        .cloned()
        .collect();
    for (kind, trouble, (fine_reason, fine_message)) in rows {
        let (status, reason, message) = match trouble {
            Some((reason, message)) => ("True", reason, message),
            None => ("False", fine_reason, fine_message.to_owned()),
        };
        let since = known
            .iter()
            .find(|c| c.type_ == kind && c.status == status)
            .and_then(|c| c.last_transition_time.clone());
        conditions.push(NamespaceCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message),
            last_transition_time: since.or(Some(Time(now))),
        });
    }
    NamespaceStatus { phase: Some("Terminating".to_owned()), conditions: Some(conditions) }
}

/// Resources of the core group are shown with a dot at their end, as Kubernetes does.
fn dotted(name: &str) -> String {
    if name.contains('.') { name.to_owned() } else { format!("{name}.") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_name_what_is_left() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let left = Left {
            objects: BTreeMap::from([("pods".to_owned(), 2)]),
            finalizers: BTreeMap::from([("x.example/hold".to_owned(), 1)]),
            ..Left::default()
        };
        let mut namespace = Namespace::default();
        namespace.status = Some(status(&namespace, &left, now));
        let find = |namespace: &Namespace, kind: &str| {
            let conditions = namespace.status.as_ref().unwrap().conditions.clone().unwrap();
            conditions.into_iter().find(|c| c.type_ == kind).unwrap()
        };
        let remaining = find(&namespace, "NamespaceContentRemaining");
        assert_eq!(remaining.status, "True");
        assert_eq!(
            remaining.message.unwrap(),
            "Some resources are remaining: pods. has 2 resource instances"
        );
        let finalizers = find(&namespace, "NamespaceFinalizersRemaining");
        assert_eq!(finalizers.reason.as_deref(), Some("SomeFinalizersRemain"));
        assert_eq!(find(&namespace, "NamespaceDeletionContentFailure").status, "False");
        let later = now.checked_add(jiff::SignedDuration::from_secs(5)).unwrap();
        assert_eq!(status(&namespace, &left, later), namespace.status.unwrap());
    }
}
