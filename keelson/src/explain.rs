//! `keelson explain packet`: where a packet goes, and why.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::{
    core::v1::{Node, Pod},
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
/// The longest page that it tells.
const PAGE: usize = 1 << 20;

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
        let known = if args.services.is_empty() {
            from_api(args, &config.node_name, &from).await?
        } else {
            from_manifests(args, &mut config)?
        };
        let here = config.node_name.clone();
        let (mut snapshot, _) = Snapshot::new(config, &known.objects);
        let mut nodes = snapshot.node_addresses().to_vec();
        if args.services.is_empty() && args.node.is_none() {
            let own = node::addresses()?;
            if nodes.is_empty() {
                // Its object is not there, or not yet.
                nodes = own.iter().copied().filter(|address| !address.is_loopback()).collect();
            }
            snapshot = snapshot.with_local_addresses(own);
        }
        let packet = Around { known, here, nodes }.packet(&from, &to, args)?;
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

/// Where the places of a command line are looked for.
struct Around {
    known: Known,
    /// The node's name.
    here: String,
    /// And its addresses.
    nodes: Vec<IpAddr>,
}

impl Around {
    /// The packet that is asked about: both ends of one family, if they have one in common.
    fn packet(&self, from: &Place, to: &Place, args: &ExplainPacketArgs) -> anyhow::Result<Packet> {
        let targets = self.targets(to)?;
        let (from, from_pod_here) = self.client(from, &targets)?;
        let to = targets.iter().find(|to| to.is_ipv4() == from.is_ipv4()).or(targets.first());
        let to = *to.context("the node's address is not known")?;
        Ok(Packet { from, from_pod_here, to, port: args.port, protocol: args.protocol })
    }

    /// The addresses that a client may connect to.
    fn targets(&self, to: &Place) -> anyhow::Result<Vec<IpAddr>> {
        match to {
            Place::Address(address) => Ok(vec![*address]),
            Place::Node => Ok(self.nodes.first().copied().into_iter().collect()),
            Place::Object(key) => self.cluster_addresses(key),
        }
    }

    /// The client's address, of the family of a target, and whether it is a pod of this node.
    fn client(&self, from: &Place, targets: &[IpAddr]) -> anyhow::Result<(IpAddr, bool)> {
        let wanted = |address: &IpAddr| targets.iter().any(|to| to.is_ipv4() == address.is_ipv4());
        let pods = &self.known.pods;
        match from {
            Place::Address(address) => {
                let is_pod = |pod: &Pod| on(pod, &self.here) && has(pod, *address);
                Ok((*address, pods.iter().any(is_pod)))
            }
            Place::Node => {
                let address = self.nodes.iter().copied().find(wanted);
                Ok((address.context("the node's address is not known")?, false))
            }
            Place::Object(key) => {
                let pod = pods.iter().find(|pod| ObjectKey::of(&pod.metadata) == *key);
                let pod = pod.with_context(|| format!("there is no pod {key}"))?;
                let address = pod_addresses(pod).find(wanted);
                let address = address.with_context(|| format!("pod {key} has no address"))?;
                Ok((address, on(pod, &self.here)))
            }
        }
    }

    fn cluster_addresses(&self, key: &ObjectKey) -> anyhow::Result<Vec<IpAddr>> {
        let mut services = self.known.objects.services.iter();
        let service = services.find(|service| ObjectKey::of(&service.metadata) == *key);
        let service = service.with_context(|| format!("there is no Service {key}"))?;
        let spec = service.spec.clone().unwrap_or_default();
        let texts = spec.cluster_ips.into_iter().flatten().chain(spec.cluster_ip);
        let addresses: Vec<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
        if addresses.is_empty() {
            bail!(
                "Service {key} has no cluster address: its name leads to its endpoints themselves"
            );
        }
        Ok(addresses)
    }
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
    let name =
        node::name(args.node.as_deref().or(settings.hostname_override.as_deref()), "--node")?;
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
    let asked = async move {
        let answer = sender.send_request(request).await?;
        // Whoever it is that listens there.
        Limited::new(answer.into_body(), PAGE).collect().await.map_err(|error| anyhow!(error))
    };
    // The connection ends when nothing more is asked.
    let (body, _) = tokio::join!(asked, connection);
    Ok(body?.to_bytes())
}

/// What is known of the cluster.
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
    let api: Api<Pod> = Api::namespaced(client, key.namespace());
    api.get_opt(key.name()).await.with_context(|| format!("get pod {key}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Command, ExplainCommand};

    #[test]
    fn both_ends_are_of_one_family() {
        let services = serde_json::json!([{"metadata": {"name": "web", "namespace": "d"},
            "spec": {"clusterIPs": ["10.96.0.1", "fd00::1"]}}]);
        let pods = serde_json::json!([{"metadata": {"name": "six", "namespace": "d"},
            "spec": {"nodeName": "n", "containers": []},
            "status": {"podIPs": [{"ip": "fd01::5"}]}}]);
        let objects =
            Objects { services: serde_json::from_value(services).unwrap(), ..Objects::default() };
        let known = Known { objects, pods: serde_json::from_value(pods).unwrap() };
        let nodes = ["192.0.2.1", "2001:db8::1"].map(|node| node.parse().unwrap()).to_vec();
        let around = Around { known, here: "n".into(), nodes };
        let (web, six) = (ObjectKey::new("d", "web"), ObjectKey::new("d", "six"));
        let (web, six) = (|| Place::Object(web.clone()), || Place::Object(six.clone()));
        let at = |text: &str| Place::Address(text.parse().unwrap());
        let args = ["keelson", "explain", "packet", "--from=node", "--to=node", "--port=1"];
        let args = crate::cli::Cli::try_parse_from(args).unwrap().command;
        let Command::Explain(ExplainCommand::Packet(args)) = args else { panic!("{args:?}") };
        for (from, to, expected) in [
            (at("203.0.113.7"), web(), ["203.0.113.7", "10.96.0.1"]),
            (at("2001:db8::9"), web(), ["2001:db8::9", "fd00::1"]),
            (Place::Node, web(), ["192.0.2.1", "10.96.0.1"]),
            (Place::Node, at("fd00::1"), ["2001:db8::1", "fd00::1"]),
            (six(), web(), ["fd01::5", "fd00::1"]),
            (at("203.0.113.7"), at("fd00::1"), ["203.0.113.7", "fd00::1"]),
            (at("203.0.113.7"), Place::Node, ["203.0.113.7", "192.0.2.1"]),
        ] {
            let targets = around.targets(&to).unwrap();
            let (client, _) = around.client(&from, &targets).unwrap();
            let packet = around.packet(&from, &to, &args).unwrap();
            assert_eq!([client.to_string(), packet.to.to_string()], expected, "{from:?} {to:?}");
        }
        assert!(around.client(&six(), &[[10, 0, 0, 1].into()]).is_err(), "it has none of IPv4");
        assert!(around.client(&six(), &around.targets(&web()).unwrap()).unwrap().1, "it is here");
    }

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
