//! The cluster's API, as a client on the machine sees it.

use std::{
    fmt::Debug,
    future::Future,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use futures::{StreamExt, TryStreamExt};
use kube::{
    Api, Client, Config,
    api::{DeleteParams, ListParams, WatchEvent, WatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::Value;

/// How long anything may take before the bench gives up.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);
/// Between two looks at something that can only be asked for: far below what is measured.
const STEP: Duration = Duration::from_millis(1);

/// Thousandths of a second from one moment to another; below zero if the other came first.
pub(crate) fn milliseconds(from: Instant, to: Instant) -> f64 {
    match to.checked_duration_since(from) {
        Some(later) => later.as_secs_f64() * 1e3,
        None => from.duration_since(to).as_secs_f64() * -1e3,
    }
}

/// Fails when `work` takes longer than anything may.
pub(crate) async fn in_time<T>(
    what: &str,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(result) => result.with_context(|| what.to_owned()),
        Err(_) => bail!("{what}: waited {DEADLINE:?}"),
    }
}

/// A client with the administrator's kubeconfig.
///
/// # Errors
/// When that isn't there yet, or is not one.
pub(crate) async fn client(data_dir: &Path) -> anyhow::Result<Client> {
    let kubeconfig = Kubeconfig::read_from(data_dir.join("admin.conf"))?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Waits until the API server says that it is ready, and returns a client of it and the moment.
///
/// # Errors
/// When that takes too long, or the process ends.
pub(crate) async fn answering(data_dir: &Path, pid: i32) -> anyhow::Result<(Client, Instant)> {
    in_time("the API to answer", async {
        let client = loop {
            match client(data_dir).await {
                Ok(client) => break client,
                Err(_) => pause(pid).await?,
            }
        };
        loop {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            if client.request_text(request).await.is_ok() {
                return Ok((client, Instant::now()));
            }
            pause(pid).await?;
        }
    })
    .await
}

/// Waits for the next look at a process that still runs.
async fn pause(pid: i32) -> anyhow::Result<()> {
    tokio::time::sleep(STEP).await;
    // The state follows the program's name in parentheses; a zombie is an ended child.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    if stat.is_empty() || stat.contains(") Z ") {
        bail!("the process ended");
    }
    Ok(())
}

/// Lists and watches until an object fulfils a condition; returns the moment at which it was seen.
///
/// # Errors
/// When that takes too long, or the API refuses.
pub(crate) async fn until<K>(
    api: &Api<K>,
    what: &str,
    mut holds: impl FnMut(&K) -> bool,
) -> anyhow::Result<Instant>
where
    K: kube::Resource + Clone + Debug + serde::de::DeserializeOwned,
{
    in_time(what, async {
        loop {
            let list = api.list(&ListParams::default()).await?;
            if list.items.iter().any(&mut holds) {
                return Ok(Instant::now());
            }
            let version = list.metadata.resource_version.unwrap_or_default();
            let mut events = api.watch(&WatchParams::default(), &version).await?.boxed();
            while let Some(event) = events.try_next().await? {
                if let WatchEvent::Added(object) | WatchEvent::Modified(object) = event
                    && holds(&object)
                {
                    return Ok(Instant::now());
                }
            }
        }
    })
    .await
}

/// Whether a list of conditions has a true one of the type.
pub(crate) fn is_true(conditions: &Value, kind: &str) -> bool {
    conditions
        .as_array()
        .is_some_and(|all| all.iter().any(|c| c["type"] == kind && c["status"] == "True"))
}

/// Removes all objects of a kind and waits until they are gone.
///
/// # Errors
/// When the API refuses, or that takes too long.
pub(crate) async fn remove_all<K>(api: &Api<K>, labels: &str) -> anyhow::Result<()>
where
    K: kube::Resource + Clone + Debug + serde::de::DeserializeOwned,
{
    let chosen = ListParams::default().labels(labels);
    // Whether that was done at once or goes on is told by what is left.
    let _ = api.delete_collection(&DeleteParams::default(), &chosen).await?;
    in_time("objects to be gone", async {
        while !api.list(&chosen.clone().limit(1)).await?.items.is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    })
    .await
}
