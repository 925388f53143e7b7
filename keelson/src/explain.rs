//! `keelson explain packet`: where a packet goes, and why.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::{
    core::v1::{Node, Pod, Service},
    networking::v1::ServiceCIDR,
};
use keelson_api::object::ObjectKey;
use keelson_proxy::{Objects, Packet, ProxyConfig, Snapshot};
use kube::{Api, Client, api::ListParams};

use crate::{
    cli::{ExplainPacketArgs, OutputFormat},
    config::{ProxyFlags, ProxySettings},
    manifests::Manifests,
    node,
    paths::Paths,
    proxy, run,
};

/// Where a proxy on this machine tells how it is configured, unless told otherwise.
const CONFIGZ: &str = "127.0.0.1:10249";
/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Runs the command.
///
/// # Errors
/// When an object isn't there or the API doesn't answer.
pub(crate) fn packet(args: &ExplainPacketArgs) -> anyhow::Result<()> {
    let from = Place::parse("--from", &args.from)?;
    let to = Place::parse("--to", &args.to)?;
    crate::runtime()?.block_on(async {
        let mut config = config(args).await?;
        if let Some(name) = &args.node {
            config.node_name.clone_from(name);
            config.node_ips.clear();
        }
        let Known { objects, pods } = if args.services.is_empty() {
            from_api(args, &config.node_name, &from).await?
        } else {
            from_manifests(args, &mut config)?
        };
        let service_addresses = addresses_of(&to, &objects.services)?;
        let here = config.node_name.clone();
        let (mut snapshot, _) = Snapshot::new(config, &objects);
        if args.services.is_empty() && args.node.is_none() {
            snapshot = snapshot.with_local_addresses(node::addresses()?);
        }
        let nodes = match snapshot.node_addresses() {
            // Its object is not there, or not yet.
            [] if args.services.is_empty() && args.node.is_none() => {
                node::addresses()?.into_iter().filter(|address| !address.is_loopback()).collect()
            }
            known => known.to_vec(),
        };
        let to_address = match &to {
            Place::Address(address) => Some(*address),
            Place::Node => nodes.first().copied(),
            Place::Object(_) => None,
        };
        let wanted = |address: &IpAddr| {
            to_address.map_or_else(
                || service_addresses.iter().any(|a| a.is_ipv4() == address.is_ipv4()),
                |to| to.is_ipv4() == address.is_ipv4(),
            )
        };
        let (from, from_pod_here) = match &from {
            Place::Address(address) => {
                (*address, pods.iter().any(|pod| on(pod, &here) && has(pod, *address)))
            }
            Place::Node => {
                let address = nodes.iter().copied().find(wanted);
                (address.context("the node's address is not known")?, false)
            }
            Place::Object(key) => {
                let pod = pods.iter().find(|pod| ObjectKey::of(&pod.metadata) == *key);
                let pod = pod.with_context(|| format!("there is no pod {key}"))?;
                let address = pod_addresses(pod).find(wanted);
                (address.with_context(|| format!("pod {key} has no address"))?, on(pod, &here))
            }
        };
        let to = to_address
            .or_else(|| service_addresses.iter().copied().find(|a| a.is_ipv4() == from.is_ipv4()))
            .or_else(|| service_addresses.first().copied())
            .context("the node's address is not known")?;
        let packet = Packet { from, from_pod_here, to, port: args.port, protocol: args.protocol };
        let mut answer = snapshot.explain(&packet);
        // Objects from files are not those that the kernel's rules were made of.
        if args.services.is_empty()
            && nix::unistd::geteuid().is_root()
            && let Err(error) = snapshot.check(&mut answer)
        {
            eprintln!("keelson: the kernel can't be asked: {error}");
        }
        match args.output {
            OutputFormat::Text => print!("{answer}"),
            OutputFormat::Json => println!("{}", serde_json::to_string_pretty(&answer)?),
        }
        Ok(())
    })
}

/// A client or what it connects to, as the command line has it.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Address(IpAddr),
    Node,
    /// A pod or Service.
    Object(ObjectKey),
}

impl Place {
    fn parse(flag: &str, words: &[String]) -> anyhow::Result<Self> {
        let kind = if flag == "--from" { "pod" } else { "service" };
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words[..] {
            ["node"] => Ok(Self::Node),
            [address] => {
                let address = address.parse().with_context(|| {
                    format!(
                        "{flag} {address:?}: an address, {kind} NAMESPACE/NAME or node is wanted"
                    )
                })?;
                Ok(Self::Address(address))
            }
            [word, name] if word == kind => {
                let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
                Ok(Self::Object(ObjectKey::new(namespace, name)))
            }
            _ => bail!("{flag}: an address, {kind} NAMESPACE/NAME or node is wanted"),
        }
    }
}

/// The cluster addresses of the Service that is meant, if one is.
fn addresses_of(to: &Place, services: &[Service]) -> anyhow::Result<Vec<IpAddr>> {
    let Place::Object(key) = to else { return Ok(Vec::new()) };
    let service = services.iter().find(|service| ObjectKey::of(&service.metadata) == *key);
    let service = service.with_context(|| format!("there is no Service {key}"))?;
    let spec = service.spec.clone().unwrap_or_default();
    let texts = spec.cluster_ips.into_iter().flatten().chain(spec.cluster_ip);
    let addresses: Vec<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
    if addresses.is_empty() {
        bail!("Service {key} has no cluster address: its name leads to its endpoints themselves");
    }
    Ok(addresses)
}

fn pod_addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> {
    let status = pod.status.clone().unwrap_or_default();
    let all = status.pod_ips.into_iter().flatten().map(|ip| ip.ip).chain(status.pod_ip);
    all.filter_map(|text| text.parse().ok())
}

