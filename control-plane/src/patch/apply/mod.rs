//! Server-side apply: each manager says what it wants of an object, and the object remembers who
//! said what.
//!
//! ```text
//! live ──┬─ merge(applied) ─ remove what only this manager had and no longer wants ─► new
//!        └─ compare(new): fields of others that changed are conflicts, or are taken with force
//! ```
//!
//! Plain writes are followed too ([`record_update`]): whoever changes a field owns it. The rules
//! are those of Kubernetes' documentation of server-side apply, and its wording.

mod managed;
mod set;
mod typed;

use jiff::Timestamp;
use serde_json::Value;

use self::{
    managed::{Held, Managed, Manager},
    set::FieldSet,
    typed::Difference,
};
use crate::{
    registry::{Resource, timestamp, value},
    schema::{Shape, schema},
    status::{Cause, Status},
};

/// Who owned the fields of an object that nobody was followed on before it was first applied.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// `kubectl apply --server-side`.
const KUBECTL: &str = "kubectl";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// The longest name of a manager (`fieldManager` is refused beyond it).
const LONGEST_MANAGER: usize = 128;

/// The manager of a request: what it says, or else the start of its `User-Agent`.
pub fn manager_name(field_manager: Option<&str>, user_agent: &str) -> String {
    let name = match field_manager {
        Some(name) if !name.is_empty() => name,
        _ => user_agent.split('/').next().unwrap_or_default(),
    };
    let name: String = name.chars().filter(|c| !c.is_control()).take(LONGEST_MANAGER).collect();
    if name.is_empty() { "unknown".to_owned() } else { name }
}

fn shape_of(resource: &Resource) -> Shape {
    schema()
        .kind(&resource.group, &resource.version, &resource.kind)
        .map_or(Shape::Any, Shape::Object)
}

/// Fields that nobody owns: those of the server.
fn unowned() -> FieldSet {
    let paths: [&[&str]; 13] = [
        &["apiVersion"],
        &["kind"],
        &["metadata", "name"],
        &["metadata", "namespace"],
        &["metadata", "generateName"],
        &["metadata", "creationTimestamp"],
        &["metadata", "deletionTimestamp"],
        &["metadata", "deletionGracePeriodSeconds"],
        &["metadata", "selfLink"],
        &["metadata", "uid"],
        &["metadata", "generation"],
        &["metadata", "managedFields"],
        &["metadata", "resourceVersion"],
    ];
    paths.iter().fold(FieldSet::default(), |set, path| set.union(&FieldSet::path(path)))
}

/// Fields that a write through this path does not change, so that it can't own them either.
fn not_written(resource: &Resource, subresource: &str) -> FieldSet {
    let set = unowned();
    if !resource.has_status() {
        return set;
    }
    match subresource {
        "status" => set
            .union(&FieldSet::path(&["spec"]))
            .union(&FieldSet::path(&["metadata", "ownerReferences"])),
        // Nodes may come with a status.
        "" if resource.kind == "Node" => set,
        "" => set.union(&FieldSet::path(&["status"])),
        _ => set,
    }
}

/// `metadata` by itself (when it is empty) is no field to own.
fn owned(set: &FieldSet, without: &FieldSet) -> FieldSet {
    let mut out = set.without_prefixes(without);
    if let Some(metadata) = out.below.get_mut("f:metadata") {
        metadata.here = false;
        if metadata.is_empty() {
            out.below.remove("f:metadata");
        }
    }
    out
}

/// What a server-side apply makes of an object. Without `live` it is a create.
///
/// The outcome goes on as any other write: defaults, [`Resource::prepare_create`] or
/// [`Resource::prepare_update`], validation. It carries the `resourceVersion` that was applied, or
/// else that of `live`, and its `managedFields` are complete.
///
/// # Errors
/// 409 with a cause for each field that another manager owns and that would change, unless
/// `force`; 400 if what is applied can't be.
pub fn apply(
    resource: &Resource,
    live: Option<&Value>,
    applied: &Value,
    manager: &str,
    subresource: &str,
    force: bool,
    now: Timestamp,
) -> Result<Value, Status> {
    if !value::list(applied, &["metadata", "managedFields"]).is_empty() {
        return Err(Status::bad_request("metadata.managedFields must be nil"));
    }
    let shape = shape_of(resource);
    typed::find_duplicates(&shape, applied, "").map_err(|e| Status::bad_request(e.to_string()))?;
    let outcome = apply_once(resource, &shape, live, applied, manager, subresource, force, now);
    let conflicts = match outcome {
        Ok(object) => return Ok(object),
        Err(conflicts) => conflicts,
    };
    // What `kubectl apply` of old set by its annotation, kubectl may take over.
    if let (KUBECTL, Some(live)) = (manager, live) {
        let allowed = last_applied_fields(&shape, live);
        let left: Vec<(Manager, FieldSet)> = conflicts
            .iter()
            .map(|(manager, fields)| (manager.clone(), fields.difference(&allowed)))
            .filter(|(_, fields)| !fields.is_empty())
            .collect();
        if !left.is_empty() {
            return Err(conflict(&left));
        }
        return apply_once(resource, &shape, Some(live), applied, manager, subresource, true, now)
            .map_err(|conflicts| conflict(&conflicts));
    }
    Err(conflict(&conflicts))
}

