//! ServiceAccount: a pod runs as a service account that exists, and finds its token, the cluster's
//! authority and its namespace below `/var/run/secrets/kubernetes.io/serviceaccount`.

use std::sync::Arc;

use rand::seq::IndexedRandom;
use serde_json::{Value, json};

use super::{Admission, AdmissionRequest, Refusal};
use crate::{
    auth::{
        fields::{at, list, text},
        node::{Kind, MIRROR, references},
    },
    lookup::Lookup,
};

/// Where programs look for their token.
const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// How long tokens last that nobody asked otherwise for: an hour, and a bit by which they are told
/// apart from those.
const TOKEN_SECONDS: u32 = 3607;
/// What the volume's name begins with.
const VOLUME: &str = "kube-api-access-";
/// What Kubernetes makes names of: no vowels, so that no words come about.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

pub(crate) struct ServiceAccount {
    lookup: Arc<dyn Lookup>,
}

impl ServiceAccount {
    pub(crate) fn new(lookup: Arc<dyn Lookup>) -> Self {
        Self { lookup }
    }
}

impl Admission for ServiceAccount {
    fn admit(
        &self,
        request: &AdmissionRequest<'_>,
        object: Option<&mut Value>,
    ) -> Result<(), Refusal> {
        let Some(pod) = object.filter(|_| request.creates_pod()) else { return Ok(()) };
        if !pod.get("spec").is_some_and(Value::is_object) {
            return Ok(()); // for validation to refuse
        }
        if at(pod, &["metadata", "annotations", MIRROR]).is_some() {
            return mirror_pod(request, pod);
        }
        if text(pod, &["spec", "serviceAccountName"]).is_empty() {
            // `serviceAccount` is the field's old name.
            let account = match text(pod, &["spec", "serviceAccount"]) {
                "" => "default",
                old => old,
            };
            pod["spec"]["serviceAccountName"] = json!(account);
        }
        let account = text(pod, &["spec", "serviceAccountName"]).to_owned();
        pod["spec"]["serviceAccount"] = json!(account);
        let found = self
            .lookup
            .get("", "serviceaccounts", Some(request.namespace), &account)
            .ok_or_else(|| {
                request.forbidden(
                    Some(pod),
                    &format!(
                        "error looking up service account {}/{account}: serviceaccount \
                             {account:?} not found",
                        request.namespace
                    ),
                )
            })?;
        let automount = |object: &Value, path: &[&str]| at(object, path).and_then(Value::as_bool);
        if automount(pod, &["spec", "automountServiceAccountToken"])
            .or_else(|| automount(&found, &["automountServiceAccountToken"]))
            .unwrap_or(true)
        {
            mount_token(pod);
        }
        if list(pod, &["spec", "imagePullSecrets"]).is_empty() {
            let secrets = list(&found, &["imagePullSecrets"]);
            if !secrets.is_empty() {
                pod["spec"]["imagePullSecrets"] = json!(secrets);
            }
        }
        Ok(())
    }
}

/// Mirror pods are made by kubelets: through them they must not reach what they may not read.
fn mirror_pod(request: &AdmissionRequest<'_>, pod: &Value) -> Result<(), Refusal> {
    let refuse = |why: &str| Err(request.forbidden(Some(pod), why));
    if !text(pod, &["spec", "serviceAccountName"]).is_empty() {
        return refuse("a mirror pod may not reference service accounts");
    }
    if references(pod).iter().any(|(kind, _)| *kind == Kind::Secret) {
        return refuse("a mirror pod may not reference secrets");
    }
    let projects_token = list(pod, &["spec", "volumes"])
        .iter()
        .flat_map(|volume| list(volume, &["projected", "sources"]))
        .any(|source| source.get("serviceAccountToken").is_some());
    if projects_token {
        return refuse("a mirror pod may not use ServiceAccountToken volume projections");
    }
    Ok(())
}

fn mount_token(pod: &mut Value) {
    let existing = list(pod, &["spec", "volumes"])
        .iter()
        .map(|volume| text(volume, &["name"]))
        .find(|name| name.starts_with(VOLUME))
        .map(str::to_owned);
    let name = existing.clone().unwrap_or_else(|| {
        let mut rng = rand::rng();
        let suffix = (0..5).filter_map(|_| ALPHABET.choose(&mut rng)).map(|&b| char::from(b));
        format!("{VOLUME}{}", suffix.collect::<String>())
    });
    let mut mounted = false;
    for containers in ["initContainers", "containers"] {
        let Some(containers) =
            pod["spec"].get_mut(containers).and_then(|containers| containers.as_array_mut())
        else {
            continue;
        };
        for container in containers.iter_mut().filter(|container| container.is_object()) {
            let own = list(container, &["volumeMounts"])
                .iter()
                .any(|mount| text(mount, &["mountPath"]) == MOUNT_PATH);
            if own {
                continue; // the author wants something else there
            }
            push(
                container,
                "volumeMounts",
                json!({ "name": name, "readOnly": true, "mountPath": MOUNT_PATH }),
            );
            mounted = true;
        }
    }
    if mounted && existing.is_none() {
        let volume = json!({
            "name": name,
            "projected": {
                "defaultMode": 0o644,
                "sources": [
                    { "serviceAccountToken": {
                        "path": "token", "expirationSeconds": TOKEN_SECONDS } },
                    { "configMap": { "name": "kube-root-ca.crt",
                        "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
                    { "downwardAPI": { "items": [{ "path": "namespace",
                        "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.namespace" } }] } },
                ],
            },
        });
        push(&mut pod["spec"], "volumes", volume);
    }
}

/// Appends to a list that may not be there yet.
fn push(object: &mut Value, field: &str, item: Value) {
    match object.get_mut(field).and_then(Value::as_array_mut) {
        Some(list) => list.push(item),
        None => object[field] = json!([item]),
    }
}
