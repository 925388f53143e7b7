//! From a manifest's text to a static pod.

use std::{collections::BTreeMap, path::Path};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodSpec, Toleration, VolumeProjection};
use keelson_api::yaml::{self, Limits};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::defaults;
use crate::labels;

/// The longest name of a pod, as the API server has it.
const NAME_BYTES: usize = 253;

/// Why a manifest is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManifestError {
    /// Not YAML, or too much of it.
    #[error("not a manifest: {0}")]
    Yaml(#[from] yaml::YamlError),
    /// Not a pod.
    #[error("holds {0}, but only kind Pod of apiVersion v1 can be a static pod")]
    NotAPod(String),
    /// A field that a pod does not have.
    #[error("unknown field {0:?}: check its spelling and place")]
    UnknownField(String),
    /// A field of the wrong type.
    #[error("{0}")]
    WrongType(String),
    /// What the API server would refuse, or what a static pod can't have.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
}

fn invalid(field: impl Into<String>, reason: impl Into<String>) -> ManifestError {
    ManifestError::Invalid { field: field.into(), reason: reason.into() }
}

/// Reads all pods of a manifest. The UID is the hash of the node's name, the file's path and the
/// pod itself, so that a changed pod is another pod, and the same one again after a restart.
pub(crate) fn parse(
    text: &[u8],
    max_bytes: usize,
    path: &Path,
    node: &str,
    now: Timestamp,
) -> Result<Vec<Pod>, ManifestError> {
    let limits = Limits { bytes: max_bytes, ..Limits::default() };
    let documents = yaml::documents(text, limits)?;
    if documents.is_empty() {
        return Err(ManifestError::NotAPod("no object at all".to_owned()));
    }
    let mut pods = Vec::new();
    for document in documents {
        for object in flatten(document)? {
            pods.push(static_pod(object, path, node, now)?);
        }
    }
    Ok(pods)
}

/// A `List` or `PodList` stands for its items.
fn flatten(document: Value) -> Result<Vec<Value>, ManifestError> {
    let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (version, kind) = (text("apiVersion"), text("kind"));
    match (version.as_str(), kind.as_str()) {
        ("v1", "Pod") => Ok(vec![document]),
        ("v1", "List" | "PodList") => {
            let items =
                document.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
            for item in &items {
                let kind = item.get("kind").and_then(Value::as_str);
                if kind.is_some_and(|kind| kind != "Pod") {
                    return Err(ManifestError::NotAPod(format!("a {}", kind.unwrap_or_default())));
                }
            }
            Ok(items)
        }
        ("", "") => Err(ManifestError::NotAPod("an object without apiVersion and kind".to_owned())),
        _ => Err(ManifestError::NotAPod(format!("kind {kind:?} of apiVersion {version:?}"))),
    }
}

fn static_pod(
    mut object: Value,
    path: &Path,
    node: &str,
    now: Timestamp,
) -> Result<Pod, ManifestError> {
    if let Some(map) = object.as_object_mut() {
        // whatever it says of a status is not the manifest's to say
        map.remove("status");
    }
    let mut hash = Sha256::new();
    for part in
        [node.as_bytes(), path.as_os_str().as_encoded_bytes(), object.to_string().as_bytes()]
    {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let uid = labels::hex(&hash.finalize()[..16]);
    let mut pod: Pod = serde_json::from_value(object.clone())
        .map_err(|error| ManifestError::WrongType(error.to_string()))?;
    unknown_fields(&object, &pod)?;
    let meta = &mut pod.metadata;
    let name = meta.name.clone().unwrap_or_default();
    check_name("metadata.name", &name)?;
    let name = format!("{name}-{}", node.to_lowercase());
    if name.len() > NAME_BYTES {
        return Err(invalid(
            "metadata.name",
            format!("{name:?} is longer than {NAME_BYTES} characters with the node's name"),
        ));
    }
    meta.name = Some(name);
    let namespace = meta.namespace.get_or_insert_with(|| "default".to_owned()).clone();
    check_name("metadata.namespace", &namespace)?;
    meta.uid = Some(uid.clone());
    meta.creation_timestamp = None;
    meta.deletion_timestamp = None;
    meta.deletion_grace_period_seconds = None;
    meta.resource_version = None;
    meta.owner_references = None;
    let annotations = meta.annotations.get_or_insert_with(BTreeMap::new);
    annotations.remove(labels::CONFIG_MIRROR);
    annotations.insert(labels::CONFIG_SOURCE.to_owned(), "file".to_owned());
    annotations.insert(labels::CONFIG_HASH.to_owned(), uid);
    annotations.insert(labels::CONFIG_SEEN.to_owned(), now.to_string());
    defaults::apply(&mut pod);
    check(&pod)?;
    let Some(spec) = &mut pod.spec else { return Err(invalid("spec", "required")) };
    spec.node_name = Some(node.to_owned());
    // a static pod stays whatever the node's taints say
    let tolerations = spec.tolerations.get_or_insert_with(Vec::new);
    let all = Toleration {
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        ..Default::default()
    };
    if !tolerations.contains(&all) {
        tolerations.push(all);
    }
    Ok(pod)
}

/// Names the first field that was read but has no place in a pod.
///
/// The pod is written out again: what is in the manifest and not in what was written was not known.
/// Empty values are left out, since writing leaves them out too.
fn unknown_fields(object: &Value, pod: &Pod) -> Result<(), ManifestError> {
    let known = serde_json::to_value(pod).unwrap_or_default();
    match first_unknown(object, &known, "") {
        Some(field) => Err(ManifestError::UnknownField(field)),
        None => Ok(()),
    }
}

fn first_unknown(given: &Value, known: &Value, path: &str) -> Option<String> {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => given.iter().find_map(|(key, value)| {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            match known.get(key) {
                Some(known) => first_unknown(value, known, &path),
                None if value.is_null() => None,
                None => Some(path),
            }
        }),
        (Value::Array(given), Value::Array(known)) => {
            given.iter().zip(known).enumerate().find_map(|(index, (given, known))| {
                first_unknown(given, known, &format!("{path}[{index}]"))
            })
        }
        _ => None,
    }
}

