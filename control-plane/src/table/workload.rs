//! Workloads, what they read, and what is told of them.

use jiff::Timestamp;
use serde_json::Value;

use super::{
    AGE, Column, Columns, NAME, NONE, age, count, name, number, selector_text, since, text, wide,
};
use crate::registry::value;

fn template_texts(object: &Value, field: &str) -> Value {
    value::list(object, &["spec", "template", "spec", "containers"])
        .iter()
        .map(|container| value::text(container, &[field]))
        .collect::<Vec<_>>()
        .join(",")
        .into()
}

fn selector(object: &Value) -> Value {
    match value::at(object, &["spec", "selector"]).map(selector_text) {
        Some(text) if !text.is_empty() => text.into(),
        _ => NONE.into(),
    }
}

pub(crate) static DEPLOYMENT: Columns = Columns {
    columns: &[
        NAME,
        text("Ready"),
        text("Up-to-date"),
        text("Available"),
        AGE,
        wide("Containers"),
        wide("Images"),
        wide("Selector"),
    ],
    cells: |object, now| {
        let ready = value::int(object, &["status", "readyReplicas"]).unwrap_or(0);
        let wanted = value::int(object, &["spec", "replicas"]).unwrap_or(0);
        vec![
            name(object),
            format!("{ready}/{wanted}").into(),
            count(object, &["status", "updatedReplicas"]),
            count(object, &["status", "availableReplicas"]),
            age(object, now),
            template_texts(object, "name"),
            template_texts(object, "image"),
            selector(object),
        ]
    },
};

pub(crate) static REPLICA_SET: Columns = Columns {
    columns: &[
        NAME,
        number("Desired"),
        number("Current"),
        number("Ready"),
        AGE,
        wide("Containers"),
        wide("Images"),
        wide("Selector"),
    ],
    cells: |object, now| {
        vec![
            name(object),
            count(object, &["spec", "replicas"]),
            count(object, &["status", "replicas"]),
            count(object, &["status", "readyReplicas"]),
            age(object, now),
            template_texts(object, "name"),
            template_texts(object, "image"),
            selector(object),
        ]
    },
};

fn size(object: &Value, field: &str) -> usize {
    value::entries(object, &[field]).count()
}

pub(crate) static CONFIG_MAP: Columns = Columns {
    columns: &[NAME, text("Data"), AGE],
    cells: |object, now| {
        vec![
            name(object),
            (size(object, "data") + size(object, "binaryData")).into(),
            age(object, now),
        ]
    },
};

pub(crate) static SECRET: Columns = Columns {
    columns: &[NAME, text("Type"), text("Data"), AGE],
    cells: |object, now| {
        vec![
            name(object),
            value::text(object, &["type"]).into(),
            size(object, "data").into(),
            age(object, now),
        ]
    },
};

pub(crate) static SERVICE_ACCOUNT: Columns =
    Columns { columns: &[NAME, AGE], cells: |object, now| vec![name(object), age(object, now)] };

pub(crate) static NAMESPACE: Columns = Columns {
    columns: &[NAME, text("Status"), AGE],
    cells: |object, now| {
        vec![name(object), value::text(object, &["status", "phase"]).into(), age(object, now)]
    },
};

pub(crate) static LEASE: Columns = Columns {
    columns: &[NAME, text("Holder"), AGE],
    cells: |object, now| {
        vec![
            name(object),
            value::text(object, &["spec", "holderIdentity"]).into(),
            age(object, now),
        ]
    },
};

pub(crate) static EVENT: Columns = Columns {
    columns: &[
        text("Last Seen"),
        text("Type"),
        text("Reason"),
        text("Object"),
        wide("Subobject"),
        wide("Source"),
        text("Message"),
        wide("First Seen"),
        wide("Count"),
        Column { name: "Name", kind: "string", format: "name", priority: 1 },
    ],
    cells: event,
};

/// An event of either group.
fn event(object: &Value, now: Timestamp) -> Vec<Value> {
    let either = |core: &[&str], other: &[&str]| -> String {
        let text = value::text(object, core);
        if text.is_empty() { value::text(object, other) } else { text }.to_owned()
    };
    let about = |field: &str| either(&["involvedObject", field], &["regarding", field]);
    let first = either(&["firstTimestamp"], &["deprecatedFirstTimestamp"]);
    let first = if first.is_empty() { either(&["eventTime"], &[]) } else { first };
    let mut last = either(&["lastTimestamp"], &["deprecatedLastTimestamp"]);
    let mut times = value::int(object, &["count"])
        .or_else(|| value::int(object, &["deprecatedCount"]))
        .filter(|count| *count != 0)
        .unwrap_or(1);
    if let Some(series) = value::at(object, &["series"]) {
        value::text(series, &["lastObservedTime"]).clone_into(&mut last);
        times = value::int(series, &["count"]).unwrap_or(times);
    } else if last.is_empty() {
        last.clone_from(&first);
    }
    let (kind, target) = (about("kind").to_lowercase(), about("name"));
    let source = |field: &str| either(&["source", field], &["deprecatedSource", field]);
    let (mut component, host) = (source("component"), source("host"));
    if component.is_empty() {
        component = either(&["reportingComponent"], &["reportingController"]);
    }
    let source = if host.is_empty() { component } else { format!("{component}, {host}") };
    let message = either(&["message"], &["note"]);
    vec![
        since(&last, now).into(),
        value::text(object, &["type"]).into(),
        value::text(object, &["reason"]).into(),
        if target.is_empty() { kind } else { format!("{kind}/{target}") }.into(),
        about("fieldPath").into(),
        source.into(),
        message.trim().into(),
        since(&first, now).into(),
        times.into(),
        name(object),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_read_as_in_kubectl() {
        let now = "2026-01-01T00:10:00Z".parse().unwrap();
        let object = json!({
            "metadata": {"name": "e"}, "type": "Normal", "reason": "Started", "message": "up\n",
            "involvedObject": {"kind": "Pod", "name": "p", "fieldPath": "spec.containers{a}"},
            "source": {"component": "kubelet", "host": "n"}, "count": 4,
            "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:09:00Z",
        });
        assert_eq!(
            Value::Array(event(&object, now)),
            json!([
                "60s",
                "Normal",
                "Started",
                "pod/p",
                "spec.containers{a}",
                "kubelet, n",
                "up",
                "10m",
                4,
                "e"
            ])
        );
    }

    #[test]
    fn deployments_show_how_many_are_ready() {
        let object = json!({"metadata": {"name": "d"},
            "spec": {"replicas": 3, "selector": {"matchLabels": {"a": "b"}},
                     "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}},
            "status": {"readyReplicas": 2, "updatedReplicas": 3, "availableReplicas": 2}});
        assert_eq!(
            Value::Array((DEPLOYMENT.cells)(&object, Timestamp::UNIX_EPOCH)),
            json!(["d", "2/3", 3, 2, "<unknown>", "c", "i", "a=b"])
        );
    }
}
