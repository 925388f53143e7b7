//! Strategic merge patch: a merge patch that knows the types, so that lists can be merged item by
//! item, and that carries directives (`$patch`, `$retainKeys`, `$setElementOrder/…`,
//! `$deleteFromPrimitiveList/…`).
//!
//! The rules are those of Kubernetes' documentation
//! (contributors/devel/sig-api-machinery/strategic-merge-patch.md).

use serde_json::{Map, Value};

use crate::{
    registry::{Resource, value},
    schema::{Field, Shape, TypeDef, schema},
    status::Status,
};

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const ELEMENT_ORDER: &str = "$setElementOrder/";
const DELETE_PRIMITIVES: &str = "$deleteFromPrimitiveList/";

/// Applies a strategic merge patch to an object of the resource (or of a subresource's kind).
///
/// # Errors
/// 400 if the patch is no object or its directives are wrong, 415 if the kind's type is not known.
pub fn strategic_merge(
    resource: &Resource,
    target: &Value,
    patch: &Value,
) -> Result<Value, Status> {
    // A subresource may be of another kind (Scale): go by what the target says it is.
    let (group, version) = match value::text(target, &["apiVersion"]) {
        "" => (resource.group.as_str(), resource.version.as_str()),
        text => text.split_once('/').unwrap_or(("", text)),
    };
    let kind = match value::text(target, &["kind"]) {
        "" => &resource.kind,
        kind => kind,
    };
    let Some(id) = schema().kind(group, version, kind) else {
        return Err(Status::unsupported_media_type(&[
            "application/json-patch+json",
            "application/merge-patch+json",
            "application/apply-patch+yaml",
        ]));
    };
    let (Some(target), Some(patch)) = (target.as_object(), patch.as_object()) else {
        return Err(Status::bad_request(
            "error decoding patch: a strategic merge patch must be an object",
        ));
    };
    let merged = merge_object(target.clone(), patch, Type::of(&Shape::Object(id)))?;
    Ok(Value::Object(merged))
}

/// What is known of an object's type.
#[derive(Clone, Copy)]
enum Type {
    Structure(&'static TypeDef),
    /// A map or something unknown: merged as by a merge patch.
    Free,
}

impl Type {
    fn of(shape: &Shape) -> Self {
        match shape {
            Shape::Object(id) => Self::Structure(schema().get(*id)),
            _ => Self::Free,
        }
    }

    fn field(self, name: &str) -> Option<&'static Field> {
        match self {
            Self::Structure(structure) => structure.field(name),
            Self::Free => None,
        }
    }
}

fn bad(message: impl Into<String>) -> Status {
    Status::bad_request(message)
}

fn merge_object(
    mut target: Map<String, Value>,
    patch: &Map<String, Value>,
    kind: Type,
) -> Result<Map<String, Value>, Status> {
    match patch.get(DIRECTIVE).map(|d| d.as_str().unwrap_or_default()) {
        None | Some("merge") => {}
        Some("replace") => {
            let mut replaced = patch.clone();
            replaced.remove(DIRECTIVE);
            return Ok(replaced);
        }
        Some("delete") => return Ok(Map::new()),
        Some(other) => return Err(bad(format!("unknown patch type {other:?} found"))),
    }
    if let Some(keys) = patch.get(RETAIN_KEYS) {
        retain_keys(&mut target, patch, keys)?;
    }
    for (name, items) in patch {
        if let Some(list) = name.strip_prefix(DELETE_PRIMITIVES) {
            let items = items.as_array().ok_or_else(|| bad(format!("{name} must be a list")))?;
            if let Some(present) = target.get_mut(list).and_then(Value::as_array_mut) {
                present.retain(|item| !items.contains(item));
            }
        }
    }
    for (name, change) in patch {
        if name == DIRECTIVE || name == RETAIN_KEYS || name.starts_with(DELETE_PRIMITIVES) {
            continue;
        }
        if let Some(list) = name.strip_prefix(ELEMENT_ORDER) {
            // An order without changes of the list itself.
            if !patch.contains_key(list)
                && let Some(Value::Array(present)) = target.get_mut(list)
            {
                let key = merge_key(kind.field(list));
                let items = std::mem::take(present);
                let before = items.clone();
                *present = reorder(items, &before, change, key)?;
            }
            continue;
        }
        if change.is_null() {
            target.remove(name);
            continue;
        }
        let order = patch.get(&format!("{ELEMENT_ORDER}{name}"));
        let old = target.remove(name);
        let merged = merge_field(old, change, kind.field(name), order)?;
        target.insert(name.clone(), merged);
    }
    Ok(target)
}

fn retain_keys(
    target: &mut Map<String, Value>,
    patch: &Map<String, Value>,
    keys: &Value,
) -> Result<(), Status> {
    let keys: Vec<&str> = keys
        .as_array()
        .map(|keys| keys.iter().filter_map(Value::as_str).collect())
        .ok_or_else(|| bad("$retainKeys must be a list of field names"))?;
    let stray = patch.iter().find(|(name, value)| {
        !name.starts_with('$') && !value.is_null() && !keys.contains(&name.as_str())
    });
    if let Some((name, _)) = stray {
        return Err(bad(format!(
            "$retainKeys must contain all the fields present in the patch, {name:?} is missing"
        )));
    }
    target.retain(|name, _| keys.contains(&name.as_str()));
    Ok(())
}

