//! `keelson status`: what runs here, and whether it is well.

use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{Node, Pod};
use keelson_runtime_shim::network::Finding;
use kube::{Api, Client, api::ListParams};

use crate::{
    cli::StatusArgs,
    instance::{self, Part},
    paths::Paths,
    run,
};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Prints it.
///
/// # Errors
/// When nothing runs here, or it does not answer: the exit code tells scripts.
pub(crate) async fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let paths = Paths::new(args.data.data_dir.as_deref()).context("data folder")?;
    let running = instance::running(&paths)?;
    if running.is_empty() {
        bail!("nothing runs here: `keelson up{}` starts it", paths.flag());
    }
    for record in &running {
        let ready = if record.ready { "ready" } else { "not ready yet" };
        println!(
            "process     {} ({}, version {}): {ready}",
            record.pid, record.role, record.version
        );
    }
    if let Some(record) = running.first() {
        println!("node        {}", record.node_name);
    }
    if instance::is_running(&paths, Part::Agent) {
        let findings = tokio::task::spawn_blocking(keelson_runtime_shim::network::check).await;
        for line in network(&findings.context("look at the network")?) {
            println!("network     {line}");
        }
    }
    let Some(server) = running.into_iter().find_map(|record| record.api_server) else {
        return Ok(());
    };
    println!("API server  {server}");
    println!("kubeconfig  {}", paths.admin_kubeconfig.display());
    let client = run::client(&paths.admin_kubeconfig).await?;
    let shown = tokio::time::timeout(PATIENCE, show_cluster(client)).await;
    shown.with_context(|| format!("the API server does not answer within {PATIENCE:?}"))?
}

/// What of the host's own set-up stands in the way of pods, a line each.
fn network(findings: &[Finding]) -> Vec<String> {
    if findings.is_empty() {
        return vec!["nothing of this machine stands in the way of pods".to_owned()];
    }
    let line = |found: &Finding| format!("{}: {}; {}", found.what, found.effect, found.remedy);
    findings.iter().map(line).collect()
}

async fn show_cluster(client: Client) -> anyhow::Result<()> {
    let list = ListParams::default();
    let nodes = Api::<Node>::all(client.clone()).list(&list).await.context("nodes")?;
    for node in nodes {
        let name = node.metadata.name.unwrap_or_default();
        let conditions = node.status.and_then(|s| s.conditions).unwrap_or_default();
        let troubles: Vec<String> = conditions
            .iter()
            .filter(|c| (c.type_ == "Ready") != (c.status == "True"))
            .map(|c| format!("{}={} ({})", c.type_, c.status, c.reason.as_deref().unwrap_or("")))
            .collect();
        let state = if troubles.is_empty() { "well".to_owned() } else { troubles.join(", ") };
        println!("node        {name}: {state}");
    }
    let pods = Api::<Pod>::all(client).list(&list).await.context("pods")?;
    let phase = |pod: &Pod| pod.status.as_ref().and_then(|s| s.phase.clone()).unwrap_or_default();
    let running = pods.iter().filter(|pod| phase(pod) == "Running").count();
    println!("pods        {running} of {} running", pods.items.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_the_way_is_shown_with_what_to_do() {
        assert_eq!(network(&[]), ["nothing of this machine stands in the way of pods"]);
        let found =
            Finding { what: "a firewall".into(), effect: "drops".into(), remedy: "open it".into() };
        assert_eq!(network(&[found]), ["a firewall: drops; open it"]);
    }
}
