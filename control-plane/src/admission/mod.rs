//! The last word on an object before it is stored: what is filled in, and what is refused.
//!
//! [`chain`] runs these plugins in order; each is documented by Kubernetes under the same name
//! ("Admission Control in Kubernetes") and is a file here:
//!
//! | plugin | what it does |
//! |---|---|
//! | `NamespaceLifecycle` (`namespace_lifecycle.rs`) | nothing new in namespaces that are missing or end |
//! | `ServiceAccount` (`service_account.rs`) | pods run as a service account and get its token |
//! | `NodeRestriction` (`node_restriction.rs`) | kubelets change what is theirs alone |
//! | `TaintNodesByCondition` (`taint_nodes.rs`) | new nodes get no pods before they are ready |
//! | `Priority` (`priority.rs`) | priority classes become numbers |
//! | `DefaultTolerationSeconds` (`default_tolerations.rs`) | pods stay five minutes on a node that fails |
//! | `RbacEscalation` (`rbac_escalation.rs`) | nobody grants what they do not hold (in Kubernetes part of the RBAC storage) |
//!
//! Not there: PodSecurity, LimitRanger, ResourceQuota, webhooks and policies.
//!
//! Plugins are pure but for what they look up in memory; they are asked on dry runs too.

pub(crate) mod default_tolerations;
pub(crate) mod namespace_lifecycle;
pub(crate) mod node_restriction;
pub(crate) mod priority;
pub(crate) mod rbac_escalation;
pub(crate) mod service_account;
pub(crate) mod taint_nodes;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde_json::Value;

use crate::{
    auth::{
        Authorizers, UserInfo,
        fields::{name, text},
    },
    lookup::Lookup,
    status::{Cause, Details},
};

/// What is being done to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It is new.
    Create,
    /// It exists and changes.
    Update,
    /// It goes.
    Delete,
    /// A subresource that streams (`exec`, `attach`, `port-forward`).
    Connect,
}

/// An object on its way into the store.
#[derive(Debug)]
pub struct AdmissionRequest<'a> {
    /// Who asks.
    pub user: &'a UserInfo,
    /// What for.
    pub operation: Operation,
    /// API group.
    pub group: &'a str,
    /// Plural resource name.
    pub resource: &'a str,
    /// Subresource, or empty.
    pub subresource: &'a str,
    /// Namespace, or empty.
    pub namespace: &'a str,
    /// Name; may be empty on create (`generateName`).
    pub name: &'a str,
    /// The object before an update or delete.
    pub old: Option<&'a Value>,
    /// `dryRun=All`.
    pub dry_run: bool,
}

/// A refusal: becomes a Status with this code and reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP code (403, 404, 409, 422 …).
    pub code: u16,
    /// Status reason (`Forbidden`, …).
    pub reason: &'static str,
    /// What to tell the user.
    pub message: String,
    /// What it is about.
    pub details: Option<Box<Details>>,
}

/// The details of a refusal that is about an object.
fn about(group: &str, plural: &str, name: &str) -> Option<Box<Details>> {
    let (group, kind, name) = (group.to_owned(), plural.to_owned(), name.to_owned());
    Some(Box::new(Details { group, kind, name, ..Details::default() }))
}

impl Refusal {
    /// A refusal without details.
    pub(crate) fn plain(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: None }
    }

    /// The same with one more cause.
    #[must_use]
    pub(crate) fn with_cause(mut self, reason: &str, message: String, field: &str) -> Self {
        let cause = Cause { reason: reason.to_owned(), message, field: field.to_owned() };
        self.details.get_or_insert_default().causes.push(cause);
        self
    }

    /// 403, as Kubernetes words it: `deployments.apps "x" is forbidden: why`.
    #[must_use]
    pub fn forbidden(group: &str, plural: &str, name: &str, why: &str) -> Self {
        let resource = match group {
            "" => plural.to_owned(),
            group => format!("{plural}.{group}"),
        };
        let object = match name {
            "" => String::new(),
            name => format!(" {name:?}"),
        };
        Self {
            code: 403,
            reason: "Forbidden",
            message: format!("{resource}{object} is forbidden: {why}"),
            details: about(group, plural, name),
        }
    }

    /// 404: `serviceaccounts "x" not found`.
    #[must_use]
    pub fn not_found(plural: &str, name: &str) -> Self {
        let details = about("", plural, name);
        Self { details, ..Self::plain(404, "NotFound", format!("{plural} {name:?} not found")) }
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::plain(400, "BadRequest", message)
    }

    /// 422: `Kind.group "name" is invalid: why`.
    #[must_use]
    pub fn invalid(kind: &str, name: &str, why: &str) -> Self {
        let message = format!("{kind} {name:?} is invalid: {why}");
        let refusal =
            Self { details: about("", kind, name), ..Self::plain(422, "Invalid", message) };
        refusal.with_cause("FieldValueInvalid", why.to_owned(), "")
    }
}

/// Fills in and checks objects.
pub trait Admission: Send + Sync + 'static {
    /// May change `object` (absent on delete and connect).
    fn admit(
        &self,
        request: &AdmissionRequest<'_>,
        object: Option<&mut Value>,
    ) -> Result<(), Refusal>;
}

/// The plugins, in order.
pub struct Chain(Vec<Box<dyn Admission>>);

/// The API server's admission chain over its watch cache.
pub fn chain(lookup: &Arc<dyn Lookup>, authorizers: &Arc<Authorizers>) -> Chain {
    let lookup = || Arc::clone(lookup);
    Chain(vec![
        Box::new(namespace_lifecycle::NamespaceLifecycle::new(lookup())),
        Box::new(service_account::ServiceAccount::new(lookup())),
        Box::new(node_restriction::NodeRestriction::new(lookup(), Arc::clone(authorizers) as _)),
        Box::new(taint_nodes::TaintNodesByCondition),
        Box::new(priority::Priority::new(lookup())),
        Box::new(default_tolerations::DefaultTolerationSeconds),
        Box::new(rbac_escalation::RbacEscalation::new(Arc::clone(authorizers))),
    ])
}

impl Admission for Chain {
    fn admit(
        &self,
        request: &AdmissionRequest<'_>,
        mut object: Option<&mut Value>,
    ) -> Result<(), Refusal> {
        self.0.iter().try_for_each(|plugin| plugin.admit(request, object.as_deref_mut()))
    }
}

impl AdmissionRequest<'_> {
    /// Whether it is about objects of this resource themselves.
    fn is_for(&self, group: &str, resource: &str) -> bool {
        self.group == group && self.resource == resource && self.subresource.is_empty()
    }

    /// Whether a pod is created.
    fn creates_pod(&self) -> bool {
        self.operation == Operation::Create && self.is_for("", "pods")
    }

    /// The object's name: on create it may stand in the object alone.
    fn object_name<'a>(&'a self, object: Option<&'a Value>) -> &'a str {
        if self.name.is_empty() { object.map(name).unwrap_or_default() } else { self.name }
    }

    /// The 403 for this object.
    fn forbidden(&self, object: Option<&Value>, why: &str) -> Refusal {
        let object_name = match self.object_name(object) {
            "" => object.map(|o| text(o, &["metadata", "generateName"])).unwrap_or_default(),
            name => name,
        };
        Refusal::forbidden(self.group, self.resource, object_name, why)
    }
}
