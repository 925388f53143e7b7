//! The cluster's own security: certificates and service-account tokens, node authorizer and RBAC,
//! and the admission chain.

use std::sync::Arc;

use super::config::Security;
use crate::{
    admission,
    auth::{
        self, Anonymous, Answers,
        tokens::{TokenError, TokenIssuer},
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
            answers: Arc::new(Answers::new(tokens, authorizers, self.server_url)),
        })
    }
}
