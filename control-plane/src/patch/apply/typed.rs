//! Walks over objects by their types: which fields are set, what differs, merging and removing.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::set::{FieldSet, canonical};
use crate::schema::{ListKind, Shape, TypeDef, schema};

/// How a value is owned.
#[derive(Clone, Copy)]
enum Grain<'a> {
    /// As a whole.
    Whole,
    /// Field by field.
    Structure(&'static TypeDef),
    /// Entry by entry.
    Map(&'a Shape),
    /// Scalar by scalar.
    Set,
    /// Item by item, known by keys.
    Items(&'a Shape, &'a [Box<str>]),
}

impl<'a> Grain<'a> {
    fn of(shape: &'a Shape) -> Self {
        match shape {
            Shape::Object(id) => {
                let structure = schema().get(*id);
                if structure.atomic { Self::Whole } else { Self::Structure(structure) }
            }
            Shape::Map(map) if !map.atomic => Self::Map(&map.values),
            Shape::List(list) => match &list.kind {
                ListKind::Atomic => Self::Whole,
                ListKind::Set => Self::Set,
                ListKind::Map(keys) => Self::Items(&list.items, keys),
            },
            _ => Self::Whole,
        }
    }

    /// The same for this value: what isn't of the expected JSON type is owned as a whole.
    fn fitting(self, value: &Value) -> Self {
        match self {
            Self::Structure(_) | Self::Map(_) if !value.is_object() => Self::Whole,
            Self::Set | Self::Items(..) if !value.is_array() => Self::Whole,
            fits => fits,
        }
    }
}

static ANYTHING: Shape = Shape::Any;

fn field_shape(structure: &'static TypeDef, name: &str) -> &'static Shape {
    structure.field(name).map_or(&ANYTHING, |field| &field.shape)
}

/// The path element of a list's item.
fn element(grain: Grain<'_>, item: &Value) -> String {
    match grain {
        Grain::Items(shape, keys) => {
            let structure = match shape {
                Shape::Object(id) => Some(schema().get(*id)),
                _ => None,
            };
            let mut key = Map::new();
            for name in keys {
                let default = || {
                    let field = structure?.field(name)?;
                    field.default.as_deref().cloned()
                };
                let value = item.get(&**name).filter(|v| !v.is_null()).cloned().or_else(default);
                if let Some(value) = value {
                    key.insert(name.to_string(), value);
                }
            }
            format!("k:{}", canonical(&Value::Object(key)))
        }
        _ => format!("v:{item}"),
    }
}

fn items_of(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn fields_of(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn is_hollow(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(Map::is_empty)
}

/// A list with an item twice, which can't be merged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: duplicate entries for key {item}")]
pub(super) struct DuplicateItem {
    path: String,
    item: String,
}

/// Finds a list in which an item comes twice.
pub(super) fn find_duplicates(
    shape: &Shape,
    value: &Value,
    path: &str,
) -> Result<(), DuplicateItem> {
    let grain = Grain::of(shape).fitting(value);
    match grain {
        Grain::Whole => Ok(()),
        Grain::Structure(structure) => fields_of(value).try_for_each(|(name, field)| {
            find_duplicates(field_shape(structure, name), field, &format!("{path}.{name}"))
        }),
        Grain::Map(values) => fields_of(value).try_for_each(|(name, field)| {
            find_duplicates(values, field, &format!("{path}.{name}"))
        }),
        Grain::Set | Grain::Items(..) => {
            let mut seen = std::collections::BTreeSet::new();
            for item in items_of(value) {
                let element = element(grain, item);
                if let Grain::Items(items, _) = grain {
                    find_duplicates(items, item, &format!("{path}[{}]", &element[2..]))?;
                }
                if let Some(item) = seen.replace(element) {
                    return Err(DuplicateItem {
                        path: path.to_owned(),
                        item: item[2..].to_owned(),
                    });
                }
            }
            Ok(())
        }
    }
}

/// The fields that a value sets.
pub(super) fn fields_set(shape: &Shape, value: &Value) -> FieldSet {
    let grain = Grain::of(shape).fitting(value);
    let mut out = FieldSet::default();
    match grain {
        Grain::Whole => return FieldSet::leaf(),
        Grain::Structure(structure) => {
            for (name, field) in fields_of(value) {
                let mut set = fields_set(field_shape(structure, name), field);
                set.here |= is_hollow(field);
                out.insert(format!("f:{name}"), set);
            }
        }
        Grain::Map(values) => {
            for (name, entry) in fields_of(value) {
                let mut set = fields_set(values, entry);
                set.here = true;
                out.insert(format!("f:{name}"), set);
            }
        }
        Grain::Set => {
            for item in items_of(value) {
                out.insert(element(grain, item), FieldSet::leaf());
            }
        }
        Grain::Items(items, _) => {
            for item in items_of(value) {
                let mut set = fields_set(items, item);
                set.here = true;
                let element = element(grain, item);
                // An item that is there twice counts once.
                let set = match out.below.get(&element) {
                    Some(first) => first.union(&set),
                    None => set,
                };
                out.insert(element, set);
            }
        }
    }
    out
}

/// What differs between two objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) added: FieldSet,
    pub(super) modified: FieldSet,
    pub(super) removed: FieldSet,
}

impl Difference {
    pub(super) fn is_empty(&self) -> bool {
        self.added.is_empty() && self.modified.is_empty() && self.removed.is_empty()
    }

    fn insert(&mut self, element: &str, below: Self) {
        self.added.insert(element.to_owned(), below.added);
        self.modified.insert(element.to_owned(), below.modified);
        self.removed.insert(element.to_owned(), below.removed);
    }

    fn changed(changed: bool) -> Self {
        let mut out = Self::default();
        out.modified.here = changed;
        out
    }

    /// The same without the fields of `set` and all below them.
    pub(super) fn without(&self, set: &FieldSet) -> Self {
        Self {
            added: self.added.without_prefixes(set),
            modified: self.modified.without_prefixes(set),
            removed: self.removed.without_prefixes(set),
        }
    }
}

/// Compares two values.
pub(super) fn compare(shape: &Shape, old: &Value, new: &Value) -> Difference {
    let grain = Grain::of(shape).fitting(old).fitting(new);
    match grain {
        Grain::Whole => Difference::changed(old != new),
        Grain::Structure(structure) => {
            compare_fields(old, new, |name| field_shape(structure, name), is_hollow)
        }
        Grain::Map(values) => compare_fields(old, new, |_| values, |_| true),
        Grain::Set => {
            let set = |value: &Value| fields_set(shape, value);
            let (old, new) = (set(old), set(new));
            Difference {
                added: new.difference(&old),
                removed: old.difference(&new),
                modified: FieldSet::default(),
            }
        }
        Grain::Items(items, _) => compare_items(grain, items, old, new),
    }
}

fn compare_fields<'a>(
    old: &Value,
    new: &Value,
    shape: impl Fn(&str) -> &'a Shape,
    own_member: impl Fn(&Value) -> bool,
) -> Difference {
    let mut out = Difference::default();
    let set_of = |name: &str, value: &Value| {
        let mut set = fields_set(shape(name), value);
        set.here |= own_member(value);
        set
    };
    for (name, before) in fields_of(old) {
        let element = format!("f:{name}");
        match new.get(name) {
            Some(after) => out.insert(&element, compare(shape(name), before, after)),
            None => out.removed.insert(element, set_of(name, before)),
        }
    }
    for (name, after) in fields_of(new) {
        if old.get(name).is_none() {
            out.added.insert(format!("f:{name}"), set_of(name, after));
        }
    }
    out
}

fn compare_items(grain: Grain<'_>, shape: &Shape, old: &Value, new: &Value) -> Difference {
    fn by_element<'v>(grain: Grain<'_>, list: &'v Value) -> BTreeMap<String, Vec<&'v Value>> {
        let mut out: BTreeMap<String, Vec<&Value>> = BTreeMap::new();
        for item in items_of(list) {
            out.entry(element(grain, item)).or_default().push(item);
        }
        out
    }
    let set_of = |items: &[&Value]| {
        items.iter().fold(FieldSet::leaf(), |set, item| set.union(&fields_set(shape, item)))
    };
    let (old, new) = (by_element(grain, old), by_element(grain, new));
    let mut out = Difference::default();
    for (element, before) in &old {
        match new.get(element) {
            None => out.removed.insert(element.clone(), set_of(before)),
            Some(after) => match (&before[..], &after[..]) {
                ([before], [after]) => out.insert(element, compare(shape, before, after)),
                _ => out.insert(element, Difference::changed(before != after)),
            },
        }
    }
    for (element, after) in &new {
        if !old.contains_key(element) {
            out.added.insert(element.clone(), set_of(after));
        }
    }
    out
}

/// Lays what is applied over what is there.
pub(super) fn merge(shape: &Shape, live: &Value, applied: &Value) -> Value {
    let grain = Grain::of(shape).fitting(live).fitting(applied);
    let merge_fields = |shape: &dyn Fn(&str) -> &'static Shape| {
        let mut out = live.as_object().cloned().unwrap_or_default();
        for (name, field) in fields_of(applied) {
            let merged = match out.get(name) {
                Some(live) => merge(shape(name), live, field),
                None => field.clone(),
            };
            out.insert(name.clone(), merged);
        }
        Value::Object(out)
    };
    match grain {
        Grain::Whole => applied.clone(),
        Grain::Structure(structure) => merge_fields(&|name| field_shape(structure, name)),
        Grain::Map(values) => {
            let mut out = live.as_object().cloned().unwrap_or_default();
            for (name, entry) in fields_of(applied) {
                let merged = match out.get(name) {
                    Some(live) => merge(values, live, entry),
                    None => entry.clone(),
                };
                out.insert(name.clone(), merged);
            }
            Value::Object(out)
        }
        Grain::Set => merge_items(grain, &ANYTHING, live, applied),
        Grain::Items(items, _) => merge_items(grain, items, live, applied),
    }
}

/// The applied order, with the items that only the live list has left beside their neighbours.
fn merge_items(grain: Grain<'_>, shape: &Shape, live: &Value, applied: &Value) -> Value {
    let with_elements = |list: &Value| -> Vec<(String, Value)> {
        items_of(list).iter().map(|item| (element(grain, item), item.clone())).collect()
    };
    let (live, applied) = (with_elements(live), with_elements(applied));
    let find = |list: &[(String, Value)], element: &str| {
        list.iter().find(|(e, _)| e == element).map(|(_, item)| item.clone())
    };
    let mut shared = applied.iter().map(|(e, _)| e).filter(|e| find(&live, e).is_some()).peekable();
    let mut out = Vec::new();
    let (mut left, mut right) = (live.iter().peekable(), applied.iter().peekable());
    loop {
        match (left.peek(), right.peek()) {
            (None, None) => return Value::Array(out),
            (Some((element, item)), _) if find(&applied, element).is_none() => {
                out.push(item.clone());
                left.next();
            }
            (Some((element, _)), Some((wanted, _)))
                if element != wanted && shared.peek().is_some_and(|next| *next != element) =>
            {
                // Comes, or came, at its place in what is applied.
                left.next();
            }
            (_, Some((element, item))) => {
                let merged = match find(&live, element) {
                    Some(live) => merge(shape, &live, item),
                    None => item.clone(),
                };
                out.push(merged);
                if shared.peek() == Some(&element) {
                    shared.next();
                }
                if left.peek().is_some_and(|(e, _)| e == element) {
                    left.next();
                }
                right.next();
            }
            (Some(_), None) => {
                left.next();
            }
        }
    }
}

/// Removes fields. What is empty after that is gone too (`None`).
pub(super) fn remove(shape: &Shape, value: &Value, set: &FieldSet) -> Option<Value> {
    let grain = Grain::of(shape).fitting(value);
    match grain {
        Grain::Whole => Some(value.clone()),
        Grain::Structure(structure) => {
            remove_fields(value, set, |name| field_shape(structure, name))
        }
        Grain::Map(values) => remove_fields(value, set, |_| values),
        Grain::Set | Grain::Items(..) => {
            let shape = if let Grain::Items(items, _) = grain { items } else { &ANYTHING };
            let mut out = Vec::new();
            for item in items_of(value) {
                match set.below.get(&element(grain, item)) {
                    None => out.push(item.clone()),
                    Some(below) if below.here => {}
                    Some(below) => out.extend(remove(shape, item, below)),
                }
            }
            (!out.is_empty()).then_some(Value::Array(out))
        }
    }
}

fn remove_fields<'a>(
    value: &Value,
    set: &FieldSet,
    shape: impl Fn(&str) -> &'a Shape,
) -> Option<Value> {
    if is_hollow(value) {
        return Some(value.clone());
    }
    let mut out = Map::new();
    for (name, field) in fields_of(value) {
        match set.below.get(&format!("f:{name}")) {
            None => {
                out.insert(name.clone(), field.clone());
            }
            Some(below) if below.here => {}
            Some(below) => {
                if let Some(left) = remove(shape(name), field, below) {
                    out.insert(name.clone(), left);
                }
            }
        }
    }
    (!out.is_empty()).then_some(Value::Object(out))
}

/// An object without anything, to compare new ones with.
pub(super) fn nothing() -> Value {
    json!({})
}
