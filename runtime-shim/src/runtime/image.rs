//! Images, and who may have them.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::ImageId;

/// An image in the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// The digest of its config.
    pub id: ImageId,
    /// `name:tag` references.
    pub repo_tags: Vec<String>,
    /// `name@sha256:…` references.
    pub repo_digests: Vec<String>,
    /// Bytes of its layers, unpacked or not as the store counts them.
    pub size: u64,
    /// The numeric user of its config, if the config names one.
    pub uid: Option<i64>,
    /// The user's name in its config, if that is not a number.
    pub username: Option<String>,
    /// Never collected as garbage.
    pub pinned: bool,
    /// The volumes its config declares.
    pub volumes: Vec<PathBuf>,
}

/// A user and password, or a token, for a registry.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryAuth {
    /// User name.
    pub username: String,
    /// Password.
    pub password: String,
    /// Bearer token, instead of user and password.
    pub registry_token: String,
}

impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryAuth").field("username", &self.username).finish_non_exhaustive()
    }
}

/// Space that images use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageFsInfo {
    /// Where the images are.
    pub mountpoint: PathBuf,
    /// Bytes they use.
    pub used_bytes: u64,
    /// Files they use.
    pub inodes_used: u64,
}
