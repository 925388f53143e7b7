//! Who asks: client certificates, then tokens.

use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{
    Authenticator, Credentials, SYSTEM_ANONYMOUS, SYSTEM_AUTHENTICATED, SYSTEM_UNAUTHENTICATED,
    UserInfo, tokens::TokenIssuer, x509,
};

/// Client certificates and service-account tokens.
pub struct Authenticators {
    tokens: Arc<TokenIssuer>,
}

/// The API server's authenticators.
#[must_use]
pub fn authenticators(tokens: Arc<TokenIssuer>) -> Authenticators {
    Authenticators { tokens }
}

#[async_trait]
impl Authenticator for Authenticators {
    async fn authenticate(&self, credentials: &Credentials) -> Result<Option<UserInfo>, String> {
        // A certificate goes before a token, as in Kubernetes.
        let mut problem = None;
        if let Some(certificate) = &credentials.client_certificate {
            match certificate.as_ref().map_err(Clone::clone).and_then(|der| x509::user(der)) {
                Ok(user) => return Ok(Some(authenticated(user))),
                Err(error) => problem = Some(error),
            }
        }
        if let Some(token) = credentials.bearer_token.as_deref().filter(|t| !t.is_empty()) {
            // Too short for a blocking thread: a signature takes some 100 µs, and is remembered.
            match self.tokens.verify(token, self.tokens.audiences(), Timestamp::now()) {
                Ok(verified) => return Ok(Some(authenticated(verified.user))),
                Err(error) => problem = Some(error.to_string()),
            }
        }
        match problem {
            Some(problem) => Err(problem),
            None => Ok(None),
        }
    }
}

/// The user with the group of all who are known.
pub(crate) fn authenticated(mut user: UserInfo) -> UserInfo {
    if user.username != SYSTEM_ANONYMOUS
        && !user.groups.iter().any(|group| group == SYSTEM_AUTHENTICATED)
    {
        user.groups.push(SYSTEM_AUTHENTICATED.to_owned());
    }
    user
}

/// Whether requests without credentials are served, and which (`anonymous` of
/// AuthenticationConfiguration). What they may do there is for RBAC to say: by default health,
/// version and discovery of the issuer, through `system:public-info-viewer`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anonymous {
    /// `--anonymous-auth`.
    pub enabled: bool,
    /// Only these paths, if any are given.
    pub paths: Vec<String>,
}

impl Default for Anonymous {
    fn default() -> Self {
        Self { enabled: true, paths: Vec::new() }
    }
}

impl Anonymous {
    /// The user of a request to `path` that came without credentials; `None` means 401.
    #[must_use]
    pub fn user(&self, path: &str) -> Option<UserInfo> {
        let served =
            self.enabled && (self.paths.is_empty() || self.paths.iter().any(|p| p == path));
        served.then(|| UserInfo {
            username: SYSTEM_ANONYMOUS.to_owned(),
            groups: vec![SYSTEM_UNAUTHENTICATED.to_owned()],
            ..UserInfo::default()
        })
    }
}
