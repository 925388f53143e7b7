//! Signed tokens (RFC 7519), with ECDSA P-256 (`ES256`, RFC 7518) and nothing else.

use aws_lc_rs::{
    encoding::AsDer,
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
        ParsedPublicKey,
    },
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject};
use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest as _, Sha256};

use super::TokenError;

/// The longest token that is looked at.
const MAX_TOKEN: usize = 16 * 1024;

/// The end of a token that has none: it is good as long as the Secret that holds it is there.
pub(crate) const NEVER: i64 = i64::MAX;

fn never() -> i64 {
    NEVER
}

// Serde hands out references.
fn is_never(expiry: &i64) -> bool {
    *expiry == NEVER
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Whom it is for.
    #[serde(rename = "aud", deserialize_with = "one_or_many")]
    pub audiences: Vec<String>,
    /// When it ends, in seconds since 1970; [`NEVER`] for the token of a Secret.
    #[serde(rename = "exp", default = "never", skip_serializing_if = "is_never")]
    pub expiry: i64,
    /// When it was made.
    #[serde(rename = "iat")]
    pub issued_at: i64,
    /// Who made it.
    #[serde(rename = "iss")]
    pub issuer: String,
    /// Its own identity.
    #[serde(rename = "jti", default)]
    pub id: String,
    /// What it is bound to.
    #[serde(rename = "kubernetes.io")]
    pub kubernetes: KubernetesClaims,
    /// When it begins.
    #[serde(rename = "nbf")]
    pub not_before: i64,
    /// `system:serviceaccount:<namespace>:<name>`.
    #[serde(rename = "sub")]
    pub subject: String,
}

/// The objects that a token is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KubernetesClaims {
    /// The service account's namespace.
    pub namespace: String,
    /// The node of the pod, or the node that the token itself is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Bound>,
    /// The pod, if it is bound to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Bound>,
    /// The secret, if it is bound to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Bound>,
    /// The service account.
    pub serviceaccount: Bound,
}

/// One object of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    /// Its name.
    pub name: String,
    /// Its UID: another object of that name is not meant.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Audience {
        One(String),
        Many(Vec<String>),
    }
    Ok(match Audience::deserialize(deserializer)? {
        Audience::One(one) => vec![one],
        Audience::Many(many) => many,
    })
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: String,
}

/// The key pair, and how it is called.
pub(crate) struct Keys {
    private: EcdsaKeyPair,
    public: ParsedPublicKey,
    /// As Kubernetes makes it: the SHA-256 of the public key's DER.
    pub(crate) id: String,
}

impl Keys {
    pub(crate) fn from_pem(pem: &str) -> Result<Self, TokenError> {
        let signing = |problem: String| TokenError::Signing(problem);
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| signing(format!("the key is no PKCS#8 PEM: {error}")))?;
        let private =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.secret_pkcs8_der())
                .map_err(|error| signing(format!("the key is no ECDSA P-256 key: {error}")))?;
        let spki = private
            .public_key()
            .as_der()
            .map_err(|_| signing("the key has no public half".to_owned()))?;
        let public = ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, private.public_key().as_ref())
            .map_err(|error| signing(error.to_string()))?;
        let id = URL_SAFE_NO_PAD.encode(Sha256::digest(spki.as_ref()));
        Ok(Self { private, public, id })
    }

    /// The public point's two coordinates, 32 bytes each.
    pub(crate) fn coordinates(&self) -> (&[u8], &[u8]) {
        // SEC 1, 2.3.3: 0x04, X, Y.
        let point = self.private.public_key().as_ref();
        (point.get(1..33).unwrap_or_default(), point.get(33..65).unwrap_or_default())
    }

    pub(crate) fn sign(&self, claims: &Claims) -> Result<String, TokenError> {
        let header = Header { alg: "ES256".to_owned(), kid: self.id.clone() };
        let encode = |json: Result<Vec<u8>, serde_json::Error>| {
            json.map(|json| URL_SAFE_NO_PAD.encode(json))
                .map_err(|error| TokenError::Signing(error.to_string()))
        };
        let header = encode(serde_json::to_vec(&header))?;
        let payload = encode(serde_json::to_vec(claims))?;
        let mut token = format!("{header}.{payload}");
        let signature = self
            .private
            .sign(&SystemRandom::new(), token.as_bytes())
            .map_err(|error| TokenError::Signing(error.to_string()))?;
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature.as_ref(), &mut token);
        Ok(token)
    }

    /// What a token says, if this key signed it for `issuer`. Times are not looked at.
    pub(crate) fn verify(&self, token: &str, issuer: &str) -> Result<Claims, TokenError> {
        if token.len() > MAX_TOKEN {
            return Err(TokenError::Malformed("it is too long"));
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Foreign)?;
        let (header, payload) = signed.split_once('.').ok_or(TokenError::Foreign)?;
        if payload.contains('.') {
            return Err(TokenError::Foreign);
        }
        let decode = |part: &str| {
            URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed("it is not base64url"))
        };
        let header: Header = serde_json::from_slice(&decode(header)?)
            .map_err(|_| TokenError::Malformed("its header cannot be read"))?;
        // The algorithm is ours to choose, never the token's.
        if header.alg != "ES256" || (!header.kid.is_empty() && header.kid != self.id) {
            return Err(TokenError::Foreign);
        }
        self.public
            .verify_sig(signed.as_bytes(), &decode(signature)?)
            .map_err(|_| TokenError::Signature)?;
        let claims: Claims = serde_json::from_slice(&decode(payload)?)
            .map_err(|_| TokenError::Malformed("its claims cannot be read"))?;
        if claims.issuer != issuer {
            return Err(TokenError::Foreign);
        }
        Ok(claims)
    }
}

/// What stands for a token in memory.
pub(crate) fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}