fn merge_key(field: Option<&Field>) -> Option<&str> {
    field?.patch.as_ref()?.key.as_deref()
}

fn merge_field(
    old: Option<Value>,
    change: &Value,
    field: Option<&'static Field>,
    order: Option<&Value>,
) -> Result<Value, Status> {
    match change {
        Value::Object(patch) => {
            let replaces = field.and_then(|f| f.patch.as_ref()).is_some_and(|p| {
                // A structure with a strategy that says nothing of merging is replaced.
                !p.merge && !p.retain_keys
            });
            let kind = match field.map(|f| &f.shape) {
                Some(Shape::Map(map)) => Type::of(&map.values).for_entries(),
                Some(shape) => Type::of(shape),
                None => Type::Free,
            };
            let target = match old {
                Some(Value::Object(target)) if !replaces => target,
                _ => Map::new(),
            };
            merge_object(target, patch, kind).map(Value::Object)
        }
        Value::Array(items) => {
            let merges = field.and_then(|f| f.patch.as_ref()).is_some_and(|p| p.merge);
            if !merges {
                return Ok(change.clone());
            }
            let target = match old {
                Some(Value::Array(target)) => target,
                _ => Vec::new(),
            };
            let before = target.clone();
            let key = merge_key(field);
            let merged = match (key, field.map(|f| &f.shape)) {
                (Some(key), Some(Shape::List(list))) => {
                    merge_list(target, items, key, Type::of(&list.items), order)?
                }
                _ => merge_scalars(target, items),
            };
            match order {
                Some(order) => reorder(merged, &before, order, key).map(Value::Array),
                None => Ok(Value::Array(merged)),
            }
        }
        scalar => Ok(scalar.clone()),
    }
}

impl Type {
    /// The entries of a map are of one type, whatever their key: only free maps are served.
    fn for_entries(self) -> Self {
        Self::Free
    }
}

fn merge_scalars(mut target: Vec<Value>, items: &[Value]) -> Vec<Value> {
    for item in items {
        if !target.contains(item) {
            target.push(item.clone());
        }
    }
    target
}

fn merge_list(
    mut target: Vec<Value>,
    items: &[Value],
    key: &str,
    kind: Type,
    order: Option<&Value>,
) -> Result<Vec<Value>, Status> {
    let key_of = |item: &Value| -> Result<Value, Status> {
        item.get(key)
            .filter(|value| !value.is_null())
            .cloned()
            .ok_or_else(|| bad(format!("map: {item} does not contain declared merge key: {key}")))
    };
    // `- $patch: replace` makes the other items the whole list.
    if items.iter().any(|item| value::text(item, &[DIRECTIVE]) == "replace") {
        return Ok(items.iter().filter(|item| item.get(DIRECTIVE).is_none()).cloned().collect());
    }
    for item in items {
        let Some(patch) = item.as_object() else {
            return Err(bad(format!("expected an object in a list merged by {key}, found {item}")));
        };
        let wanted = key_of(item)?;
        match patch.get(DIRECTIVE).map(|d| d.as_str().unwrap_or_default()) {
            Some("delete") => {
                target.retain(|present| present.get(key) != Some(&wanted));
                continue;
            }
            None | Some("merge") => {}
            Some(other) => return Err(bad(format!("unknown patch type {other:?} found"))),
        }
        if let Some(order) = order.and_then(Value::as_array)
            && !order.iter().any(|entry| entry.get(key) == Some(&wanted))
        {
            return Err(bad(format!(
                "the order of the list in the patch doesn't match its $setElementOrder list: \
                 {key} {wanted} is missing"
            )));
        }
        match target.iter_mut().find(|present| present.get(key) == Some(&wanted)) {
            Some(present) => {
                let old = present.as_object().cloned().unwrap_or_default();
                *present = Value::Object(merge_object(old, patch, kind)?);
            }
            None => target.push(Value::Object(merge_object(Map::new(), patch, kind)?)),
        }
    }
    Ok(target)
}

