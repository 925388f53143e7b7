//! Who owns whom: a graph of all objects by their owner references, kept from the watches.
//!
//! Only names, UIDs and references are kept of each object.

use std::collections::{HashMap, HashSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

/// Finalizer of an owner that goes after its dependents.
pub(crate) const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of an owner whose dependents stay.
pub(crate) const ORPHAN: &str = "orphan";

/// Names an object for good.
pub(crate) type Uid = String;

/// What is known of an object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Known {
    /// Which resource it is of: the collector's number for it.
    pub(crate) resource: usize,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) owners: Vec<OwnerReference>,
    pub(crate) stage: Stage,
}

/// How far an object's deletion is, as far as it matters to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Not being deleted.
    Alive,
    /// Being deleted.
    Going,
    /// Being deleted after its dependents.
    Foreground,
    /// Being deleted without its dependents.
    Orphaning,
}

impl Stage {
    /// Reads it from metadata.
    pub(crate) fn of(metadata: &ObjectMeta) -> Self {
        let has =
            |finalizer: &str| metadata.finalizers.iter().flatten().any(|known| known == finalizer);
        if metadata.deletion_timestamp.is_none() {
            Self::Alive
        } else if has(ORPHAN) {
            Self::Orphaning
        } else if has(FOREGROUND) {
            Self::Foreground
        } else {
            Self::Going
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    objects: HashMap<Uid, Known>,
    dependents: HashMap<Uid, HashSet<Uid>>,
}

impl Graph {
    /// What is known of an object.
    pub(crate) fn get(&self, uid: &str) -> Option<&Known> {
        self.objects.get(uid)
    }

    /// The objects that name this one as an owner.
    pub(crate) fn dependents_of(&self, uid: &str) -> Vec<Uid> {
        self.dependents.get(uid).into_iter().flatten().cloned().collect()
    }

    /// Dependents whose references keep a foreground deletion waiting.
    pub(crate) fn blocking(&self, uid: &str) -> Vec<Uid> {
        let mut dependents = self.dependents_of(uid);
        dependents.retain(|dependent| {
            self.objects.get(dependent).is_some_and(|known| {
                known
                    .owners
                    .iter()
                    .any(|owner| owner.uid == uid && owner.block_owner_deletion == Some(true))
            })
        });
        dependents
    }

    /// Takes in an object as it is now; returns which objects to look at because of it.
    pub(crate) fn set(&mut self, uid: Uid, known: Known) -> Vec<Uid> {
        let before = self.objects.insert(uid.clone(), known.clone());
        if before.as_ref() == Some(&known) {
            return Vec::new();
        }
        let old = before.as_ref().map(|b| b.owners.clone()).unwrap_or_default();
        for owner in &old {
            self.forget_dependent(&owner.uid, &uid);
        }
        for owner in &known.owners {
            self.dependents.entry(owner.uid.clone()).or_default().insert(uid.clone());
        }
        let mut look_at = Vec::new();
        let owner_unknown = known.owners.iter().any(|owner| {
            self.objects.get(&owner.uid).is_none_or(|owner| owner.stage == Stage::Foreground)
        });
        let owners_changed = before.is_some() && old != known.owners;
        let stage_changed = before.as_ref().map(|b| b.stage) != Some(known.stage);
        let deletes = matches!(known.stage, Stage::Foreground | Stage::Orphaning) && stage_changed;
        if owner_unknown || owners_changed || deletes {
            look_at.push(uid.clone());
        }
        if known.stage == Stage::Foreground && deletes {
            look_at.extend(self.dependents_of(&uid));
        }
        // An owner may have waited for this reference to go.
        for owner in old.iter().filter(|owner| !known.owners.contains(owner)) {
            if self.objects.get(&owner.uid).is_some_and(|o| o.stage == Stage::Foreground) {
                look_at.push(owner.uid.clone());
            }
        }
        look_at
    }

    /// Forgets an object that is gone; returns which objects to look at because of it.
    pub(crate) fn remove(&mut self, uid: &str) -> Vec<Uid> {
        let Some(known) = self.objects.remove(uid) else { return Vec::new() };
        let mut look_at = self.dependents_of(uid);
        for owner in &known.owners {
            self.forget_dependent(&owner.uid, uid);
            if self.objects.get(&owner.uid).is_some_and(|o| o.stage == Stage::Foreground) {
                look_at.push(owner.uid.clone());
            }
        }
        look_at
    }

    /// UIDs of all objects of a resource.
    pub(crate) fn of_resource(&self, resource: usize) -> HashSet<Uid> {
        self.objects
            .iter()
            .filter(|(_, known)| known.resource == resource)
            .map(|(uid, _)| uid.clone())
            .collect()
    }

    fn forget_dependent(&mut self, owner: &str, dependent: &str) {
        if let Some(dependents) = self.dependents.get_mut(owner) {
            dependents.remove(dependent);
            if dependents.is_empty() {
                self.dependents.remove(owner);
            }
        }
    }
}

/// What an owner reference turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OwnerState {
    /// The owner is there and stays, or its dependents may.
    Solid,
    /// There is no such owner.
    Absent,
    /// The owner waits for its dependents to go.
    Waiting,
}

/// What to do with an object, given its owners.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Keep,
    /// Take out the references (by UID) that no longer hold it.
    Unlink(Vec<Uid>),
    /// Delete it, its own dependents first.
    DeleteForeground,
    /// Delete it as its own finalizers say.
    Delete,
}

