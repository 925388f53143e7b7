//! Secrets of type `kubernetes.io/service-account-token`: the token, the certificate authority and the
//! namespace are filled in, and the Secret goes with its service account. It is the work of
//! Kubernetes' token controller, done here where the signing key is.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{
    bootstrap::own_user,
    core::{Call, Core, Target, text},
    objects::{
        delete::{self, DeleteOptions},
        write::{self, Changed, WriteOptions},
    },
    request::RequestInfo,
};
use crate::{
    cache::{Event, TooOld},
    lookup::Lookup as _,
    registry::FieldValidation,
    status::Status,
};

const TYPE: &str = "kubernetes.io/service-account-token";
const NAME: &str = "kubernetes.io/service-account.name";
const UID: &str = "kubernetes.io/service-account.uid";
/// When to look again at what could not be done.
const AGAIN: Duration = Duration::from_secs(2);

/// Looks after them until the shutdown.
pub(crate) async fn run(core: Arc<Core>) {
    let (Some(secrets), Some(accounts)) =
        (core.cache.resource("", "secrets"), core.cache.resource("", "serviceaccounts"))
    else {
        return;
    };
    loop {
        let begin = core.cache.applied();
        let (Ok(mut secrets), Ok(mut accounts)) = (secrets.watch(begin), accounts.watch(begin))
        else {
            continue; // the ring went on meanwhile
        };
        let mut left = pass(&core).await;
        loop {
            let retry = async {
                match left {
                    true => tokio::time::sleep(AGAIN).await,
                    false => std::future::pending().await,
                }
            };
            let concerned = tokio::select! {
                () = core.shutdown.cancelled() => return,
                events = secrets.next() => concerns(events, |secret| text(secret, "/type") == TYPE),
                events = accounts.next() => concerns(events, |_| true),
                () = retry => Some(true),
            };
            match concerned {
                None => break, // too slow: all is looked at anew
                Some(false) => {}
                Some(true) => left = pass(&core).await,
            }
        }
    }
}

/// Whether one of these events is about such an object; `None` if some were lost.
fn concerns(
    events: Result<Vec<Arc<Event>>, TooOld>,
    is_one: impl Fn(&Value) -> bool,
) -> Option<bool> {
    Some(events.ok()?.iter().any(|event| is_one(&event.object)))
}

/// Looks at all such Secrets; whether something is left to do.
async fn pass(core: &Core) -> bool {
    let mut left = false;
    for secret in core.cache.list("", "secrets", None) {
        let going = !text(&secret, "/metadata/deletionTimestamp").is_empty();
        if text(&secret, "/type") != TYPE || going || core.shutdown.is_cancelled() {
            continue;
        }
        match tend(core, &secret).await {
            Ok(done) => left |= !done,
            Err(status) if matches!(status.code, 404 | 409) => left = true,
            Err(status) => {
                left = true;
                let name = text(&secret, "/metadata/name");
                tracing::warn!(name, %status, "a service account's secret could not be tended");
            }
        }
    }
    left
}

/// Fills in or deletes one Secret; `false` if something is missing for that.
async fn tend(core: &Core, secret: &Arc<Value>) -> Result<bool, Status> {
    let namespace = text(secret, "/metadata/namespace");
    let target = Target { namespace, name: text(secret, "/metadata/name"), ..Target::default() };
    let Some(resource) = core.registry.resource("", "v1", "secrets").cloned() else {
        return Ok(true);
    };
    let info = RequestInfo::of(&http::Method::POST, "/", None);
    let call = Call { info, user: own_user(), headers: http::HeaderMap::new() };
    let annotation = |key: &str| {
        let all = secret.pointer("/metadata/annotations");
        all.and_then(|all| all.get(key)).and_then(Value::as_str).unwrap_or_default()
    };
    let account = core.cache.get("", "serviceaccounts", Some(namespace), annotation(NAME));
    let account = account.filter(|account| {
        annotation(UID).is_empty() || annotation(UID) == text(account, "/metadata/uid")
    });
    let Some(account) = account else {
        let uid = json!({ "preconditions": { "uid": text(secret, "/metadata/uid") } });
        let options = DeleteOptions::from_value(&uid)?;
        delete::delete_object(core, &call, &resource, target, &options).await?;
        return Ok(true);
    };
    let authority = core.cache.get("", "configmaps", Some(namespace), "kube-root-ca.crt");
    let authority = authority.as_deref().map(|map| text(map, "/data/ca.crt").to_owned());
    let complete = authority.as_ref().is_some_and(|authority| !authority.is_empty());
    let options = WriteOptions {
        dry_run: false,
        manager: "kube-controller-manager".to_owned(),
        validation: FieldValidation::Strict,
        force: false,
    };
    let change = |old: &Arc<Value>| {
        let mut object = Value::clone(old);
        object["metadata"]["annotations"][UID] = text(&account, "/metadata/uid").into();
        if !object.get("data").is_some_and(Value::is_object) {
            object["data"] = json!({});
        }
        if text(&object, "/data/token").is_empty() {
            let token = core.security.answers.secret_token(&account, old);
            let token = token.map_err(Status::internal)?;
            object["data"]["token"] = STANDARD.encode(token).into();
        }
        if let Some(authority) = authority.as_ref().filter(|authority| !authority.is_empty()) {
            object["data"]["ca.crt"] = STANDARD.encode(authority).into();
        }
        if text(&object, "/data/namespace").is_empty() {
            object["data"]["namespace"] = STANDARD.encode(namespace).into();
        }
        Ok(Changed { object, warnings: Vec::new(), applied: false })
    };
    write::update_object(core, &call, &resource, target, &change, &options).await?;
    Ok(complete)
}
