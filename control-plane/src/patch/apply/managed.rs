//! `metadata.managedFields`: who set which fields, when, and how.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::set::FieldSet;
use crate::registry::{timestamp, value};

/// As many managers by update are kept; older ones become one.
const MOST_UPDATERS: usize = 10;
/// The one that they become.
const ANCIENT: &str = "ancient-changes";

/// How a manager writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Operation {
    Apply,
    Update,
}

/// Who, how and where. Those who apply are one whatever the version.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Manager {
    pub(super) name: String,
    pub(super) operation: Operation,
    pub(super) subresource: String,
    /// Empty for those who apply.
    pub(super) api_version: String,
}

impl Manager {
    pub(super) fn applier(name: &str, subresource: &str) -> Self {
        Self {
            name: name.to_owned(),
            operation: Operation::Apply,
            subresource: subresource.to_owned(),
            api_version: String::new(),
        }
    }

    pub(super) fn updater(name: &str, subresource: &str, api_version: &str) -> Self {
        Self {
            name: name.to_owned(),
            operation: Operation::Update,
            subresource: subresource.to_owned(),
            api_version: api_version.to_owned(),
        }
    }

    /// As conflicts name them.
    pub(super) fn shown(&self) -> String {
        let mut out = format!("{:?}", self.name);
        if !self.subresource.is_empty() {
            out.push_str(&format!(" with subresource {:?}", self.subresource));
        }
        if self.operation == Operation::Update {
            out.push_str(&format!(" using {}", self.api_version));
        }
        out
    }
}

/// What a manager has.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Held {
    pub(super) fields: FieldSet,
    pub(super) api_version: String,
    pub(super) time: Option<String>,
}

/// All managers of an object.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Managed(pub(super) BTreeMap<Manager, Held>);

impl Managed {
    /// Reads an object's; `None` if they make no sense.
    pub(super) fn read(object: &Value) -> Option<Self> {
        let mut out = BTreeMap::new();
        for entry in value::list(object, &["metadata", "managedFields"]) {
            let name = value::text(entry, &["manager"]);
            let subresource = value::text(entry, &["subresource"]);
            let api_version = value::text(entry, &["apiVersion"]);
            let manager = match value::text(entry, &["operation"]) {
                "Apply" => Manager::applier(name, subresource),
                "Update" => Manager::updater(name, subresource, api_version),
                _ => return None,
            };
            if !matches!(value::text(entry, &["fieldsType"]), "FieldsV1") {
                return None;
            }
            let fields = match entry.get("fieldsV1") {
                Some(fields) => FieldSet::from_value(fields)?,
                None => FieldSet::default(),
            };
            let time = value::at(entry, &["time"]).and_then(Value::as_str).map(str::to_owned);
            out.insert(manager, Held { fields, api_version: api_version.to_owned(), time });
        }
        Some(Self(out))
    }

    /// Whether a client asks that all be forgotten: one entry with nothing in it.
    pub(super) fn is_reset(object: &Value) -> bool {
        match value::list(object, &["metadata", "managedFields"]) {
            [only] => only.as_object().is_some_and(Map::is_empty),
            _ => false,
        }
    }

    /// Makes one of the oldest managers by update if there are too many.
    pub(super) fn cap(&mut self, now: Timestamp) {
        let mut updaters: Vec<(Option<String>, Manager)> = self
            .0
            .iter()
            .filter(|(manager, _)| manager.operation == Operation::Update)
            .map(|(manager, held)| (held.time.clone(), manager.clone()))
            .collect();
        if updaters.len() <= MOST_UPDATERS {
            return;
        }
        updaters.sort();
        let surplus = updaters.len() - MOST_UPDATERS + 1;
        for (_, manager) in updaters.into_iter().take(surplus) {
            let Some(held) = self.0.remove(&manager) else { continue };
            let ancient = Manager::updater(ANCIENT, "", &held.api_version);
            let into = self.0.entry(ancient).or_insert_with(|| Held {
                fields: FieldSet::default(),
                api_version: held.api_version.clone(),
                time: None,
            });
            into.fields = into.fields.union(&held.fields);
            into.time = held.time.or_else(|| Some(timestamp(now)));
        }
    }

    /// Writes them into an object.
    pub(super) fn write(&self, object: &mut Value) {
        let Some(metadata) = value::object_at(object, "metadata") else { return };
        let mut entries: Vec<(&Manager, &Held)> =
            self.0.iter().filter(|(_, held)| !held.fields.is_empty()).collect();
        if entries.is_empty() {
            metadata.remove("managedFields");
            return;
        }
        entries.sort_by(|(a, held_a), (b, held_b)| {
            (a.operation, &held_a.time, a).cmp(&(b.operation, &held_b.time, b))
        });
        let list = entries.into_iter().map(|(manager, held)| entry(manager, held)).collect();
        metadata.insert("managedFields".to_owned(), Value::Array(list));
    }
}

fn entry(manager: &Manager, held: &Held) -> Value {
    let operation = match manager.operation {
        Operation::Apply => "Apply",
        Operation::Update => "Update",
    };
    let mut out = json!({
        "manager": manager.name,
        "operation": operation,
        "apiVersion": held.api_version,
        "fieldsType": "FieldsV1",
        "fieldsV1": held.fields.to_value(),
    });
    if let Some(time) = &held.time {
        out["time"] = time.as_str().into();
    }
    if !manager.subresource.is_empty() {
        out["subresource"] = manager.subresource.as_str().into();
    }
    out
}
