//! What a delete means.
//!
//! Most objects go at once. An object with finalizers gets a `deletionTimestamp` instead, and goes
//! with its last finalizer. A pod that runs gets one in the future, by which the kubelet stops it;
//! the kubelet's own delete, with grace period 0, lets it go. A namespace turns `Terminating`, and
//! goes when what is in it is gone.

use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};

use super::{
    read,
    write::{self, body_format, dry_run, parse_document},
};
use crate::{
    admission::Operation,
    registry::{Resource, timestamp},
    server::{
        core::{Call, Core, Refused, Target, revision_of, text},
        negotiate::Shape,
        respond::{self, Answer, ListMeta},
    },
    status::{FieldError, Status},
    store::Expect,
};

const RETRIES: usize = 200;
const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";

/// What becomes of objects that the deleted one owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Propagation {
    Orphan,
    Background,
    Foreground,
}

/// `DeleteOptions`, from the body and the query.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeleteOptions {
    grace: Option<i64>,
    propagation: Option<Propagation>,
    uid: Option<String>,
    resource_version: Option<String>,
    pub(crate) dry_run: bool,
}

impl DeleteOptions {
    fn parse(call: &Call, body: &Bytes) -> Result<Self, Status> {
        let given =
            if body.is_empty() { Value::Null } else { parse_document(body, body_format(call)?)? };
        let query = &call.info.query;
        let mut options = Self::from_value(&given)?;
        if let Some(grace) = query.number("gracePeriodSeconds")? {
            options.grace = Some(grace);
        }
        if let Some(policy) = query.get("propagationPolicy") {
            options.propagation = Some(propagation(policy)?);
        }
        if query.has("orphanDependents") {
            options.propagation = Some(orphan_dependents(query.flag("orphanDependents")));
        }
        options.dry_run |= dry_run(query.all("dryRun"))?;
        if options.grace.is_some_and(|grace| grace < 0) {
            options.grace = Some(1); // as Kubernetes treats what was never allowed
        }
        Ok(options)
    }

    /// From the object in a body; `null` is none.
    pub(crate) fn from_value(given: &Value) -> Result<Self, Status> {
        let kind = text(given, "/kind");
        if !matches!(kind, "" | "DeleteOptions") {
            return Err(Status::bad_request(format!(
                "the body of a delete must be DeleteOptions, not {kind}"
            )));
        }
        let owned = |pointer: &str| Some(text(given, pointer).to_owned()).filter(|t| !t.is_empty());
        let grace = match given.get("gracePeriodSeconds") {
            None | Some(Value::Null) => None,
            Some(seconds) => Some(seconds.as_i64().ok_or_else(|| {
                Status::bad_request("gracePeriodSeconds in DeleteOptions must be a number")
            })?),
        };
        let orphan = given.get("orphanDependents").and_then(Value::as_bool);
        let policy = owned("/propagationPolicy");
        if orphan.is_some() && policy.is_some() {
            return Err(Status::bad_request(
                "orphanDependents and deletionPropagation cannot be both set",
            ));
        }
        let dry = given.get("dryRun").and_then(Value::as_array).into_iter().flatten();
        Ok(Self {
            grace,
            propagation: match policy {
                Some(policy) => Some(propagation(&policy)?),
                None => orphan.map(orphan_dependents),
            },
            uid: owned("/preconditions/uid"),
            resource_version: owned("/preconditions/resourceVersion"),
            dry_run: dry_run(dry.filter_map(Value::as_str))?,
        })
    }
}

fn propagation(policy: &str) -> Result<Propagation, Status> {
    match policy {
        "Orphan" => Ok(Propagation::Orphan),
        "Background" => Ok(Propagation::Background),
        "Foreground" => Ok(Propagation::Foreground),
        other => {
            let error = FieldError::not_supported(
                "propagationPolicy",
                other,
                &["Background", "Foreground", "Orphan"],
            );
            Err(Status::invalid("meta.k8s.io", "DeleteOptions", "", &[error]))
        }
    }
}

fn orphan_dependents(orphan: bool) -> Propagation {
    if orphan { Propagation::Orphan } else { Propagation::Background }
}

/// Whether an object that is being deleted has nothing left to wait for.
pub(crate) fn is_over(resource: &Resource, object: &Value) -> bool {
    let list = |pointer: &str| object.pointer(pointer).and_then(Value::as_array);
    let empty = |pointer: &str| list(pointer).is_none_or(Vec::is_empty);
    !text(object, "/metadata/deletionTimestamp").is_empty()
        && empty("/metadata/finalizers")
        && grace_of(object).unwrap_or(0) == 0
        && (!is_namespace(resource) || empty("/spec/finalizers"))
}

