//! The example that `keelson up --demo` starts and shows: three web pods behind a Service.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use anyhow::{Context, bail};
use futures::TryStreamExt;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, body::Bytes};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Node, Pod, Service},
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::TcpStream;

/// The image's name: that of the example manifests.
pub(crate) const IMAGE: &str = "keelson/demo:latest";
const DEPLOYMENT: &str = include_str!("../../manifests/examples/deployment.yaml");
const SERVICE: &str = include_str!("../../manifests/examples/service.yaml");
/// How long the example may take to run: generous, for small machines.
const DEADLINE: Duration = Duration::from_secs(120);
/// The longest answer of a pod that is shown.
const ANSWER_BYTES: usize = 1024;

/// Makes the example unless it is there, waits until it runs, and prints what there is. An example
/// that was there before is the user's: what was changed in it stays, and is no error.
///
/// # Errors
/// When the API refuses it, or a new one does not run in time.
pub(crate) async fn show(client: &Client, node_ip: IpAddr, kubeconfig: &str) -> anyhow::Result<()> {
    let (deployment, new_deployment) = make::<Deployment>(client, DEPLOYMENT).await?;
    let (service, new_service) = make::<Service>(client, SERVICE).await?;
    let shown = show_running(client, &deployment, service, node_ip, kubeconfig).await;
    match shown {
        Err(error) if !new_deployment && !new_service => {
            println!("the example is not as it was made: {error:#}");
            Ok(())
        }
        shown => shown,
    }
}

async fn show_running(
    client: &Client,
    deployment: &Deployment,
    service: Service,
    node_ip: IpAddr,
    kubeconfig: &str,
) -> anyhow::Result<()> {
    tokio::time::timeout(DEADLINE, wait_available(client, deployment)).await.with_context(
        || format!("the example did not run within {DEADLINE:?}: see `kubectl describe pods`"),
    )??;

    let spec = service.spec.context("the Service has no spec")?;
    let address = spec.cluster_ip.context("the Service has no address")?;
    let ports = spec.ports.unwrap_or_default();
    let port = ports.first().context("the Service has no port")?;
    let url = format!("http://{address}:{}", port.port);
    let pods = pods(client).await?;
    let answers = answers_of_all(&address, port.port, &pods).await?;
    let nodes: Vec<Node> = Api::all(client.clone()).list(&ListParams::default()).await?.items;
    print!("{}", screen(&nodes, &pods, &url, &answers, node_ip, port.node_port, kubeconfig));
    Ok(())
}

/// The object of a manifest as it is now, and whether it had to be made.
async fn make<K>(client: &Client, manifest: &str) -> anyhow::Result<(K, bool)>
where
    K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Serialize
        + DeserializeOwned
        + Clone
        + std::fmt::Debug,
{
    let object =
        keelson_api::yaml::document(manifest.as_bytes(), keelson_api::yaml::Limits::default())
            .context("example manifest")?;
    let object: K = serde_json::from_value(object).context("example manifest")?;
    let name = object.meta().name.clone().context("example manifest: no name")?;
    let api = Api::<K>::namespaced(client.clone(), "default");
    let parameters =
        PostParams { field_manager: Some("keelson-demo".to_owned()), ..PostParams::default() };
    let context = || format!("make the example {} {name}", K::kind(&()));
    match api.create(&parameters, &object).await {
        Ok(made) => Ok((made, true)),
        Err(kube::Error::Api(status)) if status.code == 409 => {
            Ok((api.get(&name).await.with_context(context)?, false))
        }
        Err(error) => Err(error).with_context(context),
    }
}

async fn wait_available(client: &Client, deployment: &Deployment) -> anyhow::Result<()> {
    let name = deployment.metadata.name.as_deref().unwrap_or_default();
    let api: Api<Deployment> = Api::namespaced(client.clone(), "default");
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut changes = std::pin::pin!(watcher(api, config).default_backoff().applied_objects());
    let mut shown = None;
    while let Some(deployment) = changes.try_next().await.context("watch the example")? {
        let wanted = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
        let status = deployment.status.unwrap_or_default();
        let available = status.available_replicas.unwrap_or(0);
        if shown != Some(available) {
            println!("  pods of the example ready: {available} of {wanted}");
            shown = Some(available);
        }
        if available >= wanted && status.observed_generation >= deployment.metadata.generation {
            return Ok(());
        }
    }
    bail!("the watch of the example ended")
}

