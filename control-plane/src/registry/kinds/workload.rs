//! Deployments and ReplicaSets.

use std::collections::BTreeMap;

use keelson_api::selector::LabelSelector;
use serde_json::{Value, json};

use super::{pod, rules};
use crate::{
    registry::{
        Strategy,
        path::Path,
        value::{self, object_at, set_default, set_default_text},
    },
    status::FieldError,
};

/// Deployments.
pub(in crate::registry) static DEPLOYMENT: Strategy = Strategy {
    default: default_deployment,
    prepare_create: |object| object["status"] = json!({}),
    validate: validate_deployment,
    columns: &crate::table::DEPLOYMENT,
    ..Strategy::PLAIN
};

/// ReplicaSets.
pub(in crate::registry) static REPLICA_SET: Strategy = Strategy {
    default: default_replica_set,
    prepare_create: |object| object["status"] = json!({"replicas": 0}),
    validate: validate_replica_set,
    fields: &[("status.replicas", |o| {
        value::int(o, &["status", "replicas"]).unwrap_or(0).to_string()
    })],
    columns: &crate::table::REPLICA_SET,
    ..Strategy::PLAIN
};

fn default_template(object: &mut Value) {
    if let Some(template) = object.pointer_mut("/spec/template") {
        pod::default_template(template);
    }
}

fn default_deployment(deployment: &mut Value) {
    default_template(deployment);
    let Some(spec) = object_at(deployment, "spec") else { return };
    set_default(spec, "replicas", 1);
    set_default(spec, "revisionHistoryLimit", 10);
    set_default(spec, "progressDeadlineSeconds", 600);
    set_default(spec, "strategy", json!({}));
    let Some(strategy) = spec.get_mut("strategy").and_then(Value::as_object_mut) else { return };
    set_default_text(strategy, "type", "RollingUpdate");
    if strategy.get("type").and_then(Value::as_str) == Some("RollingUpdate") {
        set_default(strategy, "rollingUpdate", json!({}));
        if let Some(rolling) = strategy.get_mut("rollingUpdate").and_then(Value::as_object_mut) {
            set_default(rolling, "maxUnavailable", "25%");
            set_default(rolling, "maxSurge", "25%");
        }
    }
}

fn default_replica_set(set: &mut Value) {
    default_template(set);
    if let Some(spec) = object_at(set, "spec") {
        set_default(spec, "replicas", 1);
    }
}

fn validate_common(new: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    for field in ["replicas", "minReadySeconds"] {
        let number = value::int(new, &["spec", field]).unwrap_or(0);
        if number < 0 {
            let path = format!("spec.{field}");
            errors.push(FieldError::invalid(path, number, rules::NOT_NEGATIVE));
        }
    }
    selector(new, errors);
    let spec = Path::Root.field("spec");
    let template = spec.field("template");
    match value::at(new, &["spec", "template"]) {
        None => errors.push(FieldError::required(template, "")),
        Some(pod_template) => {
            pod::validate_template(pod_template, &template, errors);
            let policy = value::text(pod_template, &["spec", "restartPolicy"]);
            if policy != "Always" && !policy.is_empty() {
                errors.push(FieldError::not_supported(
                    "spec.template.spec.restartPolicy",
                    policy,
                    &["Always"],
                ));
            }
            if value::at(pod_template, &["spec", "activeDeadlineSeconds"]).is_some() {
                errors.push(FieldError::forbidden(
                    "spec.template.spec.activeDeadlineSeconds",
                    "activeDeadlineSeconds in ReplicaSet is not Supported",
                ));
            }
        }
    }
    if let Some(old) = old {
        rules::immutable(new, old, &["spec", "selector"], rules::IMMUTABLE, errors);
    }
}

