//! Acting as somebody else: the `Impersonate-*` headers.

use http::HeaderMap;

use super::{
    Attributes, Authorizer, Decision, SYSTEM_ANONYMOUS, SYSTEM_AUTHENTICATED,
    SYSTEM_UNAUTHENTICATED, UserInfo, messages, tokens::verify,
};
use crate::admission::Refusal;

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";

/// Who a request is made as, if its headers ask for another than `requester`. Each user, group, UID
/// and extra value must be allowed to the requester by the verb `impersonate`.
///
/// # Errors
/// 400 for headers that make no sense, 403 for what the requester may not.
pub fn impersonate(
    headers: &HeaderMap,
    requester: &UserInfo,
    authorizer: &dyn Authorizer,
) -> Result<Option<UserInfo>, Refusal> {
    let asked = Asked::from_headers(headers)?;
    let Some(username) = asked.username else {
        if asked.uid.is_some() || !asked.groups.is_empty() || !asked.extra.is_empty() {
            return Err(Refusal::bad_request(
                "impersonating a group, uid or extra value needs the Impersonate-User header too",
            ));
        }
        return Ok(None);
    };
    let may = |group: &str, resource: &str, subresource: &str, namespace: &str, name: &str| {
        let attributes = Attributes {
            user: requester.clone(),
            verb: "impersonate".to_owned(),
            resource_request: true,
            group: group.to_owned(),
            version: if group.is_empty() { String::new() } else { "v1".to_owned() },
            resource: resource.to_owned(),
            subresource: subresource.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ..Attributes::default()
        };
        match authorizer.authorize(&attributes) {
            Decision::Allow(_) => Ok(()),
            Decision::Deny(why) | Decision::NoOpinion(why) => {
                Err(messages::forbidden(&attributes, &why))
            }
        }
    };

    let mut user = UserInfo::default();
    match service_account(&username) {
        Some((namespace, name)) => {
            may("", "serviceaccounts", "", namespace, name)?;
            if asked.groups.is_empty() {
                user.groups = verify::groups(namespace);
            }
        }
        None => may("", "users", "", "", &username)?,
    }
    for group in asked.groups {
        may("", "groups", "", "", &group)?;
        user.groups.push(group);
    }
    for (key, value) in asked.extra {
        may("authentication.k8s.io", "userextras", &key, "", &value)?;
        user.extra.entry(key).or_default().push(value);
    }
    if let Some(uid) = asked.uid {
        may("authentication.k8s.io", "uids", "", "", &uid)?;
        user.uid = uid;
    }
    // Whoever is not anonymous counts as authenticated, and only they.
    let standing =
        if username == SYSTEM_ANONYMOUS { SYSTEM_UNAUTHENTICATED } else { SYSTEM_AUTHENTICATED };
    if !user.groups.iter().any(|g| g == SYSTEM_AUTHENTICATED || g == SYSTEM_UNAUTHENTICATED) {
        user.groups.push(standing.to_owned());
    }
    user.username = username;
    Ok(Some(user))
}

/// The namespace and name of a service account's user name.
fn service_account(username: &str) -> Option<(&str, &str)> {
    let (namespace, name) = username.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    (!namespace.is_empty() && !name.is_empty() && !name.contains(':')).then_some((namespace, name))
}

#[derive(Default)]
struct Asked {
    username: Option<String>,
    uid: Option<String>,
    groups: Vec<String>,
    extra: Vec<(String, String)>,
}

impl Asked {
    fn from_headers(headers: &HeaderMap) -> Result<Self, Refusal> {
        let mut asked = Self::default();
        for (name, value) in headers {
            let name = name.as_str(); // lower case already
            if !name.starts_with("impersonate-") {
                continue;
            }
            let value = value.to_str().map_err(|_| {
                Refusal::bad_request(format!("the header {name} is not plain text"))
            })?;
            match name {
                USER | UID if value.is_empty() => {}
                USER => asked.username = Some(value.to_owned()),
                UID => asked.uid = Some(value.to_owned()),
                GROUP => asked.groups.push(value.to_owned()),
                _ => {
                    if let Some(key) = name.strip_prefix(EXTRA) {
                        asked.extra.push((percent_decoded(key), value.to_owned()));
                    }
                }
            }
        }
        Ok(asked)
    }
}

/// Header names hold few characters, so keys come percent-encoded. What is not valid stays as it is.
fn percent_decoded(key: &str) -> String {
    let bytes = key.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%')
            .then(|| key.get(at + 1..at + 3))
            .flatten()
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match hex {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(decoded).unwrap_or_else(|_| key.to_owned())
}
