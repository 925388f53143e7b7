//! `create serviceaccounts/<name>/token`.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Bound, Claims, KubernetesClaims, TokenIssuer, verify::username};
use crate::{
    admission::Refusal,
    auth::fields::{at, name, namespace, text, texts, uid},
};

/// Tokens of less than ten minutes are refused.
const MIN_SECONDS: i64 = 600;
/// The documented upper limit.
const MAX_SECONDS: i64 = 1 << 32;
/// What a request gets that does not say.
const DEFAULT_SECONDS: i64 = 3600;

/// Answers a TokenRequest for the service account `account` of `account_namespace`: the same object
/// with its status filled in.
///
/// # Errors
/// 400, 404, 409 and 422 as Kubernetes has them.
pub fn token_request(
    issuer: &TokenIssuer,
    account_namespace: &str,
    account: &str,
    body: &Value,
    now: Timestamp,
) -> Result<Value, Refusal> {
    super::super::reviews::expect_kind(body, "authentication.k8s.io/v1", "TokenRequest")?;
    if !name(body).is_empty() && name(body) != account {
        return Err(Refusal::bad_request(format!(
            "the name of the object ({}) does not match the name on the URL ({account})",
            name(body)
        )));
    }
    if !namespace(body).is_empty() && namespace(body) != account_namespace {
        return Err(Refusal::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    let seconds = lifetime(body)?;
    let mut audiences = texts(body, &["spec", "audiences"]);
    if audiences.is_empty() {
        audiences = issuer.audiences().to_vec();
    }
    let lookup = &*issuer.lookup;
    let found = lookup
        .get("", "serviceaccounts", Some(account_namespace), account)
        .ok_or_else(|| Refusal::not_found("serviceaccounts", account))?;
    let mut kubernetes = KubernetesClaims {
        namespace: account_namespace.to_owned(),
        node: None,
        pod: None,
        secret: None,
        serviceaccount: Bound { name: account.to_owned(), uid: uid(&found).to_owned() },
    };
    if let Some(reference) = at(body, &["spec", "boundObjectRef"]).filter(|r| !r.is_null()) {
        bind(&mut kubernetes, issuer, reference)?;
    }
    let claims = Claims {
        audiences: audiences.clone(),
        expiry: now.as_second().saturating_add(seconds),
        issued_at: now.as_second(),
        issuer: issuer.issuer.clone(),
        id: uuid::Uuid::new_v4().to_string(),
        kubernetes,
        not_before: now.as_second(),
        subject: username(account_namespace, account),
    };
    let token = issuer
        .issue(&claims)
        .map_err(|error| Refusal::plain(500, "InternalError", error.to_string()))?;
    let expiry = Timestamp::from_second(claims.expiry).unwrap_or(Timestamp::MAX);
    let mut answer = json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "metadata": {
            "name": account,
            "namespace": account_namespace,
            "creationTimestamp": seconds_only(now),
        },
        "spec": { "audiences": audiences, "expirationSeconds": seconds },
        "status": { "token": token, "expirationTimestamp": seconds_only(expiry) },
    });
    if let Some(reference) = at(body, &["spec", "boundObjectRef"]) {
        answer["spec"]["boundObjectRef"] = reference.clone();
    }
    Ok(answer)
}

/// A time as Kubernetes writes it.
fn seconds_only(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).unwrap_or(time).to_string()
}

fn lifetime(body: &Value) -> Result<i64, Refusal> {
    let seconds = match at(body, &["spec", "expirationSeconds"]) {
        None | Some(Value::Null) => return Ok(DEFAULT_SECONDS),
        Some(value) => value.as_i64().ok_or_else(|| {
            Refusal::bad_request("spec.expirationSeconds must be a whole number of seconds")
        })?,
    };
    let invalid = |why: &str| {
        Refusal::invalid(
            "TokenRequest.authentication.k8s.io",
            name(body),
            &format!("spec.expirationSeconds: Invalid value: {seconds}: {why}"),
        )
    };
    if seconds < MIN_SECONDS {
        return Err(invalid("may not specify a duration less than 10 minutes"));
    }
    if seconds > MAX_SECONDS {
        return Err(invalid("may not specify a duration larger than 2^32 seconds"));
    }
    Ok(seconds)
}

/// Binds the token to the object that the request names.
fn bind(
    claims: &mut KubernetesClaims,
    issuer: &TokenIssuer,
    reference: &Value,
) -> Result<(), Refusal> {
    let bound_name = text(reference, &["name"]);
    let (version, kind) = (text(reference, &["apiVersion"]), text(reference, &["kind"]));
    let (plural, in_namespace) = match (version, kind) {
        ("v1", "Pod") => ("pods", Some(claims.namespace.as_str())),
        ("v1", "Secret") => ("secrets", Some(claims.namespace.as_str())),
        ("v1", "Node") => ("nodes", None),
        _ => {
            return Err(Refusal::bad_request(format!(
                "cannot bind token to object of type {version}, Kind={kind}"
            )));
        }
    };
    let object = issuer
        .lookup
        .get("", plural, in_namespace, bound_name)
        .ok_or_else(|| Refusal::not_found(plural, bound_name))?;
    let wanted = text(reference, &["uid"]);
    if !wanted.is_empty() && wanted != uid(&object) {
        let message = format!(
            "Operation cannot be fulfilled on {kind} {bound_name:?}: the UID in the bound object \
             reference ({wanted}) does not match the UID in record. The object might have been \
             deleted and then recreated"
        );
        return Err(Refusal::plain(409, "Conflict", message));
    }
    let bound = Bound { name: bound_name.to_owned(), uid: uid(&object).to_owned() };
    match kind {
        "Pod" => {
            if text(&object, &["spec", "serviceAccountName"]) != claims.serviceaccount.name {
                return Err(Refusal::bad_request(format!(
                    "cannot bind token for serviceaccount {:?} to pod running with different \
                     serviceaccount name.",
                    claims.serviceaccount.name
                )));
            }
            let node = text(&object, &["spec", "nodeName"]);
            if !node.is_empty() {
                let node_uid = issuer
                    .lookup
                    .get("", "nodes", None, node)
                    .map(|node| uid(&node).to_owned())
                    .unwrap_or_default();
                claims.node = Some(Bound { name: node.to_owned(), uid: node_uid });
            }
            claims.pod = Some(bound);
        }
        "Secret" => claims.secret = Some(bound),
        _ => claims.node = Some(bound),
    }
    Ok(())
}