fn grace_of(object: &Value) -> Option<i64> {
    object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64)
}

fn is_namespace(resource: &Resource) -> bool {
    resource.group.is_empty() && resource.plural == "namespaces"
}

fn is_pod(resource: &Resource) -> bool {
    resource.group.is_empty() && resource.plural == "pods"
}

/// What a delete does to an object.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// It is as it should be: it is on its way already.
    Nothing,
    /// It goes.
    Remove,
    /// It becomes this.
    Mark(Value),
    /// It becomes this, and as that goes.
    MarkAndRemove(Value),
}

/// Decides.
fn plan(resource: &Resource, object: &Value, options: &DeleteOptions, now: Timestamp) -> Step {
    let mut new = object.clone();
    let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) else {
        return Step::Remove;
    };
    set_finalizers(metadata, options.propagation);
    let pending = metadata.contains_key("deletionTimestamp");
    if is_namespace(resource) {
        if !pending {
            mark(metadata, now, 0);
        }
        new["status"]["phase"] = "Terminating".into();
    } else if is_pod(resource) && !finish_pod(object, options) {
        let default = object.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64);
        let grace = options.grace.or(default).unwrap_or(30).max(0);
        match grace_of(object) {
            // A second delete can only make the time shorter.
            Some(present) if pending && present <= grace => {}
            _ => {
                let begun = pending_since(object, now);
                mark(metadata, begun, grace);
                bump_generation(metadata);
            }
        }
    } else {
        if !pending {
            mark(metadata, now, 0);
            bump_generation(metadata);
        } else if is_pod(resource) {
            metadata.insert("deletionGracePeriodSeconds".to_owned(), 0.into());
        }
        if is_over(resource, &new) {
            return if options.propagation.is_some() || is_pod(resource) {
                Step::MarkAndRemove(new)
            } else {
                Step::Remove
            };
        }
    }
    match (&new == object, is_over(resource, &new)) {
        (_, true) => Step::MarkAndRemove(new),
        (true, false) => Step::Nothing,
        (false, false) => Step::Mark(new),
    }
}

/// Whether nobody needs time to stop a pod: it never got to a node, it has ended, or the delete
/// says so.
fn finish_pod(pod: &Value, options: &DeleteOptions) -> bool {
    options.grace == Some(0)
        || text(pod, "/spec/nodeName").is_empty()
        || matches!(text(pod, "/status/phase"), "Succeeded" | "Failed")
}

/// When a pod's deletion began.
fn pending_since(pod: &Value, now: Timestamp) -> Timestamp {
    let ends = text(pod, "/metadata/deletionTimestamp").parse::<Timestamp>().ok();
    match (ends, grace_of(pod)) {
        (Some(ends), Some(grace)) => {
            ends.checked_sub(SignedDuration::from_secs(grace)).unwrap_or(now).min(now)
        }
        _ => now,
    }
}

fn mark(metadata: &mut Map<String, Value>, from: Timestamp, grace: i64) {
    let until = from.checked_add(SignedDuration::from_secs(grace)).unwrap_or(Timestamp::MAX);
    metadata.insert("deletionTimestamp".to_owned(), timestamp(until).into());
    metadata.insert("deletionGracePeriodSeconds".to_owned(), grace.into());
}

fn bump_generation(metadata: &mut Map<String, Value>) {
    if let Some(generation) = metadata.get("generation").and_then(Value::as_i64) {
        metadata.insert("generation".to_owned(), (generation + 1).into());
    }
}

/// The garbage collector knows by these finalizers what to do with dependents.
fn set_finalizers(metadata: &mut Map<String, Value>, propagation: Option<Propagation>) {
    let Some(propagation) = propagation else { return };
    let mut finalizers: Vec<Value> =
        metadata.get("finalizers").and_then(Value::as_array).cloned().unwrap_or_default();
    finalizers.retain(|finalizer| *finalizer != ORPHAN && *finalizer != FOREGROUND);
    match propagation {
        Propagation::Orphan => finalizers.push(ORPHAN.into()),
        Propagation::Foreground => finalizers.push(FOREGROUND.into()),
        Propagation::Background => {}
    }
    if finalizers.is_empty() {
        metadata.remove("finalizers");
    } else {
        metadata.insert("finalizers".to_owned(), finalizers.into());
    }
}

/// What is left of an object after a delete.
pub(crate) enum Deleted {
    /// It is gone; as it was last.
    Gone(Arc<Value>),
    /// It is on its way.
    Pending(Arc<Value>),
}

