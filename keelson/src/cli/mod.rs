//! The command line: what a user can ask for, and what `--help` teaches.

mod explain;
mod proxy;

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand};
use ipnet::IpNet;

pub(crate) use explain::{ExplainCommand, ExplainPacketArgs, OutputFormat};
pub(crate) use proxy::{FamilyName, ProxyArgs};

use crate::config::LogFormat;

/// Cluster DNS would otherwise log every question.
const DEFAULT_FILTER: &str = "info,hickory_server=warn";

/// A Kubernetes node in one binary.
#[derive(Debug, Parser)]
#[command(
    name = "keelson",
    version,
    about = "A Kubernetes node in one binary",
    long_about = "Keelson does the work of kubelet and kube-proxy on any cluster that speaks the \
                  Kubernetes API, and brings a thin control plane, so that one machine is a whole \
                  cluster with nothing else installed.",
    after_help = "First steps:\n  keelson up                        run a whole cluster on this machine\n  \
                  keelson kubeconfig > ~/.kube/config   let your kubectl talk to it\n  \
                  kubectl get nodes,pods -A         look at it\n  \
                  keelson down                      stop it, and leave nothing behind"
)]
pub(crate) struct Cli {
    /// What is logged: a level (error, warn, info, debug, trace) or a filter such as
    /// `info,keelson_proxy=debug`
    #[arg(long, global = true, default_value = DEFAULT_FILTER, env = "KEELSON_LOG")]
    pub(crate) log_level: String,
    /// How log lines look
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster on this machine: control plane, node and proxy in one process
    Up(Box<UpArgs>),
    /// Stop everything that runs here, with all pods, and remove what it left in the kernel
    Down(DownArgs),
    /// Print a kubeconfig: the administrator's for kubectl, or one for another node or user
    #[command(after_help = "Another node, on the machine of the control plane:\n  \
                            keelson kubeconfig --node n2 --address 192.0.2.2 -o kubelet.conf\n  \
                            keelson kubeconfig --user system:kube-proxy -o kube-proxy.conf\n\
                            Copy both files to /etc/kubernetes on the new machine (they hold private \
                            keys), and run there:\n  \
                            keelson agent --node-name n2 --kubeconfig /etc/kubernetes/kubelet.conf\n  \
                            keelson proxy --hostname-override n2 --kubeconfig /etc/kubernetes/kube-proxy.conf\n\
                            Certificates last a year unless told otherwise. Issue new files before that and put \
                            them in place: they are taken without a restart.")]
    Kubeconfig(KubeconfigArgs),
    /// Run the node alone (kubelet's work), against any Kubernetes API or none
    Agent(Box<AgentArgs>),
    /// Run the service proxy alone (kube-proxy's work), against any Kubernetes API
    Proxy(Box<ProxyArgs>),
    /// Run the control plane alone: API server, store, scheduler, controllers, DNS
    ControlPlane(Box<ControlPlaneArgs>),
    /// Say why something is as it is
    #[command(subcommand)]
    Explain(ExplainCommand),
    /// Look after the images of this machine
    #[command(subcommand)]
    Image(ImageCommand),
    /// Say what runs here and whether it is well
    Status(StatusArgs),
    /// Print the version
    Version,
    /// Print shell completions
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Serve a small web page that says which pod answered (the demo's container runs this)
    #[command(hide = true)]
    DemoWeb {
        /// Port to listen on
        #[arg(long, default_value_t = 8080)]
        port: u16,
    },
}

/// Where everything is kept.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct DataArgs {
    /// Keep everything under this folder, instead of at Kubernetes' usual places
    /// (/var/lib/kubelet, /var/log/pods, /etc/kubernetes/pki, …)
    #[arg(long, value_name = "DIR", env = "KEELSON_DATA_DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

/// Which registries images come from.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct RegistryArgs {
    /// The registry that a short image name such as `nginx` is looked for in; without it short
    /// names are found among local images only
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(crate) default_registry: Option<String>,
    /// A registry to be spoken to without TLS; may be given several times
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(crate) insecure_registry: Vec<String>,
}

/// How the node presents itself.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct NodeArgs {
    /// The node's name; this machine's host name if absent
    #[arg(long, value_name = "NAME")]
    pub(crate) node_name: Option<String>,
    /// The node's address; that of the default route if absent
    #[arg(long, value_name = "IP")]
    pub(crate) node_ip: Option<IpAddr>,
    /// A file with a KubeletConfiguration (kubelet.config.k8s.io/v1beta1)
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The folder of static pod manifests (`staticPodPath`)
    #[arg(long, value_name = "DIR")]
    pub(crate) manifests: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
}

/// The cluster's addresses and names.
#[derive(Args, Clone, Debug)]
pub(crate) struct ClusterArgs {
    /// The port of the API server
    #[arg(long, default_value_t = 6443, value_name = "PORT")]
    pub(crate) api_port: u16,
    /// The address the API server listens on
    #[arg(long, default_value = "0.0.0.0", value_name = "IP")]
    pub(crate) bind_address: IpAddr,
    /// Addresses of pods; each node gets a part
    #[arg(long, default_value = "10.244.0.0/16", value_name = "CIDR")]
    pub(crate) cluster_cidr: IpNet,
    /// Addresses of Services
    #[arg(long, default_value = "10.96.0.0/12", value_name = "CIDR")]
    pub(crate) service_cidr: IpNet,
    /// Ports for Services of type NodePort
    #[arg(long, default_value = "30000-32767", value_name = "FROM-TO", value_parser = port_range)]
    pub(crate) service_node_port_range: PortRange,
    /// The domain of the cluster's names
    #[arg(long, default_value = "cluster.local", value_name = "DOMAIN")]
    pub(crate) cluster_domain: String,
    /// The port on the node's address at which cluster DNS answers (pods reach it at port 53 of
    /// its Service)
    #[arg(long, default_value_t = 10053, value_name = "PORT")]
    pub(crate) dns_port: u16,
    /// Further names or addresses for the API server's certificate; may be given several times
    #[arg(long, value_name = "NAME|IP")]
    pub(crate) tls_san: Vec<String>,
}

