//! The service proxy: the command that runs it alone, and what it is told.

mod config;

use std::{io::Write, path::Path};

use anyhow::{Context, bail};
use keelson_api::metrics::{component, rest_client::RestClient};
use keelson_proxy::{DetectLocal, Family, Snapshot};
use prometheus::Registry;
use serde_json::json;
use tokio_util::sync::CancellationToken;

pub(crate) use config::config;

use self::config::{GATES, gate};
use crate::{
    cli::{FamilyName, ProxyArgs},
    config::{ProxyFlags, ProxySettings, watch::Watched},
    credentials::Credentials,
    instance::{self, Held, Part, Record},
    manifests::Manifests,
    node, notify,
    paths::Paths,
    routes,
    run::{self, MainTasks},
};

/// kube-proxy's `oomScoreAdj`.
const OOM_SCORE_ADJ: i32 = -999;

/// `keelson proxy`.
///
/// # Errors
/// When it can't start.
pub(crate) fn run(args: &ProxyArgs) -> anyhow::Result<()> {
    if args.version.as_deref().is_some_and(|form| form != "false") {
        let keelson = env!("CARGO_PKG_VERSION");
        println!("Kubernetes {} (keelson {keelson})", keelson_api::KUBERNETES_VERSION);
        return Ok(());
    }
    for (name, why) in args.logging.without_effect() {
        tracing::warn!("{name} has no effect: {why}");
    }
    let file = args.config.clone().map(Watched::new);
    let settings = ProxySettings::read(args.config.as_deref(), &args.flags)?;
    if args.dry_run {
        return dry_run(args, &settings);
    }
    if let Some(path) = &args.write_config_to {
        return write_config(path, &settings);
    }
    if args.init_only {
        return initialize(&settings);
    }
    if args.cleanup {
        return cleanup(args);
    }
    run::block_on(serve(args, &settings, file))
}

/// The node's name: as the settings have it, else this machine's.
///
/// # Errors
/// When no node can be called so.
fn node_name(settings: &ProxySettings) -> anyhow::Result<String> {
    let given = settings.hostname_override.as_deref();
    if given.is_some_and(|name| !node::is_name(name)) {
        let field = "hostnameOverride";
        let name = settings.origin.written(field).cloned().unwrap_or_else(|| given.into());
        settings.refuse(field, &format!("{} is wanted, not {name}", node::NAME))?;
    }
    node::name(given, "--hostname-override or hostnameOverride in the config file")
}

/// Does what needs full root, and nothing else.
fn initialize(settings: &ProxySettings) -> anyhow::Result<()> {
    let name = node_name(settings)?;
    let config = config(settings, &name, Vec::new(), None)?;
    // Modes that have tasks of their own want to be on a runtime.
    run::block_on(async {
        tokio::task::spawn_blocking(move || keelson_proxy::initialize(&config)).await??;
        Ok(())
    })
}

/// Removes every rule, where nobody would write them again.
fn cleanup(args: &ProxyArgs) -> anyhow::Result<()> {
    let paths = Paths::new(args.data.data_dir.as_deref()).context("data folder")?;
    if let Some(keeper) = instance::rule_keeper(&paths)? {
        bail!(
            "process {keeper} keeps the rules of this network and would write them again: stop it \
             first (`kill {keeper}`, or by what started it), then clean up"
        );
    }
    run::block_on(async {
        let cleanup = tokio::task::spawn_blocking(keelson_proxy::cleanup).await;
        cleanup.context("remove the proxy's rules")?.context("remove the proxy's rules")?;
        println!("the proxy's rules are removed");
        Ok(())
    })
}

