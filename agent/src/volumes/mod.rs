//! A pod's volumes: files and mounts that are there before its containers start.
//!
//! ```text
//!   pod.spec.volumes ─► plan ─► folder | memory | host path                      (once)
//!                          └──► files of objects ─► write as a whole ◄─ changes  (until unmount)
//! ```
//!
//! * `plan`: what each volume is, and what files it holds: pure
//! * `follow`: keeps the files of one pod as its objects and tokens are now
//! * `writer`: one change, seen whole
//! * `mounts`, `host_path`, `sub_path`: the kernel's side
//!
//! Where things are is what the kubelet documents:
//! `<kubelet folder>/pods/<uid>/volumes/kubernetes.io~<kind>/<name>`, and
//! `…/volume-subpaths/<volume>/<container>/<index>` for what `subPath` mounts.
//!
//! It must never delete what is behind a mount point, and never follow a link that a container
//! planted out of its volume.

mod follow;
mod host_path;
mod mounts;
mod plan;
mod sub_path;
mod writer;

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Pod, Volume};
use tokio_util::sync::CancellationToken;

use crate::environment::{AllocatableNow, ObjectSource};
use follow::Follower;
use plan::VolumePlan;
pub use plan::is_read_only;

/// Why a pod's volumes are not ready. Its text is the message of the `FailedMount` event.
#[derive(Debug, thiserror::Error)]
#[error("MountVolume.SetUp failed for volume {volume:?}: {reason}")]
pub struct VolumeError {
    /// The volume's name in the pod.
    pub volume: String,
    /// What is missing or went wrong, and where.
    pub reason: String,
}

impl VolumeError {
    fn new(volume: &str, reason: impl Into<String>) -> Self {
        Self { volume: volume.to_owned(), reason: reason.into() }
    }
}

/// Where a pod's volumes are on the host, by volume name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountedVolumes {
    /// Host path of each volume.
    pub paths: BTreeMap<String, PathBuf>,
}

/// Makes and removes what a pod's `spec.volumes` ask for.
#[async_trait]
pub trait PodVolumes: Send + Sync + 'static {
    /// Makes every volume of the pod ready and says where each is. Idempotent. What can change
    /// later (ConfigMaps, Secrets, the downward API, tokens) is kept fresh until `unmount`.
    async fn mount(&self, pod: &Pod) -> Result<MountedVolumes, VolumeError>;
    /// Makes a `subPath` ready to be mounted, and says from where. Safe against links that a
    /// container planted in the volume; what is missing is made as a folder. Undone by `unmount`.
    ///
    /// # Errors
    /// The path leaves the volume, or can't be made.
    async fn sub_path(&self, mount: &SubPathMount<'_>) -> Result<PathBuf, VolumeError>;
    /// Undoes it for the pod with this UID, whether or not it was ever mounted by this process.
    async fn unmount(&self, pod_uid: &str) -> Result<(), VolumeError>;
    /// UIDs of the pods that have a folder on this node, for removing what is left over.
    async fn pods_on_disk(&self) -> Vec<String>;
}

/// A `subPath` of one mount of one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubPathMount<'a> {
    /// The pod's UID.
    pub pod_uid: &'a str,
    /// The container's name.
    pub container: &'a str,
    /// Which of the container's `volumeMounts` it is.
    pub index: usize,
    /// The volume's name.
    pub volume: &'a str,
    /// Where the volume is, as [`MountedVolumes`] says.
    pub volume_path: &'a Path,
    /// The path in it: `subPath`, or `subPathExpr` after
    /// [`expand_sub_path`](crate::environment::expand_sub_path).
    pub sub_path: &'a str,
}

/// Volumes on this machine.
///
/// Calling [`PodVolumes::mount`] again with a newer version of a pod brings its downward API files
/// up to date; ConfigMaps, Secrets and tokens are followed without being called.
pub struct HostVolumes {
    /// `<kubelet folder>/pods`.
    pods: PathBuf,
    objects: Arc<dyn ObjectSource>,
    allocatable: AllocatableNow,
    shutdown: CancellationToken,
    /// Pods with volumes whose files follow objects.
    followed: Mutex<HashMap<String, Arc<Follower>>>,
}

impl HostVolumes {
    /// Volumes below `kubelet_dir` (`/var/lib/kubelet`), which is made if it is not there.
    /// `objects` answers for ConfigMaps, Secrets and tokens; files are followed until `shutdown`.
    ///
    /// # Errors
    /// The folder can't be made.
    pub fn new(
        kubelet_dir: &Path,
        objects: Arc<dyn ObjectSource>,
        allocatable: AllocatableNow,
        shutdown: &CancellationToken,
    ) -> io::Result<Self> {
        let pods = kubelet_dir.join("pods");
        fs::DirBuilder::new().recursive(true).mode(0o750).create(&pods)?;
        // As the kernel lists mount points: without links.
        let pods = pods.canonicalize()?;
        let shutdown = shutdown.child_token();
        Ok(Self { pods, objects, allocatable, shutdown, followed: Mutex::default() })
    }

    fn pod_folder(&self, uid: &str) -> Result<PathBuf, String> {
        check_name(uid)?;
        Ok(self.pods.join(uid))
    }

    fn follower(&self, uid: &str) -> Arc<Follower> {
        let mut followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        let follower = followed.entry(uid.to_owned()).or_insert_with(|| {
            let (objects, allocatable) = (Arc::clone(&self.objects), Arc::clone(&self.allocatable));
            Arc::new(Follower::new(objects, allocatable, self.shutdown.child_token()))
        });
        Arc::clone(follower)
    }
}