fn selector(new: &Value, errors: &mut Vec<FieldError>) {
    let Some(selector) = value::at(new, &["spec", "selector"]) else {
        errors.push(FieldError::required("spec.selector", ""));
        return;
    };
    let spec = Path::Root.field("spec");
    let path = spec.field("selector");
    rules::label_selector(selector, &path, errors);
    let is_empty = value::entries(selector, &["matchLabels"]).next().is_none()
        && value::list(selector, &["matchExpressions"]).is_empty();
    if is_empty {
        let detail = "empty selector is invalid for deployment";
        errors.push(FieldError::invalid(path, selector.clone(), detail));
        return;
    }
    let labels: BTreeMap<String, String> =
        value::entries(new, &["spec", "template", "metadata", "labels"])
            .map(|(key, label)| (key.clone(), label.as_str().unwrap_or_default().to_owned()))
            .collect();
    let parsed = serde_json::from_value(selector.clone())
        .ok()
        .and_then(|selector| LabelSelector::from_k8s(&selector).ok());
    if let Some(parsed) = parsed
        && !parsed.matches(&labels)
    {
        let shown = value::at(new, &["spec", "template", "metadata", "labels"]).cloned();
        errors.push(FieldError::invalid(
            "spec.template.metadata.labels",
            shown.unwrap_or_else(|| json!({})),
            "`selector` does not match template `labels`",
        ));
    }
}

fn validate_replica_set(
    new: &Value,
    old: Option<&Value>,
    subresource: &str,
    errors: &mut Vec<FieldError>,
) {
    if subresource == "status" {
        status_counts(new, errors);
    } else {
        validate_common(new, old, errors);
    }
}

fn validate_deployment(
    new: &Value,
    old: Option<&Value>,
    subresource: &str,
    errors: &mut Vec<FieldError>,
) {
    if subresource == "status" {
        status_counts(new, errors);
        return;
    }
    validate_common(new, old, errors);
    strategy(new, errors);
    if let Some(limit) = value::int(new, &["spec", "revisionHistoryLimit"])
        && limit < 0
    {
        errors.push(FieldError::invalid("spec.revisionHistoryLimit", limit, rules::NOT_NEGATIVE));
    }
    if let Some(deadline) = value::int(new, &["spec", "progressDeadlineSeconds"]) {
        let path = "spec.progressDeadlineSeconds";
        if deadline < 0 {
            errors.push(FieldError::invalid(path, deadline, rules::NOT_NEGATIVE));
        }
        if deadline <= value::int(new, &["spec", "minReadySeconds"]).unwrap_or(0) {
            errors.push(FieldError::invalid(
                path,
                deadline,
                "must be greater than minReadySeconds",
            ));
        }
    }
}

fn status_counts(new: &Value, errors: &mut Vec<FieldError>) {
    for (name, count) in value::entries(new, &["status"]) {
        if let Some(count) = count.as_i64()
            && count < 0
        {
            let path = format!("status.{name}");
            errors.push(FieldError::invalid(path, count, rules::NOT_NEGATIVE));
        }
    }
}

fn strategy(new: &Value, errors: &mut Vec<FieldError>) {
    let Some(strategy) = value::at(new, &["spec", "strategy"]) else { return };
    let kind = value::text(strategy, &["type"]);
    let rolling = value::at(strategy, &["rollingUpdate"]);
    match kind {
        "Recreate" => {
            if rolling.is_some() {
                errors.push(FieldError::forbidden(
                    "spec.strategy.rollingUpdate",
                    "may not be specified when strategy `type` is 'Recreate'",
                ));
            }
        }
        "RollingUpdate" => match rolling {
            None => errors.push(FieldError::required(
                "spec.strategy.rollingUpdate",
                "this should be defaulted and never be nil",
            )),
            Some(rolling) => rolling_update(rolling, errors),
        },
        other => errors.push(FieldError::not_supported(
            "spec.strategy.type",
            other,
            &["Recreate", "RollingUpdate"],
        )),
    }
}

