//! Credentials, impersonation and reviews.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use jiff::Timestamp;
use serde_json::json;

use super::{
    fixture::{Objects, user},
    impersonation::impersonate,
    tokens::{DEFAULT_ISSUER, TokenIssuer, token_request},
    *,
};
use crate::lookup::Lookup;

/// A cluster where `boss` may impersonate jane, the group staff and service accounts of `a`.
fn cluster() -> Arc<Objects> {
    let objects = Objects::of(bootstrap::default_rbac());
    objects.add(json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": { "name": "robot", "namespace": "a", "uid": "1" },
    }));
    objects.add(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": { "name": "act" },
        "rules": [
            { "verbs": ["impersonate"], "apiGroups": [""], "resources": ["users"], "resourceNames": ["jane"] },
            { "verbs": ["impersonate"], "apiGroups": [""], "resources": ["groups"], "resourceNames": ["staff"] },
            { "verbs": ["impersonate"], "apiGroups": ["authentication.k8s.io"], "resources": ["userextras/scopes"],
              "resourceNames": ["view"] },
        ],
    }));
    objects.add(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": { "name": "act" },
        "roleRef": { "kind": "ClusterRole", "name": "act" },
        "subjects": [{ "kind": "User", "name": "boss" }],
    }));
    objects.add(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": { "name": "edit", "namespace": "a" },
        "roleRef": { "kind": "ClusterRole", "name": "edit" },
        "subjects": [{ "kind": "User", "name": "boss" }],
    }));
    Arc::new(objects)
}

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| {
            (
                HeaderName::from_bytes(name.as_bytes()).unwrap(),
                HeaderValue::from_str(value).unwrap(),
            )
        })
        .collect()
}

#[test]
fn impersonation_is_granted_piece_by_piece() {
    let authorizer = authorizers(cluster());
    let boss = user("boss", &["system:authenticated"]);
    let act = |pairs: &[(&str, &str)]| impersonate(&headers(pairs), &boss, &authorizer);
    assert_eq!(act(&[("Accept", "x")]).unwrap(), None);
    let jane = act(&[
        ("Impersonate-User", "jane"),
        ("Impersonate-Group", "staff"),
        ("Impersonate-Extra-scopes", "view"),
    ])
    .unwrap()
    .unwrap();
    assert_eq!(jane.username, "jane");
    assert_eq!(jane.groups, ["staff", "system:authenticated"]);
    assert_eq!(jane.extra["scopes"], ["view"]);
    let robot = act(&[("Impersonate-User", "system:serviceaccount:a:robot")]).unwrap().unwrap();
    assert_eq!(
        robot.groups,
        ["system:serviceaccounts", "system:serviceaccounts:a", "system:authenticated"]
    );
    for (pairs, code) in [
        (&[("Impersonate-User", "john")][..], 403),
        (&[("Impersonate-User", "jane"), ("Impersonate-Group", "system:masters")], 403),
        (&[("Impersonate-User", "jane"), ("Impersonate-Extra-scopes", "edit")], 403),
        (&[("Impersonate-User", "jane"), ("Impersonate-Uid", "1")], 403),
        (&[("Impersonate-User", "system:serviceaccount:b:robot")], 403),
        (&[("Impersonate-Group", "staff")], 400),
    ] {
        assert_eq!(act(pairs).unwrap_err().code, code, "{pairs:?}");
    }
    assert_eq!(
        act(&[("Impersonate-User", "john")]).unwrap_err().message,
        "users \"john\" is forbidden: User \"boss\" cannot impersonate resource \"users\" in API \
         group \"\" at the cluster scope"
    );
    let master = user("root", &["system:masters"]);
    let anyone =
        headers(&[("Impersonate-User", "x"), ("Impersonate-Extra-Acme.com%2Fproject", "p")]);
    let anyone = impersonate(&anyone, &master, &authorizer).unwrap().unwrap();
    assert_eq!(anyone.extra["acme.com/project"], ["p"]);
}