impl Drop for HostVolumes {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

#[async_trait]
impl PodVolumes for HostVolumes {
    async fn mount(&self, pod: &Pod) -> Result<MountedVolumes, VolumeError> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_deref());
        let volumes = volumes.unwrap_or_default();
        let first = volumes.first().map_or("", |volume| volume.name.as_str());
        let folder = self.pod_folder(uid).map_err(|reason| VolumeError::new(first, reason))?;
        let allocatable = (self.allocatable)();
        let (_, group) = plan::owners(pod);
        let mut mounted = MountedVolumes::default();
        let mut files = Vec::new();
        for volume in volumes {
            let failed = |reason: String| VolumeError::new(&volume.name, reason);
            check_name(&volume.name).map_err(failed)?;
            let plan = plan::plan(pod, volume, &allocatable).map_err(failed)?;
            let path = place(&folder, volume, &plan);
            let (at, made) = (path.clone(), plan.clone());
            blocking(move || make(&at, &made, group)).await.map_err(|e| failed(e.to_string()))?;
            if let VolumePlan::Files(plan) = plan {
                files.push((volume.name.clone(), path.clone(), plan));
            }
            mounted.paths.insert(volume.name.clone(), path);
        }
        if !files.is_empty() {
            self.follower(uid).follow(pod, files).await?;
        }
        Ok(mounted)
    }

    async fn sub_path(&self, mount: &SubPathMount<'_>) -> Result<PathBuf, VolumeError> {
        let failed = |reason: String| VolumeError {
            volume: mount.volume.to_owned(),
            reason: format!("failed to prepare subPath for volumeMount: {reason}"),
        };
        let folder = self.pod_folder(mount.pod_uid).map_err(failed)?;
        for name in [mount.volume, mount.container] {
            check_name(name).map_err(failed)?;
        }
        let target = folder.join("volume-subpaths").join(mount.volume).join(mount.container);
        let target = target.join(mount.index.to_string());
        let (volume, part) = (mount.volume_path.to_owned(), PathBuf::from(mount.sub_path));
        let to = target.clone();
        blocking(move || sub_path::mount_part(&volume, &part, &to))
            .await
            .map_err(|error| failed(error.to_string()))?;
        Ok(target)
    }

    async fn unmount(&self, pod_uid: &str) -> Result<(), VolumeError> {
        let failed = |reason: String| VolumeError {
            volume: format!("all of pod {pod_uid}"),
            reason: format!("removing them: {reason}"),
        };
        let folder = self.pod_folder(pod_uid).map_err(failed)?;
        let follower = {
            let mut followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
            followed.remove(pod_uid)
        };
        if let Some(follower) = follower {
            follower.stop().await;
        }
        blocking(move || mounts::remove_tree(&folder)).await.map_err(|e| failed(e.to_string()))
    }

    async fn pods_on_disk(&self) -> Vec<String> {
        let pods = self.pods.clone();
        let read = blocking(move || {
            fs::read_dir(pods)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<io::Result<Vec<String>>>()
        });
        match read.await {
            Ok(names) => names,
            Err(error) => {
                tracing::warn!(folder = %self.pods.display(), %error, "listing pods on disk");
                Vec::new()
            }
        }
    }
}

/// Unmounts and removes the volumes of all pods below a kubelet's folder, whoever mounted them, and
/// says of how many pods. Blocks on the file system.
///
/// # Errors
/// Something is still in use; the rest is removed all the same.
pub fn unmount_all(kubelet_dir: &Path) -> io::Result<usize> {
    let entries = match fs::read_dir(kubelet_dir.join("pods")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let (mut removed, mut first_error) = (0, None);
    for entry in entries {
        // As the kernel lists mount points: without links.
        let removal = entry.and_then(|entry| mounts::remove_tree(&entry.path().canonicalize()?));
        match removal {
            Ok(()) => removed += 1,
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    first_error.map_or(Ok(removed), Err)
}

/// Names that become part of a path.
fn check_name(name: &str) -> Result<(), String> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let valid = !matches!(name, "" | "." | "..") && name.len() <= 253 && name.bytes().all(fine);
    if valid { Ok(()) } else { Err(format!("{name:?} can't be the name of a folder")) }
}

fn place(pod_folder: &Path, volume: &Volume, plan: &VolumePlan) -> PathBuf {
    let plugin = match plan {
        VolumePlan::Host { path, .. } => return path.clone(),
        VolumePlan::Folder | VolumePlan::Memory { .. } => "kubernetes.io~empty-dir",
        VolumePlan::Files(files) => files.plugin,
    };
    pod_folder.join("volumes").join(plugin).join(&volume.name)
}

/// Makes the folder of a volume, or the memory mounted at it. What is there already stays.
fn make(path: &Path, plan: &VolumePlan, group: Option<u32>) -> io::Result<()> {
    let open_to_all = match plan {
        VolumePlan::Host { path, kind } => {
            return host_path::prepare(path, *kind).map_err(io::Error::other);
        }
        VolumePlan::Folder | VolumePlan::Memory { .. } => true,
        VolumePlan::Files(_) => false,
    };
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o750).create(parent)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let mode = if open_to_all { 0o777 } else { 0o755 };
    match plan {
        VolumePlan::Memory { limit } => mounts::mount_memory(path, *limit, mode)?,
        VolumePlan::Files(files) if files.in_memory => mounts::mount_memory(path, None, mode)?,
        _ => {}
    }
    // What containers make in it gets the group by the set-group-id bit, so there is nothing to
    // walk, and `fsGroupChangePolicy` has nothing to say about volumes that begin empty.
    let mode = if group.is_some() { mode | 0o2000 } else { mode };
    let found = fs::metadata(path)?;
    if group.is_some_and(|group| group != found.gid()) {
        chown(path, None, group)?;
    }
    if found.mode() & 0o7777 != mode {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Runs what touches the disk where that holds up nobody.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests;
