//! `keelson proxy`: its own flags, beside kube-proxy's.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

use super::DataArgs;
use crate::config::{ProxyFlags, ProxyLogging};

/// `keelson proxy`.
#[derive(Args, Debug)]
pub(crate) struct ProxyArgs {
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// A file with a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1)
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// How to reach the API server (`clientConnection.kubeconfig`)
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The API server's URL, instead of the one in the kubeconfig
    #[arg(long, value_name = "URL")]
    pub(crate) master: Option<String>,
    /// Remove the rules of every mode, and kube-proxy's, and stop
    #[arg(long, action = ArgAction::Set, value_name = "BOOL", num_args = 0..=1,
          require_equals = true, default_value_t = false, default_missing_value = "true")]
    pub(crate) cleanup: bool,
    /// Set the kernel settings that need full root, and stop: afterwards CAP_NET_ADMIN is enough
    #[arg(long, action = ArgAction::Set, value_name = "BOOL", num_args = 0..=1,
          require_equals = true, default_value_t = false, default_missing_value = "true")]
    pub(crate) init_only: bool,
    /// Write the configuration that --config, flags and defaults make to this file, and stop
    #[arg(long, value_name = "FILE")]
    pub(crate) write_config_to: Option<PathBuf>,
    /// Print the version, and stop
    #[arg(long, value_name = "FORM", num_args = 0..=1, require_equals = true,
          default_missing_value = "true")]
    pub(crate) version: Option<String>,
    /// Print the rules for the objects of --services, and touch nothing
    #[arg(long, requires = "services")]
    pub(crate) dry_run: bool,
    /// Files and folders with Services, EndpointSlices and the Node, in YAML or JSON; `-` for
    /// standard input
    #[arg(long, value_name = "PATH", num_args = 1.., requires = "dry_run")]
    pub(crate) services: Vec<PathBuf>,
    /// With --dry-run: ipv4 or ipv6 alone
    #[arg(long, value_enum, requires = "dry_run")]
    pub(crate) family: Option<FamilyName>,
    #[command(flatten)]
    pub(crate) logging: ProxyLogging,
    #[command(flatten)]
    pub(crate) flags: ProxyFlags,
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FamilyName {
    /// IPv4
    Ipv4,
    /// IPv6
    Ipv6,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::{
        cli::{Cli, Command},
        config::LogFormat,
    };

    /// Every flag of `kube-proxy --help` of release 1.36 on Linux, as a DaemonSet would give it.
    #[test]
    fn every_flag_of_kube_proxy_is_taken() {
        let flags = "--bind-address=0.0.0.0 --bind-address-hard-fail --boot-id-file=/b --cleanup=false \
            --cluster-cidr=10.244.0.0/16 --config=/c --config-sync-period=15m0s \
            --conntrack-max-per-core=32768 --conntrack-min=131072 --conntrack-tcp-be-liberal=true \
            --conntrack-tcp-timeout-close-wait=1h0m0s --conntrack-tcp-timeout-established=24h0m0s \
            --conntrack-udp-timeout=0s --conntrack-udp-timeout-stream=0s --detect-local-mode=ClusterCIDR \
            --feature-gates=A=true,B=false --healthz-bind-address=0.0.0.0:10256 --healthz-port=10256 \
            --hostname-override=n --init-only=false --iptables-localhost-nodeports=false \
            --iptables-masquerade-bit=14 --iptables-min-sync-period=1s --iptables-sync-period=30s \
            --ipvs-exclude-cidrs=10.0.0.0/8 --ipvs-min-sync-period=0s --ipvs-scheduler=rr \
            --ipvs-strict-arp --ipvs-sync-period=30s --ipvs-tcp-timeout=0s --ipvs-tcpfin-timeout=0s \
            --ipvs-udp-timeout=0s --kube-api-burst=10 \
            --kube-api-content-type=application/vnd.kubernetes.protobuf --kube-api-qps=5 \
            --kubeconfig=/k --log-flush-frequency=5s --log-json-info-buffer-size=0 \
            --log-json-split-stream --log-text-info-buffer-size=0 --log-text-split-stream=false \
            --logging-format=json --machine-id-file=/m --masquerade-all=false --master=https://a:6443 \
            --metrics-bind-address=127.0.0.1:10249 --metrics-port=10249 \
            --nodeport-addresses=10.0.0.0/8,fd00::/8 --oom-score-adj=-999 --pod-bridge-interface=cni0 \
            --pod-interface-name-prefix=veth --profiling=true --proxy-mode=nftables \
            --show-hidden-metrics-for-version=1.35 -v=4 --vmodule=a=1 --write-config-to=/w \
            --version=raw";
        let arguments = ["keelson", "proxy"].into_iter().chain(flags.split_ascii_whitespace());
        let cli = Cli::try_parse_from(arguments).unwrap_or_else(|error| panic!("{error}"));
        let (filter, format) = cli.logging();
        assert!(filter.contains("keelson_proxy=debug"), "{filter}");
        assert_eq!(format, LogFormat::Json);
        let Command::Proxy(args) = cli.command else { panic!("another command") };
        assert!(!args.cleanup && !args.init_only);
        let ignored: Vec<&str> = args.flags.without_effect().map(|(name, _)| name).collect();
        assert_eq!(ignored.len(), 16, "{ignored:?}");
        assert_eq!(args.logging.without_effect().count(), 6);
        for (flag, taken) in [("--cleanup", true), ("--cleanup=true", true), ("--nothing", false)] {
            assert_eq!(Cli::try_parse_from(["keelson", "proxy", flag]).is_ok(), taken, "{flag}");
        }
    }
}
