//! The control plane as one thing: certificates, API server, scheduler, controllers, cluster DNS.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use ipnet::IpNet;
use keelson_control_plane::{
    auth::{Anonymous, UserInfo, bootstrap::default_rbac, tokens::DEFAULT_ISSUER},
    controllers::{self, ControllersConfig},
    dns::{self, DnsConfig, DnsMetrics, Published},
    informers::Informers,
    pki::{ClusterPki, Leaf, PkiConfig},
    scheduler::{self, SchedulerMetrics},
    server::{ApiServer, ApiServerConfig, ClusterSecurity, Limits},
};
use prometheus::Registry;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    cli::{ClusterArgs, ControlPlaneArgs},
    cluster::ClusterFacts,
    instance::{self, Part, Record},
    kubeconfig::OwnKubeconfigs,
    node, notify,
    paths::Paths,
    run,
};

/// How long events are kept: kube-apiserver's `--event-ttl`.
const EVENT_TTL: Duration = Duration::from_secs(3600);

/// A running control plane.
pub(crate) struct ControlPlane {
    pub(crate) server: Arc<ApiServer>,
    pub(crate) pki: Arc<ClusterPki>,
    /// `https://address:port`.
    pub(crate) url: String,
    /// The address of cluster DNS.
    pub(crate) dns_address: IpAddr,
    tasks: TaskTracker,
}

/// An address of a range, counted from its first.
///
/// # Errors
/// When the range is too small, or not IPv4.
fn nth_address(range: IpNet, index: u32) -> anyhow::Result<IpAddr> {
    match range {
        IpNet::V4(range) => {
            let address = u32::from(range.network()).checked_add(index).map(Ipv4Addr::from);
            match address.filter(|address| range.contains(address)) {
                Some(address) => Ok(address.into()),
                None => {
                    bail!("--service-cidr {range}: too small, it needs more than {index} addresses")
                }
            }
        }
        IpNet::V6(_) => bail!("--service-cidr {range}: only IPv4 is supported yet"),
    }
}

