//! From what Kubernetes asks to what the container's maker is told: a pure function.
//!
//! [`build`] turns a [`ContainerConfig`], its sandbox and its image's config into the `config.json`
//! of an OCI bundle, with the defaults that Kubernetes' documentation and users expect: mounts,
//! masked paths, capabilities, devices, the seccomp profile. It reads nothing itself; what has to be
//! looked up (account files, device numbers, the host's cgroups) is handed in as [`Inputs`].
//!
//! What can't be enforced is an error here, never a spec that asks for less.

mod capabilities;
mod mounts;
mod resources;
mod seccomp;
mod user;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use oci_spec::{image::ImageConfiguration, runtime::Spec};
use serde_json::{Value, json};

pub(crate) use self::{
    capabilities::from_bits as capabilities_from_bits,
    resources::{DeviceNode, for_libcontainer as resources_for_libcontainer},
    seccomp::{from_file as seccomp_from_file, runtime_default as seccomp_default},
    user::{Accounts, resolve as resolve_user},
};
use crate::runtime::{ContainerConfig, LinuxUser, RuntimeError, SandboxConfig, SeccompProfile};

/// The search path of a container whose image and pod set none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why no spec can be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The request makes sense and can't be had here.
    #[error("{0}")]
    Unavailable(String),
}

impl From<SpecError> for RuntimeError {
    fn from(error: SpecError) -> RuntimeError {
        RuntimeError::Container(error.to_string())
    }
}

/// What the host is like, as far as a spec depends on it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Host {
    /// The processor architecture, as `std::env::consts::ARCH` names it.
    pub(crate) architecture: String,
    /// One cgroup tree for all controllers.
    pub(crate) cgroup_v2: bool,
    /// Swap is accounted for, and can be limited.
    pub(crate) swap_accounting: bool,
    /// The capabilities that the runtime can hand out.
    pub(crate) capabilities: BTreeSet<&'static str>,
    /// The host's own name, for pods on its network.
    pub(crate) hostname: String,
    /// Is there an mqueue file system?
    pub(crate) mqueue: bool,
}

/// Where this container's and its sandbox's things are on the host.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places {
    /// The mounted root file system.
    pub(crate) rootfs: PathBuf,
    /// The pod's `/dev/shm`.
    pub(crate) shm: PathBuf,
    /// The pod's `resolv.conf`.
    pub(crate) resolv_conf: PathBuf,
    /// The pod's `hostname` file.
    pub(crate) hostname: PathBuf,
    /// The container's cgroup, below the root of each hierarchy.
    pub(crate) cgroup: PathBuf,
    /// On cgroups of version 1: each hierarchy's folder name with the container's own folder in it.
    pub(crate) cgroup_v1: Vec<(String, PathBuf)>,
    /// The pod's network namespace; none for the host's.
    pub(crate) netns: Option<PathBuf>,
    /// The process whose IPC and UTS namespaces are the pod's: its shim.
    pub(crate) shim_pid: i32,
    /// The first process of the pod's shared process namespace, if it has one.
    pub(crate) pod_init: Option<i32>,
}

/// All that a spec is made from.
pub(crate) struct Inputs<'a> {
    /// The sandbox.
    pub(crate) sandbox: &'a SandboxConfig,
    /// The container.
    pub(crate) container: &'a ContainerConfig,
    /// Its image's config.
    pub(crate) image: &'a ImageConfiguration,
    /// The host.
    pub(crate) host: &'a Host,
    /// Where things are.
    pub(crate) places: &'a Places,
    /// Whom it runs as.
    pub(crate) user: &'a LinuxUser,
    /// The devices it gets beyond the default ones, already looked up.
    pub(crate) devices: &'a [DeviceNode],
    /// The text of a `Localhost` seccomp profile.
    pub(crate) localhost_seccomp: Option<Vec<u8>>,
}

/// The spec of a container.
pub(crate) fn build(inputs: &Inputs<'_>) -> Result<Spec, SpecError> {
    let value = build_value(inputs)?;
    let spec: Spec = serde_json::from_value(value)
        .map_err(|e| SpecError::Invalid(format!("container {}: {e}", inputs.container.name)))?;
    Ok(spec)
}

