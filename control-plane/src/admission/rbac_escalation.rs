//! Nobody grants by roles and bindings what they do not hold themselves, unless they hold the verb
//! `escalate` on the role, or `bind` on the role that a binding refers to ("Privilege escalation
//! prevention and bootstrapping").

use std::sync::Arc;

use serde_json::Value;

use super::{Admission, AdmissionRequest, Operation, Refusal};
use crate::auth::{
    Attributes, Authorizer, Authorizers, Decision,
    fields::text,
    rbac::{GROUP, Rule, rules_in},
};

pub(crate) struct RbacEscalation {
    authorizers: Arc<Authorizers>,
}

impl RbacEscalation {
    pub(crate) fn new(authorizers: Arc<Authorizers>) -> Self {
        Self { authorizers }
    }

    fn may(
        &self,
        request: &AdmissionRequest<'_>,
        verb: &str,
        resource: &str,
        namespace: &str,
        name: &str,
    ) -> bool {
        let attributes = Attributes {
            user: request.user.clone(),
            verb: verb.to_owned(),
            resource_request: true,
            group: GROUP.to_owned(),
            version: "v1".to_owned(),
            resource: resource.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ..Attributes::default()
        };
        matches!(self.authorizers.authorize(&attributes), Decision::Allow(_))
    }

    fn role(&self, request: &AdmissionRequest<'_>, role: &Value) -> Result<(), Refusal> {
        let aggregates = |role: &Value| role.get("aggregationRule").cloned().unwrap_or_default();
        if let Some(old) = request.old
            && old.get("rules") == role.get("rules")
            && aggregates(old) == aggregates(role)
        {
            return Ok(());
        }
        let name = request.object_name(Some(role));
        if self.may(request, "escalate", request.resource, request.namespace, name) {
            return Ok(());
        }
        let mut wanted = rules_in(role);
        if !aggregates(role).is_null() {
            // What is aggregated is not known beforehand: only who may do everything may ask for it.
            wanted.extend(everything());
        }
        self.hold(request, role, &wanted)
    }

    fn binding(&self, request: &AdmissionRequest<'_>, binding: &Value) -> Result<(), Refusal> {
        let same = |field| request.old.is_some_and(|old| old.get(field) == binding.get(field));
        if same("subjects") && same("roleRef") {
            return Ok(());
        }
        let role = text(binding, &["roleRef", "name"]);
        let (resource, namespace) = match text(binding, &["roleRef", "kind"]) {
            "Role" => ("roles", request.namespace),
            "ClusterRole" => ("clusterroles", ""),
            _ => return Ok(()), // for validation to refuse
        };
        // The binding's namespace: a cluster role may be bound in one namespace only.
        if self.may(request, "bind", resource, request.namespace, role) {
            return Ok(());
        }
        let wanted = self
            .authorizers
            .rbac()
            .rules_of_role(namespace, role)
            .ok_or_else(|| Refusal::not_found(&format!("{resource}.{GROUP}"), role))?;
        self.hold(request, binding, &wanted)
    }

    fn hold(
        &self,
        request: &AdmissionRequest<'_>,
        object: &Value,
        wanted: &[Rule],
    ) -> Result<(), Refusal> {
        let missing = self.authorizers.rbac().not_held(request.user, request.namespace, wanted);
        if missing.is_empty() {
            return Ok(());
        }
        let groups: Vec<_> = request.user.groups.iter().map(|group| format!("{group:?}")).collect();
        let missing: Vec<_> = compact(missing).iter().map(Rule::describe).collect();
        let why = format!(
            "user {:?} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
            request.user.username,
            groups.join(" "),
            missing.join("\n")
        );
        Err(request.forbidden(Some(object), &why))
    }
}

fn everything() -> [Rule; 2] {
    let all = || vec!["*".to_owned()];
    [
        Rule { verbs: all(), api_groups: all(), resources: all(), ..Rule::default() },
        Rule { verbs: all(), non_resource_urls: all(), ..Rule::default() },
    ]
}

/// Rules that differ in their verbs alone become one.
fn compact(rules: Vec<Rule>) -> Vec<Rule> {
    let mut compacted: Vec<Rule> = Vec::new();
    for rule in rules {
        let same = compacted.iter_mut().find(|known| {
            known.api_groups == rule.api_groups
                && known.resources == rule.resources
                && known.resource_names == rule.resource_names
                && known.non_resource_urls == rule.non_resource_urls
        });
        match same {
            Some(known) => {
                known.verbs.extend(
                    rule.verbs.into_iter().filter(|v| !known.verbs.contains(v)).collect::<Vec<_>>(),
                );
            }
            None => compacted.push(rule),
        }
    }
    compacted
}

impl Admission for RbacEscalation {
    fn admit(
        &self,
        request: &AdmissionRequest<'_>,
        object: Option<&mut Value>,
    ) -> Result<(), Refusal> {
        let Some(object) = object else { return Ok(()) };
        if request.group != GROUP
            || !request.subresource.is_empty()
            || !matches!(request.operation, Operation::Create | Operation::Update)
        {
            return Ok(());
        }
        match request.resource {
            "roles" | "clusterroles" => self.role(request, object),
            "rolebindings" | "clusterrolebindings" => self.binding(request, object),
            _ => Ok(()),
        }
    }
}
