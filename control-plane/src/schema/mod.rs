//! The types of the API: which fields there are, of what type, and how lists and maps are merged.
//!
//! One table for the whole process, read once from `types.json` (made by
//! `tools/schema-table.py`, which explains its form) and shared by decoding, patches, server-side
//! apply and the OpenAPI documents. It holds what is served and nothing else, and takes a few
//! hundred kilobytes.

mod check;
mod json;

use std::{collections::HashMap, sync::LazyLock};

use serde::Deserialize;
use serde_json::Value;

pub(crate) use self::{check::check, json::parse_with_duplicates};

static TABLE: &[u8] = include_bytes!("types.json");

static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    let table: HashMap<&str, TypeEntry<'_>> =
        serde_json::from_slice(TABLE).expect("the table of types is part of the program");
    Schema::new(table)
});

/// The types that the API server knows.
pub(crate) fn schema() -> &'static Schema {
    &SCHEMA
}

/// All types, by number.
#[derive(Debug)]
pub(crate) struct Schema {
    types: Vec<TypeDef>,
    numbers: HashMap<Box<str>, TypeId>,
}

/// A type's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TypeId(u16);

/// A structure.
#[derive(Debug)]
pub(crate) struct TypeDef {
    /// Name in OpenAPI without `io.k8s.`.
    pub(crate) name: Box<str>,
    /// By name.
    pub(crate) fields: Box<[Field]>,
    /// Owned and replaced as a whole.
    pub(crate) atomic: bool,
}

/// A field of a structure.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) name: Box<str>,
    pub(crate) shape: Shape,
    pub(crate) required: bool,
    pub(crate) default: Option<Box<Value>>,
    pub(crate) patch: Option<Box<PatchRule>>,
}

/// How a strategic merge patch treats a field.
#[derive(Debug, Default)]
pub(crate) struct PatchRule {
    /// Lists are merged by item.
    pub(crate) merge: bool,
    /// `$retainKeys` is honoured.
    pub(crate) retain_keys: bool,
    /// By which field of its items a list is merged; `None` for lists of scalars.
    pub(crate) key: Option<Box<str>>,
}

/// The type of a value.
#[derive(Debug)]
pub(crate) enum Shape {
    String,
    Boolean,
    Int32,
    Int64,
    Double,
    Bytes,
    Time,
    MicroTime,
    Quantity,
    IntOrString,
    /// Anything, owned as a whole.
    Any,
    Object(TypeId),
    List(Box<ListShape>),
    Map(Box<MapShape>),
}

/// A list.
#[derive(Debug)]
pub(crate) struct ListShape {
    pub(crate) items: Shape,
    pub(crate) kind: ListKind,
}

/// How a list is owned and merged by server-side apply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ListKind {
    /// As a whole.
    Atomic,
    /// Each scalar by itself.
    Set,
    /// Each object, known by these fields.
    Map(Box<[Box<str>]>),
}

/// A map from text.
#[derive(Debug)]
pub(crate) struct MapShape {
    pub(crate) values: Shape,
    pub(crate) atomic: bool,
}