/// Deletes one object.
pub(crate) async fn delete_object(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
    target: Target<'_>,
    options: &DeleteOptions,
) -> Result<Deleted, Status> {
    let conflict =
        |why: &str| Status::conflict(&resource.group, &resource.plural, target.name, why);
    for _ in 0..RETRIES {
        let old = core.current(resource, target.namespace, target.name).await?;
        check_preconditions(&old, options).map_err(|why| conflict(&why))?;
        let admitted = Target { old: Some(&old), ..target };
        core.admit(call, resource, Operation::Delete, admitted, options.dry_run, None)?;
        let step = plan(resource, &old, options, Timestamp::now());
        if options.dry_run {
            return Ok(match step {
                Step::Remove | Step::MarkAndRemove(_) => Deleted::Gone(old),
                Step::Mark(new) => Deleted::Pending(Arc::new(new)),
                Step::Nothing => Deleted::Pending(old),
            });
        }
        let revision = revision_of(&old);
        let result = match step {
            Step::Nothing => return Ok(Deleted::Pending(old)),
            Step::Remove => core.remove(resource, &old, revision).await.map(Deleted::Gone),
            Step::MarkAndRemove(last) => {
                core.remove(resource, &last, revision).await.map(Deleted::Gone)
            }
            Step::Mark(new) => {
                let expect = Expect::Modified(revision);
                core.write(resource, new, expect).await.map(Deleted::Pending)
            }
        };
        match result {
            Ok(deleted) => return Ok(deleted),
            Err(Refused::Failed(status)) => return Err(status),
            Err(Refused::Conflict) => {}
        }
    }
    Err(Status::stale(&resource.group, &resource.plural, target.name))
}

fn check_preconditions(object: &Value, options: &DeleteOptions) -> Result<(), String> {
    let check = |what: &str, wanted: &Option<String>, pointer: &str| {
        let found = text(object, pointer);
        match wanted {
            Some(wanted) if wanted != found => Err(format!(
                "the {what} in the precondition ({wanted}) does not match the {what} in record \
                 ({found}). The object might have been deleted and then recreated"
            )),
            _ => Ok(()),
        }
    };
    check("UID", &options.uid, "/metadata/uid")?;
    check("ResourceVersion", &options.resource_version, "/metadata/resourceVersion")
}

/// Answers a delete.
pub(crate) async fn delete(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
    body: &Bytes,
) -> Result<Answer, Status> {
    let accepted = call.accept(&[Shape::Table, Shape::Partial])?;
    let include = call.include()?;
    let options = DeleteOptions::parse(call, body)?;
    let target = Target { subresource: "", ..write::target_of(call, resource) };
    let object = match delete_object(core, call, resource, target, &options).await? {
        Deleted::Pending(object) => object,
        // Who deletes a pod is shown what it was.
        Deleted::Gone(object) if is_pod(resource) => object,
        Deleted::Gone(object) => {
            let uid = text(&object, "/metadata/uid");
            let status = Status::deleted(&resource.group, &resource.plural, &call.info.name, uid);
            return Ok(respond::document(StatusCode::OK, &status, accepted));
        }
    };
    let object = resource.convert(&object);
    Ok(respond::object(StatusCode::OK, resource, &object, accepted, include))
}

/// Answers a deletecollection with what it deleted.
pub(crate) async fn delete_collection(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
    body: &Bytes,
) -> Result<Answer, Status> {
    let accepted = call.accept(&[Shape::Table, Shape::Partial])?;
    let include = call.include()?;
    let options = DeleteOptions::parse(call, body)?;
    let (items, revision) = read::collection(core, call, resource).await?;
    let mut deleted = Vec::with_capacity(items.len());
    for item in items {
        let target = Target {
            namespace: if resource.namespaced { text(&item, "/metadata/namespace") } else { "" },
            name: text(&item, "/metadata/name"),
            ..Target::default()
        };
        match delete_object(core, call, resource, target, &options).await {
            Ok(Deleted::Gone(object) | Deleted::Pending(object)) => {
                deleted.push(resource.convert(&object));
            }
            Err(status) if status.code == 404 => {} // somebody else was faster
            Err(status) => return Err(status),
        }
    }
    let meta = ListMeta { resource_version: revision.to_string(), ..ListMeta::default() };
    Ok(respond::list(resource, &deleted, &meta, accepted, include))
}