/// Runs until a signal, or until a part fails.
async fn serve(
    args: &ProxyArgs,
    settings: &ProxySettings,
    file: Option<Watched>,
) -> anyhow::Result<()> {
    let name = node_name(settings)?;
    // What is wrong in the settings is told before anything else is looked at.
    let mut config = config(settings, &name, Vec::new(), None)?;
    let credentials = credentials(args, settings).await?;
    if let (DetectLocal::Nothing, Some(facts)) = (&config.detect_local, &credentials.facts) {
        config.detect_local = DetectLocal::Ranges(vec![facts.cluster_cidr]);
    }
    if let Some(doubt) = config::doubt(&config.detect_local) {
        tracing::warn!("{doubt}");
    }
    protect(settings.oom_score_adj.unwrap_or(OOM_SCORE_ADJ));
    let healthz = config.healthz_bind_address;
    let shutdown = run::shutdown_on_signal()?;
    let paths = Paths::new(args.data.data_dir.as_deref()).context("data folder")?;
    let record = Record { role: "proxy".to_owned(), ..Record::of_this_process(&name) };
    let mut held = instance::hold_if_possible(&paths, &[Part::Proxy], record)?;
    let registry = Registry::new();
    component::register_features(
        &registry,
        GATES.map(|name| (name, "ALPHA", gate(settings, name))),
    )?;
    let client = credentials.counted_client(RestClient::register(&registry)?);
    let tasks = MainTasks::new(shutdown.clone());
    if credentials.facts.is_some() {
        // A cluster of Keelson's own has no CNI plugin that would see to it.
        tasks.spawn("routes to other nodes", {
            let routes = routes::run(client.clone(), name.clone(), shutdown.clone());
            async move {
                routes.await;
                Ok(())
            }
        });
    }
    credentials.keep_current(&tasks, shutdown.clone());
    let proxy = keelson_proxy::run_with_registry(config, client, registry, shutdown.clone());
    tasks.spawn("service proxy", async move { Ok(proxy.await?) });
    if let Some(file) = file {
        let changed = config_changed(file, args.flags.clone(), name, shutdown.clone());
        tasks.spawn("config file", changed);
    }
    let ready = held.as_mut().map_or(Ok(()), Held::ready);
    if ready.is_ok() {
        notify::notify("READY=1");
        notify::watchdog(run::healthy(healthz, "/livez"), shutdown.clone()).await;
        shutdown.cancelled().await;
    }
    shutdown.cancel();
    run::ended(tasks.stopped()).await;
    ready.and(tasks.result())
}

/// Fails once the config file is another one, so that everything ends, and whoever looks after the
/// process starts it with the new one: kube-proxy does so too.
async fn config_changed(
    file: Watched,
    flags: ProxyFlags,
    name: String,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let path = file.path().to_owned();
    let check = |path: &Path| {
        let settings = ProxySettings::read(Some(path), &flags)?;
        node_name(&settings)?;
        config(&settings, &name, Vec::new(), None).map(drop)
    };
    if file.changed(check, shutdown).await {
        bail!(
            "config file {}: it has changed, and takes effect when the proxy is started again",
            path.display()
        );
    }
    Ok(())
}

/// How to reach the API server: as a kubeconfig says, without credentials at a URL, or as the pod
/// that this runs in may.
async fn credentials(args: &ProxyArgs, settings: &ProxySettings) -> anyhow::Result<Credentials> {
    let given = args.kubeconfig.as_ref().or(settings.client_connection.kubeconfig.as_ref());
    let server = args.master.as_deref().filter(|server| !server.is_empty());
    match given.filter(|path| !path.as_os_str().is_empty()) {
        Some(path) => Credentials::read_for(path, server).await,
        None => match server {
            Some(server) => Credentials::none_at(server).context("--master"),
            None => Credentials::of_this_pod().context(
                "outside a pod --kubeconfig, or clientConnection.kubeconfig in --config, is needed",
            ),
        },
    }
}

