//! Nodes.

use serde_json::{Value, json};

use super::rules::{check_supported, qualified_name};
use crate::{
    registry::{
        Strategy,
        path::Path,
        value::{self, object_at, set_default_text},
    },
    status::FieldError,
};

/// Nodes.
pub(in crate::registry) static NODE: Strategy = Strategy {
    default,
    validate,
    fields: &[("spec.unschedulable", |o| value::flag(o, &["spec", "unschedulable"]).to_string())],
    columns: &crate::table::NODE,
    ..Strategy::PLAIN
};

fn default(node: &mut Value) {
    if let Some(spec) = object_at(node, "spec") {
        // `podCIDR` and the first of `podCIDRs` are one.
        let first = spec.get("podCIDRs").and_then(|list| list.get(0)).cloned();
        match (spec.get("podCIDR").and_then(Value::as_str).map(str::to_owned), first) {
            (Some(range), None) if !range.is_empty() => {
                spec.insert("podCIDRs".to_owned(), json!([range]));
            }
            (None, Some(Value::String(range))) => set_default_text(spec, "podCIDR", &range),
            _ => {}
        }
        if spec.get("unschedulable") == Some(&Value::Bool(false)) {
            spec.remove("unschedulable");
        }
    }
    // What a node has, it can give, until it says otherwise.
    if let Some(status) = node.get_mut("status").and_then(Value::as_object_mut)
        && let Some(capacity) = status.get("capacity").cloned()
    {
        status.entry("allocatable").or_insert(capacity);
    }
}

fn validate(new: &Value, old: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    taints(new, errors);
    for (index, range) in value::list(new, &["spec", "podCIDRs"]).iter().enumerate() {
        let text = range.as_str().unwrap_or_default();
        if text.parse::<ipnet::IpNet>().is_err() {
            errors.push(FieldError::invalid(
                format_args!("spec.podCIDRs[{index}]"),
                text,
                "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
            ));
        }
    }
    if let Some(old) = old {
        for (field, why) in [
            ("podCIDRs", "node updates may not change podCIDR except from \"\" to valid"),
            ("providerID", "node updates may not change providerID except from \"\" to valid"),
        ] {
            let before = value::at(old, &["spec", field]);
            let after = value::at(new, &["spec", field]);
            if before.is_some() && !value::same(before, after) {
                errors.push(FieldError::forbidden(format_args!("spec.{field}"), why));
            }
        }
    }
}

fn taints(node: &Value, errors: &mut Vec<FieldError>) {
    let spec = Path::Root.field("spec");
    let root = spec.field("taints");
    let mut seen = Vec::new();
    for (index, taint) in value::list(node, &["spec", "taints"]).iter().enumerate() {
        let at = root.index(index);
        let (key, effect) = (value::text(taint, &["key"]), value::text(taint, &["effect"]));
        for why in qualified_name(key) {
            errors.push(FieldError::invalid(at.field("key"), key, why));
        }
        let text = value::text(taint, &["value"]);
        for why in super::rules::label_value(text) {
            errors.push(FieldError::invalid(at.field("value"), text, why));
        }
        let effects = &["NoExecute", "NoSchedule", "PreferNoSchedule"];
        check_supported(at.field("effect"), effect, effects, errors);
        if seen.contains(&(key, effect)) {
            errors.push(FieldError::duplicate(at, taint.clone()));
        }
        seen.push((key, effect));
    }
}