impl ControlPlane {
    /// Starts everything, and returns when the API server answers. It all ends after `shutdown`;
    /// [`Self::stopped`] waits for that. With `parts_alone` kubeconfigs are kept for an agent and a
    /// proxy in processes of their own.
    ///
    /// # Errors
    /// Certificates, store or addresses can't be had.
    pub(crate) async fn start(
        paths: &Paths,
        cluster: &ClusterArgs,
        node_name: &str,
        address: IpAddr,
        parts_alone: bool,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<Self> {
        check_ranges(cluster)?;
        let service_ip = nth_address(cluster.service_cidr, 1)?;
        let dns_address = nth_address(cluster.service_cidr, 10)?;
        let url = format!("https://{}", SocketAddr::new(address, cluster.api_port));
        let pki = load_pki(paths, cluster, node_name, address, service_ip).await?;
        let kubeconfigs = OwnKubeconfigs {
            paths: paths.clone(),
            url: url.clone(),
            facts: ClusterFacts {
                cluster_cidr: cluster.cluster_cidr,
                cluster_dns: dns_address,
                cluster_domain: cluster.cluster_domain.clone(),
                serving: None,
            },
            node: parts_alone.then(|| node_name.to_owned()),
        };
        kubeconfigs.write(&pki)?;

        let tasks = TaskTracker::new();
        let follow = move |pki: &ClusterPki| {
            if let Err(error) = kubeconfigs.write(pki) {
                tracing::error!("kubeconfigs keep certificates from before: {error:#}");
            }
        };
        tasks.spawn(Arc::clone(&pki).keep_renewed(follow, shutdown.clone()));
        let metrics = Registry::new();
        let scheduler_metrics = SchedulerMetrics::register(&metrics).context("metrics")?;
        let dns_metrics = DnsMetrics::register(&metrics).context("metrics")?;
        let security = ClusterSecurity {
            signing_key_pem: pki.service_account_key_pem().to_owned(),
            issuer: DEFAULT_ISSUER.to_owned(),
            anonymous: Anonymous::default(),
            server_url: url.clone(),
        };
        let config = ApiServerConfig {
            data_dir: paths.store.clone(),
            bind_address: SocketAddr::new(cluster.bind_address, cluster.api_port),
            advertise_address: address,
            service_cidrs: vec![cluster.service_cidr],
            node_ports: cluster.service_node_port_range.first
                ..=cluster.service_node_port_range.last,
            tls: pki.api_server_tls()?,
            kubelet_tls: Some(pki.client_config(Some(Leaf::ApiServerKubeletClient))?),
            security: Box::new(move |lookup| Ok(security.over(lookup)?)),
            metrics,
            bootstrap_objects: default_rbac(),
            limits: Limits::default(),
            event_ttl: EVENT_TTL,
        };
        let server =
            Arc::new(ApiServer::start(config, shutdown.clone()).await.context("API server")?);

        let manager = server.client(UserInfo::user("system:kube-controller-manager", &[]));
        let informers = Informers::start(&manager, shutdown);
        let scheduler = server.client(UserInfo::user("system:kube-scheduler", &[]));
        tasks.spawn(scheduler::run(
            scheduler,
            Arc::clone(&informers),
            scheduler_metrics,
            shutdown.clone(),
        ));
        let (accounts, with) = (Arc::clone(&server), Arc::clone(&informers));
        let root_ca_pem = pki.ca_pem().to_owned();
        let (pod_range, stop) = (cluster.cluster_cidr, shutdown.clone());
        tasks.spawn(async move {
            let client_for =
                |name: &str| accounts.client(UserInfo::service_account("kube-system", name));
            let config = ControllersConfig::new(root_ca_pem, vec![pod_range]);
            controllers::run(client_for, with, config, stop).await;
        });
        start_dns(
            &tasks,
            &server,
            &informers,
            cluster,
            dns_metrics,
            node_name,
            address,
            dns_address,
            shutdown,
        );
        let ended = Arc::clone(&informers);
        tasks.spawn(async move { ended.stopped().await });
        Ok(Self { server, pki, url, dns_address, tasks })
    }

    /// Waits for the end of everything after the shutdown.
    pub(crate) async fn stopped(self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.server.stopped().await;
    }
}

fn check_ranges(cluster: &ClusterArgs) -> anyhow::Result<()> {
    let (pods, services) = (cluster.cluster_cidr, cluster.service_cidr);
    if pods.contains(&services.network()) || services.contains(&pods.network()) {
        bail!(
            "--cluster-cidr {pods} and --service-cidr {services} overlap: give one another range"
        );
    }
    if !pods.addr().is_ipv4() {
        bail!("--cluster-cidr {pods}: only IPv4 is supported yet");
    }
    Ok(())
}

async fn load_pki(
    paths: &Paths,
    cluster: &ClusterArgs,
    node_name: &str,
    address: IpAddr,
    service_ip: IpAddr,
) -> anyhow::Result<Arc<ClusterPki>> {
    let config = PkiConfig {
        node_name: node_name.to_owned(),
        advertise_addresses: vec![address],
        service_ip,
        cluster_domain: cluster.cluster_domain.clone(),
        extra_sans: cluster.tls_san.clone(),
    };
    let dir = paths.pki.clone();
    let pki = tokio::task::spawn_blocking(move || ClusterPki::load_or_create(dir, &config))
        .await
        .context("certificates")??;
    Ok(Arc::new(pki))
}

#[expect(clippy::too_many_arguments, reason = "one call, whose parts have nothing else in common")]
fn start_dns(
    tasks: &TaskTracker,
    server: &ApiServer,
    informers: &Arc<Informers>,
    cluster: &ClusterArgs,
    metrics: DnsMetrics,
    node_name: &str,
    address: IpAddr,
    service_address: IpAddr,
    shutdown: &CancellationToken,
) {
    let endpoint = SocketAddr::new(address, cluster.dns_port);
    let config = DnsConfig {
        domain: cluster.cluster_domain.clone(),
        listen: vec![endpoint],
        resolv_conf: "/etc/resolv.conf".into(),
        own_addresses: vec![service_address],
        pod_ranges: vec![cluster.cluster_cidr],
    };
    let (with, stop) = (Arc::clone(informers), shutdown.clone());
    tasks.spawn(async move {
        if let Err(error) = dns::run(with, config, metrics, stop).await {
            tracing::error!(%error, "cluster DNS does not run; choose another port with --dns-port");
        }
    });
    let published = Published { service_address, endpoint, node_name: node_name.to_owned() };
    let client = server.client(UserInfo::service_account("kube-system", "kube-dns"));
    tasks.spawn(dns::publish(client, Arc::clone(informers), published, shutdown.clone()));
}

/// `keelson control-plane`.
///
/// # Errors
/// When it can't start.
pub(crate) fn run(args: &ControlPlaneArgs) -> anyhow::Result<()> {
    let paths = Paths::new(args.data.data_dir.as_deref()).context("data folder")?;
    let address = node::address(args.advertise_address)?;
    let name = node::name(args.node_name.as_deref(), "--node-name")?;
    run::block_on(async {
        let shutdown = run::shutdown_on_signal()?;
        let mut held = instance::hold(
            &paths,
            &[Part::ControlPlane],
            Record {
                role: "control-plane".to_owned(),
                api_server: Some(format!(
                    "https://{}",
                    SocketAddr::new(address, args.cluster.api_port)
                )),
                ..Record::of_this_process(&name)
            },
        )?;
        let control_plane =
            ControlPlane::start(&paths, &args.cluster, &name, address, true, &shutdown);
        let Some(control_plane) = run::unless_stopped(control_plane, &shutdown).await? else {
            return Ok(());
        };
        held.ready()?;
        notify::notify("READY=1");
        tracing::info!(url = control_plane.url, kubeconfig = %paths.admin_kubeconfig.display(), "the control plane is ready");
        let alive = run::alive(
            control_plane.server.client(UserInfo::user("system:apiserver", &["system:masters"])),
        );
        notify::watchdog(alive, shutdown.clone()).await;
        shutdown.cancelled().await;
        run::ended(control_plane.stopped()).await;
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_counted() {
        let range: IpNet = "10.96.0.0/12".parse().unwrap();
        assert_eq!(nth_address(range, 10).unwrap(), IpAddr::from([10, 96, 0, 10]));
        assert!(nth_address("10.0.0.0/30".parse().unwrap(), 10).is_err());
    }
}
