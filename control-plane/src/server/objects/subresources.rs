//! Subresources that are more than a part of the object: scale, binding, eviction.

use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;
use jiff::Timestamp;
use serde_json::Value;

use super::{
    delete::{self, DeleteOptions},
    read,
    write::{
        self, APPLY_PATCH, Changed, Format, JSON_PATCH, WriteOptions, body_format, parse_document,
        patch_kind, target_of, update_object,
    },
};
use crate::{
    admission::Operation,
    patch,
    registry::{Resource, bind_pod, scale},
    server::{
        core::{Call, Core, Target, text},
        respond::{self, Answer},
    },
    status::Status,
};

/// Answers a get of a scale.
pub(crate) async fn get_scale(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
) -> Result<Answer, Status> {
    let accepted = call.accept(&[])?;
    let object = read::find(core, call, resource).await?;
    Ok(respond::document(StatusCode::OK, &scale::of(&object), accepted))
}

/// Answers an update or patch of a scale.
pub(crate) async fn set_scale(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
    body: &Bytes,
) -> Result<Answer, Status> {
    let accepted = call.accept(&[])?;
    let options = WriteOptions::parse(call)?;
    let kind = if call.info.verb == "patch" { Some(patch_kind(call)?) } else { None };
    let given = match kind {
        Some(APPLY_PATCH) => parse_document(body, Format::Yaml)?,
        Some(_) => parse_document(body, Format::Json)?,
        None => parse_document(body, body_format(call)?)?,
    };
    let change = |old: &Arc<Value>| {
        let present = scale::of(old);
        let wanted = match kind {
            None => given.clone(),
            Some(JSON_PATCH) => patch::json_patch(&present, &given)?,
            // A Scale has no lists: all other kinds come to the same.
            Some(_) => patch::merge_patch(&present, &given)?,
        };
        if text(&wanted, "/kind") != "Scale" {
            return Err(Status::bad_request(format!(
                "the body must be a Scale of autoscaling/v1, not {:?}",
                text(&wanted, "/kind")
            )));
        }
        let mut object = Value::clone(old);
        scale::apply(&mut object, &wanted)?;
        Ok(Changed { object, warnings: Vec::new(), applied: false })
    };
    // What changes is the object's spec.
    let target = Target { subresource: "", ..target_of(call, resource) };
    let written = update_object(core, call, resource, target, &change, &options).await?;
    Ok(respond::document(StatusCode::OK, &scale::of(&written.object), accepted))
}

/// Answers a create of `pods/binding`, or of a Binding, whose name is in its body.
pub(crate) async fn bind(
    core: &Core,
    call: &Call,
    pods: &Arc<Resource>,
    body: &Bytes,
) -> Result<Answer, Status> {
    let accepted = call.accept(&[])?;
    let options = WriteOptions::parse(call)?;
    let mut binding = parse_document(body, body_format(call)?)?;
    if !matches!(text(&binding, "/kind"), "" | "Binding") {
        let kind = text(&binding, "/kind");
        return Err(Status::bad_request(format!("the body must be a Binding, not {kind}")));
    }
    let in_url = call.info.name.as_str();
    let in_body = text(&binding, "/metadata/name").to_owned();
    let name = match (in_url, in_body.as_str()) {
        ("", "") => return Err(Status::bad_request("a Binding needs the name of its pod")),
        ("", name) | (name, "") => name.to_owned(),
        (url, body) if url == body => url.to_owned(),
        (url, body) => {
            return Err(Status::bad_request(format!(
                "the name of the object ({body}) does not match the name on the URL ({url})"
            )));
        }
    };
    let namespace = text(&binding, "/metadata/namespace");
    if !namespace.is_empty() && namespace != call.info.namespace {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    let target = Target { namespace: &call.info.namespace, name: &name, ..Target::default() };
    let admitted = Target { subresource: "binding", ..target };
    let create = Operation::Create;
    core.admit(call, pods, create, admitted, options.dry_run, Some(&mut binding))?;
    let wanted_uid = text(&binding, "/metadata/uid").to_owned();
    let change = |old: &Arc<Value>| {
        if !wanted_uid.is_empty() && wanted_uid != text(old, "/metadata/uid") {
            let why = "the UID in the binding is not that of the pod";
            return Err(Status::conflict("", "pods", &name, why));
        }
        let mut pod = Value::clone(old);
        bind_pod(&mut pod, &binding, Timestamp::now())?;
        Ok(Changed { object: pod, warnings: Vec::new(), applied: false })
    };
    let target = Target { subresource: "binding", ..target };
    update_object(core, call, pods, target, &change, &options).await?;
    Ok(respond::document(StatusCode::CREATED, &delete::success(), accepted))
}

/// Answers a create of `pods/eviction`. There are no disruption budgets among the resources, so
/// nothing can stand against an eviction but the preconditions that it brings.
pub(crate) async fn evict(
    core: &Core,
    call: &Call,
    pods: &Arc<Resource>,
    body: &Bytes,
) -> Result<Answer, Status> {
    let accepted = call.accept(&[])?;
    let dry_run = write::dry_run(call.info.query.all("dryRun"))?;
    let mut eviction = parse_document(body, body_format(call)?)?;
    if text(&eviction, "/kind") != "Eviction" {
        return Err(Status::bad_request(format!(
            "the body must be an Eviction of policy/v1, not {:?}",
            text(&eviction, "/kind")
        )));
    }
    let name = text(&eviction, "/metadata/name");
    if !name.is_empty() && name != call.info.name {
        return Err(Status::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            call.info.name
        )));
    }
    let given = eviction.get("deleteOptions").cloned().unwrap_or_default();
    let mut options = DeleteOptions::from_value(&given)?;
    options.dry_run |= dry_run;
    let target = target_of(call, pods);
    core.admit(call, pods, Operation::Create, target, dry_run, Some(&mut eviction))?;
    let target = Target { subresource: "", ..target };
    delete::delete_object(core, call, pods, target, &options).await?;
    Ok(respond::document(StatusCode::CREATED, &delete::success(), accepted))
}
