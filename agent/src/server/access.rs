//! Who may use the kubelet's API (Kubernetes' page "Kubelet authentication/authorization").
//!
//! A client certificate that the cluster's authority signed, or a bearer token that the API server
//! knows (TokenReview), says who asks. Whether they may is asked of the API server
//! (SubjectAccessReview: `nodes` with a subresource, named after this node). Answers are kept for a
//! while, as the kubelet does.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use http::{HeaderMap, Method, header};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec},
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use keelson_api::client_error;
use kube::{Api, Client, api::PostParams};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

/// `authentication.webhook.cacheTTL`.
const TOKEN_TTL: Duration = Duration::from_secs(120);
/// `authorization.webhook.cacheAuthorizedTTL`.
const ALLOWED_TTL: Duration = Duration::from_secs(300);
/// `authorization.webhook.cacheUnauthorizedTTL`.
const DENIED_TTL: Duration = Duration::from_secs(30);
/// Answers that are kept.
const KEPT: usize = 1024;

/// Who asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct User {
    name: String,
    groups: Vec<String>,
}

/// How access is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessConfig {
    /// Let requests without credentials through as `system:anonymous`
    /// (`authentication.anonymous.enabled`).
    pub anonymous: bool,
    /// Ask the API server about bearer tokens (`authentication.webhook.enabled`).
    pub token_review: bool,
    /// Ask the API server what a user may (`authorization.mode: Webhook`); otherwise everybody who
    /// is known may do everything (`AlwaysAllow`).
    pub access_review: bool,
    /// The node's name, as access reviews have it.
    pub node_name: String,
}

/// Why a request goes no further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Denied {
    /// 401.
    Unauthorized,
    /// 403, with what to say.
    Forbidden(String),
    /// 500: the API server could not be asked.
    Unknown(String),
}

/// Decides about requests.
pub(super) struct Access {
    config: AccessConfig,
    client: Option<Client>,
    tokens: Kept<[u8; 32], Option<User>>,
    decisions: Kept<(User, String, &'static str), bool>,
}

impl Access {
    pub(super) fn new(config: AccessConfig, client: Option<Client>) -> Self {
        Self { config, client, tokens: Kept::default(), decisions: Kept::default() }
    }

    /// Lets a request pass or not: one of the subresources must be allowed.
    pub(super) async fn check(
        &self,
        certificate: Option<&[u8]>,
        headers: &HeaderMap,
        method: &Method,
        subresources: &[&'static str],
    ) -> Result<(), Denied> {
        let user = self.authenticate(certificate, headers).await?;
        if !self.config.access_review {
            return Ok(());
        }
        let verb = verb(method);
        for subresource in subresources {
            if self.may(&user, verb, subresource).await? {
                return Ok(());
            }
        }
        // The kubelet's words.
        Err(Denied::Forbidden(format!(
            "Forbidden (user={}, verb={verb}, resource=nodes, subresource(s)=[{}])",
            user.name,
            subresources.join(" ")
        )))
    }

    async fn may(
        &self,
        user: &User,
        verb: &str,
        subresource: &'static str,
    ) -> Result<bool, Denied> {
        let key = (user.clone(), verb.to_owned(), subresource);
        if let Some(allowed) = self.decisions.get(&key) {
            return Ok(allowed);
        }
        let client = self.client.as_ref().ok_or_else(|| {
            Denied::Forbidden("there is no API server to ask what a user may".to_owned())
        })?;
        let review = access_review(user, verb, subresource, &self.config.node_name);
        let answer = Api::<SubjectAccessReview>::all(client.clone())
            .create(&PostParams::default(), &review)
            .await
            .map_err(|error| {
                Denied::Unknown(format!("access review: {}", client_error::shown(&error)))
            })?;
        let allowed = answer.status.is_some_and(|status| status.allowed);
        self.decisions.put(key, allowed, if allowed { ALLOWED_TTL } else { DENIED_TTL });
        Ok(allowed)
    }

    async fn authenticate(
        &self,
        certificate: Option<&[u8]>,
        headers: &HeaderMap,
    ) -> Result<User, Denied> {
        if let Some(user) = certificate.and_then(user_of_certificate) {
            return Ok(user);
        }
        let token = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "))
            .map(str::trim)
            .filter(|token| !token.is_empty());
        match (token, &self.client) {
            (Some(token), Some(client)) if self.config.token_review => {
                self.review_token(client, token).await?.ok_or(Denied::Unauthorized)
            }
            (None, _) if self.config.anonymous => Ok(User {
                name: "system:anonymous".to_owned(),
                groups: vec!["system:unauthenticated".to_owned()],
            }),
            _ => Err(Denied::Unauthorized),
        }
    }

    async fn review_token(&self, client: &Client, token: &str) -> Result<Option<User>, Denied> {
        // Tokens themselves are not kept.
        let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(user) = self.tokens.get(&key) {
            return Ok(user);
        }
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), audiences: None },
            ..TokenReview::default()
        };
        let answer = Api::<TokenReview>::all(client.clone())
            .create(&PostParams::default(), &review)
            .await
            .map_err(|error| {
                Denied::Unknown(format!("token review: {}", client_error::shown(&error)))
            })?;
        let user = answer
            .status
            .filter(|status| status.authenticated == Some(true))
            .and_then(|status| status.user)
            .map(|user| User {
                name: user.username.unwrap_or_default(),
                groups: user.groups.unwrap_or_default(),
            });
        self.tokens.put(key, user.clone(), TOKEN_TTL);
        Ok(user)
    }
}

