//! Refusals in Kubernetes' own words.

use super::Attributes;
use crate::admission::Refusal;

/// `User "x" cannot list resource "pods" in API group "" in the namespace "default"`.
#[must_use]
pub fn cannot(request: &Attributes) -> String {
    let (user, verb) = (&request.user.username, &request.verb);
    if !request.resource_request {
        return format!("User {user:?} cannot {verb} path {:?}", request.path);
    }
    let resource = match request.subresource.as_str() {
        "" => request.resource.clone(),
        subresource => format!("{}/{subresource}", request.resource),
    };
    let group = &request.group;
    let place = match request.namespace.as_str() {
        "" => "at the cluster scope".to_owned(),
        namespace => format!("in the namespace {namespace:?}"),
    };
    format!("User {user:?} cannot {verb} resource {resource:?} in API group {group:?} {place}")
}

/// The 403 for a request that no authorizer allowed; `reason` is what the authorizer said.
#[must_use]
pub fn forbidden(request: &Attributes, reason: &str) -> Refusal {
    let mut why = cannot(request);
    if !reason.is_empty() {
        why = format!("{why}: {reason}");
    }
    if !request.resource_request {
        return Refusal {
            details: Some(Box::default()),
            ..Refusal::plain(403, "Forbidden", format!("forbidden: {why}"))
        };
    }
    Refusal::forbidden(&request.group, &request.resource, &request.name, &why)
}