fn has(pod: &Pod, address: IpAddr) -> bool {
    pod_addresses(pod).any(|a| a == address)
}

fn on(pod: &Pod, node: &str) -> bool {
    let spec = pod.spec.as_ref();
    spec.is_some_and(|s| s.node_name.as_deref() == Some(node) && s.host_network != Some(true))
}

/// The proxy's configuration: as its file has it, or as the running one tells.
async fn config(args: &ExplainPacketArgs) -> anyhow::Result<ProxyConfig> {
    if args.config.is_none() && args.services.is_empty() {
        match tokio::time::timeout(PATIENCE, running()).await {
            Ok(Ok(config)) => return Ok(config),
            Ok(Err(error)) => eprintln!(
                "keelson: no proxy tells its configuration at {CONFIGZ} ({error:#}): its defaults \
                 are taken, or --config FILE"
            ),
            Err(_) => eprintln!(
                "keelson: the proxy at {CONFIGZ} doesn't answer: its defaults are taken, or \
                 --config FILE"
            ),
        }
    }
    let settings = ProxySettings::read(args.config.as_deref(), &ProxyFlags::default())?;
    let name = node::name(args.node.as_deref().or(settings.hostname_override.as_deref()))?;
    proxy::config(&settings, &name, Vec::new(), None)
}

/// What the running proxy tells of itself; its mode is the one in force.
async fn running() -> anyhow::Result<ProxyConfig> {
    let mut document: serde_json::Value = serde_json::from_slice(&page("/configz").await?)?;
    let mut settings: ProxySettings =
        serde_json::from_value(document["kubeproxy.config.k8s.io"].take())?;
    settings.mode = Some(String::from_utf8(page("/proxyMode").await?.to_vec())?);
    let name = settings.hostname_override.clone().unwrap_or_default();
    proxy::config(&settings, &name, Vec::new(), None)
}

async fn page(path: &str) -> anyhow::Result<Bytes> {
    let stream = tokio::net::TcpStream::connect(CONFIGZ).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request =
        http::Request::get(path).header(http::header::HOST, CONFIGZ).body(Empty::<Bytes>::new())?;
    let asked = async move { sender.send_request(request).await?.into_body().collect().await };
    // The connection ends when nothing more is asked.
    let (body, _) = tokio::join!(asked, connection);
    Ok(body?.to_bytes())
}

struct Known {
    objects: Objects,
    pods: Vec<Pod>,
}

fn from_manifests(args: &ExplainPacketArgs, config: &mut ProxyConfig) -> anyhow::Result<Known> {
    let mut manifests = Manifests::read(&args.services)?;
    manifests.choose_node(args.node.as_deref())?;
    for problem in &manifests.problems {
        eprintln!("keelson: {problem}");
    }
    if let Some(name) = manifests.objects.node.as_ref().and_then(|n| n.metadata.name.clone()) {
        config.node_name = name;
    }
    Ok(Known { objects: manifests.objects, pods: manifests.pods })
}

async fn from_api(args: &ExplainPacketArgs, node: &str, from: &Place) -> anyhow::Result<Known> {
    let path = match &args.kubeconfig {
        Some(path) => path.clone(),
        None => Paths::new(args.data.data_dir.as_deref()).context("data folder")?.admin_kubeconfig,
    };
    let client = run::client(&path).await?;
    let all = ListParams::default();
    let services = Api::all(client.clone()).list(&all).await.context("list Services")?.items;
    let slices = Api::all(client.clone()).list(&all).await.context("list EndpointSlices")?.items;
    let node = Api::<Node>::all(client.clone()).get_opt(node).await.context("get the Node")?;
    let service_cidrs = service_cidrs(client.clone()).await?;
    let pods = match from {
        Place::Object(key) => pod(client, key).await?.into_iter().collect(),
        Place::Address(address) => {
            let its = ListParams::default().fields(&format!("status.podIP={address}"));
            // An API without this selector leaves it to the ranges of pods.
            Api::<Pod>::all(client).list(&its).await.map(|l| l.items).unwrap_or_default()
        }
        Place::Node => Vec::new(),
    };
    Ok(Known { objects: Objects { services, slices, service_cidrs, node }, pods })
}

/// The ranges of Services; none from an API that doesn't show them, as the proxy has it.
async fn service_cidrs(client: Client) -> anyhow::Result<Vec<ServiceCIDR>> {
    match Api::all(client).list(&ListParams::default()).await {
        Err(kube::Error::Api(status)) if [403, 404].contains(&status.code) => Ok(Vec::new()),
        listed => Ok(listed.context("list ServiceCIDRs")?.items),
    }
}

async fn pod(client: Client, key: &ObjectKey) -> anyhow::Result<Option<Pod>> {
    let api: Api<Pod> = Api::namespaced(client, &key.namespace);
    api.get_opt(&key.name).await.with_context(|| format!("get pod {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_addresses_objects_or_the_node() {
        let parse = |flag, words: &[&str]| {
            let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
            Place::parse(flag, &words)
        };
        assert_eq!(parse("--from", &["node"]).unwrap(), Place::Node);
        let pod = Place::Object(ObjectKey::new("a", "b"));
        assert_eq!(parse("--from", &["pod", "a/b"]).unwrap(), pod);
        let service = Place::Object(ObjectKey::new("default", "b"));
        assert_eq!(parse("--to", &["service", "b"]).unwrap(), service);
        assert!(matches!(parse("--to", &["10.0.0.1"]), Ok(Place::Address(_))));
        for words in [&["x"][..], &["service", "a/b"], &["pod", "a", "b"]] {
            assert!(parse("--from", words).is_err(), "{words:?}");
        }
    }
}
