//! Tokens from their request to their end.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{Timestamp, ToSpan};
use serde_json::{Value, json};

use super::*;
use crate::auth::fixture::Objects;

fn object(kind: &str, namespace: Option<&str>, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": kind,
        "metadata": { "name": name, "namespace": namespace, "uid": format!("uid-{name}") },
        "spec": spec,
    })
}

fn cluster() -> Arc<Objects> {
    Arc::new(Objects::of([
        object("ServiceAccount", Some("a"), "robot", &json!({})),
        object(
            "Pod",
            Some("a"),
            "pod",
            &json!({ "serviceAccountName": "robot", "nodeName": "n1" }),
        ),
        object("Pod", Some("a"), "other", &json!({ "serviceAccountName": "default" })),
        object("Secret", Some("a"), "secret", &json!({})),
        object("Node", None, "n1", &json!({})),
    ]))
}

fn key() -> String {
    rcgen::KeyPair::generate().unwrap().serialize_pem()
}

fn issuer(objects: &Arc<Objects>) -> TokenIssuer {
    TokenIssuer::new(&key(), DEFAULT_ISSUER, Arc::clone(objects) as Arc<dyn Lookup>).unwrap()
}

fn now() -> Timestamp {
    "2030-01-01T00:00:00Z".parse().unwrap()
}

fn request(issuer: &TokenIssuer, spec: &Value) -> Result<Value, crate::admission::Refusal> {
    token_request(issuer, "a", "robot", &json!({ "spec": spec }), now())
}

fn token(answer: &Value) -> String {
    answer["status"]["token"].as_str().unwrap().to_owned()
}

#[test]
fn a_pods_token_says_who_it_is() {
    let objects = cluster();
    let issuer = issuer(&objects);
    let bound = json!({ "apiVersion": "v1", "kind": "Pod", "name": "pod", "uid": "uid-pod" });
    let answer =
        request(&issuer, &json!({ "expirationSeconds": 3607, "boundObjectRef": bound })).unwrap();
    assert_eq!(answer["kind"], "TokenRequest");
    assert_eq!(answer["status"]["expirationTimestamp"], "2030-01-01T01:00:07Z");
    assert_eq!(answer["spec"]["audiences"], json!([DEFAULT_ISSUER]));
    let token = token(&answer);
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
    let claims: Value = serde_json::from_slice(&payload).unwrap();
    assert_eq!(claims["sub"], "system:serviceaccount:a:robot");
    assert_eq!(
        claims["kubernetes.io"],
        json!({
            "namespace": "a",
            "node": { "name": "n1", "uid": "uid-n1" },
            "pod": { "name": "pod", "uid": "uid-pod" },
            "serviceaccount": { "name": "robot", "uid": "uid-robot" },
        })
    );
    for _ in 0..2 {
        // The second time from memory.
        let verified = issuer.verify(&token, issuer.audiences(), now()).unwrap();
        let user = verified.user;
        assert_eq!(user.username, "system:serviceaccount:a:robot");
        assert_eq!(user.uid, "uid-robot");
        assert_eq!(user.groups, ["system:serviceaccounts", "system:serviceaccounts:a"]);
        let extra =
            |key: &str| user.extra[&format!("authentication.kubernetes.io/{key}")][0].clone();
        assert_eq!(extra("pod-name"), "pod");
        assert_eq!(extra("pod-uid"), "uid-pod");
        assert_eq!(extra("node-name"), "n1");
        assert_eq!(extra("node-uid"), "uid-n1");
        assert!(extra("credential-id").starts_with("JTI="));
    }
}

#[test]
fn what_ends_a_token() {
    let deleted = |object: &Value| {
        let mut object = object.clone();
        object["metadata"]["deletionTimestamp"] = json!("2029-12-31T23:58:00Z");
        object
    };
    let pod = json!({ "apiVersion": "v1", "kind": "Pod", "name": "pod" });
    let secret = json!({ "apiVersion": "v1", "kind": "Secret", "name": "secret" });
    let node = json!({ "apiVersion": "v1", "kind": "Node", "name": "n1" });
    for (bound, namespace, kind, name) in [
        (&pod, Some("a"), "Pod", "pod"),
        (&secret, Some("a"), "Secret", "secret"),
        (&node, None, "Node", "n1"),
        (&pod, Some("a"), "ServiceAccount", "robot"),
    ] {
        let live = object(kind, namespace, name, &json!({}));
        let mut again = live.clone();
        again["metadata"]["uid"] = json!("another");
        for (change, replacement) in
            [("gone", None), ("made again", Some(again)), ("deleted", Some(deleted(&live)))]
        {
            let objects = cluster();
            let issuer = issuer(&objects);
            let token = token(&request(&issuer, &json!({ "boundObjectRef": bound })).unwrap());
            issuer.verify(&token, issuer.audiences(), now()).unwrap();
            objects.remove(&live);
            if let Some(replacement) = replacement {
                objects.add(replacement);
            }
            let error = issuer.verify(&token, issuer.audiences(), now()).unwrap_err();
            assert!(matches!(error, TokenError::Gone { .. }), "{kind} {change}: {error}");
        }
    }
}

