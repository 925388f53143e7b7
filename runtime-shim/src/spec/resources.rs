//! What a container may use: its cgroup's limits and its devices.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::{Host, SpecError};
use crate::runtime::LinuxResources;

/// A device node of the host, looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeviceNode {
    /// Its path in the container.
    pub(crate) path: PathBuf,
    /// A block device, not a character device.
    pub(crate) block: bool,
    /// Its major number.
    pub(crate) major: u64,
    /// Its minor number.
    pub(crate) minor: u64,
    /// The permission bits of its node.
    pub(crate) mode: u32,
    /// Its owner.
    pub(crate) uid: u32,
    /// Its group.
    pub(crate) gid: u32,
    /// Any of `r`, `w`, `m`.
    pub(crate) access: String,
}

impl DeviceNode {
    pub(super) fn to_value(&self) -> Value {
        json!({
            "path": self.path,
            "type": self.kind(),
            "major": self.major,
            "minor": self.minor,
            "fileMode": self.mode,
            "uid": self.uid,
            "gid": self.gid,
        })
    }

    fn kind(&self) -> &'static str {
        if self.block { "b" } else { "c" }
    }
}

/// The `linux.resources` of the spec. Everything that is not allowed is denied: the runtime adds the
/// devices that every container has (null, zero, full, random, urandom, tty, console, ptmx, pts).
pub(super) fn plan(
    resources: &LinuxResources,
    host: &Host,
    privileged: bool,
    devices: &[DeviceNode],
) -> Result<Value, SpecError> {
    let mut plan = limits(resources, host)?;
    let mut rules = vec![json!({"allow": privileged, "access": "rwm"})];
    if !privileged {
        for device in devices {
            if device.access.is_empty() || device.access.chars().any(|c| !"rwm".contains(c)) {
                return Err(SpecError::Invalid(format!(
                    "device {}: permissions {:?} are not made of r, w and m",
                    device.path.display(),
                    device.access
                )));
            }
            rules.push(json!({
                "allow": true,
                "type": device.kind(),
                "major": device.major,
                "minor": device.minor,
                "access": device.access,
            }));
        }
    }
    plan.insert("devices".into(), json!(rules));
    Ok(Value::Object(plan))
}

/// The limits alone, as libcontainer's type, for changing them while the container runs.
pub(crate) fn for_libcontainer(
    resources: &LinuxResources,
    host: &Host,
) -> Result<oci_spec::runtime::LinuxResources, SpecError> {
    serde_json::from_value(Value::Object(limits(resources, host)?))
        .map_err(|e| SpecError::Invalid(format!("resources: {e}")))
}

fn limits(resources: &LinuxResources, host: &Host) -> Result<Map<String, Value>, SpecError> {
    let mut plan = Map::new();
    let mut cpu = Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            cpu.insert(name.to_owned(), value);
        }
    };
    // 0 means "the kernel's default" in Kubernetes' own requests.
    set("shares", resources.cpu_shares.filter(|n| *n > 0).map(|n| json!(n.clamp(2, 262_144))));
    set("quota", resources.cpu_quota.filter(|n| *n != 0).map(|n| json!(n)));
    set("period", resources.cpu_period.filter(|n| *n > 0).map(|n| json!(n)));
    set("cpus", resources.cpuset_cpus.clone().filter(|s| !s.is_empty()).map(Value::from));
    set("mems", resources.cpuset_mems.clone().filter(|s| !s.is_empty()).map(Value::from));
    if !cpu.is_empty() {
        plan.insert("cpu".into(), Value::Object(cpu));
    }
    if let Some(limit) = resources.memory_limit.filter(|n| *n > 0) {
        let mut memory = json!({"limit": limit});
        // Kubernetes' default is that a container swaps nothing: memory and swap together are
        // limited to what memory is.
        if host.swap_accounting {
            memory["swap"] = json!(limit);
        }
        plan.insert("memory".into(), memory);
    }
    if let Some(limit) = resources.pids_limit.filter(|n| *n != 0) {
        plan.insert("pids".into(), json!({"limit": limit}));
    }
    if !resources.unified.is_empty() {
        if !host.cgroup_v2 {
            let names: Vec<_> = resources.unified.keys().map(String::as_str).collect();
            return Err(SpecError::Unavailable(format!(
                "{}: these are files of cgroup version 2, and this host has version 1",
                names.join(", ")
            )));
        }
        plan.insert("unified".into(), json!(resources.unified));
    }
    Ok(plan)
}