/// Puts the items that `order` names in its order; those that only the server has stay where they
/// are relative to their neighbours of `before`.
fn reorder(
    items: Vec<Value>,
    before: &[Value],
    order: &Value,
    key: Option<&str>,
) -> Result<Vec<Value>, Status> {
    let order = order.as_array().ok_or_else(|| bad("$setElementOrder must be a list"))?;
    let id = |item: &Value| match key {
        Some(key) => item.get(key).cloned().unwrap_or(Value::Null),
        None => item.clone(),
    };
    let place = |list: &[Value], item: &Value| {
        let wanted = id(item);
        list.iter().position(|entry| id(entry) == wanted)
    };
    let (mut named, rest): (Vec<Value>, Vec<Value>) =
        items.into_iter().partition(|item| place(order, item).is_some());
    named.sort_by_key(|item| place(order, item));
    let (mut named, mut rest) = (named.into_iter().peekable(), rest.into_iter().peekable());
    let mut out = Vec::new();
    while let (Some(left), Some(right)) = (named.peek(), rest.peek()) {
        let server_first = match (place(before, left), place(before, right)) {
            (Some(left), Some(right)) => right < left,
            _ => false,
        };
        out.extend(if server_first { rest.next() } else { named.next() });
    }
    out.extend(named);
    out.extend(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::registry::Registry;

    fn patched(spec: &Value, patch: &Value) -> Result<Value, String> {
        let registry = Registry::builtin();
        let pods = registry.resource("", "v1", "pods").unwrap();
        strategic_merge(pods, &json!({"spec": spec}), &json!({"spec": patch}))
            .map(|mut object| object["spec"].take())
            .map_err(|e| e.message)
    }

    #[test]
    fn lists_merge_by_key_and_obey_directives() {
        let containers = json!({"containers": [
            {"name": "a", "image": "x", "args": ["1", "2"], "env": [{"name": "E", "value": "1"}]},
            {"name": "b", "image": "y"},
        ]});
        let rows = [
            (
                "an item is merged, an atomic list in it replaced",
                json!({"containers": [{"name": "a", "args": ["3"]}]}),
                json!({"containers": [
                    {"name": "a", "image": "x", "args": ["3"], "env": [{"name": "E", "value": "1"}]},
                    {"name": "b", "image": "y"},
                ]}),
            ),
            (
                "a new item is appended",
                json!({"containers": [{"name": "c", "image": "z"}]}),
                json!({"containers": [
                    {"name": "a", "image": "x", "args": ["1", "2"], "env": [{"name": "E", "value": "1"}]},
                    {"name": "b", "image": "y"},
                    {"name": "c", "image": "z"},
                ]}),
            ),
            (
                "an item is deleted",
                json!({"containers": [{"name": "a", "$patch": "delete"}]}),
                json!({"containers": [{"name": "b", "image": "y"}]}),
            ),
            (
                "the list is replaced",
                json!({"containers": [{"$patch": "replace"}, {"name": "n"}]}),
                json!({"containers": [{"name": "n"}]}),
            ),
            (
                "the order is set, with a null inside",
                json!({
                    "$setElementOrder/containers": [{"name": "b"}, {"name": "a"}],
                    "containers": [{"name": "a", "args": null, "env": null}],
                }),
                json!({"containers": [{"name": "b", "image": "y"}, {"name": "a", "image": "x"}]}),
            ),
        ];
        for (name, patch, expected) in rows {
            assert_eq!(patched(&containers, &patch).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn retained_keys_drop_the_others() {
        let volumes = json!({"volumes": [{"name": "v", "emptyDir": {}}]});
        let patch = json!({"volumes": [
            {"name": "v", "$retainKeys": ["name", "configMap"], "configMap": {"name": "c"}},
        ]});
        let expected = json!({"volumes": [{"name": "v", "configMap": {"name": "c"}}]});
        assert_eq!(patched(&volumes, &patch).unwrap(), expected);
        let wrong = json!({"volumes": [{"name": "v", "$retainKeys": ["configMap"]}]});
        assert!(patched(&volumes, &wrong).unwrap_err().contains("$retainKeys"));
    }

    #[test]
    fn a_missing_key_and_an_unknown_directive_are_refused() {
        let spec = json!({"containers": []});
        let rows = [
            (json!({"containers": [{"image": "x"}]}), "does not contain declared merge key: name"),
            (json!({"containers": [{"name": "x", "$patch": "sew"}]}), "unknown patch type"),
            (json!({"$patch": "sew"}), "unknown patch type"),
        ];
        for (patch, part) in rows {
            let message = patched(&spec, &patch).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn finalizers_are_merged_and_deleted_as_scalars() {
        let registry = Registry::builtin();
        let pods = registry.resource("", "v1", "pods").unwrap();
        let target = json!({"metadata": {"finalizers": ["a", "b"]}});
        let patch = json!({"metadata": {
            "$deleteFromPrimitiveList/finalizers": ["a"],
            "finalizers": ["c", "b"],
        }});
        let out = strategic_merge(pods, &target, &patch).unwrap();
        assert_eq!(out["metadata"]["finalizers"], json!(["b", "c"]));
    }

    #[test]
    fn server_items_keep_their_neighbours() {
        let items = |names: &[&str]| -> Vec<Value> {
            names.iter().map(|name| json!({"name": name})).collect()
        };
        let out = reorder(
            items(&["a", "s", "b", "new"]),
            &items(&["a", "s", "b"]),
            &Value::Array(items(&["new", "b", "a"])),
            Some("name"),
        );
        assert_eq!(out.unwrap(), items(&["new", "s", "b", "a"]));
    }

    proptest! {
        #[test]
        fn never_panics_and_keeps_what_it_does_not_name(
            target in crate::patch::testing::json(),
            patch in crate::patch::testing::json(),
        ) {
            if let Ok(out) = patched(&json!({"nodeSelector": target}), &json!({"hostname": patch})) {
                prop_assert_eq!(&out["nodeSelector"], &target);
            }
        }
    }
}
