//! A part's way to the API server, as its kubeconfig file describes it, for as long as the part runs:
//! a file that is replaced (its certificates are renewed in time) is taken without a restart. A part
//! that runs in a pod of the cluster may go by the pod's account.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::{Context, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::Request;
use keelson_api::metrics::rest_client::RestClient;
use keelson_control_plane::pki::tls::{self, ReloadingKey};
use kube::{
    Client,
    client::Body,
    config::{Config, KubeConfigOptions, Kubeconfig},
};
use tokio_util::sync::CancellationToken;

use crate::{cluster::ClusterFacts, connection, run::MainTasks};

/// How often the file is looked at.
const CHECK: Duration = Duration::from_secs(30);

/// What a kubeconfig gives a part.
pub(crate) struct Credentials {
    /// The file; the pod's account if there is none.
    path: Option<PathBuf>,
    /// The API server's URL, if it is not to be the file's.
    server: Option<String>,
    /// The file's text that is in use.
    text: String,
    current: Arc<RwLock<Way>>,
    namespace: String,
    serving: Option<Arc<ReloadingKey>>,
    /// What the file says of the cluster, if Keelson issued it.
    pub(crate) facts: Option<ClusterFacts>,
    /// The authority of the cluster in PEM, if it stands in the file.
    ca_pem: Option<String>,
}

/// The way to the API server.
#[derive(Clone)]
struct Way {
    client: Client,
    /// Where that is, as metrics name it.
    host: String,
}

/// A kubeconfig file as read.
struct Read {
    text: String,
    way: Way,
    namespace: String,
    facts: Option<ClusterFacts>,
    ca_pem: Option<String>,
}

impl Credentials {
    /// Reads a kubeconfig file.
    ///
    /// # Errors
    /// When it can't be read or understood.
    pub(crate) async fn read(path: &Path) -> anyhow::Result<Self> {
        Self::read_for(path, None).await
    }

