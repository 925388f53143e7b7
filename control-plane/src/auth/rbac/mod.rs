//! Role-based access control: `rbac.authorization.k8s.io`.
//!
//! ```text
//! request ── user, groups ──► subjects ──► bindings ──► roles ──► rules ── one matches? ──► allow
//!                             (an index of each resource, made again only when it changed)
//! ```
//!
//! A ClusterRoleBinding grants its rules everywhere, a RoleBinding those of its namespace. There are
//! no rules that deny.
//!
//! * `rule.rs`: one rule, and what it matches.
//! * `index.rs`: who is bound to what.

pub(crate) mod index;
pub(crate) mod rule;

#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use rule::Rule;
use serde_json::Value;

use self::index::{Bindings, RoleRef, Roles, Subject};
use super::{Attributes, Authorizer, Decision, UserInfo, derived::Derived};
use crate::lookup::Lookup;

/// The API group of roles and bindings.
pub(crate) const GROUP: &str = "rbac.authorization.k8s.io";

/// The authorizer.
pub struct Rbac {
    lookup: Arc<dyn Lookup>,
    cluster_roles: Derived<Roles>,
    roles: Derived<Roles>,
    cluster_role_bindings: Derived<Bindings>,
    role_bindings: Derived<Bindings>,
}

/// A grant on the way to a decision.
struct Grant {
    role_ref: RoleRef,
    binding: String,
    /// Empty for a ClusterRoleBinding.
    namespace: String,
    subject: Subject,
}

impl Rbac {
    /// An authorizer over the roles and bindings of `lookup`.
    pub fn new(lookup: Arc<dyn Lookup>) -> Self {
        Self {
            lookup,
            cluster_roles: Derived::new(GROUP, "clusterroles"),
            roles: Derived::new(GROUP, "roles"),
            cluster_role_bindings: Derived::new(GROUP, "clusterrolebindings"),
            role_bindings: Derived::new(GROUP, "rolebindings"),
        }
    }

    /// The rules of a role; `None` if it does not exist. A ClusterRole has no namespace.
    pub(crate) fn rules_of_role(&self, namespace: &str, name: &str) -> Option<Arc<[Rule]>> {
        let roles = if namespace.is_empty() { &self.cluster_roles } else { &self.roles };
        roles.get(&*self.lookup, |objects, _| Roles::new(objects)).get(namespace, name)
    }

    /// The rules of the role that a binding in `namespace` refers to.
    fn rules_of(&self, role_ref: &RoleRef, namespace: &str) -> Option<Arc<[Rule]>> {
        match role_ref {
            RoleRef::ClusterRole(name) => self.rules_of_role("", name),
            // A ClusterRoleBinding cannot refer to a Role.
            RoleRef::Role(name) if !namespace.is_empty() => self.rules_of_role(namespace, name),
            RoleRef::Role(_) => None,
        }
    }

    /// Shows every grant that holds for `user` in `namespace` to `visit`, until it returns true.
    fn visit(
        &self,
        user: &UserInfo,
        namespace: &str,
        mut visit: impl FnMut(&Grant, Option<&[Rule]>) -> bool,
    ) {
        let cluster =
            self.cluster_role_bindings.get(&*self.lookup, |objects, _| Bindings::new(objects));
        let local = (!namespace.is_empty())
            .then(|| self.role_bindings.get(&*self.lookup, |objects, _| Bindings::new(objects)));
        let mut scopes = vec![(cluster, "")];
        scopes.extend(local.map(|bindings| (bindings, namespace)));
        for (bindings, scope) in &scopes {
            let subjects = std::iter::once(Subject::User(user.username.clone()))
                .chain(user.groups.iter().cloned().map(Subject::Group));
            for subject in subjects {
                for (binding, role_ref) in bindings.of(scope, &subject) {
                    let grant = Grant {
                        role_ref: role_ref.clone(),
                        binding: binding.clone(),
                        namespace: (*scope).to_owned(),
                        subject: subject.clone(),
                    };
                    let rules = self.rules_of(role_ref, scope);
                    if visit(&grant, rules.as_deref()) {
                        return;
                    }
                }
            }
        }
    }

    /// All rules that hold for `user` in `namespace` (empty: in all), and whether some could not be
    /// found.
    pub(crate) fn rules(&self, user: &UserInfo, namespace: &str) -> (Vec<Rule>, Vec<String>) {
        let (mut all, mut problems) = (Vec::new(), Vec::new());
        self.visit(user, namespace, |grant, rules| {
            match rules {
                Some(rules) => all.extend(rules.iter().cloned()),
                None => problems.push(not_found(&grant.role_ref)),
            }
            false
        });
        (all, problems)
    }

    /// Which of `wanted` the user does not hold in `namespace`, each broken down to one verb, group
    /// and resource. Empty: all are held.
    pub(crate) fn not_held(&self, user: &UserInfo, namespace: &str, wanted: &[Rule]) -> Vec<Rule> {
        if is_master(user) {
            return Vec::new();
        }
        let (held, _) = self.rules(user, namespace);
        wanted
            .iter()
            .flat_map(Rule::break_down)
            .filter(|rule| !held.iter().any(|held| held.covers(rule)))
            .collect()
    }
}

/// A member of `system:masters`, whom everything is allowed.
pub(crate) fn is_master(user: &UserInfo) -> bool {
    user.groups.iter().any(|group| group == "system:masters")
}

fn not_found(role: &RoleRef) -> String {
    let (plural, name) = match role {
        RoleRef::ClusterRole(name) => ("clusterrole", name),
        RoleRef::Role(name) => ("role", name),
    };
    format!("{plural}.{GROUP} {name:?} not found")
}

impl Authorizer for Rbac {
    fn authorize(&self, attributes: &Attributes) -> Decision {
        let (mut allowed, mut problems) = (None, Vec::new());
        self.visit(&attributes.user, &attributes.namespace, |grant, rules| {
            match rules {
                Some(rules) if rules.iter().any(|rule| rule.allows(attributes)) => {
                    allowed = Some(explain(grant));
                }
                Some(_) => {}
                None => problems.push(not_found(&grant.role_ref)),
            }
            allowed.is_some()
        });
        match allowed {
            Some(reason) => Decision::Allow(reason),
            None if problems.is_empty() => Decision::NoOpinion(String::new()),
            None => Decision::NoOpinion(format!("RBAC: [{}]", problems.join(", "))),
        }
    }
}

fn explain(grant: &Grant) -> String {
    let (kind, role) = match &grant.role_ref {
        RoleRef::ClusterRole(name) => ("ClusterRole", name),
        RoleRef::Role(name) => ("Role", name),
    };
    let binding = if grant.namespace.is_empty() {
        format!("ClusterRoleBinding {:?}", grant.binding)
    } else {
        format!("RoleBinding {:?}", format!("{}/{}", grant.binding, grant.namespace))
    };
    let subject = match &grant.subject {
        Subject::User(name) => format!("User {name:?}"),
        Subject::Group(name) => format!("Group {name:?}"),
    };
    format!("RBAC: allowed by {binding} of {kind} {role:?} to {subject}")
}

/// The rules of a role or cluster role object as it is.
pub(crate) fn rules_in(role: &Value) -> Vec<Rule> {
    super::fields::list(role, &["rules"]).iter().map(Rule::from_value).collect()
}
