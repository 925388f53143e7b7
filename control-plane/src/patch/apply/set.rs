//! Sets of fields in the form of `managedFields` (`FieldsV1`).
//!
//! A set is a tree of path elements as they are written there: `f:name` for a field, `k:{…}` for
//! an item of a list known by its keys, `v:…` for a scalar in a set, `i:n` for an index. A node
//! may itself be a member (`.`) and have members below.

use std::{collections::BTreeMap, fmt};

use serde_json::{Map, Value};

/// How deep a set that a client sends may be.
const DEEPEST: usize = 64;

/// A set of fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FieldSet {
    /// Whether the field at this place is a member.
    pub(super) here: bool,
    /// What is below.
    pub(super) below: BTreeMap<String, FieldSet>,
}

impl FieldSet {
    /// Just this field.
    pub(super) fn leaf() -> Self {
        Self { here: true, below: BTreeMap::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.here && self.below.is_empty()
    }

    /// Puts a set below, unless it is empty.
    pub(super) fn insert(&mut self, element: String, set: Self) {
        if !set.is_empty() {
            self.below.insert(element, set);
        }
    }

    pub(super) fn union(&self, other: &Self) -> Self {
        let mut out = self.clone();
        out.here |= other.here;
        for (element, set) in &other.below {
            let merged = match out.below.get(element) {
                Some(own) => own.union(set),
                None => set.clone(),
            };
            out.below.insert(element.clone(), merged);
        }
        out
    }

    pub(super) fn intersection(&self, other: &Self) -> Self {
        let mut out = Self { here: self.here && other.here, below: BTreeMap::new() };
        for (element, set) in &self.below {
            if let Some(other) = other.below.get(element) {
                out.insert(element.clone(), set.intersection(other));
            }
        }
        out
    }

    /// The members that are not in `other`.
    pub(super) fn difference(&self, other: &Self) -> Self {
        let mut out = Self { here: self.here && !other.here, below: BTreeMap::new() };
        for (element, set) in &self.below {
            let left = match other.below.get(element) {
                Some(other) => set.difference(other),
                None => set.clone(),
            };
            out.insert(element.clone(), left);
        }
        out
    }

    /// The members that are neither in `other` nor below a member of it.
    pub(super) fn without_prefixes(&self, other: &Self) -> Self {
        if other.here {
            return Self::default();
        }
        let mut out = Self { here: self.here, below: BTreeMap::new() };
        for (element, set) in &self.below {
            let left = match other.below.get(element) {
                Some(other) => set.without_prefixes(other),
                None => set.clone(),
            };
            out.insert(element.clone(), left);
        }
        out
    }

    /// The same with each field on the way to a member a member too (items of lists not).
    pub(super) fn with_named_parents(&self) -> Self {
        let below = self
            .below
            .iter()
            .map(|(element, set)| {
                let mut set = set.with_named_parents();
                set.here |= element.starts_with("f:");
                (element.clone(), set)
            })
            .collect();
        Self { here: self.here, below }
    }

    /// A set of one path of fields.
    pub(super) fn path(fields: &[&str]) -> Self {
        match fields {
            [] => Self::leaf(),
            [first, rest @ ..] => {
                let mut out = Self::default();
                out.insert(format!("f:{first}"), Self::path(rest));
                out
            }
        }
    }

    /// The members' paths, as messages have them.
    pub(super) fn paths(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.collect_paths(&mut String::new(), &mut out);
        out
    }

    fn collect_paths(&self, prefix: &mut String, out: &mut Vec<String>) {
        if self.here {
            out.push(prefix.clone());
        }
        for (element, set) in &self.below {
            let length = prefix.len();
            prefix.push_str(&Shown(element).to_string());
            set.collect_paths(prefix, out);
            prefix.truncate(length);
        }
    }

    /// `fieldsV1`.
    pub(super) fn to_value(&self) -> Value {
        let mut out = Map::new();
        if self.here && !self.below.is_empty() {
            out.insert(".".to_owned(), Value::Object(Map::new()));
        }
        for (element, set) in &self.below {
            out.insert(element.clone(), set.to_value());
        }
        Value::Object(out)
    }

    /// From `fieldsV1`; `None` if it is none.
    pub(super) fn from_value(value: &Value) -> Option<Self> {
        let mut out = Self::read(value, DEEPEST)?;
        // The object itself is no field.
        out.here = false;
        Some(out)
    }

    fn read(value: &Value, depth: usize) -> Option<Self> {
        let fields = value.as_object()?;
        let depth = depth.checked_sub(1)?;
        let mut out = Self { here: fields.is_empty(), below: BTreeMap::new() };
        for (element, below) in fields {
            if element == "." {
                out.here = true;
                continue;
            }
            let element = match element.split_once(':')? {
                ("f", _) => element.clone(),
                ("k", key) => format!("k:{}", canonical(&serde_json::from_str(key).ok()?)),
                ("v", scalar) => {
                    format!("v:{}", serde_json::from_str::<Value>(scalar).ok()?)
                }
                ("i", index) => format!("i:{}", index.parse::<usize>().ok()?),
                _ => return None,
            };
            out.insert(element, Self::read(below, depth)?);
        }
        Some(out)
    }
}

/// An object with its fields sorted, so that equal keys are equal text.
pub(super) fn canonical(key: &Value) -> String {
    let sorted: BTreeMap<&String, &Value> = key.as_object().into_iter().flatten().collect();
    serde_json::to_string(&sorted).unwrap_or_default()
}

/// A path element as messages show it: `.name`, `[name="x"]`, `["x"]`, `[0]`.
struct Shown<'a>(&'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.split_once(':') {
            Some(("f", name)) => write!(f, ".{name}"),
            Some(("k", key)) => {
                let key: Value = serde_json::from_str(key).unwrap_or_default();
                let pairs: Vec<String> = key
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(name, value)| format!("{name}={value}"))
                    .collect();
                write!(f, "[{}]", pairs.join(","))
            }
            Some((_, rest)) => write!(f, "[{rest}]"),
            None => f.write_str(self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sets_are_written_as_fields_v1() {
        let value = json!({"f:spec": {
            "f:replicas": {},
            "f:containers": {"k:{\"name\":\"a\"}": {".": {}, "f:image": {}}},
        }, "f:metadata": {"f:finalizers": {"v:\"x\"": {}}}});
        let set = FieldSet::from_value(&value).unwrap();
        assert_eq!(set.to_value(), value);
        assert_eq!(
            set.paths(),
            [
                ".metadata.finalizers[\"x\"]",
                ".spec.containers[name=\"a\"]",
                ".spec.containers[name=\"a\"].image",
                ".spec.replicas",
            ]
        );
    }

    #[test]
    fn keys_are_compared_in_one_form() {
        let one = json!({"f:ports": {"k:{\"protocol\":\"TCP\", \"port\":80}": {}}});
        let two = json!({"f:ports": {"k:{\"port\":80,\"protocol\":\"TCP\"}": {}}});
        assert_eq!(FieldSet::from_value(&one), FieldSet::from_value(&two));
    }

    #[test]
    fn nonsense_is_no_set() {
        for value in [json!([]), json!({"x": {}}), json!({"k:nonsense": {}}), json!({"f:a": 1})] {
            assert_eq!(FieldSet::from_value(&value), None, "{value}");
        }
        let mut deep = json!({});
        for _ in 0..100 {
            deep = json!({"f:a": deep});
        }
        assert_eq!(FieldSet::from_value(&deep), None);
    }

    #[test]
    fn sets_obey_their_laws() {
        let a = FieldSet::from_value(&json!({"f:a": {}, "f:b": {"f:c": {}}})).unwrap();
        let b = FieldSet::from_value(&json!({"f:b": {"f:c": {}, "f:d": {}}})).unwrap();
        assert_eq!(a.difference(&b).to_value(), json!({"f:a": {}}));
        assert_eq!(a.intersection(&b).to_value(), json!({"f:b": {"f:c": {}}}));
        assert_eq!(a.union(&b), b.union(&a));
        assert_eq!(a.difference(&b).union(&a.intersection(&b)), a);
        assert_eq!(a.without_prefixes(&FieldSet::path(&["b"])).to_value(), json!({"f:a": {}}));
    }
}
