//! Events, which are one set of objects in two groups: kept as the core group has them, converted
//! for `events.k8s.io`.

use serde_json::{Map, Value, json};

use crate::{
    registry::{Strategy, strategy::FieldLabel, value},
    status::FieldError,
};

/// Events of the core group.
pub(in crate::registry) static CORE: Strategy = Strategy {
    validate,
    fields: FIELDS,
    columns: &crate::table::EVENT,
    create_on_update: true,
    ..Strategy::PLAIN
};

/// Events of `events.k8s.io`.
pub(in crate::registry) static EVENTS: Strategy = Strategy {
    create_on_update: true,
    validate,
    fields: FIELDS,
    columns: &crate::table::EVENT,
    from_stored: Some(from_core),
    to_stored: Some(to_core),
    ..Strategy::PLAIN
};

/// A field of the object that an event is about, whichever group's form it has.
fn about(event: &Value, field: &str) -> String {
    let core = value::text(event, &["involvedObject", field]);
    let text = if core.is_empty() { value::text(event, &["regarding", field]) } else { core };
    text.to_owned()
}

fn reporter(event: &Value) -> String {
    ["reportingComponent", "reportingController"]
        .iter()
        .map(|field| value::text(event, &[field]))
        .chain([
            value::text(event, &["source", "component"]),
            value::text(event, &["deprecatedSource", "component"]),
        ])
        .find(|text| !text.is_empty())
        .unwrap_or_default()
        .to_owned()
}

fn source(event: &Value) -> String {
    [["source", "component"], ["deprecatedSource", "component"]]
        .iter()
        .map(|path| value::text(event, path))
        .find(|text| !text.is_empty())
        .map_or_else(|| reporter(event), str::to_owned)
}

const FIELDS: &[FieldLabel] = &[
    ("involvedObject.kind", |e| about(e, "kind")),
    ("involvedObject.namespace", |e| about(e, "namespace")),
    ("involvedObject.name", |e| about(e, "name")),
    ("involvedObject.uid", |e| about(e, "uid")),
    ("involvedObject.apiVersion", |e| about(e, "apiVersion")),
    ("involvedObject.resourceVersion", |e| about(e, "resourceVersion")),
    ("involvedObject.fieldPath", |e| about(e, "fieldPath")),
    ("regarding.kind", |e| about(e, "kind")),
    ("regarding.namespace", |e| about(e, "namespace")),
    ("regarding.name", |e| about(e, "name")),
    ("regarding.uid", |e| about(e, "uid")),
    ("regarding.apiVersion", |e| about(e, "apiVersion")),
    ("regarding.resourceVersion", |e| about(e, "resourceVersion")),
    ("regarding.fieldPath", |e| about(e, "fieldPath")),
    ("reason", |e| value::text(e, &["reason"]).to_owned()),
    ("reportingComponent", reporter),
    ("reportingController", reporter),
    ("source", source),
    ("type", |e| value::text(e, &["type"]).to_owned()),
];

/// What the two groups call differently: core, events.
const NAMES: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

fn renamed(event: &Value, version: &str, rename: impl Fn(&str) -> Option<&'static str>) -> Value {
    let mut out = Map::new();
    for (name, field) in event.as_object().into_iter().flatten() {
        out.insert(rename(name).unwrap_or(name).to_owned(), field.clone());
    }
    out.insert("apiVersion".to_owned(), version.into());
    Value::Object(out)
}

fn from_core(event: &Value) -> Value {
    let mut out = renamed(event, "events.k8s.io/v1", |name| {
        NAMES.iter().find(|(core, _)| *core == name).map(|(_, other)| *other)
    });
    // Required there, though old events have none.
    if let Some(out) = out.as_object_mut() {
        out.entry("eventTime").or_insert(Value::Null);
    }
    out
}

fn to_core(event: &Value) -> Value {
    let mut out = renamed(event, "v1", |name| {
        NAMES.iter().find(|(_, other)| *other == name).map(|(core, _)| *core)
    });
    if let Some(out) = out.as_object_mut() {
        if out.get("eventTime").is_some_and(Value::is_null) {
            out.remove("eventTime");
        }
        for field in ["involvedObject", "source"] {
            out.entry(field).or_insert_with(|| json!({}));
        }
    }
    out
}

fn validate(new: &Value, _: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    let namespace = value::text(new, &["metadata", "namespace"]);
    let object_namespace = about(new, "namespace");
    let field = "involvedObject.namespace";
    if object_namespace.is_empty() {
        // What has no namespace tells of itself in the default one; nodes' old events too.
        if !matches!(namespace, "default" | "kube-system") {
            let detail = "does not match event.namespace";
            errors.push(FieldError::invalid(field, object_namespace, detail));
        }
    } else if object_namespace != namespace {
        let detail = "does not match event.namespace";
        errors.push(FieldError::invalid(field, object_namespace, detail));
    }
    let is_new = new.get("reportingController").is_some();
    if is_new && value::at(new, &["eventTime"]).is_some() {
        for (field, longest) in [("reason", 128), ("action", 128), ("note", 1024)] {
            let text = value::text(new, &[field]);
            if text.len() > longest {
                let detail = format!("can have at most {longest} characters");
                errors.push(FieldError::invalid(field, "", detail));
            }
        }
        for field in ["reportingInstance", "reason", "action"] {
            if value::text(new, &[field]).is_empty() {
                errors.push(FieldError::required(field, ""));
            }
        }
        let kind = value::text(new, &["type"]);
        if !matches!(kind, "Normal" | "Warning") {
            let detail = "has invalid value: ";
            errors.push(FieldError::invalid("type", "", format!("{detail}{kind}")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_convert_both_ways() {
        let core = json!({
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": "e", "namespace": "d"},
            "involvedObject": {"kind": "Pod", "name": "p", "namespace": "d"},
            "reason": "Started", "message": "up", "source": {"component": "kubelet", "host": "n"},
            "firstTimestamp": "2026-01-01T00:00:00Z", "count": 2, "type": "Normal",
            "reportingComponent": "kubelet", "reportingInstance": "n",
        });
        let event = from_core(&core);
        assert_eq!(event["note"], "up");
        assert_eq!(event["regarding"]["name"], "p");
        assert_eq!(event["deprecatedCount"], 2);
        assert_eq!(event["reportingController"], "kubelet");
        assert_eq!(to_core(&event), core);
        for form in [&core, &event] {
            assert_eq!(about(form, "name"), "p");
            assert_eq!(source(form), "kubelet");
        }
    }
}