/// Lower-case letters, digits, `-` and `.`, beginning and ending with a letter or digit.
fn check_name(field: &str, name: &str) -> Result<(), ManifestError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = name.as_bytes();
    let valid = !bytes.is_empty()
        && bytes.len() <= NAME_BYTES
        && bytes.iter().all(|byte| plain(*byte) || matches!(byte, b'-' | b'.'))
        && bytes.first().is_some_and(|byte| plain(*byte))
        && bytes.last().is_some_and(|byte| plain(*byte))
        && !name.contains("..");
    if valid {
        return Ok(());
    }
    Err(invalid(
        field,
        format!(
            "invalid value {name:?}: must consist of lower case alphanumeric characters, '-' or '.', \
             and must start and end with an alphanumeric character"
        ),
    ))
}

/// What would break later, and what static pods can't have since they can't reach the API.
fn check(pod: &Pod) -> Result<(), ManifestError> {
    let Some(spec) = &pod.spec else { return Err(invalid("spec", "required")) };
    if spec.containers.is_empty() {
        return Err(invalid("spec.containers", "at least one container is required"));
    }
    let mut names = std::collections::BTreeSet::new();
    let init = spec.init_containers.iter().flatten().map(|container| ("initContainers", container));
    for (list, container) in init.chain(spec.containers.iter().map(|one| ("containers", one))) {
        let field = format!("spec.{list}[{}]", container.name);
        check_name(&format!("{field}.name"), &container.name)?;
        if container.name.contains('.') || container.name.len() > 63 {
            return Err(invalid(
                format!("{field}.name"),
                "must be a label of at most 63 characters",
            ));
        }
        if !names.insert(&container.name) {
            return Err(invalid(format!("{field}.name"), "duplicate value"));
        }
        if container.image.as_deref().unwrap_or_default().trim().is_empty() {
            return Err(invalid(format!("{field}.image"), "required"));
        }
        for mount in container.volume_mounts.iter().flatten() {
            let found = spec.volumes.iter().flatten().any(|volume| volume.name == mount.name);
            if !found {
                return Err(invalid(
                    format!("{field}.volumeMounts"),
                    format!("volume {:?} not found in spec.volumes", mount.name),
                ));
            }
        }
    }
    let mut volumes = std::collections::BTreeSet::new();
    for volume in spec.volumes.iter().flatten() {
        check_name("spec.volumes.name", &volume.name)?;
        if !volumes.insert(&volume.name) {
            return Err(invalid(format!("spec.volumes[{}].name", volume.name), "duplicate value"));
        }
    }
    if !matches!(spec.restart_policy.as_deref(), Some("Always" | "OnFailure" | "Never")) {
        return Err(invalid("spec.restartPolicy", "must be Always, OnFailure or Never"));
    }
    if spec.ephemeral_containers.as_ref().is_some_and(|list| !list.is_empty()) {
        return Err(invalid("spec.ephemeralContainers", "a static pod can't have any"));
    }
    match api_reference(spec) {
        Some((field, kind)) => Err(invalid(field, format!("static pods may not reference {kind}"))),
        None => Ok(()),
    }
}

