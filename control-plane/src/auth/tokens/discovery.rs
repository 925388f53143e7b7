//! The documents by which others verify this cluster's tokens (OpenID Connect Discovery 1.0).

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use super::TokenIssuer;

impl TokenIssuer {
    /// `/openid/v1/jwks` (media type `application/jwk-set+json`).
    #[must_use]
    pub fn key_set(&self) -> Value {
        let (x, y) = self.keys.coordinates();
        json!({ "keys": [{
            "use": "sig",
            "kty": "EC",
            "kid": self.keys.id,
            "crv": "P-256",
            "alg": "ES256",
            "x": URL_SAFE_NO_PAD.encode(x),
            "y": URL_SAFE_NO_PAD.encode(y),
        }]})
    }

    /// `/.well-known/openid-configuration`. `server_url` is where clients reach the API server.
    #[must_use]
    pub fn openid_configuration(&self, server_url: &str) -> Value {
        json!({
            "issuer": self.issuer,
            "jwks_uri": format!("{}/openid/v1/jwks", server_url.trim_end_matches('/')),
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256"],
        })
    }
}