#[tokio::test]
async fn certificates_go_before_tokens_and_bad_ones_are_refused() {
    let objects = cluster();
    let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
    let lookup = Arc::clone(&objects) as Arc<dyn Lookup>;
    let tokens = Arc::new(TokenIssuer::new(&key, DEFAULT_ISSUER, lookup).unwrap());
    let now = Timestamp::now();
    let answer = token_request(&tokens, "a", "robot", &json!({}), now).unwrap();
    let token = answer["status"]["token"].as_str().unwrap().to_owned();
    let authenticator = authenticators(Arc::clone(&tokens));
    let with = |token: Option<&str>| Credentials {
        bearer_token: token.map(str::to_owned),
        ..Credentials::default()
    };
    assert_eq!(authenticator.authenticate(&with(None)).await, Ok(None));
    let robot = authenticator.authenticate(&with(Some(&token))).await.unwrap().unwrap();
    assert!(robot.groups.contains(&"system:authenticated".to_owned()));
    assert!(authenticator.authenticate(&with(Some("x"))).await.is_err());
    for bad in [Ok(vec![1, 2, 3]), Err("another authority signed it".to_owned())] {
        let with = |token| Credentials { client_certificate: Some(bad.clone()), ..with(token) };
        assert!(authenticator.authenticate(&with(None)).await.is_err());
        // A token that came along still counts.
        let robot = authenticator.authenticate(&with(Some(&token))).await.unwrap().unwrap();
        assert_eq!(robot.username, "system:serviceaccount:a:robot");
    }

    let review = |token: &str| {
        reviews::token_review(&json!({ "spec": { "token": token } }), &tokens, now).unwrap()
    };
    let good = review(&token);
    assert_eq!(good["status"]["authenticated"], true);
    assert_eq!(good["status"]["user"]["username"], "system:serviceaccount:a:robot");
    assert_eq!(good["status"]["audiences"], json!([DEFAULT_ISSUER]));
    let bad = review("x");
    assert_eq!(bad["status"], json!({ "user": {}, "error": "invalid bearer token" }));
    assert_eq!(reviews::token_review(&json!({}), &tokens, now).unwrap_err().code, 400);
}

#[test]
fn anonymous_requests_are_served_as_configured() {
    assert_eq!(Anonymous::default().user("/x").unwrap().username, SYSTEM_ANONYMOUS);
    let some = Anonymous { enabled: true, paths: vec!["/livez".into()] };
    assert!(some.user("/livez").is_some() && some.user("/livez/x").is_none());
    assert!(Anonymous { enabled: false, paths: vec![] }.user("/livez").is_none());
}

#[test]
fn access_reviews() {
    let authorizer = authorizers(cluster());
    let boss = user("boss", &[]);
    let asked = |verb: &str| json!({ "spec": { "resourceAttributes": { "verb": verb, "resource": "pods", "namespace": "a" } } });
    let own = |verb| reviews::self_subject_access_review(&boss, &asked(verb), &authorizer).unwrap();
    assert_eq!(own("delete")["status"]["allowed"], true);
    assert_eq!(own("escalate")["status"], json!({ "allowed": false }));
    let mut about = asked("delete");
    let review = |body: &serde_json::Value| reviews::subject_access_review(body, &authorizer);
    assert_eq!(review(&about).unwrap_err().code, 422);
    about["spec"]["user"] = json!("boss");
    assert_eq!(review(&about).unwrap()["status"]["allowed"], true);
    about["spec"]["user"] = json!("other");
    about["spec"]["groups"] = json!(["system:masters"]);
    assert_eq!(review(&about).unwrap()["status"]["allowed"], true);
    let local = |namespace| reviews::local_subject_access_review(namespace, &about, &authorizer);
    assert_eq!(local("a").unwrap()["kind"], "LocalSubjectAccessReview");
    assert_eq!(local("b").unwrap_err().code, 422);
    for spec in
        [json!({}), json!({ "user": "x", "resourceAttributes": {}, "nonResourceAttributes": {} })]
    {
        assert_eq!(review(&json!({ "spec": spec })).unwrap_err().code, 422);
    }
    let path = json!({ "spec": { "user": "x", "groups": ["system:unauthenticated"],
        "nonResourceAttributes": { "verb": "get", "path": "/version" } } });
    assert_eq!(review(&path).unwrap()["status"]["allowed"], true);

    let rules = json!({ "spec": { "namespace": "a" } });
    let rules = reviews::self_subject_rules_review(&boss, &rules, &authorizer).unwrap();
    assert!(rules["status"]["resourceRules"].as_array().unwrap().len() > 10);
    assert_eq!(rules["status"]["incomplete"], false);
    let me = reviews::self_subject_review(&boss, &json!({})).unwrap();
    assert_eq!(me["status"]["userInfo"]["username"], "boss");
}
