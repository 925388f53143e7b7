//! From a pod's specification to what the runtime is asked to make.
//!
//! Everything here is pure or reads a file that it is handed; the worker's `apply` carries the
//! results to the runtime.

pub(crate) mod dns;
pub(crate) mod files;
pub(crate) mod hostname;
pub(crate) mod mounts;
pub(crate) mod resources;
pub(crate) mod sandbox;
pub(crate) mod security;

use std::{collections::BTreeMap, path::PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod};
use keelson_runtime_shim::runtime::{ContainerConfig, Image, Mount};

use crate::{config::AgentConfig, environment, labels, worker::view};

/// Why a container can't be made from its specification: the message of
/// `CreateContainerConfigError`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub(crate) struct ConfigError(pub(crate) String);

/// What a container's configuration is made from.
pub(crate) struct ContainerParts<'a> {
    /// The agent's configuration.
    pub(crate) config: &'a AgentConfig,
    /// The pod.
    pub(crate) pod: &'a Pod,
    /// The container.
    pub(crate) container: &'a Container,
    /// Its restart count.
    pub(crate) attempt: u32,
    /// The image to run, as the runtime names it.
    pub(crate) image_ref: &'a str,
    /// What the store knows of the image.
    pub(crate) image: &'a Image,
    /// Its environment, expanded.
    pub(crate) env: Vec<(String, String)>,
    /// Its volumes, in order of mounting.
    pub(crate) volume_mounts: Vec<Mount>,
    /// The pod's `/etc/hosts` on the host; absent where the container brings its own.
    pub(crate) hosts_file: Option<PathBuf>,
    /// The file on the host for the container's last words.
    pub(crate) termination_file: Option<PathBuf>,
    /// Seconds of wait kept for the restart after this one.
    pub(crate) back_off: Option<std::time::Duration>,
    /// Bytes of memory of the machine, for the OOM score.
    pub(crate) memory_capacity: i64,
}

/// The configuration of one container.
pub(crate) fn container_config(parts: ContainerParts<'_>) -> Result<ContainerConfig, ConfigError> {
    let ContainerParts { config, pod, container, .. } = parts;
    let security = security::container_security(config, pod, container, parts.image)?;
    let expanded = |list: &Option<Vec<String>>| {
        environment::expand_all(list.as_deref().unwrap_or_default(), &parts.env)
    };
    let mut mounts = parts.volume_mounts;
    let taken =
        |mounts: &[Mount], path: &str| mounts.iter().any(|mount| mount.container_path == *path);
    if let Some(hosts) = parts.hosts_file
        && !taken(&mounts, "/etc/hosts")
    {
        // not read-only, as programs that add their own names expect
        mounts.push(mounts::file("/etc/hosts", hosts, security.readonly_rootfs));
    }
    let message_path =
        container.termination_message_path.as_deref().unwrap_or("/dev/termination-log");
    if let Some(file) = &parts.termination_file
        && !taken(&mounts, message_path)
    {
        mounts.push(mounts::file(message_path, file.clone(), false));
    }
    let name = &container.name;
    Ok(ContainerConfig {
        name: name.clone(),
        attempt: parts.attempt,
        image: parts.image_ref.to_owned(),
        command: expanded(&container.command),
        args: expanded(&container.args),
        working_dir: container
            .working_dir
            .as_ref()
            .filter(|dir| !dir.is_empty())
            .map(PathBuf::from),
        mounts,
        devices: Vec::new(),
        labels: labels::container_labels(pod, name),
        annotations: annotations(
            pod,
            container,
            parts.attempt,
            parts.back_off,
            parts.termination_file.as_deref(),
        ),
        log_path: format!("{name}/{}.log", parts.attempt).into(),
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        resources: resources::container_resources(config, pod, container, parts.memory_capacity),
        security,
        stop_signal: container
            .lifecycle
            .as_ref()
            .and_then(|lifecycle| lifecycle.stop_signal.clone()),
        env: parts.env,
    })
}

fn annotations(
    pod: &Pod,
    container: &Container,
    attempt: u32,
    back_off: Option<std::time::Duration>,
    termination_file: Option<&std::path::Path>,
) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut put = |key: &str, value: String| all.insert(key.to_owned(), value);
    put(labels::HASH, labels::container_hash(container));
    put(labels::IMAGE, container.image.clone().unwrap_or_default());
    put(labels::RESTART_COUNT, attempt.to_string());
    put(
        labels::TERMINATION_MESSAGE_PATH,
        container
            .termination_message_path
            .clone()
            .unwrap_or_else(|| "/dev/termination-log".to_owned()),
    );
    put(
        labels::TERMINATION_MESSAGE_POLICY,
        container.termination_message_policy.clone().unwrap_or_else(|| "File".to_owned()),
    );
    if let Some(file) = termination_file {
        put(labels::TERMINATION_MESSAGE_FILE, file.display().to_string());
    }
    if let Some(back_off) = back_off {
        put(labels::BACK_OFF, back_off.as_secs().to_string());
    }
    if let Some(grace) = view::spec(pod).termination_grace_period_seconds {
        put(labels::GRACE_PERIOD, grace.to_string());
    }
    let pre_stop = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
    if let Some(Ok(pre_stop)) = pre_stop.map(serde_json::to_string) {
        put(labels::PRE_STOP, pre_stop);
    }
    all
}
