//! `keelson down`: stops everything and leaves nothing in the kernel.

use std::{fs, path::Path, time::Duration};

use anyhow::Context;
use keelson_agent::volumes::unmount_all;
use keelson_runtime_shim::{
    embedded::EmbeddedRuntime,
    images::{ImageOptions, ImageStore},
    network::remove_node_routes,
};

use crate::{
    agent,
    cli::DownArgs,
    config::KubeletSettings,
    image,
    instance::{self, Part},
    paths::Paths,
};

/// How long the process may take to end by itself.
const PATIENCE: Duration = Duration::from_secs(25);

/// Runs the command.
///
/// # Errors
/// Names what could not be removed; the rest is tried all the same.
pub(crate) async fn run(args: &DownArgs) -> anyhow::Result<()> {
    let paths = Paths::new(args.data.data_dir.as_deref()).context("data folder")?;
    let record = instance::read(&paths, Part::Agent)?;
    // The proxy first: it would write its rules again. The control plane last: the others ask it.
    for part in [Part::Proxy, Part::Agent, Part::ControlPlane] {
        let stopping = paths.clone();
        let stop = move || instance::stop(&stopping, part, PATIENCE);
        let stopped = tokio::task::spawn_blocking(stop).await.context("stop a process")?;
        if stopped.with_context(|| format!("stop the {}", part.name()))? {
            println!("stopped the {}", part.name());
        }
    }
    let mut failed = Vec::new();
    if paths.runtime.exists() {
        let cgroup_root = match &record {
            Some(record) => record.cgroup_root.clone(),
            None => agent::cgroup_root(&paths, &KubeletSettings::default()),
        };
        if let Err(error) = remove_pods(&paths, &cgroup_root).await {
            failed.push(format!("pods: {error:#}"));
        }
    }
    // One network has one set of rules: another instance in it goes on using them.
    if let Some(other) = instance::other_proxy() {
        println!("kept the service rules: process {other} uses them");
    } else {
        match tokio::task::spawn_blocking(keelson_proxy::cleanup).await.context("service rules")? {
            Ok(()) => println!("removed the service rules"),
            Err(error) => failed.push(format!("service rules: {error}")),
        }
        match remove_node_routes().await {
            Ok(0) => {}
            Ok(count) => println!("removed {count} routes to other nodes' pods"),
            Err(error) => failed.push(format!("routes: {error}")),
        }
    }
    let kubelet = paths.kubelet.clone();
    match tokio::task::spawn_blocking(move || unmount_all(&kubelet)).await.context("volumes")? {
        Ok(0) => {}
        Ok(count) => println!("removed the volumes of {count} pods"),
        Err(error) => failed.push(format!("volumes: {error}")),
    }
    if args.purge {
        for path in paths.stored() {
            match purge(path) {
                Ok(true) => println!("removed {}", path.display()),
                Ok(false) => {}
                Err(error) => failed.push(format!("{}: {error}", path.display())),
            }
        }
    } else {
        instance::forget(&paths)?;
    }
    if failed.is_empty() {
        println!(
            "nothing is left{}",
            if args.purge {
                ""
            } else {
                " in the kernel; stored data is kept (--purge removes it)"
            }
        );
        return Ok(());
    }
    anyhow::bail!("not removed: {}", failed.join("; "))
}

async fn remove_pods(paths: &Paths, cgroup_root: &str) -> anyhow::Result<()> {
    let images = ImageStore::open(image::store_path(paths), ImageOptions::default())?;
    let config = agent::runtime_config(paths, cgroup_root, Vec::new());
    let runtime = EmbeddedRuntime::open(config, images).await?;
    let removed = runtime.teardown_all().await?;
    println!(
        "removed {} pods with {} containers, {} further mounts, {} further cgroups, and the pods' \
         network ({} parts)",
        removed.sandboxes, removed.containers, removed.mounts, removed.cgroups, removed.network
    );
    Ok(())
}

/// Removes a file or a folder, if it is there.
fn purge(path: &Path) -> std::io::Result<bool> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if metadata.is_dir() {
        fs::remove_dir_all(path)?;
    } else {
        fs::remove_file(path)?;
    }
    Ok(true)
}