#[derive(Deserialize)]
struct TypeEntry<'a> {
    #[serde(borrow)]
    fields: HashMap<&'a str, FieldEntry<'a>>,
    #[serde(default)]
    required: Vec<&'a str>,
    #[serde(default)]
    atomic: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum FieldEntry<'a> {
    Plain(&'a str),
    Full(#[serde(borrow)] FullEntry<'a>),
}

#[derive(Deserialize)]
struct FullEntry<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow, default)]
    list: Option<ListEntry<'a>>,
    #[serde(default)]
    atomic: bool,
    #[serde(default)]
    patch: Option<&'a str>,
    #[serde(default)]
    key: Option<&'a str>,
    #[serde(default)]
    default: Option<Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ListEntry<'a> {
    Keys(#[serde(borrow)] Vec<&'a str>),
    Named(#[expect(dead_code, reason = "`set` is the only name")] &'a str),
}

impl Schema {
    fn new(table: HashMap<&str, TypeEntry<'_>>) -> Self {
        let mut names: Vec<&str> = table.keys().copied().collect();
        names.sort_unstable();
        let numbers: HashMap<Box<str>, TypeId> = (0_u16..)
            .zip(&names)
            .map(|(number, name)| (Box::from(*name), TypeId(number)))
            .collect();
        let mut table = table;
        let types = names
            .iter()
            .filter_map(|name| table.remove_entry(name))
            .map(|(name, entry)| TypeDef::new(name, entry, &numbers))
            .collect();
        Self { types, numbers }
    }

    /// The type of a kind.
    pub(crate) fn kind(&self, group: &str, version: &str, kind: &str) -> Option<TypeId> {
        // `rbac.authorization.k8s.io` is `rbac` in the names of types.
        let group = match group.split('.').next().unwrap_or_default() {
            "" => "core",
            first => first,
        };
        self.named(&format!("api.{group}.{version}.{kind}"))
            .or_else(|| self.named(&format!("apimachinery.pkg.apis.meta.{version}.{kind}")))
    }

    /// The type of a name.
    pub(crate) fn named(&self, name: &str) -> Option<TypeId> {
        self.numbers.get(name).copied()
    }

    /// A type.
    pub(crate) fn get(&self, id: TypeId) -> &TypeDef {
        &self.types[usize::from(id.0)]
    }

    /// All types, by name.
    pub(crate) fn types(&self) -> impl Iterator<Item = &TypeDef> {
        self.types.iter()
    }
}

impl TypeDef {
    fn new(name: &str, entry: TypeEntry<'_>, numbers: &HashMap<Box<str>, TypeId>) -> Self {
        let mut fields: Vec<Field> = entry
            .fields
            .into_iter()
            .map(|(field, spec)| {
                let required = entry.required.contains(&field);
                Field::new(field, spec, required, numbers)
            })
            .collect();
        fields.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Self { name: name.into(), fields: fields.into(), atomic: entry.atomic }
    }

    /// A field by name.
    pub(crate) fn field(&self, name: &str) -> Option<&Field> {
        let at = self.fields.binary_search_by(|field| (*field.name).cmp(name)).ok()?;
        self.fields.get(at)
    }

    /// The last part of the name (`PodSpec`).
    pub(crate) fn short_name(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or_default()
    }
}

impl Field {
    fn new(
        name: &str,
        entry: FieldEntry<'_>,
        required: bool,
        numbers: &HashMap<Box<str>, TypeId>,
    ) -> Self {
        let entry = match entry {
            FieldEntry::Full(entry) => entry,
            FieldEntry::Plain(kind) => {
                FullEntry { kind, list: None, atomic: false, patch: None, key: None, default: None }
            }
        };
        let mut shape = Shape::parse(entry.kind, numbers);
        match &mut shape {
            Shape::List(list) => {
                list.kind = match entry.list {
                    None => ListKind::Atomic,
                    Some(ListEntry::Named(_)) => ListKind::Set,
                    Some(ListEntry::Keys(keys)) => {
                        ListKind::Map(keys.into_iter().map(Box::from).collect())
                    }
                };
            }
            Shape::Map(map) => map.atomic = entry.atomic,
            _ => {}
        }
        let patch = entry.patch.map(|strategies| {
            Box::new(PatchRule {
                merge: strategies.split(',').any(|s| s == "merge"),
                retain_keys: strategies.split(',').any(|s| s == "retainKeys"),
                key: entry.key.map(Box::from),
            })
        });
        Self { name: name.into(), shape, required, default: entry.default.map(Box::new), patch }
    }
}

impl Shape {
    fn parse(text: &str, numbers: &HashMap<Box<str>, TypeId>) -> Self {
        if let Some(items) = text.strip_prefix("[]") {
            let items = Self::parse(items, numbers);
            return Self::List(Box::new(ListShape { items, kind: ListKind::Atomic }));
        }
        if let Some(values) = text.strip_prefix("{}") {
            let values = Self::parse(values, numbers);
            return Self::Map(Box::new(MapShape { values, atomic: false }));
        }
        match text {
            "string" => Self::String,
            "boolean" => Self::Boolean,
            "int32" => Self::Int32,
            "int64" => Self::Int64,
            "double" => Self::Double,
            "bytes" => Self::Bytes,
            "time" => Self::Time,
            "microtime" => Self::MicroTime,
            "quantity" => Self::Quantity,
            "int-or-string" => Self::IntOrString,
            name => numbers.get(name).map_or(Self::Any, |id| Self::Object(*id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Registry;

    #[test]
    fn each_served_kind_has_a_type() {
        for resource in Registry::builtin().resources() {
            let id = schema().kind(&resource.group, &resource.version, &resource.kind);
            assert!(id.is_some(), "{} has no type", resource.kind);
            for sub in resource.subresources.iter().filter(|s| s.name == "scale") {
                assert!(schema().kind(sub.group, sub.version, sub.kind).is_some());
            }
        }
    }

    #[test]
    fn all_names_of_types_are_known() {
        let table: HashMap<&str, TypeEntry<'_>> = serde_json::from_slice(TABLE).unwrap();
        let plain = "string boolean int32 int64 double bytes time microtime quantity any \
                     int-or-string";
        for entry in table.values() {
            for field in entry.fields.values() {
                let text = match field {
                    FieldEntry::Plain(text) => text,
                    FieldEntry::Full(full) => full.kind,
                };
                let name = text.trim_start_matches("[]").trim_start_matches("{}");
                let name = name.trim_start_matches("[]");
                let known = table.contains_key(name) || plain.split(' ').any(|p| p == name);
                assert!(known, "{text}");
            }
        }
    }

    #[test]
    fn merge_rules_are_read() {
        let container = schema().get(schema().named("api.core.v1.Container").unwrap());
        let ports = container.field("ports").unwrap();
        let Shape::List(list) = &ports.shape else { panic!("a list") };
        assert_eq!(list.kind, ListKind::Map(["containerPort".into(), "protocol".into()].into()));
        assert_eq!(ports.patch.as_ref().unwrap().key.as_deref(), Some("containerPort"));
    }
}
