//! Questions about users and permissions, as API objects.
//!
//! Each function takes the object that was posted and returns it with its status filled in.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    Attributes, Authorizer, Authorizers, Decision, UserInfo,
    authenticators::authenticated,
    fields::{at, list, text, texts},
    node::node_name,
    tokens::TokenIssuer,
};
use crate::admission::Refusal;

const AUTHENTICATION: &str = "authentication.k8s.io/v1";
const AUTHORIZATION: &str = "authorization.k8s.io/v1";

/// Refuses an object of another kind than the URL says. Kind and version may be left out.
pub(crate) fn expect_kind(body: &Value, version: &str, kind: &str) -> Result<(), Refusal> {
    let (given_version, given) = (text(body, &["apiVersion"]), text(body, &["kind"]));
    if !body.is_object()
        || (!given.is_empty() && given != kind)
        || (!given_version.is_empty() && given_version != version)
    {
        return Err(Refusal::bad_request(format!(
            "the object provided is unrecognized (must be of type {kind} of {version}): it is \
             {given:?} of {given_version:?}"
        )));
    }
    Ok(())
}

fn answer(body: &Value, version: &str, kind: &str, status: &Value) -> Value {
    let mut answer = body.clone();
    answer["apiVersion"] = json!(version);
    answer["kind"] = json!(kind);
    if !answer.get("metadata").is_some_and(Value::is_object) {
        answer["metadata"] = json!({});
    }
    answer["status"] = status.clone();
    answer
}

/// Whose token it is (`TokenReview`).
///
/// # Errors
/// 400 for a body that is none.
pub fn token_review(body: &Value, tokens: &TokenIssuer, now: Timestamp) -> Result<Value, Refusal> {
    expect_kind(body, AUTHENTICATION, "TokenReview")?;
    let token = text(body, &["spec", "token"]);
    if token.is_empty() {
        return Err(Refusal::bad_request("token is required for TokenReview in authentication"));
    }
    let asked = texts(body, &["spec", "audiences"]);
    let audiences = if asked.is_empty() { tokens.audiences() } else { &asked };
    let status = match tokens.verify(token, audiences, now) {
        Ok(verified) => json!({
            "authenticated": true,
            "user": authenticated(verified.user),
            "audiences": verified.audiences,
        }),
        Err(error) => {
            tracing::debug!(%error, "a token was reviewed and is not valid");
            json!({ "user": {}, "error": "invalid bearer token" })
        }
    };
    Ok(answer(body, AUTHENTICATION, "TokenReview", &status))
}

/// Who the caller is (`SelfSubjectReview`).
///
/// # Errors
/// 400 for a body that is none.
pub fn self_subject_review(user: &UserInfo, body: &Value) -> Result<Value, Refusal> {
    expect_kind(body, AUTHENTICATION, "SelfSubjectReview")?;
    Ok(answer(body, AUTHENTICATION, "SelfSubjectReview", &json!({ "userInfo": user })))
}

/// Whether a user may (`SubjectAccessReview`).
///
/// # Errors
/// 400 for a body that is none, 422 for one that asks for nothing or about nobody.
pub fn subject_access_review(body: &Value, authorizer: &dyn Authorizer) -> Result<Value, Refusal> {
    review(body, "SubjectAccessReview", named_user(body), authorizer, |_| None)
}

/// Whether a user may, in one namespace (`LocalSubjectAccessReview`).
///
/// # Errors
/// As [`subject_access_review`]; 422 also for a question about another namespace or about a path.
pub fn local_subject_access_review(
    namespace: &str,
    body: &Value,
    authorizer: &dyn Authorizer,
) -> Result<Value, Refusal> {
    review(body, "LocalSubjectAccessReview", named_user(body), authorizer, |spec| {
        let asked = text(spec, &["resourceAttributes", "namespace"]);
        if is_set(spec, "nonResourceAttributes") {
            Some(
                "spec.nonResourceAttributes: Invalid value: disallowed on this kind of request"
                    .to_owned(),
            )
        } else if asked != namespace {
            Some(format!(
                "spec.resourceAttributes.namespace: Invalid value: {asked:?}: must match \
                 metadata.namespace"
            ))
        } else {
            None
        }
    })
}

/// Whether the caller may (`SelfSubjectAccessReview`).
///
/// # Errors
/// As [`subject_access_review`].
pub fn self_subject_access_review(
    user: &UserInfo,
    body: &Value,
    authorizer: &dyn Authorizer,
) -> Result<Value, Refusal> {
    review(body, "SelfSubjectAccessReview", Some(user.clone()), authorizer, |_| None)
}

