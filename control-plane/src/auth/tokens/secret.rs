//! Tokens that are kept in Secrets of type `kubernetes.io/service-account-token` and do not run out
//! ("Manually create a long-lived API token for a ServiceAccount"). Such a token is bound to its
//! Secret: it is worth nothing once the Secret, or what is in it, is gone.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde_json::Value;

use super::{
    Bound, Claims, KubernetesClaims, TokenError, TokenIssuer, jwt::NEVER, verify::username,
};
use crate::{
    auth::fields::{name, namespace, text, uid},
    lookup::Lookup,
};

/// The token that a Secret of a service account is to hold.
///
/// # Errors
/// It can't be signed.
pub(crate) fn issue(
    issuer: &TokenIssuer,
    account: &Value,
    secret: &Value,
    now: Timestamp,
) -> Result<String, TokenError> {
    let bound =
        |object: &Value| Bound { name: name(object).to_owned(), uid: uid(object).to_owned() };
    issuer.issue(&Claims {
        audiences: issuer.audiences().to_vec(),
        expiry: NEVER,
        issued_at: now.as_second(),
        issuer: issuer.issuer.clone(),
        id: uuid::Uuid::new_v4().to_string(),
        kubernetes: KubernetesClaims {
            namespace: namespace(account).to_owned(),
            node: None,
            pod: None,
            secret: Some(bound(secret)),
            serviceaccount: bound(account),
        },
        not_before: now.as_second(),
        subject: username(namespace(account), name(account)),
    })
}

/// Whether the Secret that the token is bound to still holds it.
pub(super) fn check(claims: &Claims, token: &str, lookup: &dyn Lookup) -> Result<(), TokenError> {
    let Some(bound) = &claims.kubernetes.secret else {
        return Err(TokenError::Malformed("it runs out at no time and is bound to no secret"));
    };
    let namespace = Some(claims.kubernetes.namespace.as_str());
    let held = lookup
        .get("", "secrets", namespace, &bound.name)
        .and_then(|secret| STANDARD.decode(text(&secret, &["data", "token"])).ok());
    if held.as_deref() == Some(token.as_bytes()) {
        return Ok(());
    }
    Err(TokenError::Gone {
        subject: claims.subject.clone(),
        kind: "secret",
        name: bound.name.clone(),
        problem: "does not hold this token",
    })
}
