//! Lists as tables: the `meta.k8s.io/v1` Table that `kubectl get` prints.
//!
//! Each kind has its [`Columns`]: their definitions, and a function that makes the cells of one
//! object. Names, types and wording are Kubernetes' (`pkg/printers/internalversion`).

mod access;
mod duration;
mod network;
mod node;
mod pod;
mod selector;
mod workload;

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

pub(crate) use self::{
    access::{PRIORITY_CLASS, ROLE, ROLE_BINDING},
    network::{ENDPOINT_SLICE, ENDPOINTS, SERVICE},
    node::NODE,
    pod::POD,
    selector::selector_text,
    workload::{
        CONFIG_MAP, DEPLOYMENT, EVENT, LEASE, NAMESPACE, REPLICA_SET, SECRET, SERVICE_ACCOUNT,
    },
};
use crate::registry::{Resource, value};

/// What is printed where there is nothing.
const NONE: &str = "<none>";

/// A column.
#[derive(Debug)]
pub(crate) struct Column {
    name: &'static str,
    kind: &'static str,
    format: &'static str,
    /// Above 0: only in wide output.
    priority: u8,
}

const fn text(name: &'static str) -> Column {
    Column { name, kind: "string", format: "", priority: 0 }
}

const fn number(name: &'static str) -> Column {
    Column { name, kind: "integer", format: "", priority: 0 }
}

const fn wide(name: &'static str) -> Column {
    Column { name, kind: "string", format: "", priority: 1 }
}

const NAME: Column = Column { name: "Name", kind: "string", format: "name", priority: 0 };
const AGE: Column = text("Age");

/// The columns of a kind.
#[derive(Debug)]
pub(crate) struct Columns {
    columns: &'static [Column],
    /// The cells of an object, at a time.
    cells: fn(&Value, Timestamp) -> Vec<Value>,
}

/// For kinds without columns of their own.
pub(crate) static GENERIC: Columns = Columns {
    columns: &[NAME, Column { name: "Created At", kind: "date", format: "", priority: 0 }],
    cells: |object, _| {
        vec![name(object), value::text(object, &["metadata", "creationTimestamp"]).into()]
    },
};

/// How much of an object a row carries (`includeObject` of a request).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IncludeObject {
    /// Nothing.
    None,
    /// Its metadata.
    #[default]
    Metadata,
    /// All of it.
    Object,
}

impl IncludeObject {
    /// From the query parameter; what isn't known is as if it were not there.
    pub fn parse(parameter: Option<&str>) -> Self {
        match parameter {
            Some("None") => Self::None,
            Some("Object") => Self::Object,
            _ => Self::Metadata,
        }
    }
}

/// A Table of objects. `list_meta` is the metadata of the list (`resourceVersion`, `continue`,
/// `remainingItemCount`).
pub fn render(
    resource: &Resource,
    items: &[Arc<Value>],
    include: IncludeObject,
    now: Timestamp,
    list_meta: Value,
) -> Value {
    let columns = resource.strategy.columns;
    let rows: Vec<Value> = items.iter().map(|item| row(columns, item, include, now)).collect();
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": list_meta,
        "columnDefinitions": definitions(columns),
        "rows": rows,
    })
}

/// A Table of one object, as in an event of a watch: those after the first need no column
/// definitions.
pub fn render_event(
    resource: &Resource,
    item: &Value,
    include: IncludeObject,
    now: Timestamp,
    with_columns: bool,
) -> Value {
    let columns = resource.strategy.columns;
    let version = value::text(item, &["metadata", "resourceVersion"]);
    let shown = if with_columns { definitions(columns) } else { Value::Null };
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": { "resourceVersion": version },
        "columnDefinitions": shown,
        "rows": [row(columns, item, include, now)],
    })
}

fn definitions(columns: &Columns) -> Value {
    let definition = |column: &Column| {
        json!({
            "name": column.name,
            "type": column.kind,
            "format": column.format,
            "description": "",
            "priority": column.priority,
        })
    };
    columns.columns.iter().map(definition).collect()
}

fn row(columns: &Columns, item: &Value, include: IncludeObject, now: Timestamp) -> Value {
    let object = match include {
        IncludeObject::None => Value::Null,
        IncludeObject::Object => item.clone(),
        IncludeObject::Metadata => json!({
            "kind": "PartialObjectMetadata",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": item.get("metadata"),
        }),
    };
    json!({ "cells": (columns.cells)(item, now), "object": object })
}

fn name(object: &Value) -> Value {
    value::text(object, &["metadata", "name"]).into()
}

fn age(object: &Value, now: Timestamp) -> Value {
    since(value::text(object, &["metadata", "creationTimestamp"]), now).into()
}

/// How long ago a time was.
fn since(time: &str, now: Timestamp) -> String {
    time.parse::<Timestamp>()
        .map_or_else(|_| "<unknown>".to_owned(), |then| duration::human(now.duration_since(then)))
}

fn or_none(text: &str) -> Value {
    if text.is_empty() { NONE.into() } else { text.into() }
}

fn count(object: &Value, path: &[&str]) -> Value {
    value::int(object, path).unwrap_or(0).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Registry;

    #[test]
    fn each_kind_has_as_many_cells_as_columns() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        for resource in Registry::builtin().resources() {
            let items = [Arc::new(json!({"metadata": {"name": "x"}}))];
            let table = render(resource, &items, IncludeObject::Metadata, now, json!({}));
            assert_eq!(
                table["columnDefinitions"].as_array().unwrap().len(),
                table["rows"][0]["cells"].as_array().unwrap().len(),
                "{}",
                resource.kind
            );
            assert_eq!(table["rows"][0]["object"]["metadata"]["name"], "x");
        }
    }
}