/// The user that a review asks about.
fn named_user(body: &Value) -> Option<UserInfo> {
    let user = UserInfo {
        username: text(body, &["spec", "user"]).to_owned(),
        uid: text(body, &["spec", "uid"]).to_owned(),
        groups: texts(body, &["spec", "groups"]),
        extra: at(body, &["spec", "extra"])
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .map(|(key, _)| (key.to_ascii_lowercase(), texts(body, &["spec", "extra", key])))
            .collect::<BTreeMap<_, _>>(),
    };
    (!user.username.is_empty() || !user.groups.is_empty()).then_some(user)
}

fn is_set(spec: &Value, field: &str) -> bool {
    spec.get(field).is_some_and(|value| !value.is_null())
}

fn review(
    body: &Value,
    kind: &'static str,
    user: Option<UserInfo>,
    authorizer: &dyn Authorizer,
    more: impl FnOnce(&Value) -> Option<String>,
) -> Result<Value, Refusal> {
    expect_kind(body, AUTHORIZATION, kind)?;
    let nothing = json!({});
    let spec = body.get("spec").unwrap_or(&nothing);
    let invalid = |why: &str| Refusal::invalid(&format!("{kind}.authorization.k8s.io"), "", why);
    let by_resource =
        match (is_set(spec, "resourceAttributes"), is_set(spec, "nonResourceAttributes")) {
            (true, true) => {
                return Err(invalid(
                    "spec.nonResourceAttributes: Invalid value: cannot be specified in combination \
                 with resourceAttributes",
                ));
            }
            (false, false) => {
                return Err(invalid(
                    "spec.resourceAttributes: Invalid value: null: exactly one of \
                 nonResourceAttributes or resourceAttributes must be specified",
                ));
            }
            (by_resource, _) => by_resource,
        };
    let user = user.ok_or_else(|| {
        invalid("spec.user: Invalid value: \"\": at least one of user or group must be specified")
    })?;
    if let Some(problem) = more(spec) {
        return Err(invalid(&problem));
    }
    let attributes = if by_resource {
        resource_attributes(user, spec)
    } else {
        Attributes {
            user,
            verb: text(spec, &["nonResourceAttributes", "verb"]).to_owned(),
            path: text(spec, &["nonResourceAttributes", "path"]).to_owned(),
            ..Attributes::default()
        }
    };
    let mut status = match authorizer.authorize(&attributes) {
        Decision::Allow(reason) => json!({ "allowed": true, "reason": reason }),
        Decision::Deny(reason) => json!({ "allowed": false, "denied": true, "reason": reason }),
        Decision::NoOpinion(reason) => json!({ "allowed": false, "reason": reason }),
    };
    if status["reason"] == "" {
        status.as_object_mut().and_then(|status| status.remove("reason"));
    }
    Ok(answer(body, AUTHORIZATION, kind, &status))
}

fn resource_attributes(user: UserInfo, spec: &Value) -> Attributes {
    let field = |name: &str| text(spec, &["resourceAttributes", name]).to_owned();
    let requirements = list(spec, &["resourceAttributes", "fieldSelector", "requirements"]);
    Attributes {
        user,
        verb: field("verb"),
        resource_request: true,
        group: field("group"),
        version: match field("version") {
            version if version.is_empty() => "*".to_owned(),
            version => version,
        },
        resource: field("resource"),
        subresource: field("subresource"),
        namespace: field("namespace"),
        name: field("name"),
        field_selector: requirements
            .iter()
            .filter(|r| text(r, &["operator"]) == "In" && list(r, &["values"]).len() == 1)
            .map(|r| (text(r, &["key"]).to_owned(), texts(r, &["values"]).concat()))
            .collect(),
        path: String::new(),
    }
}

/// What the caller may do in a namespace (`SelfSubjectRulesReview`).
///
/// # Errors
/// 400 for a body that is none or names no namespace.
pub fn self_subject_rules_review(
    user: &UserInfo,
    body: &Value,
    authorizers: &Authorizers,
) -> Result<Value, Refusal> {
    expect_kind(body, AUTHORIZATION, "SelfSubjectRulesReview")?;
    let namespace = text(body, &["spec", "namespace"]);
    if namespace.is_empty() {
        return Err(Refusal::bad_request("no namespace on request"));
    }
    let (rules, mut problems) = authorizers.rbac().rules(user, namespace);
    if node_name(user).is_some() {
        problems.push("node authorizer does not support user rule resolution".to_owned());
    }
    let (paths, resources): (Vec<_>, Vec<_>) =
        rules.iter().partition(|rule| !rule.non_resource_urls.is_empty());
    let values = |rules: Vec<&super::rbac::Rule>| {
        rules.into_iter().map(super::rbac::Rule::to_value).collect::<Vec<_>>()
    };
    let mut status = json!({
        "resourceRules": values(resources),
        "nonResourceRules": values(paths),
        "incomplete": !problems.is_empty(),
    });
    if !problems.is_empty() {
        status["evaluationError"] = json!(problems.join(", "));
    }
    Ok(answer(body, AUTHORIZATION, "SelfSubjectRulesReview", &status))
}
