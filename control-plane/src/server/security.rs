//! The cluster's own security: certificates and service-account tokens, node authorizer and RBAC,
//! and the admission chain.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;

use super::config::Security;
use crate::{
    admission::{self, Refusal},
    auth::{
        self, Anonymous, Authorizers, UserInfo, reviews,
        tokens::{TokenError, TokenIssuer, secret, token_request},
    },
    lookup::Lookup,
};

/// How the cluster's own security is set up.
#[derive(Clone)]
pub struct ClusterSecurity {
    /// The private key that signs service-account tokens: PKCS#8 PEM, ECDSA P-256
    /// ([`ClusterPki::service_account_key_pem`](crate::pki::ClusterPki::service_account_key_pem)).
    pub signing_key_pem: String,
    /// Who issues the tokens; also the API server's audience.
    pub issuer: String,
    /// Requests without credentials.
    pub anonymous: Anonymous,
    /// Where verifiers of tokens outside the cluster reach this server:
    /// `https://address:port`.
    pub server_url: String,
}

impl ClusterSecurity {
    /// Sets it up over the API server's watch cache.
    ///
    /// # Errors
    /// The key is no such key.
    pub fn over(self, lookup: Arc<dyn Lookup>) -> Result<Security, TokenError> {
        let key = &self.signing_key_pem;
        let tokens = Arc::new(TokenIssuer::new(key, self.issuer, Arc::clone(&lookup))?);
        let authorizers = Arc::new(auth::authorizers(Arc::clone(&lookup)));
        Ok(Security {
            authenticator: Arc::new(auth::authenticators(Arc::clone(&tokens))),
            anonymous: self.anonymous,
            authorizer: Arc::clone(&authorizers) as _,
            admission: Arc::new(admission::chain(&lookup, &authorizers)),
            answers: Arc::new(Answers { tokens, authorizers, server_url: self.server_url }),
        })
    }
}

/// What is asked about security as API objects, answered and stored nowhere.
pub struct Answers {
    tokens: Arc<TokenIssuer>,
    authorizers: Arc<Authorizers>,
    server_url: String,
}

impl Answers {
    /// Answers a review by its plural name (`tokenreviews`, `subjectaccessreviews`, …): the object
    /// with its status.
    pub(crate) fn review(
        &self,
        plural: &str,
        namespace: &str,
        user: &UserInfo,
        question: &Value,
    ) -> Result<Value, Refusal> {
        let authorizers = &*self.authorizers;
        match plural {
            "tokenreviews" => reviews::token_review(question, &self.tokens, Timestamp::now()),
            "selfsubjectreviews" => reviews::self_subject_review(user, question),
            "subjectaccessreviews" => reviews::subject_access_review(question, authorizers),
            "localsubjectaccessreviews" => {
                reviews::local_subject_access_review(namespace, question, authorizers)
            }
            "selfsubjectaccessreviews" => {
                reviews::self_subject_access_review(user, question, authorizers)
            }
            "selfsubjectrulesreviews" => {
                reviews::self_subject_rules_review(user, question, authorizers)
            }
            other => Err(Refusal::bad_request(format!("{other} are not answered here"))),
        }
    }

    /// Issues a token: the `TokenRequest` with its status.
    pub(crate) fn token(
        &self,
        namespace: &str,
        service_account: &str,
        request: &Value,
    ) -> Result<Value, Refusal> {
        token_request(&self.tokens, namespace, service_account, request, Timestamp::now())
    }

    /// The token that a Secret of a service account is to hold.
    pub(crate) fn secret_token(
        &self,
        account: &Value,
        secret: &Value,
    ) -> Result<String, TokenError> {
        secret::issue(&self.tokens, account, secret, Timestamp::now())
    }

    /// `/.well-known/openid-configuration`.
    pub(crate) fn openid_configuration(&self) -> Value {
        self.tokens.openid_configuration(&self.server_url)
    }

    /// `/openid/v1/jwks`.
    pub(crate) fn key_set(&self) -> Value {
        self.tokens.key_set()
    }
}
