//! Credentials for a registry from the pod's `imagePullSecrets`.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::api::core::v1::{Pod, Secret};
use keelson_api::client_error;
use keelson_runtime_shim::runtime::RegistryAuth;
use kube::Api;
use serde_json::Value;

use crate::worker::{Context, view};

/// The credentials that the pod's secrets hold for the image's registry. A secret that can't be
/// read is left out, as documented: the pull is tried without it.
pub(crate) async fn for_image(context: &Context, pod: &Pod, image: &str) -> Vec<RegistryAuth> {
    let Some(client) = &context.client else { return Vec::new() };
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let mut found = Vec::new();
    for reference in view::spec(pod).image_pull_secrets.iter().flatten() {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
        match secrets.get(&reference.name).await {
            Ok(secret) => found.extend(matching(&secret, image)),
            Err(error) => {
                let error = client_error::shown(&error);
                tracing::warn!(namespace, secret = reference.name, error, "pull secret not read");
                context.pod_event(
                    pod,
                    keelson_api::events::EventType::Warning,
                    "FailedToRetrieveImagePullSecret",
                    format!(
                        "Unable to retrieve some image pull secrets ({}); attempting to pull the \
                         image may not succeed.",
                        reference.name
                    ),
                );
            }
        }
    }
    found
}

/// The entries of a docker config secret that are for the image's registry.
fn matching(secret: &Secret, image: &str) -> Vec<RegistryAuth> {
    let data = secret.data.as_ref();
    let text = |key: &str| data.and_then(|data| data.get(key)).map(|bytes| bytes.0.as_slice());
    let auths: Option<Value> = text(".dockerconfigjson")
        .and_then(|json| serde_json::from_slice::<Value>(json).ok())
        .and_then(|config| config.get("auths").cloned())
        .or_else(|| text(".dockercfg").and_then(|json| serde_json::from_slice(json).ok()));
    let Some(Value::Object(auths)) = auths else { return Vec::new() };
    auths
        .iter()
        .filter(|(registry, _)| is_for(registry, image))
        .filter_map(|(_, entry)| credentials(entry))
        .collect()
}

/// Whether a config's key (`registry.example`, `https://registry.example/v2/`,
/// `registry.example/team`) covers an image.
fn is_for(registry: &str, image: &str) -> bool {
    let registry = registry.trim_start_matches("https://").trim_start_matches("http://");
    let registry = registry.trim_end_matches('/');
    let registry = registry.trim_end_matches("/v1").trim_end_matches("/v2");
    image.strip_prefix(registry).is_some_and(|rest| rest.starts_with(['/', ':']))
}

fn credentials(entry: &Value) -> Option<RegistryAuth> {
    let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut auth = RegistryAuth {
        username: text("username"),
        password: text("password"),
        registry_token: text("registrytoken"),
    };
    if auth.username.is_empty()
        && let Ok(decoded) = STANDARD.decode(text("auth"))
        && let Ok(decoded) = String::from_utf8(decoded)
        && let Some((user, password)) = decoded.split_once(':')
    {
        auth.username = user.to_owned();
        auth.password = password.to_owned();
    }
    (auth != RegistryAuth::default()).then_some(auth)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::ByteString;

    use super::*;

    #[test]
    fn a_secret_gives_what_is_for_the_registry() {
        let config = format!(
            r#"{{"auths":{{"https://registry.example/v2/":{{"auth":"{}"}},"other.example":{{"username":"x","password":"y"}}}}}}"#,
            STANDARD.encode("me:secret:1")
        );
        let secret = Secret {
            data: Some(BTreeMap::from([(
                ".dockerconfigjson".to_owned(),
                ByteString(config.into_bytes()),
            )])),
            ..Default::default()
        };
        let found = matching(&secret, "registry.example/team/app:1");
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].username.as_str(), found[0].password.as_str()), ("me", "secret:1"));
        assert!(matching(&secret, "registry.example.org/app").is_empty());
    }

    #[test]
    fn broken_secrets_give_nothing() {
        for config in ["", "{", "[]", r#"{"auths":[]}"#, r#"{"auths":{"r":{"auth":"%"}}}"#] {
            let secret = Secret {
                data: Some(BTreeMap::from([(
                    ".dockerconfigjson".to_owned(),
                    ByteString(config.as_bytes().to_vec()),
                )])),
                ..Default::default()
            };
            assert!(matching(&secret, "r/app").is_empty(), "{config}");
        }
    }
}
