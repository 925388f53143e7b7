//! Where the runtime keeps what, and how it is written.
//!
//! ```text
//! <root>/bin/keelson-shim-<digest>      the shim's program
//! <root>/sandboxes/<id>/sandbox.json    what a sandbox was made from, and how far it came
//!                      /resolv.conf, hostname, shm/
//! <root>/containers/<id>/container.json what a container was made from
//!                       /state          its process: pid, start, end (written by the shim)
//!                       /config.json    the OCI spec; rootfs/, upper/, work/: its files
//! <root>/addresses/<address>            which sandbox has an address
//! <root>/trash/                         what is being removed
//! <run>/s/<id>.sock                     a shim's socket
//! <run>/netns/<id>                      a pod's network namespace
//! <run>/c/<id>/                         libcontainer's own state
//! ```
//!
//! A record appears by one rename after what it speaks of is there, and a folder goes by one rename
//! into the trash before its files go: so whoever was killed in between finds either all or nothing.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write},
    net::IpAddr,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::shim::protocol;
use crate::runtime::{
    ContainerConfig, ContainerId, ImageId, LinuxUser, Result, RuntimeError, SandboxConfig,
    SandboxId,
};

/// What is written down of a sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct SandboxRecord {
    pub(super) id: SandboxId,
    pub(super) config: SandboxConfig,
    pub(super) created_at: Timestamp,
    /// The boot it was made in; after another boot nothing of it runs.
    pub(super) boot: String,
    pub(super) ips: Vec<IpAddr>,
    pub(super) phase: Phase,
    /// The first process of the pod's shared process namespace.
    pub(super) pod_init: Option<i32>,
    pub(super) shim_pid: Option<i32>,
}

/// How far a sandbox came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Phase {
    /// Not all of it is there yet: the next start removes it.
    Making,
    Ready,
    Stopped,
}

/// What is written down of a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ContainerRecord {
    pub(super) id: ContainerId,
    pub(super) sandbox: SandboxId,
    pub(super) config: ContainerConfig,
    pub(super) created_at: Timestamp,
    pub(super) image_id: ImageId,
    pub(super) image_ref: String,
    pub(super) user: LinuxUser,
    pub(super) stop_signal: i32,
    pub(super) log_path: PathBuf,
    /// Its cgroup, below the root of each hierarchy.
    pub(super) cgroup: PathBuf,
}

/// The folders.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) root: PathBuf,
    pub(super) run: PathBuf,
}

impl Disk {
    pub(super) fn open(root: &Path, run: &Path) -> Result<Disk> {
        let disk = Disk { root: root.to_owned(), run: run.to_owned() };
        for dir in [
            disk.root.join("bin"),
            disk.sandboxes(),
            disk.containers(),
            disk.addresses(),
            disk.root.join("trash"),
            disk.run.join("s"),
            disk.run.join("netns"),
            disk.run.join("c"),
        ] {
            fs::create_dir_all(&dir).map_err(failed("making", &dir))?;
        }
        // Whoever reads bundles or sockets could read secrets from an environment.
        for dir in [&disk.root, &disk.run] {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(dir, fs::Permissions::from_mode(0o711))
                .map_err(failed("protecting", dir))?;
        }
        Ok(disk)
    }

    pub(super) fn sandboxes(&self) -> PathBuf {
        self.root.join("sandboxes")
    }

    pub(super) fn containers(&self) -> PathBuf {
        self.root.join("containers")
    }

    pub(super) fn addresses(&self) -> PathBuf {
        self.root.join("addresses")
    }

    pub(super) fn sandbox(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes().join(id.as_str())
    }

    pub(super) fn container(&self, id: &ContainerId) -> PathBuf {
        self.containers().join(id.as_str())
    }

    pub(super) fn state(&self, id: &ContainerId) -> PathBuf {
        self.container(id).join("state")
    }

    pub(super) fn rootfs(&self, id: &ContainerId) -> PathBuf {
        self.container(id).join("rootfs")
    }

