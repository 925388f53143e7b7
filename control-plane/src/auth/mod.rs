//! Who asks, and whether they may.
//!
//! ```text
//!            certificate or token          Impersonate-*            masters → node → RBAC
//! request ──► [authenticators] ── user ──► [impersonation] ── user ──► [authorizers] ──► admission
//!                    │ none                                                 │ no
//!                    ▼                                                      ▼
//!            [Anonymous] or 401                                        403, [messages]
//! ```
//!
//! * [`x509`], [`tokens`]: the two kinds of credentials.
//! * [`rbac`], [`node`]: the two authorizers. Both decide from memory, by indexes (`derived.rs`) that
//!   are made again only when the objects under them changed.
//! * [`bootstrap`]: the documented default roles and bindings.
//! * [`reviews`]: the same answers as API objects (`TokenReview`, `SubjectAccessReview`, …).
//!
//! Nothing here does I/O or waits. A refusal says what Kubernetes says, and no more than that to who
//! is not authenticated.
//!
//! [authenticators]: authenticators()
//! [authorizers]: authorizers()

pub(crate) mod authenticators;
pub(crate) mod authorizers;
pub mod bootstrap;
pub(crate) mod derived;
pub(crate) mod fields;
pub mod impersonation;
pub mod messages;
pub mod node;
pub mod rbac;
pub mod reviews;
pub mod tokens;
pub mod x509;

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;

pub use authenticators::{Anonymous, Authenticators, authenticators};
pub use authorizers::{Authorizers, authorizers};

use std::collections::BTreeMap;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

/// The user of requests without credentials.
pub const SYSTEM_ANONYMOUS: &str = "system:anonymous";
/// The group of all users that are known.
pub const SYSTEM_AUTHENTICATED: &str = "system:authenticated";
/// The group of [`SYSTEM_ANONYMOUS`].
pub const SYSTEM_UNAUTHENTICATED: &str = "system:unauthenticated";

/// A user as authentication found them (`authentication.k8s.io/v1` UserInfo).
///
/// A request from inside the process carries one in its extensions; only in-process callers can
/// put it there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UserInfo {
    /// The name that rules and audit know them by.
    pub username: String,
    /// A name that is never given to another.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// Groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// What else the authenticator said.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, Vec<String>>,
}

impl UserInfo {
    /// A user that is known, with these groups and `system:authenticated`.
    #[must_use]
    pub fn user(username: impl Into<String>, groups: &[&str]) -> Self {
        authenticators::authenticated(Self {
            username: username.into(),
            groups: groups.iter().map(|&group| group.to_owned()).collect(),
            ..Self::default()
        })
    }

    /// The kubelet of a node.
    #[must_use]
    pub fn node(name: &str) -> Self {
        Self::user(format!("system:node:{name}"), &[node::NODES])
    }

    /// A service account, as its tokens name it; in-process controllers are those of `kube-system`.
    #[must_use]
    pub fn service_account(namespace: &str, name: &str) -> Self {
        authenticators::authenticated(Self {
            username: tokens::verify::username(namespace, name),
            groups: tokens::verify::groups(namespace),
            ..Self::default()
        })
    }
}

/// What a request wants to do, as an authorizer sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Who asks.
    pub user: UserInfo,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`, …; for
    /// other paths the HTTP method in lower case.
    pub verb: String,
    /// Whether it names a resource; otherwise only `path` counts.
    pub resource_request: bool,
    /// API group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Plural resource name.
    pub resource: String,
    /// Subresource, or empty.
    pub subresource: String,
    /// Namespace, or empty.
    pub namespace: String,
    /// Object name, or empty. A list or watch with the field selector `metadata.name=x` names `x`.
    pub name: String,
    /// The `field=value` parts of a list's, watch's or deletecollection's field selector: by them
    /// the node authorizer knows a kubelet that asks for its own pods (`spec.nodeName`).
    pub field_selector: Vec<(String, String)>,
    /// URL path.
    pub path: String,
}

/// An authorizer's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Yes, because.
    Allow(String),
    /// No, whatever others say.
    Deny(String),
    /// Not for this authorizer to say.
    NoOpinion(String),
}

/// Decides whether a request may go on.
pub trait Authorizer: Send + Sync + 'static {
    /// Decides from memory, without I/O.
    fn authorize(&self, attributes: &Attributes) -> Decision;
}

/// What came with a request that may say who asks.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// The client's certificate in DER, with its key proven and its chain and dates verified against
    /// the cluster's authority; or why it is no good.
    pub client_certificate: Option<Result<Vec<u8>, String>>,
    /// The `Authorization: Bearer` token.
    pub bearer_token: Option<String>,
}

/// Finds out who asks.
#[async_trait]
pub trait Authenticator: Send + Sync + 'static {
    /// The user; `Ok(None)` if no credentials were given (the caller is then
    /// `system:anonymous`, or refused); `Err` with a reason for the log if they are bad (401).
    async fn authenticate(&self, credentials: &Credentials) -> Result<Option<UserInfo>, String>;
}
