//! What is wrong with a pod's wishes about where it runs: affinity and topology spread constraints.

use serde_json::Value;

use crate::{
    registry::{
        kinds::rules::{self, check_supported},
        path::Path,
        value,
    },
    status::FieldError,
};

const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";
const NO_OPERATOR: &str = "not a valid selector operator";
const NOT_POSITIVE: &str = "must be greater than zero";

/// Checks `affinity` and `topologySpreadConstraints`.
pub(super) fn validate(spec: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = path.field("affinity");
    if let Some(affinity) = spec.get("affinity").and_then(|affinity| affinity.get("nodeAffinity")) {
        node_affinity(affinity, &root.field("nodeAffinity"), errors);
    }
    for field in ["podAffinity", "podAntiAffinity"] {
        if let Some(affinity) = spec.get("affinity").and_then(|affinity| affinity.get(field)) {
            pod_affinity(affinity, &root.field(field), errors);
        }
    }
    spread(spec, path, errors);
}

fn node_affinity(affinity: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    if let Some(required) = affinity.get(REQUIRED).filter(|required| !required.is_null()) {
        let root = path.field(REQUIRED);
        let root = root.field("nodeSelectorTerms");
        let terms = value::list(required, &["nodeSelectorTerms"]);
        if terms.is_empty() {
            errors.push(FieldError::required(root, "must have at least one node selector term"));
        }
        for (index, term) in terms.iter().enumerate() {
            node_selector_term(term, &root.index(index), errors);
        }
    }
    let root = path.field(PREFERRED);
    for (index, term) in value::list(affinity, &[PREFERRED]).iter().enumerate() {
        let at = root.index(index);
        weight(term, &at, errors);
        let preference = term.get("preference").unwrap_or(&Value::Null);
        node_selector_term(preference, &at.field("preference"), errors);
    }
}

fn weight(term: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let weight = value::int(term, &["weight"]).unwrap_or(0);
    if !(1..=100).contains(&weight) {
        let why = "must be in the range 1-100";
        errors.push(FieldError::invalid(path.field("weight"), weight, why));
    }
}

fn label_name(name: &str, path: Path<'_>, errors: &mut Vec<FieldError>) {
    for why in rules::qualified_name(name) {
        errors.push(FieldError::invalid(path, name, why));
    }
}

fn node_selector_term(term: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = path.field("matchExpressions");
    for (index, expression) in value::list(term, &["matchExpressions"]).iter().enumerate() {
        let at = root.index(index);
        let count = value::list(expression, &["values"]).len();
        let values = at.field("values");
        match value::text(expression, &["operator"]) {
            "In" | "NotIn" if count == 0 => errors.push(FieldError::required(
                values,
                "must be specified when `operator` is 'In' or 'NotIn'",
            )),
            "Exists" | "DoesNotExist" if count > 0 => errors.push(FieldError::forbidden(
                values,
                "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
            )),
            "Gt" | "Lt" if count != 1 => errors.push(FieldError::required(
                values,
                "must be specified single value when `operator` is 'Lt' or 'Gt'",
            )),
            "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
            other => errors.push(FieldError::invalid(at.field("operator"), other, NO_OPERATOR)),
        }
        label_name(value::text(expression, &["key"]), at.field("key"), errors);
    }
    let root = path.field("matchFields");
    for (index, expression) in value::list(term, &["matchFields"]).iter().enumerate() {
        let at = root.index(index);
        match value::text(expression, &["operator"]) {
            "In" | "NotIn" if value::list(expression, &["values"]).len() != 1 => {
                errors.push(FieldError::required(
                    at.field("values"),
                    "must be only one value when `operator` is 'In' or 'NotIn' for node field \
                     selector",
                ));
            }
            "In" | "NotIn" => {}
            other => errors.push(FieldError::invalid(at.field("operator"), other, NO_OPERATOR)),
        }
        let key = value::text(expression, &["key"]);
        if key != "metadata.name" {
            let why = "not a valid field selector key";
            errors.push(FieldError::invalid(at.field("key"), key, why));
        }
    }
}

fn pod_affinity(affinity: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = path.field(REQUIRED);
    for (index, term) in value::list(affinity, &[REQUIRED]).iter().enumerate() {
        pod_affinity_term(term, &root.index(index), errors);
    }
    let root = path.field(PREFERRED);
    for (index, weighted) in value::list(affinity, &[PREFERRED]).iter().enumerate() {
        let at = root.index(index);
        weight(weighted, &at, errors);
        let term = weighted.get("podAffinityTerm").unwrap_or(&Value::Null);
        pod_affinity_term(term, &at.field("podAffinityTerm"), errors);
    }
}

fn pod_affinity_term(term: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    for field in ["labelSelector", "namespaceSelector"] {
        if let Some(selector) = term.get(field) {
            rules::label_selector(selector, &path.field(field), errors);
        }
    }
    let namespaces = path.field("namespaces");
    for (index, namespace) in value::list(term, &["namespaces"]).iter().enumerate() {
        let name = namespace.as_str().unwrap_or_default();
        if let Some(why) = rules::dns_label(name) {
            errors.push(FieldError::invalid(namespaces.index(index), name, why));
        }
    }
    topology_key(term, path, errors);
}