    /// Short, since a socket's address has 108 bytes at most.
    pub(super) fn socket(&self, id: &SandboxId) -> PathBuf {
        self.run.join("s").join(format!("{}.sock", id.as_str().get(..24).unwrap_or(id.as_str())))
    }

    pub(super) fn netns(&self, id: &SandboxId) -> PathBuf {
        self.run.join("netns").join(id.as_str())
    }

    pub(super) fn libcontainer(&self) -> PathBuf {
        self.run.join("c")
    }

    pub(super) fn write_sandbox(&self, record: &SandboxRecord) -> Result<()> {
        write_json(&self.sandbox(&record.id).join("sandbox.json"), record)
    }

    pub(super) fn write_container(&self, record: &ContainerRecord) -> Result<()> {
        write_json(&self.container(&record.id).join("container.json"), record)
    }

    /// What the shim wrote of a container's process; the default if it was never started.
    pub(super) fn read_state(&self, id: &ContainerId) -> protocol::State {
        let text = fs::read(self.state(id)).unwrap_or_default();
        serde_json::from_slice(&text)
            .unwrap_or_else(|_| protocol::State { container: id.0.clone(), ..Default::default() })
    }

    /// Makes the state file at its full size, so that an end can be written on a full disk.
    pub(super) fn reserve_state(&self, id: &ContainerId) -> Result<()> {
        let path = self.state(id);
        let mut blank = vec![b' '; protocol::STATE_FILE_SIZE - 1];
        blank.push(b'\n');
        fs::write(&path, blank).map_err(failed("writing", &path))
    }

    /// Takes a folder out of sight at once, and then its files away.
    pub(super) fn discard(&self, dir: &Path) -> Result<()> {
        let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let trash =
            self.root.join("trash").join(format!("{name}-{}", uuid::Uuid::new_v4().simple()));
        match fs::rename(dir, &trash) {
            Ok(()) => fs::remove_dir_all(&trash).map_err(failed("removing", &trash)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(failed("removing", dir)(e)),
        }
    }

    /// Removes what was being removed when its process was killed.
    pub(super) fn empty_trash(&self) {
        for entry in fs::read_dir(self.root.join("trash")).into_iter().flatten().flatten() {
            if let Err(error) = fs::remove_dir_all(entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "could not empty the trash");
            }
        }
    }
}

/// An error about a path.
pub(super) fn failed<'a>(
    doing: &'a str,
    path: &'a Path,
) -> impl Fn(io::Error) -> RuntimeError + 'a {
    move |source| RuntimeError::Io { what: format!("{doing} {}", path.display()), source }
}

/// Writes a file whole or not at all.
pub(super) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(failed("making a file in", dir))?;
    file.write_all(bytes).map_err(failed("writing", path))?;
    file.persist(path).map_err(|e| failed("writing", path)(e.error))?;
    Ok(())
}

/// The images that the containers below a runtime's root are made from, whether or not a process has
/// it open: what must not be removed. A record that can't be read is an error, for it may name one.
///
/// # Errors
/// The records can't be read.
pub fn images_in_use(root: &Path) -> std::io::Result<BTreeSet<ImageId>> {
    let folders = match fs::read_dir(root.join("containers")) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        folders => folders?,
    };
    let mut used = BTreeSet::new();
    for folder in folders {
        match fs::read(folder?.path().join("container.json")) {
            Ok(text) => {
                let record: ContainerRecord = serde_json::from_slice(&text)?;
                used.insert(record.image_id);
            }
            // One that is being made or was removed just now.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(used)
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec(value)
        .map_err(|e| RuntimeError::Internal(format!("{}: {e}", path.display())))?;
    write_atomically(path, &text)
}

/// A record, if it is there and whole.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let file = File::open(path).ok()?;
    match serde_json::from_reader(io::BufReader::new(file)) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "a record can't be read");
            None
        }
    }
}

/// Names this boot of the machine.
pub(super) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|t| t.trim().to_owned())
        .unwrap_or_default()
}

/// A new name: 64 hexadecimal digits.
pub(super) fn new_id() -> String {
    format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple())
}