/// Decides about an object from the state of each owner.
pub(crate) fn verdict(owners: &[(Uid, OwnerState)], has_dependents: bool) -> Verdict {
    let any = |state: OwnerState| owners.iter().any(|(_, s)| *s == state);
    if owners.is_empty() {
        return Verdict::Keep;
    }
    if any(OwnerState::Solid) {
        let loose: Vec<Uid> = owners
            .iter()
            .filter(|(_, state)| *state != OwnerState::Solid)
            .map(|(uid, _)| uid.clone())
            .collect();
        return if loose.is_empty() { Verdict::Keep } else { Verdict::Unlink(loose) };
    }
    if any(OwnerState::Waiting) && has_dependents {
        return Verdict::DeleteForeground;
    }
    Verdict::Delete
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(owners: &[(&str, bool)], stage: Stage) -> Known {
        let owner = |(uid, block): &(&str, bool)| OwnerReference {
            uid: (*uid).to_owned(),
            block_owner_deletion: Some(*block),
            ..OwnerReference::default()
        };
        Known {
            resource: 0,
            namespace: "d".into(),
            name: "x".into(),
            owners: owners.iter().map(owner).collect(),
            stage,
        }
    }

    fn sorted(mut uids: Vec<Uid>) -> Vec<Uid> {
        uids.sort();
        uids
    }

    #[test]
    fn dependents_are_looked_at_when_their_owner_goes() {
        let mut graph = Graph::default();
        assert!(graph.set("deploy".into(), known(&[], Stage::Alive)).is_empty());
        assert!(graph.set("rs".into(), known(&[("deploy", true)], Stage::Alive)).is_empty());
        assert!(graph.set("pod".into(), known(&[("rs", true)], Stage::Alive)).is_empty());
        assert_eq!(graph.remove("deploy"), ["rs"]);
        assert_eq!(graph.remove("rs"), ["pod"]);
    }

    #[test]
    fn an_object_whose_owner_is_not_known_is_looked_at() {
        let mut graph = Graph::default();
        assert_eq!(graph.set("pod".into(), known(&[("rs", true)], Stage::Alive)), ["pod"]);
    }

    #[test]
    fn a_foreground_deletion_waits_for_those_that_block_it() {
        let mut graph = Graph::default();
        graph.set("rs".into(), known(&[], Stage::Alive));
        graph.set("a".into(), known(&[("rs", true)], Stage::Alive));
        graph.set("b".into(), known(&[("rs", false)], Stage::Alive));
        assert_eq!(sorted(graph.set("rs".into(), known(&[], Stage::Foreground))), ["a", "b", "rs"]);
        assert_eq!(graph.blocking("rs"), ["a"]);
        assert_eq!(graph.remove("a"), ["rs"]);
        assert!(graph.blocking("rs").is_empty());
    }

    #[test]
    fn owners_decide() {
        use OwnerState::{Absent, Solid, Waiting};
        let table: [(&[OwnerState], bool, Verdict); 7] = [
            (&[], false, Verdict::Keep),
            (&[Solid], true, Verdict::Keep),
            (&[Solid, Absent], false, Verdict::Unlink(vec!["1".into()])),
            (&[Absent], true, Verdict::Delete),
            (&[Waiting], false, Verdict::Delete),
            (&[Waiting], true, Verdict::DeleteForeground),
            (&[Waiting, Solid], true, Verdict::Unlink(vec!["0".into()])),
        ];
        for (states, has_dependents, expected) in table {
            let owners: Vec<_> =
                states.iter().enumerate().map(|(i, state)| (i.to_string(), *state)).collect();
            assert_eq!(verdict(&owners, has_dependents), expected, "{states:?}");
        }
    }
}