fn topology_key(term: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    match value::text(term, &["topologyKey"]) {
        "" => errors.push(FieldError::required(path.field("topologyKey"), "can not be empty")),
        key => label_name(key, path.field("topologyKey"), errors),
    }
}

fn spread(spec: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = path.field("topologySpreadConstraints");
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for (index, constraint) in value::list(spec, &["topologySpreadConstraints"]).iter().enumerate()
    {
        let at = root.index(index);
        let text = |field: &str| value::text(constraint, &[field]);
        let skew = value::int(constraint, &["maxSkew"]).unwrap_or(0);
        if skew <= 0 {
            errors.push(FieldError::invalid(at.field("maxSkew"), skew, NOT_POSITIVE));
        }
        topology_key(constraint, &at, errors);
        let action = text("whenUnsatisfiable");
        let actions = &["DoNotSchedule", "ScheduleAnyway"];
        check_supported(at.field("whenUnsatisfiable"), action, actions, errors);
        let pair = (text("topologyKey"), action);
        if seen.contains(&pair) {
            let field = "{topologyKey, whenUnsatisfiable}";
            let twice = format!("{{{}, {}}}", pair.0, pair.1);
            errors.push(FieldError::duplicate(at.field(field), twice));
        }
        seen.push(pair);
        if let Some(least) = value::int(constraint, &["minDomains"]) {
            if least <= 0 {
                errors.push(FieldError::invalid(at.field("minDomains"), least, NOT_POSITIVE));
            }
            if action != "DoNotSchedule" {
                let why = format!(
                    "can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {action}"
                );
                errors.push(FieldError::invalid(at.field("minDomains"), least, why));
            }
        }
        for field in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            if constraint.get(field).is_some_and(|policy| !policy.is_null()) {
                check_supported(at.field(field), text(field), &["Honor", "Ignore"], errors);
            }
        }
        if let Some(selector) = constraint.get("labelSelector") {
            rules::label_selector(selector, &at.field("labelSelector"), errors);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn problems(spec: Value) -> Vec<String> {
        let mut errors = Vec::new();
        validate(&spec, &Path::Root.field("spec"), &mut errors);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn affinity_terms_are_checked() {
        let nodes = |term: Value| json!({"affinity": {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [term]}}}});
        let at = format!("spec.affinity.nodeAffinity.{REQUIRED}.nodeSelectorTerms");
        let good = json!({"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}],
            "matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]});
        assert!(problems(nodes(good)).is_empty());
        let rows = [
            (
                nodes(json!({"matchExpressions": [{"key": "a", "operator": "Equals"}]})),
                format!(
                    "{at}[0].matchExpressions[0].operator: Invalid value: \"Equals\": {NO_OPERATOR}"
                ),
            ),
            (
                nodes(json!({"matchExpressions": [{"key": "a", "operator": "In"}]})),
                format!(
                    "{at}[0].matchExpressions[0].values: Required value: must be specified when \
                     `operator` is 'In' or 'NotIn'"
                ),
            ),
            (
                json!({"affinity": {"nodeAffinity": {REQUIRED: {}}}}),
                format!("{at}: Required value: must have at least one node selector term"),
            ),
            (
                json!({"affinity": {"podAntiAffinity": {REQUIRED: [{"labelSelector": {}}]}}}),
                format!(
                    "spec.affinity.podAntiAffinity.{REQUIRED}[0].topologyKey: Required value: can \
                     not be empty"
                ),
            ),
            (
                json!({"affinity": {"podAffinity": {PREFERRED: [
                    {"weight": 101, "podAffinityTerm": {"topologyKey": "zone"}}]}}}),
                format!(
                    "spec.affinity.podAffinity.{PREFERRED}[0].weight: Invalid value: 101: must be \
                     in the range 1-100"
                ),
            ),
        ];
        for (spec, problem) in rows {
            assert_eq!(problems(spec), [problem]);
        }
    }

    #[test]
    fn spread_constraints_are_checked() {
        let good =
            json!({"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"});
        let with = |field: &str, value: Value| {
            let mut constraint = good.clone();
            constraint[field] = value;
            problems(json!({"topologySpreadConstraints": [constraint]}))
        };
        let at = "spec.topologySpreadConstraints";
        assert!(with("minDomains", json!(2)).is_empty());
        let rows = [
            ("maxSkew", json!(0), "Invalid value: 0: must be greater than zero"),
            ("topologyKey", json!(""), "Required value: can not be empty"),
            (
                "whenUnsatisfiable",
                json!("Never"),
                "Unsupported value: \"Never\": supported values: \"DoNotSchedule\", \
                 \"ScheduleAnyway\"",
            ),
        ];
        for (field, value, problem) in rows {
            assert_eq!(with(field, value), [format!("{at}[0].{field}: {problem}")]);
        }
        assert_eq!(
            problems(json!({"topologySpreadConstraints": [good, good]})),
            [format!(
                "{at}[1].{{topologyKey, whenUnsatisfiable}}: Duplicate value: \"{{zone, \
                 DoNotSchedule}}\""
            )]
        );
    }
}