/// The answer to a request that succeeded and has nothing to show.
pub(crate) fn success() -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Registry;

    fn now() -> Timestamp {
        "2030-01-01T00:00:00Z".parse().unwrap()
    }

    fn plan_of(plural: &str, object: &Value, options: Value) -> Step {
        let registry = Registry::builtin();
        let resource = registry.resource("", "v1", plural).unwrap();
        plan(resource, object, &DeleteOptions::from_value(&options).unwrap(), now())
    }

    #[test]
    fn what_nobody_waits_for_goes_at_once() {
        let object = json!({"metadata": {"name": "a"}});
        assert_eq!(plan_of("configmaps", &object, Value::Null), Step::Remove);
        let held = json!({"metadata": {"name": "a", "finalizers": ["example.com/x"]}});
        let Step::Mark(marked) = plan_of("configmaps", &held, Value::Null) else { panic!() };
        assert_eq!(marked["metadata"]["deletionTimestamp"], "2030-01-01T00:00:00Z");
        assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 0);
        assert_eq!(plan_of("configmaps", &marked, Value::Null), Step::Nothing);
        let mut freed = marked;
        freed["metadata"]["finalizers"] = json!([]);
        let registry = Registry::builtin();
        assert!(is_over(registry.resource("", "v1", "configmaps").unwrap(), &freed));
    }

    #[test]
    fn propagation_is_told_by_finalizers() {
        let object = json!({"metadata": {"name": "a"}});
        for (policy, finalizer) in [("Orphan", ORPHAN), ("Foreground", FOREGROUND)] {
            let options = json!({"propagationPolicy": policy});
            let Step::Mark(marked) = plan_of("configmaps", &object, options) else { panic!() };
            assert_eq!(marked["metadata"]["finalizers"], json!([finalizer]));
            // Background takes it back.
            let options = json!({"propagationPolicy": "Background"});
            assert!(matches!(plan_of("configmaps", &marked, options), Step::MarkAndRemove(_)));
        }
        assert!(DeleteOptions::from_value(&json!({"propagationPolicy": "Later"})).is_err());
    }

    #[test]
    fn a_running_pod_gets_its_time() {
        let pod = json!({"metadata": {"name": "a", "generation": 1},
            "spec": {"nodeName": "n", "terminationGracePeriodSeconds": 20},
            "status": {"phase": "Running"}});
        let Step::Mark(marked) = plan_of("pods", &pod, Value::Null) else { panic!() };
        assert_eq!(marked["metadata"]["deletionTimestamp"], "2030-01-01T00:00:20Z");
        assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 20);
        assert_eq!(marked["metadata"]["generation"], 2);
        // Longer is not possible any more, shorter is, counted from when it began.
        assert_eq!(plan_of("pods", &marked, json!({"gracePeriodSeconds": 60})), Step::Nothing);
        let Step::Mark(shorter) = plan_of("pods", &marked, json!({"gracePeriodSeconds": 5})) else {
            panic!()
        };
        assert_eq!(shorter["metadata"]["deletionTimestamp"], "2030-01-01T00:00:05Z");
        let now = json!({"gracePeriodSeconds": 0});
        assert!(matches!(plan_of("pods", &marked, now.clone()), Step::MarkAndRemove(_)));
        assert!(matches!(plan_of("pods", &pod, now), Step::MarkAndRemove(_)));
        for quick in [
            json!({"metadata": {"name": "a"}, "spec": {}}),
            json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n"},
                   "status": {"phase": "Failed"}}),
        ] {
            assert!(matches!(plan_of("pods", &quick, Value::Null), Step::MarkAndRemove(_)));
        }
    }

    #[test]
    fn a_grace_period_beyond_all_time_can_be_shortened() {
        let pod = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n",
            "terminationGracePeriodSeconds": i64::MAX}, "status": {"phase": "Running"}});
        let Step::Mark(marked) = plan_of("pods", &pod, Value::Null) else { panic!() };
        let shorter = json!({"gracePeriodSeconds": 5});
        let Step::Mark(marked) = plan_of("pods", &marked, shorter) else { panic!() };
        assert_eq!(marked["metadata"]["deletionTimestamp"], "2030-01-01T00:00:05Z");
    }

    #[test]
    fn a_namespace_goes_when_it_is_empty() {
        let namespace = json!({"metadata": {"name": "a"}, "spec": {"finalizers": ["kubernetes"]},
            "status": {"phase": "Active"}});
        let Step::Mark(marked) = plan_of("namespaces", &namespace, Value::Null) else { panic!() };
        assert_eq!(marked["status"]["phase"], "Terminating");
        assert_eq!(plan_of("namespaces", &marked, Value::Null), Step::Nothing);
        let freed = finalized_for_test(&marked);
        assert!(matches!(plan_of("namespaces", &freed, Value::Null), Step::MarkAndRemove(_)));
    }

    fn finalized_for_test(namespace: &Value) -> Value {
        let mut freed = namespace.clone();
        freed["spec"]["finalizers"] = json!([]);
        freed
    }
}
