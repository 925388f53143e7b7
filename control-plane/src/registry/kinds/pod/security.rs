//! What is wrong with security contexts.

use serde_json::Value;

use crate::{
    registry::{kinds::rules::check_supported, path::Path, value},
    status::FieldError,
};

const HIGHEST_ID: i64 = i32::MAX as i64;

/// Checks the context of a pod.
pub(super) fn pod(spec: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let Some(context) = value::at(spec, &["securityContext"]) else { return };
    let path = path.field("securityContext");
    ids(context, &["runAsUser", "runAsGroup", "fsGroup"], &path, errors);
    let groups = path.field("supplementalGroups");
    for (index, group) in value::list(context, &["supplementalGroups"]).iter().enumerate() {
        id(group, &groups.index(index), errors);
    }
    let policy = value::text(context, &["fsGroupChangePolicy"]);
    if !policy.is_empty() {
        let at = path.field("fsGroupChangePolicy");
        check_supported(at, policy, &["Always", "OnRootMismatch"], errors);
    }
    let policy = value::text(context, &["supplementalGroupsPolicy"]);
    if !policy.is_empty() {
        let at = path.field("supplementalGroupsPolicy");
        check_supported(at, policy, &["Merge", "Strict"], errors);
    }
    profile(context, "seccompProfile", &path, errors);
    profile(context, "appArmorProfile", &path, errors);
    let sysctls = path.field("sysctls");
    for (index, sysctl) in value::list(context, &["sysctls"]).iter().enumerate() {
        let at = sysctls.index(index);
        let name = value::text(sysctl, &["name"]);
        let allowed = |b: u8| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.' | b'/')
        };
        if name.is_empty() {
            errors.push(FieldError::required(at.field("name"), ""));
        } else if !name.bytes().all(allowed) {
            let detail = "must have at most 253 characters and match regex \
                          ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";
            errors.push(FieldError::invalid(at.field("name"), name, detail));
        }
    }
}

/// Checks the context of a container.
pub(super) fn container(container: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let Some(context) = value::at(container, &["securityContext"]) else { return };
    let at = path.field("securityContext");
    ids(context, &["runAsUser", "runAsGroup"], &at, errors);
    profile(context, "seccompProfile", &at, errors);
    profile(context, "appArmorProfile", &at, errors);
    let mount = value::text(context, &["procMount"]);
    if !mount.is_empty() {
        check_supported(at.field("procMount"), mount, &["Default", "Unmasked"], errors);
    }
    if context.get("allowPrivilegeEscalation") == Some(&Value::Bool(false)) {
        if value::flag(context, &["privileged"]) {
            errors.push(FieldError::invalid(
                at,
                context.clone(),
                "cannot set `allowPrivilegeEscalation` to false and `privileged` to true",
            ));
        }
        let added = value::list(context, &["capabilities", "add"]);
        if added.iter().any(|capability| capability == "CAP_SYS_ADMIN") {
            errors.push(FieldError::invalid(
                at,
                context.clone(),
                "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` \
                 CAP_SYS_ADMIN",
            ));
        }
    }
}

fn ids(context: &Value, fields: &[&str], path: &Path<'_>, errors: &mut Vec<FieldError>) {
    for field in fields {
        if let Some(number) = value::at(context, &[field]) {
            id(number, &path.field(field), errors);
        }
    }
}

fn id(number: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    if !number.as_i64().is_some_and(|n| (0..=HIGHEST_ID).contains(&n)) {
        let detail = format!("must be between 0 and {HIGHEST_ID}, inclusive");
        errors.push(FieldError::invalid(path, number.clone(), detail));
    }
}

fn profile(context: &Value, field: &str, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let Some(profile) = value::at(context, &[field]) else { return };
    let at = path.field(field);
    let kind = value::text(profile, &["type"]);
    check_supported(at.field("type"), kind, &["Localhost", "RuntimeDefault", "Unconfined"], errors);
    let local = at.field("localhostProfile");
    let given = value::text(profile, &["localhostProfile"]);
    match (kind, given) {
        ("Localhost", "") => {
            let detail = "must be set when type is Localhost";
            errors.push(FieldError::required(local, detail));
        }
        ("Localhost", path) if field == "seccompProfile" => {
            if path.starts_with('/') {
                errors.push(FieldError::invalid(local, path, "must be a relative path"));
            } else if path.split('/').any(|part| part == "..") {
                errors.push(FieldError::invalid(local, path, "must not contain '..'"));
            }
        }
        ("Localhost", _) | (_, "") => {}
        (_, given) => {
            let detail = "can only be set when type is Localhost";
            errors.push(FieldError::invalid(local, given, detail));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn contexts_are_checked() {
        let rows = [
            (json!({"runAsUser": 0}), ""),
            (json!({"runAsUser": -1}), "securityContext.runAsUser: Invalid value: -1"),
            (
                json!({"privileged": true, "allowPrivilegeEscalation": false}),
                "cannot set `allowPrivilegeEscalation` to false",
            ),
            (json!({"seccompProfile": {"type": "RuntimeDefault"}}), ""),
            (
                json!({"seccompProfile": {"type": "Localhost"}}),
                "securityContext.seccompProfile.localhostProfile: Required value",
            ),
            (
                json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "../x"}}),
                "must not contain '..'",
            ),
        ];
        for (context, expected) in rows {
            let mut errors = Vec::new();
            container(&json!({ "securityContext": context }), &Path::Root, &mut errors);
            let text = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            assert!(text.contains(expected) && expected.is_empty() == text.is_empty(), "{text}");
        }
    }
}
