//! Roles and their bindings.

use serde_json::Value;

use super::rules::check_supported;
use crate::{
    registry::{
        Strategy,
        path::Path,
        value::{self, set_default_text},
    },
    status::FieldError,
};

const GROUP: &str = "rbac.authorization.k8s.io";

/// Roles.
pub(in crate::registry) static ROLE: Strategy =
    Strategy { validate: validate_role, ..CLUSTER_ROLE };

/// Cluster roles.
pub(in crate::registry) static CLUSTER_ROLE: Strategy = Strategy {
    validate: validate_cluster_role,
    columns: &crate::table::ROLE,
    create_on_update: true,
    ..Strategy::PLAIN
};

/// Bindings of roles.
pub(in crate::registry) static ROLE_BINDING: Strategy =
    Strategy { validate: validate_role_binding, ..CLUSTER_ROLE_BINDING };

/// Bindings of cluster roles.
pub(in crate::registry) static CLUSTER_ROLE_BINDING: Strategy = Strategy {
    default,
    validate: validate_cluster_role_binding,
    columns: &crate::table::ROLE_BINDING,
    create_on_update: true,
    ..Strategy::PLAIN
};

fn default(binding: &mut Value) {
    if let Some(role) = binding.get_mut("roleRef").and_then(Value::as_object_mut) {
        set_default_text(role, "apiGroup", GROUP);
    }
    for subject in binding.get_mut("subjects").and_then(Value::as_array_mut).into_iter().flatten() {
        let kind = value::text(subject, &["kind"]).to_owned();
        if matches!(&*kind, "User" | "Group")
            && let Some(subject) = subject.as_object_mut()
        {
            set_default_text(subject, "apiGroup", GROUP);
        }
    }
}

fn validate_role(new: &Value, _: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    validate_rules(new, true, errors);
}

fn validate_cluster_role(new: &Value, _: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    validate_rules(new, false, errors);
}

fn validate_rules(role: &Value, namespaced: bool, errors: &mut Vec<FieldError>) {
    let root = Path::Root.field("rules");
    for (index, rule) in value::list(role, &["rules"]).iter().enumerate() {
        let path = root.index(index);
        let is_empty = |field| value::list(rule, &[field]).is_empty();
        if is_empty("verbs") {
            errors.push(FieldError::required(
                path.field("verbs"),
                "verbs must contain at least one value",
            ));
        }
        if !is_empty("nonResourceURLs") {
            if namespaced {
                errors.push(FieldError::invalid(
                    path.field("nonResourceURLs"),
                    rule["nonResourceURLs"].clone(),
                    "namespaced rules cannot apply to non-resource URLs",
                ));
            }
            if !is_empty("apiGroups") || !is_empty("resources") || !is_empty("resourceNames") {
                errors.push(FieldError::invalid(
                    path.field("nonResourceURLs"),
                    rule["nonResourceURLs"].clone(),
                    "rules cannot apply to both regular resources and non-resource URLs",
                ));
            }
            continue;
        }
        if is_empty("apiGroups") {
            let detail = "resource rules must supply at least one api group";
            errors.push(FieldError::required(path.field("apiGroups"), detail));
        }
        if is_empty("resources") {
            let detail = "resource rules must supply at least one resource";
            errors.push(FieldError::required(path.field("resources"), detail));
        }
    }
}

fn validate_role_binding(new: &Value, old: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    validate_binding(new, old, &["Role", "ClusterRole"], errors);
}

fn validate_cluster_role_binding(
    new: &Value,
    old: Option<&Value>,
    _: &str,
    errors: &mut Vec<FieldError>,
) {
    validate_binding(new, old, &["ClusterRole"], errors);
}

fn validate_binding(
    new: &Value,
    old: Option<&Value>,
    kinds: &[&str],
    errors: &mut Vec<FieldError>,
) {
    check_supported(
        "roleRef.apiGroup",
        value::text(new, &["roleRef", "apiGroup"]),
        &[GROUP],
        errors,
    );
    check_supported("roleRef.kind", value::text(new, &["roleRef", "kind"]), kinds, errors);
    if value::text(new, &["roleRef", "name"]).is_empty() {
        errors.push(FieldError::required("roleRef.name", ""));
    }
    if let Some(old) = old
        && !value::same(new.get("roleRef"), old.get("roleRef"))
    {
        let role = new.get("roleRef").cloned().unwrap_or_default();
        errors.push(FieldError::invalid("roleRef", role, "cannot change roleRef"));
    }
    let root = Path::Root.field("subjects");
    for (index, subject) in value::list(new, &["subjects"]).iter().enumerate() {
        let path = root.index(index);
        let text = |field| value::text(subject, &[field]);
        if text("name").is_empty() {
            errors.push(FieldError::required(path.field("name"), ""));
        }
        match text("kind") {
            "ServiceAccount" => {
                if !text("apiGroup").is_empty() {
                    let group = path.field("apiGroup");
                    errors.push(FieldError::not_supported(group, text("apiGroup"), &[""]));
                }
                if text("namespace").is_empty() {
                    errors.push(FieldError::required(path.field("namespace"), ""));
                }
            }
            "User" | "Group" => {
                check_supported(path.field("apiGroup"), text("apiGroup"), &[GROUP], errors);
            }
            kind => errors.push(FieldError::not_supported(
                path.field("kind"),
                kind,
                &["ServiceAccount", "User", "Group"],
            )),
        }
    }
}
