//! Priority classes.

use serde_json::Value;

use super::rules::{check_supported, immutable};
use crate::{
    registry::{
        Strategy,
        value::{self, set_default_text},
    },
    status::FieldError,
};

/// Priority classes.
pub(in crate::registry) static PRIORITY_CLASS: Strategy = Strategy {
    default: |class| {
        if let Some(class) = class.as_object_mut() {
            set_default_text(class, "preemptionPolicy", "PreemptLowerPriority");
        }
    },
    validate,
    columns: &crate::table::PRIORITY_CLASS,
    ..Strategy::PLAIN
};

/// The highest priority that a user may give.
const HIGHEST: i64 = 1_000_000_000;
/// Classes that the cluster brings, and their priorities.
const SYSTEM: [(&str, i64); 2] =
    [("system-node-critical", 2_000_001_000), ("system-cluster-critical", 2_000_000_000)];

fn validate(new: &Value, old: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    let name = value::text(new, &["metadata", "name"]);
    let priority = value::int(new, &["value"]).unwrap_or(0);
    let known = SYSTEM.iter().any(|(system, value)| *system == name && *value == priority);
    if name.starts_with("system-") && !known {
        errors.push(FieldError::forbidden(
            "metadata.name",
            "priority class names with 'system-' prefix are reserved for system use only",
        ));
    } else if priority > HIGHEST && !known {
        let detail = format!("maximum allowed value of a user defined priority is {HIGHEST}");
        errors.push(FieldError::forbidden("value", detail));
    }
    check_supported(
        "preemptionPolicy",
        value::text(new, &["preemptionPolicy"]),
        &["Never", "PreemptLowerPriority"],
        errors,
    );
    if let Some(old) = old {
        immutable(new, old, &["value"], "may not be changed in an update.", errors);
        immutable(new, old, &["preemptionPolicy"], "field is immutable", errors);
    }
}
