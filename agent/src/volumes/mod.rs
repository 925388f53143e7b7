//! A pod's volumes: files and mounts that are there before its containers start.

use std::{collections::BTreeMap, path::PathBuf};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Pod;

/// Why a pod's volumes are not ready. Its text is the message of the `FailedMount` event.
#[derive(Debug, thiserror::Error)]
#[error("MountVolume.SetUp failed for volume {volume:?}: {reason}")]
pub struct VolumeError {
    /// The volume's name in the pod.
    pub volume: String,
    /// What is missing or went wrong, and where.
    pub reason: String,
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
    /// Undoes it for the pod with this UID, whether or not it was ever mounted by this process.
    async fn unmount(&self, pod_uid: &str) -> Result<(), VolumeError>;
    /// UIDs of the pods that have a folder on this node, for removing what is left over.
    async fn pods_on_disk(&self) -> Vec<String>;
}
