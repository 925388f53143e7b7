//! Pods.

mod containers;
mod default;
mod placement;
mod security;
mod spec;
mod update;
mod volumes;

use jiff::Timestamp;
use serde_json::{Value, json};

pub(in crate::registry) use self::default::template as default_template;
pub(in crate::registry) use self::spec::validate_template;
use crate::{
    registry::{Strategy, strategy::FieldLabel, timestamp, value},
    status::{FieldError, Status},
};

/// Pods.
pub(in crate::registry) static POD: Strategy = Strategy {
    default: default::pod,
    prepare_create,
    prepare_update: update::prepare,
    validate,
    fields: FIELDS,
    columns: &crate::table::POD,
    ..Strategy::PLAIN
};

const FIELDS: &[FieldLabel] = &[
    ("spec.nodeName", |o| value::text(o, &["spec", "nodeName"]).to_owned()),
    ("spec.restartPolicy", |o| value::text(o, &["spec", "restartPolicy"]).to_owned()),
    ("spec.schedulerName", |o| value::text(o, &["spec", "schedulerName"]).to_owned()),
    ("spec.serviceAccountName", |o| value::text(o, &["spec", "serviceAccountName"]).to_owned()),
    ("spec.hostNetwork", |o| value::flag(o, &["spec", "hostNetwork"]).to_string()),
    ("status.phase", |o| value::text(o, &["status", "phase"]).to_owned()),
    ("status.podIP", |o| value::text(o, &["status", "podIP"]).to_owned()),
    ("status.podIPs", |o| value::text(o, &["status", "podIP"]).to_owned()),
    ("status.nominatedNodeName", |o| value::text(o, &["status", "nominatedNodeName"]).to_owned()),
];

fn prepare_create(pod: &mut Value) {
    let qos = quality_of_service(pod);
    pod["status"] = json!({"phase": "Pending", "qosClass": qos});
    if !value::list(pod, &["spec", "schedulingGates"]).is_empty() {
        // KEP-3521: nobody else says so, the scheduler does not look at such a pod.
        set_condition(
            pod,
            json!({
                "type": "PodScheduled",
                "status": "False",
                "reason": "SchedulingGated",
                "message": "Scheduling is blocked due to non-empty scheduling gates",
            }),
        );
    }
}

/// `status.qosClass`: how the node treats the pod when memory runs short.
fn quality_of_service(pod: &Value) -> &'static str {
    let spec = pod.get("spec").unwrap_or(&Value::Null);
    let pod_level = value::at(spec, &["resources"]).filter(|r| {
        r.as_object().is_some_and(|r| r.contains_key("requests") || r.contains_key("limits"))
    });
    let containers = value::list(spec, &["containers"])
        .iter()
        .chain(value::list(spec, &["initContainers"]))
        .map(|c| c.get("resources").unwrap_or(&Value::Null));
    let all: Vec<&Value> = match pod_level {
        Some(resources) => vec![resources],
        None => containers.collect(),
    };
    let asked = |resources: &Value, kind: &str, name: &str| {
        value::at(resources, &[kind, name])
            .and_then(Value::as_str)
            .and_then(|text| keelson_api::quantity::Quantity::parse(text).ok())
            .filter(|quantity| !quantity.is_zero())
    };
    let names = ["cpu", "memory"];
    let anything = all.iter().any(|resources| {
        names.iter().any(|name| {
            asked(resources, "requests", name).is_some()
                || asked(resources, "limits", name).is_some()
        })
    });
    let everything = all.iter().all(|resources| {
        names.iter().all(|name| {
            let limit = asked(resources, "limits", name);
            let request = asked(resources, "requests", name).or(limit);
            limit.is_some() && request == limit
        })
    });
    match (anything, everything) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

fn validate(new: &Value, old: Option<&Value>, subresource: &str, errors: &mut Vec<FieldError>) {
    match old {
        None => spec::validate(new, errors),
        Some(old) => update::validate(new, old, subresource, errors),
    }
}

/// Puts a pod on a node, as a Binding says (`pods/binding`).
///
/// # Errors
/// 422 if the Binding names no node, 409 if the pod has a node, is gated or is being deleted, or
/// is another than the Binding's.
pub fn bind(pod: &mut Value, binding: &Value, now: Timestamp) -> Result<(), Status> {
    let name = value::text(pod, &["metadata", "name"]).to_owned();
    let node = value::text(binding, &["target", "name"]).to_owned();
    let kind = value::text(binding, &["target", "kind"]);
    let mut errors = Vec::new();
    if !matches!(kind, "" | "Node") {
        errors.push(FieldError::not_supported("target.kind", kind, &["Node", "<empty>"]));
    }
    if node.is_empty() {
        errors.push(FieldError::required("target.name", ""));
    }
    if !errors.is_empty() {
        return Err(Status::invalid("", "Binding", &name, &errors));
    }
    let refuse = |why: String| Err(Status::conflict("", "pods/binding", &name, &why));
    let (uid, wanted) =
        (value::text(pod, &["metadata", "uid"]), value::text(binding, &["metadata", "uid"]));
    if !wanted.is_empty() && wanted != uid {
        return refuse(format!(
            "Precondition failed: UID in precondition: {wanted}, UID in object meta: {uid}"
        ));
    }
    if value::at(pod, &["metadata", "deletionTimestamp"]).is_some() {
        return refuse(format!("pod {name} is being deleted, cannot be assigned to a host"));
    }
    let present = value::text(pod, &["spec", "nodeName"]);
    if !present.is_empty() {
        return refuse(format!("pod {name} is already assigned to node {present:?}"));
    }
    if !value::list(pod, &["spec", "schedulingGates"]).is_empty() {
        return refuse(format!("pod {name} has non-empty .spec.schedulingGates"));
    }
    if let Some(spec) = value::object_at(pod, "spec") {
        spec.insert("nodeName".to_owned(), node.into());
    }
    for field in ["annotations", "labels"] {
        for (key, entry) in value::entries(binding, &["metadata", field]) {
            if let Some(metadata) = value::object_at(pod, "metadata") {
                let map = metadata.entry(field).or_insert_with(|| json!({}));
                map[key] = entry.clone();
            }
        }
    }
    set_condition(
        pod,
        json!({
            "type": "PodScheduled",
            "status": "True",
            "lastTransitionTime": timestamp(now),
        }),
    );
    Ok(())
}

fn set_condition(pod: &mut Value, condition: Value) {
    let Some(status) = value::object_at(pod, "status") else { return };
    let conditions = status.entry("conditions").or_insert_with(|| json!([]));
    let Some(conditions) = conditions.as_array_mut() else { return };
    match conditions.iter_mut().find(|c| c["type"] == condition["type"]) {
        Some(present) => *present = condition,
        None => conditions.push(condition),
    }
}

#[cfg(test)]
mod tests;