    /// Reads a kubeconfig file for the API server at this URL, or that of the file.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(crate) async fn read_for(path: &Path, server: Option<&str>) -> anyhow::Result<Self> {
        let Read { text, way, namespace, facts, ca_pem } = read(path, server).await?;
        let serving = facts.as_ref().and_then(|facts| facts.serving.clone());
        let serving = serving.map(|pair| ReloadingKey::of(&pair.into(), path)).transpose()?;
        Ok(Self {
            path: Some(path.to_owned()),
            server: server.map(str::to_owned),
            text,
            current: Arc::new(RwLock::new(way)),
            namespace,
            serving: serving.map(Arc::new),
            facts,
            ca_pem,
        })
    }

    /// Those of the account of the pod that this runs in.
    ///
    /// # Errors
    /// When it doesn't run in a pod.
    pub(crate) fn of_this_pod() -> anyhow::Result<Self> {
        Self::without_file(Config::incluster()?)
    }

    /// None, for the API server at a URL; one without a scheme is of HTTP, as with client-go.
    ///
    /// # Errors
    /// When it isn't one.
    pub(crate) fn none_at(server: &str) -> anyhow::Result<Self> {
        let url = match server.contains("://") {
            true => server.to_owned(),
            false => format!("http://{server}"),
        };
        let url: http::Uri = url.parse().with_context(|| format!("{server:?} is not a URL"))?;
        if !matches!(url.scheme_str(), Some("http" | "https")) {
            bail!("{server:?}: a URL of http or https is wanted");
        }
        Self::without_file(Config::new(url))
    }

    fn without_file(config: Config) -> anyhow::Result<Self> {
        let namespace = config.default_namespace.clone();
        Ok(Self {
            path: None,
            server: None,
            text: String::new(),
            current: Arc::new(RwLock::new(Way::new(config)?)),
            namespace,
            serving: None,
            facts: None,
            ca_pem: None,
        })
    }

    /// A client that always uses the credentials that are in the file now.
    pub(crate) fn client(&self) -> Client {
        let current = Arc::clone(&self.current);
        let service = tower::service_fn(move |request: Request<Body>| {
            let way = current.read().unwrap_or_else(PoisonError::into_inner).clone();
            async move { way.client.send(request).await }
        });
        Client::new(service, self.namespace.clone())
    }

    /// As [`Self::client`], with its requests counted.
    pub(crate) fn counted_client(&self, metrics: RestClient) -> Client {
        let current = Arc::clone(&self.current);
        let service = tower::service_fn(move |request: Request<Body>| {
            let way = current.read().unwrap_or_else(PoisonError::into_inner).clone();
            let metrics = metrics.clone();
            async move { metrics.send(&way.client, &way.host, request).await }
        });
        Client::new(service, self.namespace.clone())
    }

    /// The TLS of the kubelet's HTTPS port, if the file has a certificate for it: clients are known
    /// by certificates of the cluster's authority.
    ///
    /// # Errors
    /// rustls refuses the certificates.
    pub(crate) fn serving_tls(&self) -> anyhow::Result<Option<Arc<rustls::ServerConfig>>> {
        let (Some(serving), Some(ca)) = (&self.serving, &self.ca_pem) else { return Ok(None) };
        Ok(Some(tls::server_config(ca, Arc::clone(serving))?))
    }

    /// Follows the file until `shutdown`, as one of these tasks.
    pub(crate) fn keep_current(self, tasks: &MainTasks, shutdown: CancellationToken) {
        tasks.spawn("credentials", async move {
            self.follow(shutdown).await;
            Ok(())
        });
    }

    async fn follow(mut self, shutdown: CancellationToken) {
        let Some(path) = self.path.clone() else {
            // The client itself follows the account's token.
            return shutdown.cancelled().await;
        };
        let mut ticks = tokio::time::interval(CHECK);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = shutdown.cancelled() => return,
            }
            match self.refresh(&path).await {
                Ok(false) => {}
                Ok(true) => tracing::info!(file = %path.display(), "took new credentials"),
                Err(error) => {
                    tracing::warn!("{error:#}; going on with the credentials from before");
                }
            }
        }
    }

    /// Takes what stands in the file now. Returns whether it is new.
    async fn refresh(&mut self, path: &Path) -> anyhow::Result<bool> {
        let text = tokio::fs::read_to_string(path)
            .await
            .with_context(|| format!("kubeconfig {}", path.display()))?;
        if text == self.text {
            return Ok(false);
        }
        let read = read(path, self.server.as_deref()).await?;
        let pair = read.facts.and_then(|facts| facts.serving);
        if let (Some(serving), Some(pair)) = (&self.serving, pair) {
            serving.reload(&pair.into(), path)?;
        }
        // With connections of its own, so that the next request shows the new certificate.
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = read.way;
        self.text = read.text;
        Ok(true)
    }
}

impl Way {
    fn new(config: Config) -> anyhow::Result<Self> {
        let host = config.cluster_url.authority().map(ToString::to_string).unwrap_or_default();
        Ok(Self { client: connection::client(config)?, host })
    }
}

async fn read(path: &Path, server: Option<&str>) -> anyhow::Result<Read> {
    let context = || format!("kubeconfig {}", path.display());
    let text = tokio::fs::read_to_string(path).await.with_context(context)?;
    // With its relative paths made whole.
    let mut kubeconfig = Kubeconfig::read_from(path).with_context(context)?;
    if let Some(server) = server {
        for cluster in kubeconfig.clusters.iter_mut().filter_map(|named| named.cluster.as_mut()) {
            cluster.server = Some(server.to_owned());
        }
    }
    let facts = ClusterFacts::of(&kubeconfig).with_context(context)?;
    let cluster = kubeconfig.clusters.iter().find_map(|named| named.cluster.as_ref());
    let ca_pem = cluster
        .and_then(|cluster| cluster.certificate_authority_data.as_ref())
        .and_then(|data| STANDARD.decode(data).ok())
        .and_then(|pem| String::from_utf8(pem).ok());
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .with_context(context)?;
    let namespace = config.default_namespace.clone();
    let way = Way::new(config).with_context(context)?;
    Ok(Read { text, way, namespace, facts, ca_pem })
}