type Conflicts = Vec<(Manager, FieldSet)>;

#[expect(clippy::too_many_arguments)] // the request, unpacked
fn apply_once(
    resource: &Resource,
    shape: &Shape,
    live: Option<&Value>,
    applied: &Value,
    manager: &str,
    subresource: &str,
    force: bool,
    now: Timestamp,
) -> Result<Value, Conflicts> {
    let nothing = typed::nothing();
    let without = not_written(resource, subresource);
    let mut managed = live.and_then(Managed::read).unwrap_or_default();
    if let Some(live) = live
        && managed.0.is_empty()
    {
        let everything = owned(&typed::fields_set(shape, live), &unowned());
        let before = Manager::updater(BEFORE_FIRST_APPLY, "", &resource.api_version());
        let held = Held {
            fields: everything,
            api_version: resource.api_version().into_owned(),
            time: Some(timestamp(now)),
        };
        managed.0.insert(before, held);
    }
    let live_object = live.unwrap_or(&nothing);
    let me = Manager::applier(manager, subresource);
    let before = managed.0.get(&me).cloned();
    let wanted = owned(&typed::fields_set(shape, applied), &without);
    managed.0.insert(
        me.clone(),
        Held {
            fields: wanted.clone(),
            api_version: resource.api_version().into_owned(),
            time: before.as_ref().and_then(|held| held.time.clone()),
        },
    );
    let merged = typed::merge(shape, live_object, applied);
    let mut new = prune(shape, merged, &managed, before.as_ref());
    let difference = typed::compare(shape, live_object, &new).without(&without);
    take(&mut managed, &difference, &me, force)?;
    if manager == KUBECTL
        && let Some(live) = live
    {
        refresh_last_applied(live, applied, &mut new);
    }
    let changed = !difference.is_empty() || before.as_ref().map(|b| &b.fields) != Some(&wanted);
    if let Some(held) = managed.0.get_mut(&me)
        && (changed || held.time.is_none())
    {
        held.time = Some(timestamp(now));
    }
    managed.cap(now);
    managed.write(&mut new);
    keep_identity(live_object, &mut new);
    Ok(new)
}

/// Name and resource version are not for merging to lose.
fn keep_identity(live: &Value, new: &mut Value) {
    if let Some(metadata) = value::object_at(new, "metadata") {
        for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
            if metadata.get(field).is_none_or(Value::is_null)
                && let Some(kept) = value::at(live, &["metadata", field])
            {
                metadata.insert(field.to_owned(), kept.clone());
            }
        }
    }
}

/// Removes what this manager applied before, no longer does, and nobody else has.
fn prune(shape: &Shape, merged: Value, managed: &Managed, before: Option<&Held>) -> Value {
    let Some(before) = before.filter(|held| !held.fields.is_empty()) else { return merged };
    let last = before.fields.with_named_parents();
    let without =
        |set: &FieldSet| typed::remove(shape, &merged, set).unwrap_or_else(typed::nothing);
    let named = |object: &Value| typed::fields_set(shape, object).with_named_parents();
    let all = named(&merged);
    let pruned = without(&last);
    let held = managed.0.values().fold(FieldSet::default(), |all, held| all.union(&held.fields));
    let unheld = all.difference(&named(&pruned)).difference(&held.with_named_parents());
    let pruned = without(&unheld);
    let dangling = all.difference(&named(&pruned)).intersection(&last);
    without(&dangling)
}

