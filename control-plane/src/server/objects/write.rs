//! Create, update and patch.

use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;
use jiff::Timestamp;
use keelson_api::yaml;
use serde_json::Value;

use super::{delete, furnished};
use crate::{
    admission::Operation,
    patch,
    registry::{CreateContext, FieldValidation, Resource, generate_name},
    server::{
        core::{Call, Core, Refused, Target, revision_of, text},
        negotiate::Shape,
        protobuf,
        respond::{self, Answer},
    },
    status::{FieldError, Status},
    store::Expect,
};

/// Names that are tried for `generateName` (as `RetryGenerateName` of Kubernetes).
const NAMES_TRIED: usize = 8;
/// How often a write begins again because the object changed under it. Of those who race, one wins
/// each time: more would have to race than may be served at a time.
const RETRIES: usize = 200;
/// Bytes of a `fieldManager`.
const LONGEST_MANAGER: usize = 128;
/// Nested deeper, no YAML is read.
const YAML_DEPTH: usize = 100;

pub(crate) const JSON_PATCH: &str = "application/json-patch+json";
pub(crate) const MERGE_PATCH: &str = "application/merge-patch+json";
pub(crate) const STRATEGIC_PATCH: &str = "application/strategic-merge-patch+json";
pub(crate) const APPLY_PATCH: &str = "application/apply-patch+yaml";

/// What the query says of a write.
#[derive(Clone, Debug)]
pub(crate) struct WriteOptions {
    pub(crate) dry_run: bool,
    pub(crate) manager: String,
    pub(crate) validation: FieldValidation,
    pub(crate) force: bool,
}

impl WriteOptions {
    pub(crate) fn parse(call: &Call) -> Result<Self, Status> {
        let query = &call.info.query;
        let dry_run = dry_run(query.all("dryRun"))?;
        let manager = query.get("fieldManager");
        check_manager(call, manager.unwrap_or_default())?;
        let agent = call.headers.get(http::header::USER_AGENT);
        let agent = agent.and_then(|value| value.to_str().ok()).unwrap_or_default();
        Ok(Self {
            dry_run,
            manager: patch::apply::manager_name(manager, agent),
            validation: FieldValidation::parse(query.get("fieldValidation"))?,
            force: query.flag("force"),
        })
    }
}

/// The rules of `fieldManager`.
fn check_manager(call: &Call, manager: &str) -> Result<(), Status> {
    let mut errors = Vec::new();
    if manager.len() > LONGEST_MANAGER {
        errors.push(FieldError::too_long("fieldManager", LONGEST_MANAGER));
    }
    if manager.chars().any(char::is_control) {
        let why = "should only contain printable characters";
        errors.push(FieldError::invalid("fieldManager", manager, why));
    }
    if errors.is_empty() {
        return Ok(());
    }
    let kind = match call.info.verb {
        "create" => "CreateOptions",
        "patch" => "PatchOptions",
        _ => "UpdateOptions",
    };
    Err(Status::invalid("meta.k8s.io", kind, "", &errors))
}

/// Whether `dryRun` asks for one.
pub(crate) fn dry_run<'a>(values: impl Iterator<Item = &'a str>) -> Result<bool, Status> {
    let mut dry = false;
    for value in values.filter(|value| !value.is_empty()) {
        if value != "All" {
            return Err(Status::bad_request(format!(
                "Invalid value for dryRun: {value:?}: supported values: \"All\""
            )));
        }
        dry = true;
    }
    Ok(dry)
}

/// What a write came to.
pub(crate) struct Written {
    pub(crate) object: Arc<Value>,
    pub(crate) created: bool,
    pub(crate) warnings: Vec<String>,
}

impl Written {
    pub(crate) fn answer(self, call: &Call, resource: &Resource) -> Result<Answer, Status> {
        let accepted = call.accept(&[Shape::Table, Shape::Partial])?;
        let code = if self.created { StatusCode::CREATED } else { StatusCode::OK };
        let mut answer = respond::object(code, resource, &self.object, accepted, call.include()?);
        respond::warn(&mut answer, &self.warnings);
        Ok(answer)
    }
}

/// How a body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Json,
    Yaml,
    Protobuf,
}

/// The document in a body.
pub(crate) fn parse_document(body: &[u8], format: Format) -> Result<Value, Status> {
    match format {
        Format::Json => serde_json::from_slice(body)
            .map_err(|error| Status::bad_request(format!("the body is not JSON: {error}"))),
        Format::Yaml => parse_yaml(body),
        Format::Protobuf => protobuf::decode(body)
            .map_err(|error| Status::bad_request(format!("the body cannot be read: {error}"))),
    }
}