/// The first reference to another object of the API: documented to be refused in static pods, which
/// run without an API.
fn api_reference(spec: &PodSpec) -> Option<(String, &'static str)> {
    let found = |field: String, kind| Some((field, kind));
    let given = |name: &Option<String>| name.as_ref().is_some_and(|name| !name.is_empty());
    if given(&spec.service_account_name) || given(&spec.service_account) {
        return found("spec.serviceAccountName".to_owned(), "serviceaccounts");
    }
    if spec.image_pull_secrets.as_ref().is_some_and(|secrets| !secrets.is_empty()) {
        return found("spec.imagePullSecrets".to_owned(), "secrets");
    }
    if spec.resource_claims.as_ref().is_some_and(|claims| !claims.is_empty()) {
        return found("spec.resourceClaims".to_owned(), "resourceclaims");
    }
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        let env_from = container.env_from.iter().flatten().map(|source| {
            (source.config_map_ref.is_some(), source.secret_ref.is_some(), "envFrom")
        });
        let env = container.env.iter().flatten().filter_map(|one| {
            let from = one.value_from.as_ref()?;
            Some((from.config_map_key_ref.is_some(), from.secret_key_ref.is_some(), "env"))
        });
        for (config_map, secret, list) in env_from.chain(env) {
            if config_map || secret {
                let kind = if config_map { "configmaps" } else { "secrets" };
                return found(format!("spec.containers[{}].{list}", container.name), kind);
            }
        }
    }
    for volume in spec.volumes.iter().flatten() {
        let projected = || {
            let sources = volume.projected.iter().flat_map(|all| all.sources.iter().flatten());
            sources.collect::<Vec<_>>()
        };
        let any = |has: fn(&VolumeProjection) -> bool| projected().into_iter().any(has);
        let kind = if volume.config_map.is_some() || any(|one| one.config_map.is_some()) {
            "configmaps"
        } else if volume.secret.is_some()
            || any(|one| one.secret.is_some())
            || volume.csi.as_ref().is_some_and(|csi| csi.node_publish_secret_ref.is_some())
        {
            "secrets"
        } else if any(|one| one.service_account_token.is_some()) {
            "serviceaccounts"
        } else if any(|one| one.cluster_trust_bundle.is_some()) {
            "clustertrustbundles"
        } else if volume.persistent_volume_claim.is_some() || volume.ephemeral.is_some() {
            "persistentvolumeclaims"
        } else {
            continue;
        };
        return found(format!("spec.volumes[{}]", volume.name), kind);
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Result<Vec<Pod>, ManifestError> {
        parse(text.as_bytes(), 1 << 20, Path::new("/m/a.yaml"), "Node1", Timestamp::UNIX_EPOCH)
    }

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  containers:\n  - {name: a, image: 'app:1'}\n";

    #[test]
    fn a_manifest_becomes_a_static_pod() {
        let pod = read(POD).unwrap().remove(0);
        assert_eq!(pod.metadata.name.as_deref(), Some("web-node1"));
        assert_eq!(pod.metadata.namespace.as_deref(), Some("default"));
        let annotations = pod.metadata.annotations.unwrap();
        assert_eq!(annotations[labels::CONFIG_SOURCE], "file");
        assert_eq!(Some(&annotations[labels::CONFIG_HASH]), pod.metadata.uid.as_ref());
        let spec = pod.spec.unwrap();
        assert_eq!(spec.node_name.as_deref(), Some("Node1"));
        assert_eq!(spec.restart_policy.as_deref(), Some("Always"));
        assert_eq!(spec.containers[0].image_pull_policy.as_deref(), Some("IfNotPresent"));
    }

    #[test]
    fn the_uid_changes_with_the_content_only() {
        let uid = |text: &str| read(text).unwrap()[0].metadata.uid.clone();
        assert_eq!(uid(POD), uid(POD));
        assert_ne!(uid(POD), uid(&POD.replace("app:1", "app:2")));
        assert_eq!(uid(POD), uid(&format!("# a comment\n{POD}")));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let rows = [
            ("a: [", "not a manifest"),
            ("", "no object at all"),
            ("apiVersion: apps/v1\nkind: Deployment\n", "\"Deployment\""),
            (&POD.replace("image:", "imag:"), "imag"),
            (&POD.replace("'app:1'", "[1]"), "invalid type"),
            (&POD.replace("web", "We_b"), "metadata.name"),
            (&POD.replace("name: a,", "name: a, ports: [{containerPort: x}],"), "invalid type"),
            (&POD.replace("containers:", "hostNetwrok: true\n  containers:"), "spec.hostNetwrok"),
            (
                &POD.replace("containers:", "serviceAccountName: x\n  containers:"),
                "may not reference serviceaccounts",
            ),
            (
                &POD.replace("containers:", "imagePullSecrets: [{name: x}]\n  containers:"),
                "may not reference secrets",
            ),
            (
                &POD.replace("name: a,", "name: a, envFrom: [{configMapRef: {name: x}}],"),
                "may not reference configmaps",
            ),
            (
                &POD.replace(
                    "name: a,",
                    "name: a, env: [{name: A, valueFrom: {secretKeyRef: {name: x, key: k}}}],",
                ),
                "may not reference secrets",
            ),
            (
                &POD.replace(
                    "containers:",
                    "volumes: [{name: v, projected: {sources: [{serviceAccountToken: {path: t}}]}}]\n  containers:",
                ),
                "spec.volumes[v]: static pods may not reference serviceaccounts",
            ),
            (
                &POD.replace(
                    "containers:",
                    "volumes: [{name: v, persistentVolumeClaim: {claimName: x}}]\n  containers:",
                ),
                "may not reference persistentvolumeclaims",
            ),
        ];
        for (text, expected) in rows {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = parse(&bytes, 1 << 20, Path::new("/m"), "n", Timestamp::UNIX_EPOCH);
        }
    }
}
