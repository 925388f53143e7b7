//! Whether what a token says is still so.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::{Bound, Claims, TokenError, jwt::NEVER};
use crate::{
    auth::{
        UserInfo,
        fields::{text, uid},
    },
    lookup::Lookup,
};

/// How long tokens outlive the moment that an object's deletion set for its end, so that a pod can
/// still say goodbye.
const AFTER_DELETION: SignedDuration = SignedDuration::from_secs(60);

/// A token that is good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Whose it is.
    pub user: UserInfo,
    /// For which of the audiences that were asked for.
    pub audiences: Vec<String>,
}

/// The groups of a service account, without `system:authenticated`.
pub(crate) fn groups(namespace: &str) -> Vec<String> {
    vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")]
}

/// A service account's user name.
pub(crate) fn username(namespace: &str, name: &str) -> String {
    format!("system:serviceaccount:{namespace}:{name}")
}

pub(crate) fn verify(
    claims: &Claims,
    audiences: &[String],
    lookup: &dyn Lookup,
    now: Timestamp,
) -> Result<Verified, TokenError> {
    let kubernetes = &claims.kubernetes;
    let subject = username(&kubernetes.namespace, &kubernetes.serviceaccount.name);
    if subject != claims.subject {
        return Err(TokenError::Malformed("its subject is not its service account"));
    }
    let time = |seconds| Timestamp::from_second(seconds).unwrap_or(Timestamp::MIN);
    let not_before = time(claims.not_before);
    let expiry = match claims.expiry {
        NEVER => Timestamp::MAX,
        seconds => time(seconds),
    };
    if now < not_before || now >= expiry {
        return Err(TokenError::Time { subject, not_before, expiry });
    }
    let accepted: Vec<String> =
        audiences.iter().filter(|a| claims.audiences.contains(a)).cloned().collect();
    if accepted.is_empty() {
        return Err(TokenError::Audience { subject, audiences: claims.audiences.clone() });
    }
    let live = |kind, plural, namespace, bound: &Bound| {
        let object = lookup.get("", plural, namespace, &bound.name);
        match missing(object.as_deref(), bound, now) {
            None => Ok(()),
            Some(problem) => Err(TokenError::Gone {
                subject: subject.clone(),
                kind,
                name: bound.name.clone(),
                problem,
            }),
        }
    };
    let namespace = Some(kubernetes.namespace.as_str());
    live("service account", "serviceaccounts", namespace, &kubernetes.serviceaccount)?;
    if let Some(secret) = &kubernetes.secret {
        live("secret", "secrets", namespace, secret)?;
    }
    if let Some(pod) = &kubernetes.pod {
        live("pod", "pods", namespace, pod)?;
    } else if let Some(node) = &kubernetes.node {
        // The node of a bound pod is information only.
        live("node", "nodes", None, node)?;
    }

    let mut extra = BTreeMap::new();
    let mut say = |key: &str, value: &str| {
        if !value.is_empty() {
            extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()]);
        }
    };
    if !claims.id.is_empty() {
        say("credential-id", &format!("JTI={}", claims.id));
    }
    if let Some(pod) = &kubernetes.pod {
        say("pod-name", &pod.name);
        say("pod-uid", &pod.uid);
    }
    if let Some(node) = &kubernetes.node {
        say("node-name", &node.name);
        say("node-uid", &node.uid);
    }
    Ok(Verified {
        user: UserInfo {
            username: subject,
            uid: kubernetes.serviceaccount.uid.clone(),
            groups: groups(&kubernetes.namespace),
            extra,
        },
        audiences: accepted,
    })
}

/// Why an object is not the one that was meant.
fn missing(object: Option<&Value>, bound: &Bound, now: Timestamp) -> Option<&'static str> {
    let Some(object) = object else { return Some("does not exist") };
    if uid(object) != bound.uid {
        return Some("was deleted and made again");
    }
    let deletion = text(object, &["metadata", "deletionTimestamp"]);
    match deletion.parse::<Timestamp>() {
        Ok(deletion) if now.duration_since(deletion) > AFTER_DELETION => Some("has been deleted"),
        _ => None,
    }
}