fn parse_yaml(body: &[u8]) -> Result<Value, Status> {
    let limits = yaml::Limits { depth: YAML_DEPTH, ..yaml::Limits::default() };
    let mut documents = yaml::documents(body, limits)
        .map_err(|error| Status::bad_request(format!("the body is not YAML: {error}")))?;
    match documents.len() {
        1 => Ok(documents.remove(0)),
        n => Err(Status::bad_request(format!("the body has {n} documents where one is expected"))),
    }
}

/// How a body that should be an object is written.
///
/// # Errors
/// 415: in no way that is read here.
pub(crate) fn body_format(call: &Call) -> Result<Format, Status> {
    match call.content_type().as_deref() {
        None | Some("" | "application/json" | "text/json") => Ok(Format::Json),
        Some("application/yaml" | "application/x-yaml" | "text/yaml") => Ok(Format::Yaml),
        Some(protobuf::MEDIA_TYPE) => Ok(Format::Protobuf),
        Some(_) => Err(Status::unsupported_media_type(&[
            "application/json",
            "application/yaml",
            protobuf::MEDIA_TYPE,
        ])),
    }
}

/// The object in a body, and what is odd about it.
fn read_object(
    call: &Call,
    resource: &Resource,
    body: &[u8],
    validation: FieldValidation,
) -> Result<(Value, Vec<String>), Status> {
    let decoded = match body_format(call)? {
        Format::Json => resource.decode_bytes(body, validation)?,
        format => resource.decode(parse_document(body, format)?, validation)?,
    };
    Ok((decoded.object, decoded.warnings))
}

/// Answers a create.
pub(crate) async fn create(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
    body: &Bytes,
) -> Result<Answer, Status> {
    call.accept(&[Shape::Table, Shape::Partial])?; // before anything is written
    let options = WriteOptions::parse(call)?;
    let (object, warnings) = read_object(call, resource, body, options.validation)?;
    let target = Target { namespace: &call.info.namespace, ..Target::default() };
    let object = create_object(core, call, resource, target, object, &options, true).await?;
    Written { object, created: true, warnings }.answer(call, resource)
}

/// Creates one object; `target.name` is the name in the URL, if there is one.
pub(crate) async fn create_object(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
    target: Target<'_>,
    mut object: Value,
    options: &WriteOptions,
    record: bool,
) -> Result<Arc<Value>, Status> {
    let now = Timestamp::now();
    let namespace = if resource.namespaced { target.namespace } else { "" };
    if resource.namespaced && namespace.is_empty() {
        return Err(Status::bad_request("an empty namespace may not be set during creation"));
    }
    let generated = target.name.is_empty() && text(&object, "/metadata/name").is_empty();
    resource.default(&mut object);
    let context =
        CreateContext { namespace, name: Some(target.name).filter(|name| !name.is_empty()), now };
    resource.prepare_create(&mut object, &context)?;
    if record {
        patch::apply::record_update(resource, None, &mut object, &options.manager, "", now);
    }
    let name = text(&object, "/metadata/name").to_owned();
    let admitted = Target { namespace, name: &name, ..Target::default() };
    let create = Operation::Create;
    furnished::wait(core, resource, namespace, &object).await;
    core.admit(call, resource, create, admitted, options.dry_run, Some(&mut object))?;
    let reservation = reserve(core, resource, &mut object, None)?;
    let errors = resource.validate(&object, None, "");
    if !errors.is_empty() {
        return Err(resource.invalid(&object, &errors));
    }
    let mut tried = 0;
    loop {
        let name = text(&object, "/metadata/name").to_owned();
        let taken = || Status::already_exists(&resource.group, &resource.plural, &name);
        if options.dry_run {
            let key = crate::cache::object_key(namespace, &name);
            return match core.cache_of(resource)?.get(&key) {
                Some(_) => Err(taken()),
                None => Ok(Arc::new(object)),
            };
        }
        let stored = resource.to_stored(object.clone());
        match core.write(resource, stored, Expect::Absent).await {
            Ok(stored) => {
                if let Some(reservation) = reservation {
                    reservation.keep();
                }
                return Ok(resource.convert(&stored));
            }
            Err(Refused::Failed(status)) => return Err(status),
            Err(Refused::Conflict) if !generated => return Err(taken()),
            Err(Refused::Conflict) => {
                tried += 1;
                let base = text(&object, "/metadata/generateName").to_owned();
                if tried == NAMES_TRIED || base.is_empty() {
                    return Err(taken().with_retry_after(1));
                }
                if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
                    metadata.insert("name".to_owned(), generate_name(&base).into());
                }
            }
        }
    }
}