/// A range of ports, both ends in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PortRange {
    /// The first.
    pub(crate) first: u16,
    /// The last.
    pub(crate) last: u16,
}

fn port_range(text: &str) -> Result<PortRange, String> {
    let (first, last) =
        text.split_once('-').ok_or("two ports with a '-' between them are needed")?;
    let port = |text: &str| text.trim().parse::<u16>().map_err(|e| format!("{text:?}: {e}"));
    let range = PortRange { first: port(first)?, last: port(last)? };
    if range.first == 0 || range.first > range.last {
        return Err("the first port must be above 0 and not above the last".to_owned());
    }
    Ok(range)
}

/// `keelson up`.
#[derive(Args, Debug)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    pub(crate) data: DataArgs,
    #[command(flatten)]
    pub(crate) node: NodeArgs,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// A file with a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1)
    #[arg(long, value_name = "FILE")]
    pub(crate) proxy_config: Option<PathBuf>,
    /// Go to the background once the node is ready
    #[arg(long)]
    pub(crate) detach: bool,
    /// Start an example (three web pods behind a Service), and show how it answers
    #[arg(long)]
    pub(crate) demo: bool,
}

/// `keelson down`.
#[derive(Args, Debug)]
pub(crate) struct DownArgs {
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Remove what is stored too: objects, certificates, images, volumes, logs
    #[arg(long)]
    pub(crate) purge: bool,
}

/// `keelson kubeconfig`.
#[derive(Args, Debug)]
pub(crate) struct KubeconfigArgs {
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Issue one for the agent of another machine: the node's name. It holds the node's client
    /// certificate, its serving certificate, and what a node must know of the cluster
    #[arg(long, value_name = "NAME", requires = "address", conflicts_with_all = ["user", "group"])]
    pub(crate) node: Option<String>,
    /// The address that the new node is reached at; may be given several times
    #[arg(long, value_name = "IP", requires = "node")]
    pub(crate) address: Vec<IpAddr>,
    /// Issue one for a user, such as system:kube-proxy
    #[arg(long, value_name = "NAME")]
    pub(crate) user: Option<String>,
    /// The group of that user
    #[arg(long, value_name = "NAME", requires = "user")]
    pub(crate) group: Option<String>,
    /// Where the API server is reached, if not at the address in the administrator's kubeconfig; its
    /// certificate must name it (--tls-san)
    #[arg(long, value_name = "URL")]
    pub(crate) server: Option<String>,
    /// How long the certificates that are issued last, such as 720h; a year if absent
    #[arg(long, value_name = "DURATION", value_parser = crate::config::duration::parse)]
    pub(crate) expires_in: Option<std::time::Duration>,
    /// Write it to this file (mode 0600) instead of standard output
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

/// `keelson agent`.
#[derive(Args, Debug)]
pub(crate) struct AgentArgs {
    #[command(flatten)]
    pub(crate) data: DataArgs,
    #[command(flatten)]
    pub(crate) node: NodeArgs,
    /// How to reach the API server; without it only static pods run
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
}

/// `keelson control-plane`.
#[derive(Args, Debug)]
pub(crate) struct ControlPlaneArgs {
    #[command(flatten)]
    pub(crate) data: DataArgs,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// The address that clients and pods reach the API server at; that of the default route if
    /// absent
    #[arg(long, value_name = "IP")]
    pub(crate) advertise_address: Option<IpAddr>,
    /// The name of this machine's node, for the kubeconfig that is written for an agent here; this
    /// machine's host name if absent
    #[arg(long, value_name = "NAME")]
    pub(crate) node_name: Option<String>,
}

/// `keelson image`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Take images from an OCI layout (folder or tar) or a `docker save` archive
    Import {
        #[command(flatten)]
        data: DataArgs,
        /// The folder or archive
        path: PathBuf,
        /// Name what is imported, if the archive names nothing
        #[arg(long, value_name = "NAME:TAG")]
        name: Option<String>,
    },
    /// Make the examples' image (keelson/demo:latest) out of this binary
    Demo {
        #[command(flatten)]
        data: DataArgs,
    },
    /// Get an image from its registry
    Pull {
        #[command(flatten)]
        data: DataArgs,
        #[command(flatten)]
        registries: RegistryArgs,
        /// The image
        image: String,
    },
    /// List images
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        data: DataArgs,
    },
    /// Remove images by name, digest or id
    #[command(visible_alias = "remove")]
    Rm {
        #[command(flatten)]
        data: DataArgs,
        /// The images
        #[arg(required = true)]
        images: Vec<String>,
    },
}

/// `keelson status`.
#[derive(Args, Debug)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) data: DataArgs,
}

impl Cli {
    /// What is logged and how; `keelson proxy` takes kube-proxy's flags for it too.
    pub(crate) fn logging(&self) -> (String, LogFormat) {
        match &self.command {
            Command::Proxy(args) => (
                args.logging.filter().unwrap_or_else(|| self.log_level.clone()),
                args.logging.logging_format.unwrap_or(self.log_format),
            ),
            _ => (self.log_level.clone(), self.log_format),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn port_ranges_are_checked() {
        assert_eq!(port_range("1-2"), Ok(PortRange { first: 1, last: 2 }));
        for text in ["", "1", "2-1", "0-5", "a-b", "1-70000"] {
            assert!(port_range(text).is_err(), "{text:?}");
        }
    }
}