async fn pods(client: &Client) -> anyhow::Result<Vec<Pod>> {
    let list = ListParams::default().labels("app=web");
    let pods = Api::<Pod>::namespaced(client.clone(), "default").list(&list).await?.items;
    Ok(pods.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect())
}

/// Asks at the Service's address until each pod has answered once.
async fn answers_of_all(
    address: &str,
    port: i32,
    pods: &[Pod],
) -> anyhow::Result<BTreeMap<String, String>> {
    let mut answers = BTreeMap::new();
    // Each try picks a pod at random: a hundred tries miss one of three with less than 1e-17.
    let mut last = None;
    for _ in 0..100 {
        if answers.len() >= pods.len() {
            return Ok(answers);
        }
        match fetch(address, port).await {
            Ok(answer) => {
                if let Some(pod) = pods
                    .iter()
                    .filter_map(|p| p.metadata.name.as_ref())
                    .find(|name| answer.contains(*name))
                {
                    answers.insert(pod.clone(), answer.trim().to_owned());
                }
            }
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => {
            Err(error).with_context(|| format!("the Service's address {address}:{port}"))
        }
        None => bail!(
            "the Service's address {address}:{port} answered with {} of {} pods",
            answers.len(),
            pods.len()
        ),
    }
}

/// One GET request over a connection of its own, so that each is balanced anew.
async fn fetch(address: &str, port: i32) -> anyhow::Result<String> {
    let request = async {
        let stream = TcpStream::connect(format!("{address}:{port}")).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::get("/").header("host", address).body(Empty::<Bytes>::new())?;
        // The connection ends with the request: both are driven here.
        let (response, connection) = tokio::join!(
            async {
                let response = sender.send_request(request).await?;
                let body = Limited::new(response.into_body(), ANSWER_BYTES).collect().await;
                drop(sender);
                body.map(|body| body.to_bytes()).map_err(|e| anyhow::anyhow!(e))
            },
            connection
        );
        connection?;
        Ok::<_, anyhow::Error>(String::from_utf8_lossy(&response?).into_owned())
    };
    tokio::time::timeout(Duration::from_secs(5), request).await.context("no answer within 5 s")?
}

/// What the user sees at the end.
fn screen(
    nodes: &[Node],
    pods: &[Pod],
    url: &str,
    answers: &BTreeMap<String, String>,
    node_ip: IpAddr,
    node_port: Option<i32>,
    kubeconfig: &str,
) -> String {
    let mut text = String::from("\n");
    for node in nodes {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let status = node.status.as_ref();
        let ready = status
            .and_then(|s| s.conditions.as_ref())
            .is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"));
        let version = status
            .and_then(|s| s.node_info.as_ref())
            .map_or("", |info| info.kubelet_version.as_str());
        let ready = if ready { "Ready" } else { "NotReady" };
        text += &format!("node     {name}  {ready}  {version}  {node_ip}\n");
    }
    for pod in pods {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let status = pod.status.as_ref();
        let phase = status.and_then(|s| s.phase.as_deref()).unwrap_or("Unknown");
        let ip = status.and_then(|s| s.pod_ip.as_deref()).unwrap_or("-");
        let answer = answers.get(name).map_or("(no answer)", String::as_str);
        text += &format!("pod      {name}  {phase}  {ip}  answers: {answer}\n");
    }
    text += &format!("service  web  {url}");
    if let Some(port) = node_port {
        text += &format!("  and on the node  http://{node_ip}:{port}");
    }
    text += &format!(
        "\n\nTry next, in another terminal:\n  export KUBECONFIG={kubeconfig}\n  \
         kubectl get nodes,pods,svc -A -o wide\n  \
         kubectl scale deployment web --replicas=5\n  \
         curl {url}\n\n"
    );
    text
}
