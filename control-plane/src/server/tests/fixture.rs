//! An API server in a temporary folder.

use std::{path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use http::Request;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::{
    auth::{Anonymous, UserInfo, bootstrap::default_rbac, tokens::DEFAULT_ISSUER},
    pki::{ClusterPki, Leaf, PkiConfig},
    server::{ApiServer, ApiServerConfig, ClusterSecurity, Limits},
};

/// An API server for one test.
pub(super) struct World {
    pub(super) server: ApiServer,
    pub(super) pki: Arc<ClusterPki>,
    pub(super) client: kube::Client,
    pub(super) dir: TempDir,
    shutdown: CancellationToken,
}

impl Drop for World {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

pub(super) async fn world() -> World {
    world_with(Limits::default()).await
}

pub(super) async fn world_with(limits: Limits) -> World {
    let dir = TempDir::new().unwrap();
    let pki = pki(&dir);
    let shutdown = CancellationToken::new();
    let server = start(&dir, &pki, limits, &shutdown).await;
    let client = server.client(UserInfo::user("admin", &["system:masters"]));
    World { server, pki, client, dir, shutdown }
}

fn pki(dir: &TempDir) -> Arc<ClusterPki> {
    let config = PkiConfig {
        node_name: "node-1".into(),
        advertise_addresses: vec!["127.0.0.1".parse().unwrap()],
        service_ip: "10.96.0.1".parse().unwrap(),
        cluster_domain: "cluster.local".into(),
        extra_sans: Vec::new(),
    };
    Arc::new(ClusterPki::load_or_create(dir.path().join("pki"), &config).unwrap())
}

async fn start(
    dir: &TempDir,
    pki: &Arc<ClusterPki>,
    limits: Limits,
    shutdown: &CancellationToken,
) -> ApiServer {
    let security = ClusterSecurity {
        signing_key_pem: pki.service_account_key_pem().to_owned(),
        issuer: DEFAULT_ISSUER.to_owned(),
        anonymous: Anonymous::default(),
        server_url: "https://127.0.0.1:6443".to_owned(),
    };
    let config = ApiServerConfig {
        data_dir: dir.path().join("data"),
        bind_address: "127.0.0.1:0".parse().unwrap(),
        advertise_address: "192.0.2.7".parse().unwrap(),
        service_cidrs: vec!["10.96.0.0/12".parse().unwrap()],
        node_ports: 30000..=32767,
        tls: pki.api_server_tls().unwrap(),
        kubelet_tls: Some(pki.client_config(Some(Leaf::ApiServerKubeletClient)).unwrap()),
        security: Box::new(move |lookup| security.over(lookup).map_err(Into::into)),
        metrics: prometheus::Registry::new(),
        bootstrap_objects: default_rbac(),
        limits,
        event_ttl: Duration::from_secs(3600),
    };
    ApiServer::start(config, shutdown.clone()).await.unwrap()
}

impl World {
    /// Stops the server, and starts another over the same folder.
    pub(super) async fn restart(mut self) -> Self {
        self.shutdown.cancel();
        self.server.stopped().await;
        let shutdown = CancellationToken::new();
        self.server = start(&self.dir, &self.pki, Limits::default(), &shutdown).await;
        self.client = self.server.client(UserInfo::user("admin", &["system:masters"]));
        self.shutdown = shutdown;
        self
    }

    /// A request of the administrator's, without a body or with this one; code and document.
    pub(super) async fn ask(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let kind = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let bytes = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        self.send(method, path, &[("content-type", kind)], bytes).await
    }

    pub(super) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> (u16, Value) {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(kube::client::Body::from(body)).unwrap();
        let answer = self.client.send(request).await.unwrap();
        let code = answer.status().as_u16();
        let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
        let text = || Value::String(String::from_utf8_lossy(&body).into_owned());
        (code, serde_json::from_slice(&body).unwrap_or_else(|_| text()))
    }

    /// As [`Self::ask`], and it must succeed.
    pub(super) async fn must(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let (code, answer) = self.ask(method, path, body).await;
        assert!((200..300).contains(&code), "{method} {path}: {code} {answer}");
        answer
    }

    /// A service account, without which no pod is admitted.
    pub(super) async fn service_account(&self) {
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": "default"}});
        self.must("POST", "/api/v1/namespaces/default/serviceaccounts", Some(account)).await;
    }

    pub(super) fn kubeconfig(&self) -> PathBuf {
        let url = format!("https://{}", self.server.address());
        let path = self.dir.path().join("admin.conf");
        std::fs::write(&path, self.pki.kubeconfig(Leaf::Admin, &url, "admin", None)).unwrap();
        path
    }

    /// The real kubectl over TLS; whether it succeeded, and all it printed.
    pub(super) async fn kubectl(&self, arguments: &[&str], input: &str) -> (bool, String) {
        use tokio::io::AsyncWriteExt as _;
        let mut child = self.kubectl_command(arguments).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).await.unwrap();
        drop(stdin);
        let output = child.wait_with_output().await.unwrap();
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        (output.status.success(), text)
    }

    pub(super) fn kubectl_command(&self, arguments: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new("kubectl");
        command
            .args(arguments)
            .env("KUBECONFIG", self.kubeconfig())
            .env("HOME", self.dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }
}