#[test]
fn time_audience_and_signature() {
    let objects = cluster();
    let issuer = issuer(&objects);
    let token = token(&request(&issuer, &json!({ "expirationSeconds": 600 })).unwrap());
    let verify = |token: &str, at| issuer.verify(token, issuer.audiences(), at);
    verify(&token, now() + 599.seconds()).unwrap();
    assert!(matches!(verify(&token, now() + 600.seconds()), Err(TokenError::Time { .. })));
    assert!(matches!(verify(&token, now() - 1.seconds()), Err(TokenError::Time { .. })));
    let elsewhere = ["vault".to_owned()];
    assert!(matches!(issuer.verify(&token, &elsewhere, now()), Err(TokenError::Audience { .. })));
    let vault = self::token(&request(&issuer, &json!({ "audiences": ["vault", "x"] })).unwrap());
    assert!(matches!(verify(&vault, now()), Err(TokenError::Audience { .. })));
    assert_eq!(issuer.verify(&vault, &elsewhere, now()).unwrap().audiences, elsewhere);

    let other = TokenIssuer::new(&key(), DEFAULT_ISSUER, objects).unwrap();
    assert_eq!(other.verify(&token, other.audiences(), now()), Err(TokenError::Foreign));
    // Every byte counts.
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let (header, payload) = signed.split_once('.').unwrap();
    let mut claims: Value =
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).unwrap()).unwrap();
    claims["exp"] = json!(i64::MAX);
    let forged = URL_SAFE_NO_PAD.encode(claims.to_string());
    let none = URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
    let hmac = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256"}"#);
    for (bad, expected) in [
        (format!("{header}.{forged}.{signature}"), TokenError::Signature),
        (format!("{header}.{payload}."), TokenError::Signature),
        (format!("{none}.{payload}."), TokenError::Foreign),
        (format!("{hmac}.{payload}.{signature}"), TokenError::Foreign),
        (format!("{token}.x"), TokenError::Foreign),
        ("opaque".to_owned(), TokenError::Foreign),
        ("x".repeat(1 << 20), TokenError::Malformed("it is too long")),
    ] {
        assert_eq!(verify(&bad, now()), Err(expected), "{bad:.40}");
    }
}

#[test]
fn bad_requests() {
    let objects = cluster();
    let issuer = issuer(&objects);
    let bound = |kind: &str, name: &str, uid: &str| json!({ "boundObjectRef": { "apiVersion": "v1", "kind": kind, "name": name, "uid": uid } });
    for (spec, code, message) in [
        (
            json!({ "expirationSeconds": 599 }),
            422,
            "may not specify a duration less than 10 minutes",
        ),
        (
            json!({ "expirationSeconds": 1_i64 << 33 }),
            422,
            "may not specify a duration larger than 2^32 seconds",
        ),
        (json!({ "expirationSeconds": "x" }), 400, "whole number"),
        (bound("Pod", "none", ""), 404, "pods \"none\" not found"),
        (bound("Pod", "pod", "old"), 409, "does not match the UID in record"),
        (bound("Pod", "other", ""), 400, "different serviceaccount name"),
        (bound("ConfigMap", "x", ""), 400, "cannot bind token to object of type"),
    ] {
        let refusal = request(&issuer, &spec).unwrap_err();
        assert_eq!(refusal.code, code, "{refusal:?}");
        assert!(refusal.message.contains(message), "{refusal:?}");
    }
    let refusal = token_request(&issuer, "a", "none", &json!({}), now()).unwrap_err();
    assert_eq!(refusal.message, "serviceaccounts \"none\" not found");
    let body = json!({ "kind": "Pod", "apiVersion": "v1" });
    assert_eq!(token_request(&issuer, "a", "robot", &body, now()).unwrap_err().code, 400);
}

#[test]
fn others_can_verify_by_the_key_set() {
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
    let issuer = issuer(&cluster());
    let token = token(&request(&issuer, &json!({})).unwrap());
    let keys = issuer.key_set();
    let key = &keys["keys"][0];
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let mut point = vec![4];
    for coordinate in ["x", "y"] {
        point.extend(URL_SAFE_NO_PAD.decode(key[coordinate].as_str().unwrap()).unwrap());
    }
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
        .verify(signed.as_bytes(), &URL_SAFE_NO_PAD.decode(signature).unwrap())
        .unwrap();
    let header = URL_SAFE_NO_PAD.decode(token.split('.').next().unwrap()).unwrap();
    let header: Value = serde_json::from_slice(&header).unwrap();
    assert_eq!(header["kid"], key["kid"]);
    let document = issuer.openid_configuration("https://10.0.0.1:6443/");
    assert_eq!(document["jwks_uri"], "https://10.0.0.1:6443/openid/v1/jwks");
}

#[test]
fn memory_is_bounded() {
    let issuer = issuer(&cluster());
    for n in 0..3 * REMEMBERED {
        let claims = Claims {
            audiences: vec![],
            expiry: 0,
            issued_at: 0,
            issuer: DEFAULT_ISSUER.to_owned(),
            id: n.to_string(),
            kubernetes: KubernetesClaims {
                namespace: "a".into(),
                node: None,
                pod: None,
                secret: None,
                serviceaccount: Bound { name: "robot".into(), uid: String::new() },
            },
            not_before: 0,
            subject: String::new(),
        };
        issuer.signed_claims(&issuer.issue(&claims).unwrap()).unwrap();
    }
    let remembered = issuer.remembered.lock().unwrap();
    assert!(remembered.iter().all(|generation| generation.len() <= REMEMBERED));
}

proptest::proptest! {
    /// Whatever a client sends as its token, it is refused and nothing else happens.
    #[test]
    fn arbitrary_tokens_are_refused(token in "[A-Za-z0-9_.=+/-]{0,200}|\\PC{0,80}") {
        let issuer = issuer(&Arc::new(Objects::default()));
        proptest::prop_assert!(issuer.verify(&token, issuer.audiences(), now()).is_err());
    }
}