/// Takes what a Service needs; nothing for others.
fn reserve<'a>(
    core: &'a Core,
    resource: &Resource,
    new: &mut Value,
    old: Option<&Value>,
) -> Result<Option<crate::server::services::Reservation<'a>>, Status> {
    if !resource.group.is_empty() || resource.plural != "services" {
        return Ok(None);
    }
    core.services.reserve(new, old).map(Some).map_err(|errors| resource.invalid(new, &errors))
}

/// How an update makes the new object from the old.
pub(crate) type Change<'a> = dyn Fn(&Arc<Value>) -> Result<Changed, Status> + Send + Sync + 'a;

/// The new object.
pub(crate) struct Changed {
    pub(crate) object: Value,
    pub(crate) warnings: Vec<String>,
    /// The managed fields are already as they should be.
    pub(crate) applied: bool,
}

/// Answers an update.
pub(crate) async fn update(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
    body: &Bytes,
) -> Result<Answer, Status> {
    call.accept(&[Shape::Table, Shape::Partial])?;
    let options = WriteOptions::parse(call)?;
    let (object, warnings) = read_object(call, resource, body, options.validation)?;
    let finalize = call.info.subresource == "finalize";
    let change = |old: &Arc<Value>| {
        let object = if finalize { finalized(old, &object) } else { object.clone() };
        Ok(Changed { object, warnings: warnings.clone(), applied: false })
    };
    let target = target_of(call, resource);
    for _ in 0..RETRIES {
        match update_object(core, call, resource, target, &change, &options).await {
            Err(status) if status.code == 404 && puts(resource, target, &object) => {}
            written => return written?.answer(call, resource),
        }
        core.authorize_create(call, resource)?;
        let new = object.clone();
        match create_object(core, call, resource, target, new, &options, true).await {
            Ok(object) => {
                return Written { object, created: true, warnings }.answer(call, resource);
            }
            Err(status) if status.reason == "AlreadyExists" => {}
            Err(status) => return Err(status),
        }
    }
    Err(Status::stale(&resource.group, &resource.plural, target.name))
}

/// Whether an update of what is not there means to create it: for the kinds that Kubernetes allows
/// it for, unless the object says that it was there before.
fn puts(resource: &Resource, target: Target<'_>, object: &Value) -> bool {
    resource.creates_on_update()
        && target.subresource.is_empty()
        && text(object, "/metadata/uid").is_empty()
        && matches!(text(object, "/metadata/resourceVersion"), "" | "0")
}

/// `namespaces/finalize` changes `spec.finalizers` and nothing else.
fn finalized(old: &Value, given: &Value) -> Value {
    let mut object = old.clone();
    let finalizers = given.pointer("/spec/finalizers").cloned();
    if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
        match finalizers {
            Some(finalizers) => spec.insert("finalizers".to_owned(), finalizers),
            None => spec.remove("finalizers"),
        };
    }
    let version = given.pointer("/metadata/resourceVersion").cloned();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        match version {
            Some(version) => metadata.insert("resourceVersion".to_owned(), version),
            None => metadata.remove("resourceVersion"),
        };
    }
    object
}

pub(crate) fn target_of<'a>(call: &'a Call, resource: &Resource) -> Target<'a> {
    Target {
        namespace: if resource.namespaced { &call.info.namespace } else { "" },
        name: &call.info.name,
        subresource: &call.info.subresource,
        old: None,
    }
}

