//! Everything about security that is asked through the API and stored nowhere.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;

use super::{
    Authorizers, UserInfo, reviews,
    tokens::{TokenIssuer, token_request},
};
use crate::admission::Refusal;

/// Answers reviews and token requests, and publishes the issuer's documents.
pub struct Answers {
    tokens: Arc<TokenIssuer>,
    authorizers: Arc<Authorizers>,
    server_url: String,
}

impl Answers {
    /// `server_url` is where others reach the API server to verify tokens.
    pub fn new(
        tokens: Arc<TokenIssuer>,
        authorizers: Arc<Authorizers>,
        server_url: impl Into<String>,
    ) -> Self {
        Self { tokens, authorizers, server_url: server_url.into() }
    }

    /// Answers a review by its plural name (`tokenreviews`, `subjectaccessreviews`, …): the posted
    /// object with its status.
    ///
    /// # Errors
    /// The question makes no sense, or there is no such review.
    pub fn review(
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
            _ => Err(Refusal::not_found(plural, "")),
        }
    }

    /// Issues a token for a service account: the posted `TokenRequest` with its status.
    ///
    /// # Errors
    /// As [`token_request`].
    pub fn token(
        &self,
        namespace: &str,
        service_account: &str,
        request: &Value,
    ) -> Result<Value, Refusal> {
        token_request(&self.tokens, namespace, service_account, request, Timestamp::now())
    }

    /// `/.well-known/openid-configuration`.
    #[must_use]
    pub fn openid_configuration(&self) -> Value {
        self.tokens.openid_configuration(&self.server_url)
    }

    /// `/openid/v1/jwks`.
    #[must_use]
    pub fn key_set(&self) -> Value {
        self.tokens.key_set()
    }
}
