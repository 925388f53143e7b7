//! Service-account tokens: who a pod is.
//!
//! A token is a JWT signed with `sa.key`. It names a service account and, if it was made for one, the
//! pod, node or secret that it is bound to, each with its UID. It is good as long as it has not run
//! out *and* all that it names still exists under that UID, so that the token of a deleted pod is
//! worth nothing at once.
//!
//! * `jwt.rs`: the signature alone (ES256), and what the token says.
//! * `verify.rs`: whether what it says is still so.
//! * `request.rs`: the `token` subresource of service accounts.
//! * `secret.rs`: tokens that are kept in Secrets and do not run out.
//! * `discovery.rs`: the documents by which others can verify tokens.

pub(crate) mod discovery;
pub(crate) mod jwt;
pub(crate) mod request;
pub(crate) mod secret;
pub(crate) mod verify;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;

pub use jwt::{Bound, Claims, KubernetesClaims};
pub use request::token_request;
pub use verify::Verified;

use crate::lookup::Lookup;

/// The issuer, and the audience of tokens that ask for none.
pub const DEFAULT_ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// How many verified signatures are remembered, in each of two generations.
const REMEMBERED: usize = 1024;

/// Why a token is not accepted. For the log; the caller is told no more than `401`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    /// Not a JWT of this issuer.
    #[error("the token is not a service-account token of this cluster")]
    Foreign,
    /// Something of the form is wrong.
    #[error("the token is malformed: {0}")]
    Malformed(&'static str),
    /// The signature is wrong.
    #[error("the token's signature is not valid")]
    Signature,
    /// Its time has not come or is over.
    #[error("the token of {subject} is not valid at this time: it is for {not_before} to {expiry}")]
    Time {
        /// Whose it is.
        subject: String,
        /// From.
        not_before: Timestamp,
        /// To.
        expiry: Timestamp,
    },
    /// It is for somebody else to accept.
    #[error(
        "the token of {subject} is for the audiences {audiences:?}, none of which is asked for"
    )]
    Audience {
        /// Whose it is.
        subject: String,
        /// Whom it is for.
        audiences: Vec<String>,
    },
    /// What it is bound to is gone.
    #[error("the token of {subject} is no longer valid: {kind} {name:?} {problem}")]
    Gone {
        /// Whose it is.
        subject: String,
        /// What is gone.
        kind: &'static str,
        /// Its name.
        name: String,
        /// What became of it.
        problem: &'static str,
    },
    /// No token could be made.
    #[error("could not sign a service-account token: {0}")]
    Signing(String),
}

/// Issues and verifies service-account tokens.
pub struct TokenIssuer {
    keys: jwt::Keys,
    issuer: String,
    audiences: Vec<String>,
    lookup: Arc<dyn Lookup>,
    /// Tokens whose signature was found right, by their SHA-256: this generation and the last.
    remembered: Mutex<[HashMap<[u8; 32], Arc<Claims>>; 2]>,
}

impl TokenIssuer {
    /// An issuer with this ECDSA P-256 key (PKCS#8 PEM), such as
    /// [`ClusterPki::service_account_key_pem`](crate::pki::ClusterPki::service_account_key_pem).
    /// `issuer` is also the API server's audience; [`DEFAULT_ISSUER`] unless configured.
    ///
    /// # Errors
    /// It is no such key.
    pub fn new(
        key_pem: &str,
        issuer: impl Into<String>,
        lookup: Arc<dyn Lookup>,
    ) -> Result<Self, TokenError> {
        let issuer = issuer.into();
        Ok(Self {
            keys: jwt::Keys::from_pem(key_pem)?,
            audiences: vec![issuer.clone()],
            issuer,
            lookup,
            remembered: Mutex::default(),
        })
    }

    /// The API server's own audiences.
    #[must_use]
    pub fn audiences(&self) -> &[String] {
        &self.audiences
    }

    /// Signs a token.
    ///
    /// # Errors
    /// The crypto library refuses; does not happen with a good key.
    pub fn issue(&self, claims: &Claims) -> Result<String, TokenError> {
        self.keys.sign(claims)
    }

    /// Whose token this is, if it is good for one of `audiences` at `now`.
    ///
    /// # Errors
    /// Why it is not.
    pub fn verify(
        &self,
        token: &str,
        audiences: &[String],
        now: Timestamp,
    ) -> Result<Verified, TokenError> {
        let claims = self.signed_claims(token)?;
        if claims.expiry == jwt::NEVER {
            secret::check(&claims, token, &*self.lookup)?;
        }
        verify::verify(&claims, audiences, &*self.lookup, now)
    }

    /// What a token says, its signature verified now or before.
    fn signed_claims(&self, token: &str) -> Result<Arc<Claims>, TokenError> {
        let digest = jwt::digest(token);
        if let Some(claims) = self.recall(&digest) {
            return Ok(claims);
        }
        let claims = Arc::new(self.keys.verify(token, &self.issuer)?);
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered[0].len() >= REMEMBERED {
            remembered[1] = mem::take(&mut remembered[0]);
        }
        remembered[0].insert(digest, Arc::clone(&claims));
        Ok(claims)
    }

    fn recall(&self, digest: &[u8; 32]) -> Option<Arc<Claims>> {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(claims) = remembered[0].get(digest) {
            return Some(Arc::clone(claims));
        }
        let claims = remembered[1].remove(digest)?;
        if remembered[0].len() < REMEMBERED {
            remembered[0].insert(*digest, Arc::clone(&claims));
        }
        Some(claims)
    }
}
