//! The last word on an object before it is stored: what is filled in, and what is refused.

use serde_json::Value;

use crate::auth::UserInfo;

/// What is being done to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It is new.
    Create,
    /// It exists and changes.
    Update,
    /// It goes.
    Delete,
    /// A subresource that streams (`exec`, `attach`, `port-forward`).
    Connect,
}

/// An object on its way into the store.
#[derive(Debug)]
pub struct AdmissionRequest<'a> {
    /// Who asks.
    pub user: &'a UserInfo,
    /// What for.
    pub operation: Operation,
    /// API group.
    pub group: &'a str,
    /// Plural resource name.
    pub resource: &'a str,
    /// Subresource, or empty.
    pub subresource: &'a str,
    /// Namespace, or empty.
    pub namespace: &'a str,
    /// Name; may be empty on create (`generateName`).
    pub name: &'a str,
    /// The object before an update or delete.
    pub old: Option<&'a Value>,
    /// `dryRun=All`.
    pub dry_run: bool,
}

/// A refusal: becomes a Status with this code and reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP code (403, 404, 409, 422 …).
    pub code: u16,
    /// Status reason (`Forbidden`, …).
    pub reason: &'static str,
    /// What to tell the user.
    pub message: String,
}

impl Refusal {
    /// 403, as Kubernetes words it: `deployments.apps "x" is forbidden: why`.
    #[must_use]
    pub fn forbidden(group: &str, plural: &str, name: &str, why: &str) -> Self {
        let resource = match group {
            "" => plural.to_owned(),
            group => format!("{plural}.{group}"),
        };
        let object = match name {
            "" => String::new(),
            name => format!(" {name:?}"),
        };
        Self {
            code: 403,
            reason: "Forbidden",
            message: format!("{resource}{object} is forbidden: {why}"),
        }
    }

    /// 404: `serviceaccounts "x" not found`.
    #[must_use]
    pub fn not_found(plural: &str, name: &str) -> Self {
        Self { code: 404, reason: "NotFound", message: format!("{plural} {name:?} not found") }
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { code: 400, reason: "BadRequest", message: message.into() }
    }

    /// 422: `Kind.group "name" is invalid: why`.
    #[must_use]
    pub fn invalid(kind: &str, name: &str, why: &str) -> Self {
        Self { code: 422, reason: "Invalid", message: format!("{kind} {name:?} is invalid: {why}") }
    }
}

/// Fills in and checks objects.
pub trait Admission: Send + Sync + 'static {
    /// May change `object` (absent on delete and connect).
    fn admit(
        &self,
        request: &AdmissionRequest<'_>,
        object: Option<&mut Value>,
    ) -> Result<(), Refusal>;
}
