//! What is mounted in a container, and which of it is hidden or not writable.

use std::path::Path;

use serde_json::{Value, json};

use super::{Host, Places, SpecError, is_plain_absolute};
use crate::runtime::{ContainerConfig, Mount, MountPropagation, SandboxConfig};

/// Kernel files that tell about, or change, the whole machine: what runtimes mask by default
/// (`procMount: Default`).
pub(super) const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Kernel folders that may be read and not written.
pub(super) const READ_ONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// All mounts of a container in their order. A mount that the pod asks for takes the place of the
/// default one at the same path.
pub(super) fn plan(
    sandbox: &SandboxConfig,
    container: &ContainerConfig,
    host: &Host,
    places: &Places,
) -> Result<Vec<Value>, SpecError> {
    let privileged = container.security.privileged;
    let readonly = if privileged { "rw" } else { "ro" };
    let mut list = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", readonly]),
    ];
    if host.mqueue {
        list.push(mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]));
    }
    if host.cgroup_v2 {
        list.push(mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", readonly],
        ));
    } else {
        // By hand: libcontainer would bind the container's own folders writable.
        list.push(mount(
            "/sys/fs/cgroup",
            "tmpfs",
            "tmpfs",
            &["noexec", "nosuid", "nodev", "mode=755"],
        ));
        for (hierarchy, folder) in &places.cgroup_v1 {
            list.push(bind(
                Path::new("/sys/fs/cgroup").join(hierarchy).as_path(),
                folder,
                &["nosuid", "noexec", "nodev", "rprivate", readonly],
            ));
        }
    }
    let shm = if sandbox.namespaces.host_ipc { Path::new("/dev/shm") } else { &places.shm };
    list.push(bind(Path::new("/dev/shm"), shm, &["nosuid", "noexec", "nodev", "rprivate", "rw"]));
    let etc = if container.security.readonly_rootfs { "ro" } else { "rw" };
    for (path, source) in
        [("/etc/resolv.conf", &places.resolv_conf), ("/etc/hostname", &places.hostname)]
    {
        list.push(bind(Path::new(path), source, &["rprivate", etc]));
    }

    for asked in &container.mounts {
        if !is_plain_absolute(&asked.container_path) || asked.container_path == Path::new("/") {
            return Err(SpecError::Invalid(format!(
                "mount at {}: it must be an absolute path without \"..\", other than \"/\"",
                asked.container_path.display()
            )));
        }
        if asked.recursive_readonly && !asked.readonly {
            return Err(SpecError::Invalid(format!(
                "mount at {}: recursively read-only and yet writable",
                asked.container_path.display()
            )));
        }
        list.retain(|m| {
            Path::new(m["destination"].as_str().unwrap_or_default()) != asked.container_path
        });
        list.push(of_pod(asked));
    }
    Ok(list)
}

fn of_pod(asked: &Mount) -> Value {
    let propagation = match asked.propagation {
        MountPropagation::Private => "rprivate",
        MountPropagation::HostToContainer => "rslave",
        MountPropagation::Bidirectional => "rshared",
    };
    let writable = match (asked.readonly, asked.recursive_readonly) {
        (_, true) => "rro",
        (true, false) => "ro",
        (false, false) => "rw",
    };
    json!({
        "destination": asked.container_path,
        "type": "bind",
        "source": asked.host_path,
        "options": ["rbind", propagation, writable],
    })
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": kind, "source": source, "options": options})
}

fn bind(destination: &Path, source: &Path, options: &[&str]) -> Value {
    let mut all = vec!["rbind"];
    all.extend(options);
    json!({"destination": destination, "type": "bind", "source": source, "options": all})
}

/// How the container's root must propagate, so that its mounts can do as they are asked.
pub(super) fn root_propagation(mounts: &[Mount]) -> Option<&'static str> {
    if mounts.iter().any(|m| m.propagation == MountPropagation::Bidirectional) {
        Some("shared")
    } else if mounts.iter().any(|m| m.propagation == MountPropagation::HostToContainer) {
        Some("slave")
    } else {
        None
    }
}