/// Finds whose fields changed, and takes them away from them.
fn take(
    managed: &mut Managed,
    difference: &Difference,
    me: &Manager,
    force: bool,
) -> Result<(), Conflicts> {
    let written = difference.modified.union(&difference.added);
    let conflicts: Conflicts = managed
        .0
        .iter()
        .filter(|(manager, _)| *manager != me)
        .map(|(manager, held)| (manager.clone(), held.fields.intersection(&written)))
        .filter(|(_, fields)| !fields.is_empty())
        .collect();
    if !force && !conflicts.is_empty() {
        return Err(conflicts);
    }
    for (manager, held) in &mut managed.0 {
        if manager != me {
            held.fields = held.fields.difference(&written).difference(&difference.removed);
        }
    }
    managed.0.retain(|_, held| !held.fields.is_empty());
    Ok(())
}

fn conflict(conflicts: &[(Manager, FieldSet)]) -> Status {
    let mut causes = Vec::new();
    let mut lines = Vec::new();
    for (manager, fields) in conflicts {
        let shown = manager.shown();
        lines.push(format!("conflicts with {shown}:"));
        for path in fields.paths() {
            lines.push(format!("- {path}"));
            causes.push(Cause {
                reason: "FieldManagerConflict".to_owned(),
                message: format!("conflict with {shown}"),
                field: path,
            });
        }
    }
    let message = match &causes[..] {
        [one] => format!("Apply failed with 1 conflict: {}: {}", one.message, one.field),
        many => format!("Apply failed with {} conflicts: {}", many.len(), lines.join("\n")),
    };
    Status::new(409, "Conflict", message).with_causes(causes)
}

fn last_applied_fields(shape: &Shape, live: &Value) -> FieldSet {
    let text = value::text(live, &["metadata", "annotations", LAST_APPLIED]);
    serde_json::from_str::<Value>(text)
        .map(|object| typed::fields_set(shape, &object))
        .unwrap_or_default()
}

/// An object that came by `kubectl apply` of old keeps its annotation true, so that one can go
/// back.
fn refresh_last_applied(live: &Value, applied: &Value, new: &mut Value) {
    if value::text(live, &["metadata", "annotations", LAST_APPLIED]).is_empty() {
        return;
    }
    let mut configuration = applied.clone();
    if let Some(annotations) =
        configuration.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut)
    {
        annotations.remove(LAST_APPLIED);
    }
    if let Some(annotations) = new.pointer_mut("/metadata/annotations") {
        annotations[LAST_APPLIED] = format!("{configuration}\n").into();
    }
}

/// Writes down in `managedFields` who changed what, for every write that is no apply. Without
/// `old` it is a create. Whoever changes nothing leaves no trace, not even a newer time.
///
/// A client may write `managedFields` itself (but not through a subresource): to a list with one
/// empty entry, to forget them, or to others that make sense; none at all leaves them alone.
pub fn record_update(
    resource: &Resource,
    old: Option<&Value>,
    new: &mut Value,
    manager: &str,
    subresource: &str,
    now: Timestamp,
) {
    let shape = shape_of(resource);
    let of_old = || old.and_then(Managed::read).unwrap_or_default();
    let mut managed = if subresource.is_empty() && Managed::is_reset(new) {
        Managed::default()
    } else if subresource.is_empty() {
        match Managed::read(new) {
            Some(managed) if !managed.0.is_empty() => managed,
            _ => of_old(),
        }
    } else {
        of_old()
    };
    let nothing = typed::nothing();
    let without = not_written(resource, subresource);
    let difference = typed::compare(&shape, old.unwrap_or(&nothing), new).without(&without);
    let me = Manager::updater(manager, subresource, &resource.api_version());
    let taken = owned(&difference.added.union(&difference.modified), &without);
    let before = managed.0.get(&me).cloned();
    // As a newcomer: what it had, it takes again.
    let nobody = Manager::updater("", "", "");
    let forced = take(&mut managed, &difference, &nobody, true);
    debug_assert!(forced.is_ok(), "a write by force has no conflicts");
    if !taken.is_empty() {
        let kept = before.map(|held| held.fields.difference(&difference.removed));
        let fields = kept.unwrap_or_default().union(&taken);
        let held = Held {
            fields,
            api_version: resource.api_version().into_owned(),
            time: Some(timestamp(now)),
        };
        managed.0.insert(me, held);
        managed.cap(now);
    }
    managed.write(new);
}

#[cfg(test)]
mod tests;