fn rolling_update(rolling: &Value, errors: &mut Vec<FieldError>) {
    let zero = |field: &str| {
        matches!(rolling.get(field), Some(Value::Number(n)) if n.as_i64() == Some(0))
            || value::text(rolling, &[field]) == "0%"
    };
    for field in ["maxUnavailable", "maxSurge"] {
        let path = format!("spec.strategy.rollingUpdate.{field}");
        match rolling.get(field) {
            Some(Value::Number(number)) if number.as_i64().unwrap_or(0) < 0 => {
                errors.push(FieldError::invalid(path, number.as_i64(), rules::NOT_NEGATIVE));
            }
            Some(Value::String(text)) => match text.strip_suffix('%').map(str::parse::<u32>) {
                Some(Ok(percent)) if percent > 100 && field == "maxUnavailable" => errors.push(
                    FieldError::invalid(path, text.as_str(), "must not be greater than 100%"),
                ),
                Some(Ok(_)) => {}
                _ => errors.push(FieldError::invalid(
                    path,
                    text.as_str(),
                    "a valid percent string must be a numeric string followed by an ending '%' \
                     (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')",
                )),
            },
            _ => {}
        }
    }
    if zero("maxUnavailable") && zero("maxSurge") {
        errors.push(FieldError::invalid(
            "spec.strategy.rollingUpdate.maxUnavailable",
            rolling.get("maxUnavailable").cloned().unwrap_or_default(),
            "may not be 0 when `maxSurge` is 0",
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment(change: impl FnOnce(&mut Value)) -> Vec<String> {
        let mut object = json!({"spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "c", "image": "i"}]},
            },
        }});
        change(&mut object);
        default_deployment(&mut object);
        let mut errors = Vec::new();
        validate_deployment(&object, None, "", &mut errors);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn deployments_are_checked() {
        assert_eq!(deployment(|_| {}), [""; 0]);
        type Change = fn(&mut Value);
        let rows: [(Change, &str); 7] = [
            (
                |o| o["spec"]["selector"]["matchLabels"]["app"] = "db".into(),
                "spec.template.metadata.labels: Invalid value: {\"app\":\"web\"}: `selector` does \
                 not match template `labels`",
            ),
            (
                |o| o["spec"]["replicas"] = (-1).into(),
                "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
            ),
            (
                |o| o["spec"]["strategy"] = json!({"type": "Sometimes"}),
                "spec.strategy.type: Unsupported value: \"Sometimes\": supported values: \
                 \"Recreate\", \"RollingUpdate\"",
            ),
            (
                |o| {
                    o["spec"]["strategy"] =
                        json!({"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}});
                },
                "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: \"0%\": may not be 0 \
                 when `maxSurge` is 0",
            ),
            (
                |o| o["spec"]["template"]["spec"]["restartPolicy"] = "Never".into(),
                "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \
                 \"Always\"",
            ),
            (
                |o| o["spec"]["progressDeadlineSeconds"] = 0.into(),
                "spec.progressDeadlineSeconds: Invalid value: 0: must be greater than \
                 minReadySeconds",
            ),
            (
                |o| o["spec"]["template"]["spec"]["containers"] = json!([]),
                "spec.template.spec.containers: Required value",
            ),
        ];
        for (change, message) in rows {
            assert_eq!(deployment(change), [message]);
        }
    }

    #[test]
    fn the_selector_stays() {
        let object = |label: &str| {
            json!({"spec": {
                "selector": {"matchLabels": {"app": label}},
                "template": {"metadata": {"labels": {"app": label}},
                             "spec": {"containers": [{"name": "c", "image": "i"}]}},
            }})
        };
        let (mut new, old) = (object("a"), object("b"));
        default_deployment(&mut new);
        let mut errors = Vec::new();
        validate_deployment(&new, Some(&old), "", &mut errors);
        assert_eq!(
            errors[0].to_string(),
            "spec.selector: Invalid value: {\"matchLabels\":{\"app\":\"a\"}}: field is immutable"
        );
    }

    #[test]
    fn deployments_roll_a_quarter_at_a_time_unless_told_otherwise() {
        let mut object = json!({});
        default_deployment(&mut object);
        assert_eq!(
            object["spec"],
            json!({
                "replicas": 1, "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600,
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {
                    "maxUnavailable": "25%", "maxSurge": "25%",
                }},
            })
        );
    }
}
