//! NamespaceLifecycle: "rejects requests in a namespace that does not exist, or create requests in a
//! namespace undergoing termination, and prevents deletion of the system reserved namespaces".

use std::sync::Arc;

use serde_json::Value;

use super::{Admission, AdmissionRequest, Operation, Refusal};
use crate::{
    auth::fields::{at, text},
    lookup::Lookup,
};

/// Namespaces that always stay.
const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

pub(crate) struct NamespaceLifecycle {
    lookup: Arc<dyn Lookup>,
}

impl NamespaceLifecycle {
    pub(crate) fn new(lookup: Arc<dyn Lookup>) -> Self {
        Self { lookup }
    }
}

impl Admission for NamespaceLifecycle {
    fn admit(
        &self,
        request: &AdmissionRequest<'_>,
        object: Option<&mut Value>,
    ) -> Result<(), Refusal> {
        if request.group.is_empty() && request.resource == "namespaces" {
            if request.operation == Operation::Delete && IMMORTAL.contains(&request.name) {
                return Err(request.forbidden(None, "this namespace may not be deleted"));
            }
            return Ok(());
        }
        // A question about access in a namespace says nothing about whether it exists.
        if request.namespace.is_empty()
            || request.operation == Operation::Delete
            || request.group == "authorization.k8s.io"
        {
            return Ok(());
        }
        let Some(namespace) = self.lookup.get("", "namespaces", None, request.namespace) else {
            return Err(Refusal::not_found("namespaces", request.namespace));
        };
        let terminating = text(&namespace, &["status", "phase"]) == "Terminating"
            || at(&namespace, &["metadata", "deletionTimestamp"]).is_some();
        if request.operation == Operation::Create && terminating {
            let name = request.namespace;
            let why = format!(
                "unable to create new content in namespace {name} because it is being terminated"
            );
            let cause = format!("namespace {name} is being terminated");
            let refusal = request.forbidden(object.as_deref(), &why);
            return Err(refusal.with_cause("NamespaceTerminating", cause, "metadata.namespace"));
        }
        Ok(())
    }
}