#[cfg(test)]
mod tests {
    use keelson_control_plane::pki::{self, CertificateAndKey};
    use serde_json::json;

    use super::*;

    fn kubeconfig(server: &str, files: &CertificateAndKey) -> String {
        let facts = json!({"clusterCIDR": "10.244.0.0/16", "clusterDNS": "10.96.0.10",
            "clusterDomain": "cluster.local",
            "serving": {"certificate": files.certificate_pem, "key": files.key_pem}});
        pki::kubeconfig(&pki::Kubeconfig {
            server_url: server,
            ca_pem: &files.certificate_pem,
            client: files,
            cluster: "c",
            user: "u",
            context: "u@c",
            extension: Some((crate::cluster::EXTENSION, &facts)),
        })
    }

    #[tokio::test]
    async fn a_file_that_is_replaced_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubelet.conf");
        let files = pki::self_signed(&["n2".to_owned()]).unwrap();
        std::fs::write(&path, kubeconfig("https://127.0.0.1:1", &files)).unwrap();
        let mut credentials = Credentials::read(&path).await.unwrap();
        assert_eq!(credentials.facts.as_ref().unwrap().cluster_domain, "cluster.local");
        assert!(credentials.serving_tls().unwrap().is_some());
        let said = async |client: &Client| {
            let request = Request::get("/livez").body(Vec::new()).unwrap();
            client.request_text(request).await
        };
        let client = credentials.client();
        assert!(said(&client).await.is_err(), "nobody listens there");
        assert!(!credentials.refresh(&path).await.unwrap());

        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", server.local_addr().unwrap());
        tokio::spawn(async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let (mut stream, _) = server.accept().await.unwrap();
            let mut buffer = [0; 4096];
            let _ = stream.read(&mut buffer).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        });
        let renewed = pki::self_signed(&["n2".to_owned()]).unwrap();
        std::fs::write(&path, kubeconfig(&url, &renewed)).unwrap();
        assert!(credentials.refresh(&path).await.unwrap());
        assert_eq!(said(&client).await.unwrap(), "ok", "the old client follows");

        let registry = prometheus::Registry::new();
        let counted = credentials.counted_client(RestClient::register(&registry).unwrap());
        assert!(said(&counted).await.is_err(), "the server answered once");
        let metrics = keelson_api::metrics::encode(&registry).unwrap();
        let host = url.trim_start_matches("http://");
        let line = format!("code=\"<error>\",host=\"{host}\",method=\"GET\"}} 1");
        assert!(metrics.contains(&line), "{metrics}");
        let elsewhere = Credentials::read_for(&path, Some("http://127.0.0.1:2")).await.unwrap();
        assert_eq!(elsewhere.current.read().unwrap().host, "127.0.0.1:2");

        std::fs::write(&path, "half").unwrap();
        assert!(credentials.refresh(&path).await.is_err());
    }

    #[tokio::test]
    async fn a_url_alone_is_enough_for_a_server_that_wants_no_credentials() {
        for (server, host) in [
            ("http://192.0.2.1:8080", "192.0.2.1:8080"),
            ("192.0.2.1:8080", "192.0.2.1:8080"),
            ("https://api.example:6443", "api.example:6443"),
        ] {
            let credentials = Credentials::none_at(server).unwrap();
            assert_eq!(credentials.current.read().unwrap().host, host);
        }
        for wrong in ["ftp://192.0.2.1", "http://", "a b"] {
            assert!(Credentials::none_at(wrong).is_err(), "{wrong}");
        }
    }
}