/// The verb of an access review for an HTTP method.
fn verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "get",
    }
}

fn access_review(user: &User, verb: &str, subresource: &str, node: &str) -> SubjectAccessReview {
    SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(user.name.clone()),
            groups: Some(user.groups.clone()),
            resource_attributes: Some(ResourceAttributes {
                group: Some(String::new()),
                version: Some("v1".to_owned()),
                resource: Some("nodes".to_owned()),
                subresource: Some(subresource.to_owned()),
                name: Some(node.to_owned()),
                verb: Some(verb.to_owned()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    }
}

/// Common name and organizations of a certificate whose chain TLS has verified.
fn user_of_certificate(der: &[u8]) -> Option<User> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let mut groups: Vec<String> =
        subject.iter_organization().filter_map(|o| o.as_str().ok().map(str::to_owned)).collect();
    groups.push("system:authenticated".to_owned());
    Some(User { name, groups })
}

/// Answers that are good for a while.
struct Kept<K, V> {
    entries: Mutex<HashMap<K, (V, Instant)>>,
}

impl<K, V> Default for Kept<K, V> {
    fn default() -> Self {
        Self { entries: Mutex::default() }
    }
}

impl<K: Eq + Hash, V: Clone> Kept<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries
            .get(key)
            .filter(|(_, until)| *until > Instant::now())
            .map(|(value, _)| value.clone())
    }

    fn put(&self, key: K, value: V, ttl: Duration) {
        let now = Instant::now();
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= KEPT {
            entries.retain(|_, (_, until)| *until > now);
        }
        if entries.len() < KEPT {
            entries.insert(key, (value, now + ttl));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(anonymous: bool, access_review: bool) -> Access {
        let node_name = "n".to_owned();
        Access::new(AccessConfig { anonymous, token_review: true, access_review, node_name }, None)
    }

    #[tokio::test]
    async fn without_credentials_nobody_gets_in_unless_told_so() {
        let check = async |access: Access| {
            access.check(None, &HeaderMap::new(), &Method::GET, &["pods"]).await
        };
        assert_eq!(check(access(false, false)).await, Err(Denied::Unauthorized));
        assert_eq!(check(access(true, false)).await, Ok(()));
        assert!(matches!(check(access(true, true)).await, Err(Denied::Forbidden(_))));
    }

    #[tokio::test]
    async fn certificates_name_the_user() {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "admin");
        parameters.distinguished_name.push(rcgen::DnType::OrganizationName, "system:masters");
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        let user = user_of_certificate(certificate.der()).unwrap();
        assert_eq!(user.name, "admin");
        assert_eq!(user.groups, ["system:masters", "system:authenticated"]);
        assert_eq!(user_of_certificate(b"nonsense"), None);
    }

    #[test]
    fn answers_are_kept_for_a_while() {
        let kept = Kept::default();
        kept.put(1, "a", Duration::from_secs(60));
        kept.put(2, "b", Duration::ZERO);
        assert_eq!(kept.get(&1), Some("a"));
        assert_eq!(kept.get(&2), None);
    }
}
