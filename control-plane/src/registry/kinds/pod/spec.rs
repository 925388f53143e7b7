//! What is wrong with a pod's specification.

use serde_json::Value;

use super::{containers, placement, security, volumes};
use crate::{
    registry::{
        kinds::rules::{self, check_supported},
        path::Path,
        value,
    },
    status::FieldError,
};

/// Checks a new pod.
pub(super) fn validate(pod: &Value, errors: &mut Vec<FieldError>) {
    let spec = pod.get("spec").unwrap_or(&Value::Null);
    let path = Path::Root.field("spec");
    validate_spec(spec, &path, errors);
    if !value::list(spec, &["ephemeralContainers"]).is_empty() {
        let detail = "cannot be set on create";
        errors.push(FieldError::forbidden(path.field("ephemeralContainers"), detail));
    }
}

/// Checks a template of pods.
pub(in crate::registry) fn validate_template(
    template: &Value,
    path: &Path<'_>,
    errors: &mut Vec<FieldError>,
) {
    let metadata = path.field("metadata");
    rules::labels(template.pointer("/metadata/labels"), &metadata.field("labels"), errors);
    let spec = template.get("spec").unwrap_or(&Value::Null);
    let spec_path = path.field("spec");
    validate_spec(spec, &spec_path, errors);
    if !value::list(spec, &["ephemeralContainers"]).is_empty() {
        errors.push(FieldError::forbidden(
            spec_path.field("ephemeralContainers"),
            "ephemeral containers not allowed in pod template",
        ));
    }
}

fn validate_spec(spec: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let volumes = volumes::validate(spec, path, errors);
    containers::validate(spec, &volumes, path, errors);
    let text = |field: &str| value::text(spec, &[field]);
    check_supported(
        path.field("restartPolicy"),
        text("restartPolicy"),
        &["Always", "Never", "OnFailure"],
        errors,
    );
    check_supported(
        path.field("dnsPolicy"),
        text("dnsPolicy"),
        &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
        errors,
    );
    dns_config(spec, path, errors);
    for field in ["hostname", "subdomain"] {
        if let Some(why) = rules::dns_label(text(field)).filter(|_| !text(field).is_empty()) {
            errors.push(FieldError::invalid(path.field(field), text(field), why));
        }
    }
    for field in ["nodeName", "serviceAccountName", "priorityClassName", "runtimeClassName"] {
        if let Some(why) = rules::dns_subdomain(text(field)).filter(|_| !text(field).is_empty()) {
            errors.push(FieldError::invalid(path.field(field), text(field), why));
        }
    }
    if let Some(seconds) = value::int(spec, &["activeDeadlineSeconds"])
        && !(1..=i64::from(i32::MAX)).contains(&seconds)
    {
        errors.push(FieldError::invalid(
            path.field("activeDeadlineSeconds"),
            seconds,
            "must be between 1 and 2147483647, inclusive",
        ));
    }
    if let Some(seconds) = value::int(spec, &["terminationGracePeriodSeconds"])
        && seconds < 0
    {
        errors.push(FieldError::invalid(
            path.field("terminationGracePeriodSeconds"),
            seconds,
            rules::NOT_NEGATIVE,
        ));
    }
    rules::labels(spec.get("nodeSelector"), &path.field("nodeSelector"), errors);
    if value::flag(spec, &["shareProcessNamespace"]) && value::flag(spec, &["hostPID"]) {
        errors.push(FieldError::invalid(
            path.field("securityContext"),
            true,
            "ShareProcessNamespace and HostPID cannot both be enabled",
        ));
    }
    security::pod(spec, path, errors);
    tolerations(spec, path, errors);
    placement::validate(spec, path, errors);
    host_aliases(spec, path, errors);
}

fn dns_config(spec: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = path.field("dnsConfig");
    let servers = value::list(spec, &["dnsConfig", "nameservers"]);
    let list = root.field("nameservers");
    if value::text(spec, &["dnsPolicy"]) == "None" && servers.is_empty() {
        errors.push(FieldError::required(
            list,
            "must provide at least one DNS nameserver when `dnsPolicy` is None",
        ));
    }
    if servers.len() > 3 {
        errors.push(FieldError::invalid(
            list,
            Value::from(servers.to_vec()),
            "must not have more than 3 nameservers",
        ));
    }
    for (index, server) in servers.iter().enumerate() {
        rules::ip_address(server.as_str().unwrap_or_default(), list.index(index), errors);
    }
    let searches = value::list(spec, &["dnsConfig", "searches"]);
    if searches.len() > 32 {
        errors.push(FieldError::invalid(
            root.field("searches"),
            Value::from(searches.to_vec()),
            "must not have more than 32 search paths",
        ));
    }
}

fn tolerations(spec: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = path.field("tolerations");
    for (index, toleration) in value::list(spec, &["tolerations"]).iter().enumerate() {
        let at = root.index(index);
        let text = |field: &str| value::text(toleration, &[field]);
        let (key, operator) = (text("key"), text("operator"));
        if !key.is_empty() {
            for why in rules::qualified_name(key) {
                errors.push(FieldError::invalid(at.field("key"), key, why));
            }
        }
        if key.is_empty() && operator != "Exists" {
            errors.push(FieldError::invalid(
                at.field("operator"),
                operator,
                "operator must be Exists when `key` is empty, which means \"match all values and \
                 all keys\"",
            ));
        }
        match operator {
            "" | "Equal" => {
                for why in rules::label_value(text("value")) {
                    errors.push(FieldError::invalid(at.field("operator"), text("value"), why));
                }
            }
            "Exists" if !text("value").is_empty() => errors.push(FieldError::invalid(
                at.field("operator"),
                toleration.clone(),
                "value must be empty when `operator` is 'Exists'",
            )),
            "Exists" => {}
            other => {
                let supported = &["Equal", "Exists"];
                errors.push(FieldError::not_supported(at.field("operator"), other, supported));
            }
        }
        let effects = &["", "NoExecute", "NoSchedule", "PreferNoSchedule"];
        check_supported(at.field("effect"), text("effect"), effects, errors);
        if value::int(toleration, &["tolerationSeconds"]).is_some() && text("effect") != "NoExecute"
        {
            errors.push(FieldError::invalid(
                at.field("effect"),
                text("effect"),
                "effect must be 'NoExecute' when `tolerationSeconds` is set",
            ));
        }
    }
}

fn host_aliases(spec: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = path.field("hostAliases");
    for (index, alias) in value::list(spec, &["hostAliases"]).iter().enumerate() {
        let at = root.index(index);
        rules::ip_address(value::text(alias, &["ip"]), at.field("ip"), errors);
        for name in value::list(alias, &["hostnames"]) {
            let name = name.as_str().unwrap_or_default();
            let why = rules::dns_subdomain(name);
            errors.extend(why.map(|why| FieldError::invalid(at.field("hostnames"), name, why)));
        }
    }
}
