//! `keelson explain packet`: where a packet goes, and why.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::{
    core::v1::{Node, Pod},
    networking::v1::ServiceCIDR,
};
use keelson_api::object::ObjectKey;
use keelson_proxy::{DetectLocal, Objects, Packet, ProxyConfig, Snapshot};
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
        let elsewhere = args.node.as_ref().is_some_and(|name| *name != config.node_name);
        if let Some(name) = &args.node {
            config.node_name.clone_from(name);
            config.node_ips.clear();
        }
        let by_interface = matches!(
            config.detect_local,
            DetectLocal::Interface(_) | DetectLocal::InterfacePrefix(_)
        );
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
        let around = Around { known, here, nodes };
        let packet = around.packet(&from, &to, args)?;
        let mut answer = snapshot.explain(&packet);
        answer.notes.extend(around.on_another_node(&from, &packet));
        answer.notes.extend(around.unknown(by_interface));
        // Objects from files, or as another node has them, are not those that the kernel's rules
        // were made of.
        if args.services.is_empty()
            && !elsewhere
            && nix::unistd::geteuid().is_root()
            && let Err(error) = snapshot.check(&mut answer)
        {
            eprintln!("keelson: the kernel can't be asked: {error}");
        }
        match args.output {
            OutputFormat::Text => print!("{answer}"),
            OutputFormat::Json => println!("{}", serde_json::to_string_pretty(&answer)?),
        }
        match around.known.unread {
            0 => Ok(()),
            count => bail!("the answer lacks what could not be read ({count}, named above)"),
        }
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

    /// What is to be said where the client is a pod whose packets another node's proxy sees first.
    fn on_another_node(&self, from: &Place, packet: &Packet) -> Option<String> {
        let pod = self.known.pods.iter().find(|pod| match from {
            Place::Object(key) => ObjectKey::of(&pod.metadata) == *key,
            Place::Address(address) => has(pod, *address) && !is_over(pod),
            Place::Node => false,
        })?;
        let node = pod.spec.as_ref()?.node_name.as_deref()?;
        // What is sent to this node gets here as it is.
        if node == self.here || self.nodes.contains(&packet.to) {
            return None;
        }
        Some(format!(
            "pod {} runs on the node {node}, whose own proxy decides where its packets go; this is \
             what the proxy of {} would do with them: ask there, or with --node {node}",
            ObjectKey::of(&pod.metadata),
            self.here
        ))
    }

    /// What is not known of the client, and why.
    fn unknown(&self, by_interface: bool) -> Option<String> {
        let why = self.known.pods_unread.as_deref()?;
        Some(if by_interface {
            format!(
                "pods can't be read ({why}): pods are told by their interface, so whether the client \
                 is a pod of this node is not known, and it counts as from outside; for a pod other \
                 endpoints may be eligible, and its address isn't hidden (name it with --from pod \
                 NAMESPACE/NAME)"
            )
        } else {
            format!(
                "pods can't be read ({why}): if the client is a pod of another node, that node's \
                 proxy decides"
            )
        })
    }

    fn cluster_addresses(&self, key: &ObjectKey) -> anyhow::Result<Vec<IpAddr>> {
        let mut services = self.known.objects.services.iter();
        let service = services.find(|service| ObjectKey::of(&service.metadata) == *key);
        let service = service.with_context(|| format!("there is no Service {key}"))?;
        let spec = service.spec.clone().unwrap_or_default();
        let texts = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
        let addresses: Vec<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
        if spec.type_.as_deref() == Some("ExternalName") {
            let name = spec.external_name.unwrap_or_default();
            bail!(
                "Service {key} is an ExternalName: it has no address and no endpoints, its name is \
                 an alias (CNAME) of {name:?}"
            );
        }
        if spec.cluster_ip.as_deref() == Some("None") {
            bail!(
                "Service {key} is headless: it has no cluster address, its name leads to its \
                 endpoints themselves"
            );
        }
        if addresses.is_empty() {
            bail!("Service {key} has no cluster address");
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

/// Whether its address may be another pod's by now.
fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
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
#[derive(Default)]
struct Known {
    objects: Objects,
    pods: Vec<Pod>,
    /// Why pods could not be read.
    pods_unread: Option<String>,
    /// How much could not be read in files.
    unread: usize,
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
    let unread = manifests.problems.len();
    Ok(Known { objects: manifests.objects, pods: manifests.pods, unread, ..Known::default() })
}

async fn from_api(args: &ExplainPacketArgs, node: &str, from: &Place) -> anyhow::Result<Known> {
    let path = match &args.kubeconfig {
        Some(path) => path.clone(),
        None => own_kubeconfig(args)?,
    };
    let client = run::client(&path).await?;
    let all = ListParams::default();
    let services = Api::all(client.clone()).list(&all).await.context("list Services")?.items;
    let slices = Api::all(client.clone()).list(&all).await.context("list EndpointSlices")?.items;
    let node = Api::<Node>::all(client.clone()).get_opt(node).await.context("get the Node")?;
    let service_cidrs = service_cidrs(client.clone()).await?;
    let mut pods_unread = None;
    let pods = match from {
        Place::Object(key) => pod(client, key).await?.into_iter().collect(),
        Place::Address(address) => {
            let its = ListParams::default().fields(&format!("status.podIP={address}"));
            let listed = Api::<Pod>::all(client).list(&its).await;
            listed.map(|list| list.items).unwrap_or_else(|error| {
                pods_unread = Some(reason(&error));
                Vec::new()
            })
        }
        Place::Node => Vec::new(),
    };
    let objects = Objects { services, slices, service_cidrs, node };
    Ok(Known { objects, pods, pods_unread, unread: 0 })
}

/// Why a request failed, in a line.
fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{}: {}", status.code, status.message),
        other => other.to_string(),
    }
}

/// The kubeconfig of `keelson up` on this machine.
fn own_kubeconfig(args: &ExplainPacketArgs) -> anyhow::Result<PathBuf> {
    let path = Paths::new(args.data.data_dir.as_deref()).context("data folder")?.admin_kubeconfig;
    if let Err(error) = std::fs::File::open(&path) {
        bail!(
            "no cluster of this machine's to ask ({}: {error}): name the kubeconfig of one with \
             --kubeconfig FILE, or manifests to go by instead with --services PATH",
            path.display()
        );
    }
    Ok(path)
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
mod tests;
