//! Leases.

use serde_json::Value;

use crate::{
    registry::{Strategy, value},
    status::FieldError,
};

/// Leases.
pub(in crate::registry) static LEASE: Strategy =
    Strategy { validate, columns: &crate::table::LEASE, create_on_update: true, ..Strategy::PLAIN };

fn validate(new: &Value, _old: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    if let Some(seconds) = value::int(new, &["spec", "leaseDurationSeconds"])
        && seconds <= 0
    {
        let field = "spec.leaseDurationSeconds";
        errors.push(FieldError::invalid(field, seconds, "must be greater than 0"));
    }
    if let Some(count) = value::int(new, &["spec", "leaseTransitions"])
        && count < 0
    {
        let detail = "must be greater than or equal to 0";
        errors.push(FieldError::invalid("spec.leaseTransitions", count, detail));
    }
}
