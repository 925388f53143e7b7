//! Types as OpenAPI schemas.

use serde_json::{Map, Value, json};

use crate::{
    registry::Resource,
    schema::{Field, ListKind, Shape, TypeId, schema},
};

/// Which OpenAPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    V2,
    V3,
}

impl Dialect {
    fn prefix(self) -> &'static str {
        match self {
            Self::V2 => "#/definitions/",
            Self::V3 => "#/components/schemas/",
        }
    }

    /// A reference to a type.
    pub(super) fn reference(self, name: &str) -> Value {
        json!({ "$ref": format!("{}{name}", self.prefix()) })
    }

    /// A reference where more may stand beside it: version 3 needs a wrapper.
    fn embedded(self, name: &str) -> Value {
        match self {
            Self::V2 => self.reference(name),
            Self::V3 => json!({ "allOf": [self.reference(name)] }),
        }
    }
}

/// The full name of a type of the table.
fn full_name(name: &str) -> String {
    format!("io.k8s.{name}")
}

const TIME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Time";
const MICRO_TIME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime";
const QUANTITY: &str = "io.k8s.apimachinery.pkg.api.resource.Quantity";
const INT_OR_STRING: &str = "io.k8s.apimachinery.pkg.util.intstr.IntOrString";
const LIST_META: &str = "apimachinery.pkg.apis.meta.v1.ListMeta";

/// The full name of a kind's type.
pub(super) fn kind_name(group: &str, version: &str, kind: &str) -> Option<String> {
    let id = schema().kind(group, version, kind)?;
    Some(full_name(&schema().get(id).name))
}

/// Collects types and all that they refer to.
pub(super) struct Types {
    dialect: Dialect,
    out: Map<String, Value>,
}

impl Types {
    pub(super) fn new(dialect: Dialect) -> Self {
        Self { dialect, out: Map::new() }
    }

    pub(super) fn finish(self) -> Map<String, Value> {
        self.out
    }

    /// Adds a kind, if its type is known.
    pub(super) fn add_kind(&mut self, group: &str, version: &str, kind: &str) {
        let Some(id) = schema().kind(group, version, kind) else { return };
        self.add(id);
        let name = full_name(&schema().get(id).name);
        if let Some(entry) = self.out.get_mut(&name) {
            entry["x-kubernetes-group-version-kind"] =
                json!([{"group": group, "version": version, "kind": kind}]);
        }
    }

    /// Adds the list of a kind.
    pub(super) fn add_list(&mut self, resource: &Resource) {
        let Some(item) = kind_name(&resource.group, &resource.version, &resource.kind) else {
            return;
        };
        if let Some(id) = schema().named(LIST_META) {
            self.add(id);
        }
        let list = json!({
            "description": format!("{} is a list of {}.", resource.list_kind, resource.kind),
            "type": "object",
            "required": ["items"],
            "properties": {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": self.dialect.embedded(&full_name(LIST_META)),
                "items": {"type": "array", "items": self.dialect.embedded(&item)},
            },
            "x-kubernetes-group-version-kind": [{
                "group": resource.group, "version": resource.version, "kind": resource.list_kind,
            }],
        });
        self.out.insert(format!("{item}List"), list);
    }

    fn add(&mut self, id: TypeId) {
        let structure = schema().get(id);
        let name = full_name(&structure.name);
        if self.out.contains_key(&name) {
            return;
        }
        // Taken first: types may refer to themselves.
        self.out.insert(name.clone(), Value::Null);
        let properties: Map<String, Value> = structure
            .fields
            .iter()
            .map(|field| (field.name.to_string(), self.field(field)))
            .collect();
        let required: Vec<&str> =
            structure.fields.iter().filter(|f| f.required).map(|f| &*f.name).collect();
        let mut entry = json!({"type": "object", "properties": properties});
        if !required.is_empty() {
            entry["required"] = required.into();
        }
        if structure.atomic {
            entry["x-kubernetes-map-type"] = "atomic".into();
        }
        self.out.insert(name, entry);
    }

    fn field(&mut self, field: &Field) -> Value {
        let mut out = self.shape(&field.shape);
        if let Some(default) = &field.default {
            out["default"] = (**default).clone();
        }
        if let Some(rule) = &field.patch {
            let strategy = match (rule.merge, rule.retain_keys) {
                (true, true) => "merge,retainKeys",
                (true, false) => "merge",
                (false, true) => "retainKeys",
                (false, false) => "replace",
            };
            out["x-kubernetes-patch-strategy"] = strategy.into();
            if let Some(key) = &rule.key {
                out["x-kubernetes-patch-merge-key"] = key.to_string().into();
            }
        }
        out
    }

    fn leaf(&mut self, name: &str, v2: &Value, v3: &Value) -> Value {
        let body = match self.dialect {
            Dialect::V2 => v2,
            Dialect::V3 => v3,
        };
        self.out.entry(name).or_insert_with(|| body.clone());
        self.dialect.embedded(name)
    }

    fn shape(&mut self, shape: &Shape) -> Value {
        match shape {
            Shape::String => json!({"type": "string"}),
            Shape::Boolean => json!({"type": "boolean"}),
            Shape::Int32 => json!({"type": "integer", "format": "int32"}),
            Shape::Int64 => json!({"type": "integer", "format": "int64"}),
            Shape::Double => json!({"type": "number", "format": "double"}),
            Shape::Bytes => json!({"type": "string", "format": "byte"}),
            Shape::Any => json!({"type": "object"}),
            Shape::Time => {
                let body = json!({"type": "string", "format": "date-time"});
                self.leaf(TIME, &body, &body)
            }
            Shape::MicroTime => {
                let body = json!({"type": "string", "format": "date-time"});
                self.leaf(MICRO_TIME, &body, &body)
            }
            Shape::Quantity => self.leaf(
                QUANTITY,
                &json!({"type": "string"}),
                &json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
            ),
            Shape::IntOrString => self.leaf(
                INT_OR_STRING,
                &json!({"type": "string", "format": "int-or-string"}),
                &json!({"format": "int-or-string",
                        "oneOf": [{"type": "integer"}, {"type": "string"}]}),
            ),
            Shape::Object(id) => {
                self.add(*id);
                self.dialect.embedded(&full_name(&schema().get(*id).name))
            }
            Shape::List(list) => {
                let mut out = json!({"type": "array", "items": self.shape(&list.items)});
                match &list.kind {
                    ListKind::Atomic => out["x-kubernetes-list-type"] = "atomic".into(),
                    ListKind::Set => out["x-kubernetes-list-type"] = "set".into(),
                    ListKind::Map(keys) => {
                        out["x-kubernetes-list-type"] = "map".into();
                        out["x-kubernetes-list-map-keys"] =
                            keys.iter().map(ToString::to_string).collect();
                    }
                }
                out
            }
            Shape::Map(map) => {
                let mut out =
                    json!({"type": "object", "additionalProperties": self.shape(&map.values)});
                if map.atomic {
                    out["x-kubernetes-map-type"] = "atomic".into();
                }
                out
            }
        }
    }
}