fn build_value(inputs: &Inputs<'_>) -> Result<Value, SpecError> {
    let Inputs { sandbox, container, host, places, .. } = inputs;
    let security = &container.security;
    let image = inputs.image.config().as_ref();
    let args = command(container, image)?;
    let cwd = container
        .working_dir
        .clone()
        .filter(|p| !p.as_os_str().is_empty())
        .or_else(|| {
            image.and_then(|c| c.working_dir().clone()).filter(|d| !d.is_empty()).map(PathBuf::from)
        })
        .unwrap_or_else(|| PathBuf::from("/"));
    if !cwd.is_absolute() {
        return Err(SpecError::Invalid(format!(
            "working directory {}: not absolute",
            cwd.display()
        )));
    }

    let set = capabilities::resolve(
        security.privileged,
        &security.add_capabilities,
        &security.drop_capabilities,
        &host.capabilities,
    )?;
    let names: Vec<String> = set.iter().map(|c| format!("CAP_{c}")).collect();
    let mut process = json!({
        "terminal": container.tty,
        "user": {
            "uid": inputs.user.uid,
            "gid": inputs.user.gid,
            "additionalGids": inputs.user.supplemental_groups,
        },
        "args": args,
        "env": environment(sandbox, container, image, host)?,
        "cwd": cwd,
        // Nothing inheritable or ambient: a process that is not root starts without any.
        "capabilities": {"bounding": names, "effective": names, "permitted": names},
    });
    // Left out, not false: libcontainer loads the filter too late for a process without
    // capabilities as soon as the field is there.
    if security.no_new_privileges {
        process["noNewPrivileges"] = json!(true);
    }

    let mut linux = json!({
        "resources": resources::plan(&container.resources, host, security.privileged, inputs.devices)?,
        "cgroupsPath": places.cgroup,
        "namespaces": namespaces(sandbox, host, places),
        "devices": inputs.devices.iter().map(DeviceNode::to_value).collect::<Vec<_>>(),
    });
    if !security.privileged && !security.unmasked_proc {
        linux["maskedPaths"] = json!(mounts::MASKED);
        linux["readonlyPaths"] = json!(mounts::READ_ONLY);
    }
    if let Some(propagation) = mounts::root_propagation(&container.mounts) {
        linux["rootfsPropagation"] = json!(propagation);
    }
    let profile = match &security.seccomp {
        _ if security.privileged => None,
        SeccompProfile::Unconfined => None,
        SeccompProfile::RuntimeDefault => Some(seccomp_default(&set, &host.architecture)?),
        SeccompProfile::Localhost(path) => {
            let path = path.display().to_string();
            let text = inputs.localhost_seccomp.as_deref().ok_or_else(|| {
                SpecError::Invalid(format!("seccomp profile {path}: it could not be read"))
            })?;
            Some(seccomp_from_file(text, &path)?)
        }
    };
    if let Some(mut profile) = profile {
        seccomp::for_libcontainer(&mut profile);
        linux["seccomp"] = profile;
    }
    Ok(json!({
        "ociVersion": "1.2.0",
        "root": {"path": places.rootfs, "readonly": security.readonly_rootfs},
        "process": process,
        "mounts": mounts::plan(sandbox, container, host, places)?,
        "linux": linux,
        "annotations": BTreeMap::<String, String>::new(),
    }))
}

/// The command line: `command` replaces entry point and arguments of the image, `args` only the
/// latter, as Kubernetes documents it.
fn command(
    container: &ContainerConfig,
    image: Option<&oci_spec::image::Config>,
) -> Result<Vec<String>, SpecError> {
    let mut line = container.command.clone();
    let mut args = container.args.clone();
    if line.is_empty() {
        line = image.and_then(|c| c.entrypoint().clone()).unwrap_or_default();
        if args.is_empty() {
            args = image.and_then(|c| c.cmd().clone()).unwrap_or_default();
        }
    }
    line.extend(args);
    if line.is_empty() {
        return Err(SpecError::Invalid(format!(
            "container {}: no command specified, neither in the pod nor in the image",
            container.name
        )));
    }
    if line.iter().any(|word| word.contains('\0')) {
        return Err(SpecError::Invalid(format!(
            "container {}: a NUL in the command",
            container.name
        )));
    }
    Ok(line)
}