/// Writes what file, flags and defaults come to.
fn write_config(path: &Path, settings: &ProxySettings) -> anyhow::Result<()> {
    let name = node_name(settings)?;
    let mut document = config(settings, &name, Vec::new(), None)?.document();
    // A file without a name does for every node.
    document["hostnameOverride"] = settings.hostname_override.as_deref().unwrap_or_default().into();
    document["clientConnection"] = json!({"kubeconfig": settings.client_connection.kubeconfig});
    document["oomScoreAdj"] = settings.oom_score_adj.unwrap_or(OOM_SCORE_ADJ).into();
    let gates = settings.feature_gates.iter().filter(|(name, _)| GATES.contains(&name.as_str()));
    for (name, on) in gates {
        document["featureGates"][name] = (*on).into();
    }
    let text = keelson_api::yaml::text(&document)?;
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// Prints the rules for the objects of some manifests; what is wrong with them goes to standard
/// error. What can't even be read is a failure, once the rules for the rest are printed.
fn dry_run(args: &ProxyArgs, settings: &ProxySettings) -> anyhow::Result<()> {
    let mut manifests = Manifests::read(&args.services)?;
    manifests.choose_node(settings.hostname_override.as_deref())?;
    let named = manifests.objects.node.as_ref().and_then(|node| node.metadata.name.clone());
    let name = match named {
        Some(name) => name,
        None => node_name(settings)?,
    };
    let mut config = config(settings, &name, Vec::new(), None)?;
    config.families = match args.family {
        None => Vec::new(),
        Some(FamilyName::Ipv4) => vec![Family::V4],
        Some(FamilyName::Ipv6) => vec![Family::V6],
    };
    let (snapshot, refusals) = Snapshot::new(config, &manifests.objects);
    for problem in &manifests.problems {
        eprintln!("keelson: {problem}");
    }
    for refusal in &refusals {
        eprintln!("keelson: {}", manifests.place(refusal));
    }
    match std::io::stdout().write_all(snapshot.rules().as_bytes()) {
        // Who reads has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        printed => printed.context("print the rules")?,
    }
    match manifests.problems.len() {
        0 => Ok(()),
        count => bail!("the rules lack what could not be read ({count}, named above)"),
    }
}

/// Makes it less likely that the kernel kills this process when memory is short.
fn protect(score: i32) {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        tracing::info!(%error, score, "oomScoreAdj can't be set; the present value stays");
    }
}

#[cfg(test)]
mod tests {
    use keelson_proxy::ProxyConfig;

    use super::*;

    fn configured(fields: serde_json::Value) -> anyhow::Result<ProxyConfig> {
        config(&serde_json::from_value(fields)?, "n", Vec::new(), None)
    }

    #[test]
    fn what_configz_shows_and_write_config_to_writes_is_the_same_configuration() {
        for fields in [
            json!({}),
            json!({"mode": "iptables"}),
            json!({"mode": "userspace", "nodePortAddresses": ["primary"]}),
            json!({
                "bindAddress": "2001:db8::1", "bindAddressHardFail": true,
                "clusterCIDR": "10.0.0.0/8,fd00::/8", "conntrack": {"maxPerCore": 1, "min": 2,
                    "tcpBeLiberal": true, "tcpCloseWaitTimeout": "0s", "udpTimeout": "1m30s",
                    "tcpEstablishedTimeout": "36h", "udpStreamTimeout": "1.5s"},
                "featureGates": {"RemoveStaleTCPConnections": true},
                "metricsBindAddress": "[::]:99", "nodePortAddresses": ["192.0.2.0/24"],
                "nftables": {"masqueradeAll": true, "masqueradeBit": 3, "minSyncPeriod": "20ms",
                    "syncPeriod": "1m"},
            }),
            json!({"bindAddress": "::"}),
            json!({"detectLocalMode": "NodeCIDR"}),
            json!({"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "b"},
                "mode": "iptables", "iptables": {"localhostNodePorts": false, "masqueradeBit": 1}}),
            json!({"detectLocalMode": "InterfaceNamePrefix",
                "detectLocal": {"interfaceNamePrefix": "veth"}}),
        ] {
            let before = configured(fields.clone()).unwrap();
            let document = before.document();
            assert_eq!(
                document["bindAddress"],
                fields.get("bindAddress").cloned().unwrap_or_else(|| "0.0.0.0".into())
            );
            assert_eq!(configured(document.clone()).unwrap(), before, "{document:#}");
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("config.yaml");
            let settings = serde_json::from_value(document).unwrap();
            write_config(&path, &settings).unwrap();
            let read = ProxySettings::read(Some(&path), &ProxyFlags::default()).unwrap();
            assert_eq!(config(&read, "n", Vec::new(), None).unwrap(), before);
            assert_eq!(read.oom_score_adj, Some(OOM_SCORE_ADJ));
        }
    }
}