/// Changes one object; begins again when it changed meanwhile, unless the new one says by its
/// `resourceVersion` which old one it is made for.
pub(crate) async fn update_object(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
    target: Target<'_>,
    change: &Change<'_>,
    options: &WriteOptions,
) -> Result<Written, Status> {
    let stale = || Status::stale(&resource.group, &resource.plural, target.name);
    for _ in 0..RETRIES {
        let stored = core.current(resource, target.namespace, target.name).await?;
        let old = resource.convert(&stored);
        let Changed { object: mut new, warnings, applied } = change(&old)?;
        let wanted = text(&new, "/metadata/resourceVersion");
        if !matches!(wanted, "" | "0") && wanted != text(&old, "/metadata/resourceVersion") {
            return Err(stale());
        }
        let now = Timestamp::now();
        resource.default(&mut new);
        resource.prepare_update(&mut new, &old, target.subresource)?;
        if !applied {
            let manager = &options.manager;
            let record = patch::apply::record_update;
            record(resource, Some(&old), &mut new, manager, target.subresource, now);
        }
        let admitted = Target { old: Some(&old), ..target };
        let operation = Operation::Update;
        core.admit(call, resource, operation, admitted, options.dry_run, Some(&mut new))?;
        let reservation = if target.subresource.is_empty() {
            reserve(core, resource, &mut new, Some(&old))?
        } else {
            None
        };
        let errors = resource.validate(&new, Some(&old), target.subresource);
        if !errors.is_empty() {
            return Err(resource.invalid(&new, &errors));
        }
        let revision = revision_of(&old);
        crate::cache::set_resource_version(&mut new, revision);
        if options.dry_run || new == *old {
            return Ok(Written { object: Arc::new(new), created: false, warnings });
        }
        let to_store = resource.to_stored(new);
        let result = if delete::is_over(resource, &to_store) {
            core.remove(resource, &to_store, revision).await
        } else {
            core.write(resource, to_store, Expect::Modified(revision)).await
        };
        match result {
            Ok(stored) => {
                if let Some(reservation) = reservation {
                    reservation.keep();
                }
                let object = resource.convert(&stored);
                return Ok(Written { object, created: false, warnings });
            }
            Err(Refused::Failed(status)) => return Err(status),
            Err(Refused::Conflict) => {}
        }
    }
    Err(stale())
}

/// Answers a patch.
pub(crate) async fn patch(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
    body: &Bytes,
) -> Result<Answer, Status> {
    call.accept(&[Shape::Table, Shape::Partial])?;
    let options = WriteOptions::parse(call)?;
    let kind = patch_kind(call)?;
    if kind == APPLY_PATCH {
        return apply(core, call, resource, body, &options).await;
    }
    if options.force {
        return Err(Status::bad_request("force may not be set for non-apply patches"));
    }
    let given = parse_document(body, Format::Json)?;
    let change = |old: &Arc<Value>| {
        let patched = match kind {
            JSON_PATCH => patch::json_patch(old, &given)?,
            MERGE_PATCH => patch::merge_patch(old, &given)?,
            _ => patch::strategic_merge(resource, old, &given)?,
        };
        let decoded = resource.decode(patched, options.validation)?;
        Ok(Changed { object: decoded.object, warnings: decoded.warnings, applied: false })
    };
    update_object(core, call, resource, target_of(call, resource), &change, &options)
        .await?
        .answer(call, resource)
}

/// Which of the four kinds of patch the body is.
///
/// # Errors
/// 415: none of them.
pub(crate) fn patch_kind(call: &Call) -> Result<&'static str, Status> {
    const KINDS: [&str; 4] = [JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, APPLY_PATCH];
    let given = call.content_type().unwrap_or_default();
    KINDS
        .into_iter()
        .find(|kind| *kind == given)
        .ok_or_else(|| Status::unsupported_media_type(&KINDS))
}

/// Server-side apply.
async fn apply(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
    body: &Bytes,
    options: &WriteOptions,
) -> Result<Answer, Status> {
    if call.info.query.get("fieldManager").is_none() {
        return Err(Status::bad_request("fieldManager is required for apply patch"));
    }
    let given = parse_document(body, Format::Yaml)?;
    let decoded = resource.decode(given, options.validation)?;
    let applied = decoded.object;
    let target = target_of(call, resource);
    let manager = options.manager.as_str();
    let apply_to = |live: Option<&Value>| {
        patch::apply::apply(
            resource,
            live,
            &applied,
            manager,
            target.subresource,
            options.force,
            Timestamp::now(),
        )
    };
    let change = |old: &Arc<Value>| {
        let object = apply_to(Some(old))?;
        Ok(Changed { object, warnings: decoded.warnings.clone(), applied: true })
    };
    for _ in 0..RETRIES {
        match update_object(core, call, resource, target, &change, options).await {
            Ok(written) => return written.answer(call, resource),
            Err(status) if status.code == 404 && target.subresource.is_empty() => {}
            Err(status) => return Err(status),
        }
        if !text(&applied, "/metadata/uid").is_empty() {
            // Whoever knows the UID means an object that is gone.
            let why = "the object with this UID does not exist any more";
            return Err(Status::conflict(&resource.group, &resource.plural, target.name, why));
        }
        // A patch that creates needs to be allowed to.
        core.authorize_create(call, resource)?;
        let object = apply_to(None)?;
        match create_object(core, call, resource, target, object, options, false).await {
            Ok(object) => {
                let warnings = decoded.warnings.clone();
                return Written { object, created: true, warnings }.answer(call, resource);
            }
            Err(status) if status.reason == "AlreadyExists" => {}
            Err(status) => return Err(status),
        }
    }
    Err(Status::stale(&resource.group, &resource.plural, target.name))
}