/// The environment: the image's, over it the pod's; `PATH` and `HOSTNAME` always have a value.
fn environment(
    sandbox: &SandboxConfig,
    container: &ContainerConfig,
    image: Option<&oci_spec::image::Config>,
    host: &Host,
) -> Result<Vec<String>, SpecError> {
    let hostname = if sandbox.hostname.is_empty() { &host.hostname } else { &sandbox.hostname };
    let mut variables: Vec<(String, String)> = vec![("PATH".into(), DEFAULT_PATH.into())];
    let mut set = |name: &str, value: &str| match variables.iter_mut().find(|(n, _)| n == name) {
        Some((_, old)) => value.clone_into(old),
        None => variables.push((name.to_owned(), value.to_owned())),
    };
    set("HOSTNAME", hostname);
    if container.tty {
        set("TERM", "xterm");
    }
    for line in image.and_then(|c| c.env().as_ref()).into_iter().flatten() {
        let (name, value) = line.split_once('=').unwrap_or((line, ""));
        set(name, value);
    }
    for (name, value) in &container.env {
        set(name, value);
    }
    for (name, value) in &variables {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(SpecError::Invalid(format!(
                "container {}: {name:?} can't be the name of an environment variable, or its value \
                 has a NUL",
                container.name
            )));
        }
    }
    Ok(variables.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
}

fn namespaces(sandbox: &SandboxConfig, host: &Host, places: &Places) -> Vec<Value> {
    let of = |pid: i32, kind: &str| PathBuf::from(format!("/proc/{pid}/ns/{kind}"));
    let mut list = vec![json!({"type": "mount"})];
    if let Some(path) = &places.netns {
        list.push(json!({"type": "network", "path": path}));
    }
    if !sandbox.namespaces.host_ipc {
        list.push(json!({"type": "ipc", "path": of(places.shim_pid, "ipc")}));
    }
    if !sandbox.namespaces.host_network {
        list.push(json!({"type": "uts", "path": of(places.shim_pid, "uts")}));
    }
    if let Some(init) = places.pod_init {
        list.push(json!({"type": "pid", "path": of(init, "pid")}));
    } else if !sandbox.namespaces.host_pid {
        list.push(json!({"type": "pid"}));
    }
    // With version 1 there is no cgroup namespace by default, with version 2 there is.
    if host.cgroup_v2 {
        list.push(json!({"type": "cgroup"}));
    }
    list
}

/// The signal that asks a container to stop: the pod's, else the image's, else `SIGTERM`.
pub(crate) fn stop_signal(
    container: &ContainerConfig,
    image: &ImageConfiguration,
) -> Result<i32, SpecError> {
    let name = container
        .stop_signal
        .clone()
        .or_else(|| image.config().as_ref().and_then(|c| c.stop_signal().clone()))
        .filter(|s| !s.is_empty());
    let Some(name) = name else { return Ok(libc::SIGTERM) };
    signal_number(&name).ok_or_else(|| {
        SpecError::Invalid(format!("stop signal {name:?}: not a signal's name or number"))
    })
}

/// `SIGTERM`, `term`, `15`, `SIGRTMIN+3`.
fn signal_number(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = short.strip_prefix("RTMIN") {
        let offset = if offset.is_empty() { 0 } else { offset.strip_prefix('+')?.parse().ok()? };
        return (0..=30).contains(&offset).then_some(34 + offset);
    }
    if let Some(offset) = short.strip_prefix("RTMAX") {
        let offset = if offset.is_empty() { 0 } else { offset.strip_prefix('-')?.parse().ok()? };
        return (0..=30).contains(&offset).then_some(64 - offset);
    }
    format!("SIG{short}").parse::<nix::sys::signal::Signal>().ok().map(|s| s as i32)
}

/// Whether a path may name something inside a container: absolute, without `..`.
fn is_plain_absolute(path: &Path) -> bool {
    path.is_absolute() && !path.components().any(|c| matches!(c, std::path::Component::ParentDir))
}
