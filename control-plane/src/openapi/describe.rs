//! What fields are for, in the words of the API's own documentation, which the client library's
//! types carry.

use k8s_openapi::{
    api::{
        apps::v1 as apps, authentication::v1 as authn, authorization::v1 as authz,
        autoscaling::v1 as autoscaling, coordination::v1 as coordination, core::v1 as core,
        discovery::v1 as discovery, events::v1 as events, policy::v1 as policy, rbac::v1 as rbac,
        scheduling::v1 as scheduling,
    },
    apimachinery::pkg::apis::meta::v1 as meta,
    schemars::SchemaGenerator,
};
use serde_json::{Map, Value};

macro_rules! definitions_of {
    ($($kind:ty),* $(,)?) => {{
        let mut generator = SchemaGenerator::default();
        $(let _reference = generator.subschema_for::<$kind>();)*
        generator.take_definitions(false)
    }};
}

/// The documentation of all types that are served.
fn documentation() -> Map<String, Value> {
    definitions_of![
        apps::Deployment,
        apps::ReplicaSet,
        authn::SelfSubjectReview,
        authn::TokenRequest,
        authn::TokenReview,
        authz::LocalSubjectAccessReview,
        authz::SelfSubjectAccessReview,
        authz::SelfSubjectRulesReview,
        authz::SubjectAccessReview,
        autoscaling::Scale,
        coordination::Lease,
        core::Binding,
        core::ConfigMap,
        core::Endpoints,
        core::Event,
        core::Namespace,
        core::Node,
        core::Pod,
        core::Secret,
        core::Service,
        core::ServiceAccount,
        discovery::EndpointSlice,
        events::Event,
        policy::Eviction,
        rbac::ClusterRole,
        rbac::ClusterRoleBinding,
        rbac::Role,
        rbac::RoleBinding,
        scheduling::PriorityClass,
        meta::DeleteOptions,
        meta::ListMeta,
        meta::Status,
    ]
}

/// Adds descriptions to schemas and their properties.
pub(super) fn add(schemas: &mut Map<String, Value>) {
    let mut documentation = documentation();
    for (name, entry) in schemas {
        let Some(mut documented) = documentation.remove(name) else { continue };
        move_description(&mut documented, entry);
        let properties = entry.get_mut("properties").and_then(Value::as_object_mut);
        for (field, property) in properties.into_iter().flatten() {
            if let Some(documented) =
                documented.get_mut("properties").and_then(|all| all.get_mut(field))
            {
                move_description(documented, property);
            }
        }
    }
}

fn move_description(from: &mut Value, to: &mut Value) {
    if let (Some(text), Some(to)) =
        (from.get_mut("description").map(Value::take), to.as_object_mut())
    {
        to.entry("description").or_insert(text);
    }
}
