//! Looking up what of the host a container is to get: devices, and mounts that propagate.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use super::disk::failed;
use crate::{
    runtime::{Device, Mount, MountPropagation, Result, RuntimeError},
    spec,
};

/// A device that a container asks for.
pub(super) fn look_up(device: &Device) -> Result<spec::DeviceNode> {
    let path = &device.host_path;
    let metadata = fs::metadata(path).map_err(failed("looking up the device", path))?;
    let kind = metadata.file_type();
    if !kind.is_block_device() && !kind.is_char_device() {
        return Err(RuntimeError::Invalid(format!("{}: not a device", path.display())));
    }
    Ok(node(&device.container_path, &metadata, &device.permissions))
}

fn node(path: &Path, metadata: &fs::Metadata, access: &str) -> spec::DeviceNode {
    let number = metadata.rdev();
    spec::DeviceNode {
        path: path.to_owned(),
        block: metadata.file_type().is_block_device(),
        major: u64::from(libc::major(number)),
        minor: u64::from(libc::minor(number)),
        mode: metadata.mode() & 0o777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        access: access.to_owned(),
    }
}

/// All devices of the host, for a privileged container; not those that each container has of its
/// own.
pub(super) fn all_devices(dir: &Path) -> Vec<spec::DeviceNode> {
    const OWN: [&str; 10] =
        ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "console", "ptmx", "tty"];
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if OWN.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        let path = entry.path();
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        let kind = metadata.file_type();
        if kind.is_dir() {
            found.extend(all_devices(&path));
        } else if kind.is_block_device() || kind.is_char_device() {
            found.push(node(&path, &metadata, "rwm"));
        }
    }
    found
}

/// Later mounts can travel only where the host's own mount lets them.
pub(super) fn check_propagation(mounts: &[Mount]) -> Result<()> {
    if mounts.iter().all(|m| m.propagation == MountPropagation::Private) {
        return Ok(());
    }
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")
        .map_err(failed("reading", Path::new("/proc/self/mountinfo")))?;
    for asked in mounts {
        let path = fs::canonicalize(&asked.host_path).unwrap_or_else(|_| asked.host_path.clone());
        let (at, tags) = mount_of(&mountinfo, &path);
        let shared = tags.contains("shared:");
        let (fine, wanted) = match asked.propagation {
            MountPropagation::Private => (true, ""),
            MountPropagation::HostToContainer => {
                (shared || tags.contains("master:"), "shared or slave")
            }
            MountPropagation::Bidirectional => (shared, "shared"),
        };
        if !fine {
            return Err(RuntimeError::Container(format!(
                "mount at {}: {} is on the mount {at} of the host, which is not {wanted}; see \
                 mount --make-rshared",
                asked.container_path.display(),
                asked.host_path.display()
            )));
        }
    }
    Ok(())
}

/// The mount that a path is on, and its propagation tags.
fn mount_of<'a>(mountinfo: &'a str, path: &Path) -> (&'a str, String) {
    let mut best: (&str, String) = ("/", String::new());
    for line in mountinfo.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let Some(at) = fields.get(4) else { continue };
        if path.starts_with(at) && at.len() >= best.0.len() {
            let tags = fields.iter().skip(6).take_while(|f| **f != "-").copied();
            best = (at, tags.collect::<Vec<_>>().join(" "));
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_mount_counts() {
        let info = "\
22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
23 22 8:2 / /var rw master:3 - ext4 /dev/sda2 rw
24 23 8:3 / /var/lib rw - ext4 /dev/sda3 rw
";
        assert_eq!(mount_of(info, Path::new("/etc")), ("/", "shared:1".to_owned()));
        assert_eq!(mount_of(info, Path::new("/var/log")), ("/var", "master:3".to_owned()));
        assert_eq!(mount_of(info, Path::new("/var/library")), ("/var", "master:3".to_owned()));
        assert_eq!(mount_of(info, Path::new("/var/lib/x")), ("/var/lib", String::new()));
    }
}
