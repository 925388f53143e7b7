//! `keelson up`: control plane, node and proxy in one process.
//!
//! The parts hold clients of the API server's own in-process service, each with an identity of its
//! own, so what they may do is decided as it is over the wire.

use std::{net::IpAddr, sync::Arc, time::Duration};

use anyhow::Context;
use keelson_control_plane::auth::UserInfo;
use kube::Client;
use tokio_util::sync::CancellationToken;

use crate::{
    agent::{self, Node, NodeOptions},
    cli::UpArgs,
    config::{KubeletSettings, ProxyFlags, ProxySettings},
    control_plane::ControlPlane,
    demo, detach, image,
    instance::{self, Held, Part, Record},
    node, notify,
    paths::Paths,
    proxy, routes,
    run::{self, MainTasks},
};

/// How long the node may take to get ready before the user is told that it is slow.
const SLOW: Duration = Duration::from_secs(30);

/// Runs until a signal.
///
/// # Errors
/// When something can't start; what had started is stopped then.
pub(crate) fn run(args: &UpArgs) -> anyhow::Result<()> {
    let paths = Paths::new(args.data.data_dir.as_deref()).context("data folder")?;
    // What is wrong with flags and files is said before anything begins, and before the background.
    let settings = agent::settings(&args.node)?;
    let proxy_settings = ProxySettings::read(args.proxy_config.as_deref(), &ProxyFlags::default())?;
    let name = node::name(args.node.node_name.as_deref(), "--node-name")?;
    let address = node::address(args.node.node_ip)?;
    agent::check_machine(settings.fail_cgroup_v1 != Some(true))?;
    if args.detach {
        return detach::detach(&paths);
    }
    let proxy_config =
        proxy::config(&proxy_settings, &name, vec![address], Some(args.cluster.cluster_cidr))?;
    run::block_on(async {
        let shutdown = run::shutdown_on_signal()?;
        let held = instance::hold(
            &paths,
            &Part::ALL,
            Record {
                role: "up".to_owned(),
                api_server: Some(format!("https://{address}:{}", args.cluster.api_port)),
                cgroup_root: agent::cgroup_root(&paths, &settings),
                ..Record::of_this_process(&name)
            },
        )?;
        let started =
            Started { args, paths: &paths, name: &name, address, shutdown: shutdown.clone() };
        let result = started.run(settings, proxy_config, held).await;
        // A part that failed takes the others along.
        shutdown.cancel();
        result
    })
}

struct Started<'a> {
    args: &'a UpArgs,
    paths: &'a Paths,
    name: &'a str,
    address: IpAddr,
    shutdown: CancellationToken,
}

impl Started<'_> {
    async fn run(
        self,
        settings: KubeletSettings,
        proxy_config: keelson_proxy::ProxyConfig,
        mut held: Held,
    ) -> anyhow::Result<()> {
        let Self { args, paths, name, address, shutdown } = self;
        if args.demo {
            println!("starting the control plane …");
        }
        let control_plane =
            ControlPlane::start(paths, &args.cluster, name, address, false, &shutdown);
        let Some(control_plane) = run::unless_stopped(control_plane, &shutdown).await? else {
            return Ok(());
        };
        let server = Arc::clone(&control_plane.server);
        let tasks = MainTasks::new(shutdown.clone());
        let proxy_client =
            server.client(UserInfo::user("system:kube-proxy", &["system:node-proxier"]));
        let routes = routes::run(proxy_client.clone(), name.to_owned(), shutdown.clone());
        tasks.spawn("routes to other nodes", async move {
            routes.await;
            Ok(())
        });
        let proxy = keelson_proxy::run(proxy_config, proxy_client, shutdown.clone());
        tasks.spawn("service proxy", async move { Ok(proxy.await?) });
        let options = NodeOptions {
            tls: control_plane.pki.kubelet_server_config()?,
            cluster_dns: vec![control_plane.dns_address],
            cluster_domain: args.cluster.cluster_domain.clone(),
            cluster_ranges: vec![args.cluster.cluster_cidr],
            images: image::options(&args.node.registries),
            manifests: agent::manifests(&args.node, &settings, paths),
            name: name.to_owned(),
            address,
            settings,
            client: Some(server.client(UserInfo::node(name))),
        };
        let node = Node::start(paths, options, &shutdown);
        let node = run::unless_stopped(node, &shutdown).await?;
        if let Some(node) = &node {
            let admin = server.client(UserInfo::user("kubernetes-admin", &["system:masters"]));
            let ready = self::ready(&admin, args, paths, name, address, node, &mut held);
            tokio::select! {
                result = ready => result?,
                () = shutdown.cancelled() => {}
            }
            let api =
                run::alive(server.client(UserInfo::user("system:apiserver", &["system:masters"])));
            let alive = async || node.is_alive() && api().await;
            notify::watchdog(alive, shutdown.clone()).await;
        }
        shutdown.cancelled().await;
        run::ended(async {
            if let Some(node) = &node {
                node.stopped().await;
            }
            tasks.stopped().await;
            control_plane.stopped().await;
        })
        .await;
        tasks.result()?;
        node.map_or(Ok(()), |node| node.result())
    }
}

/// Waits until the node is ready, and tells systemd, the waiting parent and the user.
async fn ready(
    admin: &Client,
    args: &UpArgs,
    paths: &Paths,
    name: &str,
    address: IpAddr,
    node: &Node,
    held: &mut Held,
) -> anyhow::Result<()> {
    let node_ready = node.ready();
    let slow = async {
        tokio::time::sleep(SLOW).await;
        tracing::warn!(node = name, "not ready after {SLOW:?}; see `kubectl describe node {name}`");
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = node_ready => {}
        () = slow => {}
    }
    held.ready()?;
    notify::notify("READY=1");
    tracing::info!(node = name, kubeconfig = %paths.admin_kubeconfig.display(), "ready");
    if args.demo {
        println!("node {name} is ready; making the example's image …");
        image::make_demo_image(&node.images).await?;
        let kubeconfig = paths.admin_kubeconfig.display().to_string();
        demo::show(admin, address, &kubeconfig).await?;
        println!(
            "Ctrl-C stops keelson; the pods run on. `keelson down{}` stops everything.",
            paths.flag()
        );
    }
    Ok(())
}
