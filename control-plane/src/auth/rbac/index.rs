//! Roles by name, and bindings by whom they bind.

use std::{collections::HashMap, sync::Arc};

use serde_json::Value;

use super::{Rule, rules_in};
use crate::auth::{
    fields::{list, name, namespace, text},
    tokens::verify::username,
};

/// Whom a binding binds. A service account is the user that its tokens name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Subject {
    User(String),
    Group(String),
}

impl Subject {
    /// A binding's subject; `None` for a kind that there is not. A service account without a
    /// namespace is one of the binding's own.
    pub(crate) fn from_value(subject: &Value, binding_namespace: &str) -> Option<Self> {
        let subject_name = text(subject, &["name"]);
        match text(subject, &["kind"]) {
            "User" => Some(Self::User(subject_name.to_owned())),
            "Group" => Some(Self::Group(subject_name.to_owned())),
            "ServiceAccount" => {
                let in_namespace = match text(subject, &["namespace"]) {
                    "" => binding_namespace,
                    given => given,
                };
                (!in_namespace.is_empty()).then(|| Self::User(username(in_namespace, subject_name)))
            }
            _ => None,
        }
    }
}

/// What a binding refers to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum RoleRef {
    ClusterRole(String),
    Role(String),
}

impl RoleRef {
    /// A binding's `roleRef`; `None` for a kind that there is not.
    pub(crate) fn of(binding: &Value) -> Option<Self> {
        let role = text(binding, &["roleRef", "name"]).to_owned();
        match text(binding, &["roleRef", "kind"]) {
            "ClusterRole" => Some(Self::ClusterRole(role)),
            "Role" => Some(Self::Role(role)),
            _ => None,
        }
    }
}

/// Roles or cluster roles: namespace (empty for the latter) → name → rules.
pub(crate) struct Roles(HashMap<String, HashMap<String, Arc<[Rule]>>>);

impl Roles {
    pub(crate) fn new(objects: &[Arc<Value>]) -> Self {
        let mut roles: HashMap<String, HashMap<String, Arc<[Rule]>>> = HashMap::new();
        for role in objects {
            roles
                .entry(namespace(role).to_owned())
                .or_default()
                .insert(name(role).to_owned(), rules_in(role).into());
        }
        Self(roles)
    }

    pub(crate) fn get(&self, in_namespace: &str, role: &str) -> Option<Arc<[Rule]>> {
        self.0.get(in_namespace)?.get(role).cloned()
    }
}

/// Bindings: namespace (empty for cluster role bindings) → subject → binding's name and role.
pub(crate) struct Bindings(HashMap<String, HashMap<Subject, Vec<(String, RoleRef)>>>);

impl Bindings {
    pub(crate) fn new(objects: &[Arc<Value>]) -> Self {
        let mut bindings: HashMap<String, HashMap<Subject, Vec<(String, RoleRef)>>> =
            HashMap::new();
        for binding in objects {
            let Some(role) = RoleRef::of(binding) else { continue };
            let in_namespace = namespace(binding);
            let subjects = bindings.entry(in_namespace.to_owned()).or_default();
            for subject in list(binding, &["subjects"]) {
                if let Some(subject) = Subject::from_value(subject, in_namespace) {
                    subjects
                        .entry(subject)
                        .or_default()
                        .push((name(binding).to_owned(), role.clone()));
                }
            }
        }
        Self(bindings)
    }

    pub(crate) fn of(&self, in_namespace: &str, subject: &Subject) -> &[(String, RoleRef)] {
        self.0
            .get(in_namespace)
            .and_then(|subjects| subjects.get(subject))
            .map_or(&[], Vec::as_slice)
    }
}
