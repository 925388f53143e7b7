//! The file by which kubectl and other clients find the cluster.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::CertificateAndKey;

/// What goes into a kubeconfig.
#[derive(Clone, Copy, Debug)]
pub struct Kubeconfig<'a> {
    /// `https://address:port` of the API server.
    pub server_url: &'a str,
    /// What the API server's certificate is verified against.
    pub ca_pem: &'a str,
    /// Who the user is.
    pub client: &'a CertificateAndKey,
    /// The cluster's name in the file.
    pub cluster: &'a str,
    /// The user's name in the file.
    pub user: &'a str,
    /// The context's name in the file.
    pub context: &'a str,
    /// What else is said of the cluster, and under which name.
    pub extension: Option<(&'a str, &'a Value)>,
}

/// A kubeconfig as YAML, with all certificates in it, so that the one file is enough.
#[must_use]
pub fn kubeconfig(config: &Kubeconfig<'_>) -> String {
    // JSON's strings are YAML's, so that no name can break out of its place.
    let [cluster, user, context, server] =
        [config.cluster, config.user, config.context, config.server_url].map(|text| json!(text));
    let [authority, certificate, key] =
        [config.ca_pem, &config.client.certificate_pem, &config.client.key_pem]
            .map(|pem| STANDARD.encode(pem));
    let extensions = config.extension.map_or_else(String::new, |(name, extension)| {
        format!("\n    extensions: {}", json!([{ "name": name, "extension": extension }]))
    });
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: {cluster}
  cluster:
    certificate-authority-data: {authority}
    server: {server}{extensions}
contexts:
- name: {context}
  context:
    cluster: {cluster}
    user: {user}
current-context: {context}
preferences: {{}}
users:
- name: {user}
  user:
    client-certificate-data: {certificate}
    client-key-data: {key}
"
    )
}
