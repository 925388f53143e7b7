//! What each of a pod's volumes is, and what files it holds: pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
};

use k8s_openapi::api::core::v1::{
    DownwardAPIVolumeFile, KeyToPath, Pod, ServiceAccountTokenProjection, Volume, VolumeProjection,
};
use keelson_api::quantity::Quantity;

use crate::environment::{
    self, Allocatable, Data, DataKind, DataName, ObjectError, Place, TokenWish, Watched,
};

/// The mode of files whose volume does not say one.
const DEFAULT_MODE: u32 = 0o644;
/// A token for the API server is asked for an hour, as the API's own default is.
const DEFAULT_TOKEN_SECONDS: i64 = 3600;

/// What a volume is made as.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum VolumePlan {
    /// A folder of the node.
    Host {
        /// Where.
        path: PathBuf,
        /// What must be there, or is made.
        kind: HostPathKind,
    },
    /// An empty folder on the disk.
    Folder,
    /// An empty folder in memory.
    Memory {
        /// Its bound in bytes; the kernel's (half of the memory) without one.
        limit: Option<u64>,
    },
    /// Files that follow objects.
    Files(FilesPlan),
}

/// The documented values of `hostPath.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostPathKind {
    /// No check.
    Unset,
    DirectoryOrCreate,
    Directory,
    FileOrCreate,
    File,
    Socket,
    CharDevice,
    BlockDevice,
}

/// A volume whose files follow objects.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct FilesPlan {
    /// The plugin's folder, as the kubelet names it.
    pub(crate) plugin: &'static str,
    /// Kept in memory, so that a Secret is never on a disk.
    pub(crate) in_memory: bool,
    mode: u32,
    sources: Vec<Source>,
}

#[derive(Clone, Debug, PartialEq)]
enum Source {
    Data { object: DataName, items: Option<Vec<KeyToPath>>, optional: bool },
    Downward(Vec<DownwardAPIVolumeFile>),
    Token { wish: TokenWish, path: String },
}

/// A file to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileContent {
    pub(crate) bytes: Vec<u8>,
    pub(crate) mode: u32,
    /// Its owner, if that is not root.
    pub(crate) owner: Option<u32>,
}

/// The files of a volume, by their checked path in it.
pub(crate) type Files = BTreeMap<PathBuf, FileContent>;

/// Decides what a volume is.
///
/// # Errors
/// It is of a kind that is not supported, or not well formed.
pub(crate) fn plan(
    pod: &Pod,
    volume: &Volume,
    allocatable: &Allocatable,
) -> Result<VolumePlan, String> {
    if let Some(host) = &volume.host_path {
        let path = PathBuf::from(&host.path);
        if path.components().any(|c| c == Component::ParentDir) || !path.is_absolute() {
            return Err(format!("hostPath {:?} must be absolute and without ..", host.path));
        }
        let kind = host_path_kind(host.type_.as_deref().unwrap_or_default())?;
        return Ok(VolumePlan::Host { path, kind });
    }
    if let Some(empty) = &volume.empty_dir {
        return match empty.medium.as_deref().unwrap_or_default() {
            "" => Ok(VolumePlan::Folder),
            "Memory" => {
                let asked = empty.size_limit.as_ref().map(|q| Quantity::parse(&q.0)).transpose();
                let asked = asked.map_err(|error| format!("sizeLimit: {error}"))?;
                Ok(VolumePlan::Memory { limit: memory_limit(pod, asked, allocatable) })
            }
            medium => Err(format!("emptyDir medium {medium:?} is not supported")),
        };
    }
    files_plan(pod, volume).map(VolumePlan::Files)
}

fn host_path_kind(kind: &str) -> Result<HostPathKind, String> {
    Ok(match kind {
        "" => HostPathKind::Unset,
        "DirectoryOrCreate" => HostPathKind::DirectoryOrCreate,
        "Directory" => HostPathKind::Directory,
        "FileOrCreate" => HostPathKind::FileOrCreate,
        "File" => HostPathKind::File,
        "Socket" => HostPathKind::Socket,
        "CharDevice" => HostPathKind::CharDevice,
        "BlockDevice" => HostPathKind::BlockDevice,
        other => return Err(format!("hostPath type {other:?} is not one of the documented")),
    })
}

/// The least of what is asked for, what the pod's containers may use together, and what the node
/// has for its pods (KEP-1967).
fn memory_limit(pod: &Pod, asked: Option<Quantity>, allocatable: &Allocatable) -> Option<u64> {
    let spec = pod.spec.as_ref();
    let limits = spec.into_iter().flat_map(|spec| &spec.containers).map(|container| {
        let limits = container.resources.as_ref()?.limits.as_ref()?;
        Quantity::parse(&limits.get("memory")?.0).ok()
    });
    // Without a limit on each container there is none on the pod.
    let pod_limit = limits.collect::<Option<Vec<_>>>().filter(|limits| !limits.is_empty());
    let pod_limit = pod_limit.map(|limits| limits.into_iter().sum::<Quantity>());
    [asked, pod_limit, allocatable.get("memory").cloned()]
        .into_iter()
        .flatten()
        .filter_map(|quantity| u64::try_from(quantity.value()).ok())
        .filter(|bytes| *bytes > 0)
        .min()
}

fn files_plan(pod: &Pod, volume: &Volume) -> Result<FilesPlan, String> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let data =
        |kind, name: &str, items: &Option<Vec<KeyToPath>>, optional: Option<bool>| Source::Data {
            object: DataName { kind, namespace: namespace.to_owned(), name: name.to_owned() },
            items: items.clone(),
            optional: optional.unwrap_or(false),
        };
    let plan = |plugin, in_memory, mode: Option<i32>, sources| {
        Ok(FilesPlan { plugin, in_memory, mode: checked_mode(mode)?, sources })
    };
    if let Some(source) = &volume.config_map {
        let sources = vec![data(DataKind::ConfigMap, &source.name, &source.items, source.optional)];
        plan("kubernetes.io~configmap", false, source.default_mode, sources)
    } else if let Some(source) = &volume.secret {
        let name = source.secret_name.as_deref().unwrap_or_default();
        let sources = vec![data(DataKind::Secret, name, &source.items, source.optional)];
        plan("kubernetes.io~secret", true, source.default_mode, sources)
    } else if let Some(source) = &volume.downward_api {
        let sources = vec![Source::Downward(source.items.clone().unwrap_or_default())];
        plan("kubernetes.io~downward-api", true, source.default_mode, sources)
    } else if let Some(source) = &volume.projected {
        let sources = source.sources.iter().flatten().map(|s| projected(pod, s, data));
        let sources = sources.collect::<Result<Vec<_>, _>>()?;
        plan("kubernetes.io~projected", true, source.default_mode, sources)
    } else {
        Err(unsupported(volume))
    }
}

fn projected(
    pod: &Pod,
    source: &VolumeProjection,
    data: impl Fn(DataKind, &str, &Option<Vec<KeyToPath>>, Option<bool>) -> Source,
) -> Result<Source, String> {
    if let Some(source) = &source.config_map {
        Ok(data(DataKind::ConfigMap, &source.name, &source.items, source.optional))
    } else if let Some(source) = &source.secret {
        Ok(data(DataKind::Secret, &source.name, &source.items, source.optional))
    } else if let Some(source) = &source.downward_api {
        Ok(Source::Downward(source.items.clone().unwrap_or_default()))
    } else if let Some(source) = &source.service_account_token {
        Ok(Source::Token { wish: wish(pod, source), path: source.path.clone() })
    } else if source.cluster_trust_bundle.is_some() {
        Err("projected clusterTrustBundle is not supported: use a ConfigMap".into())
    } else if source.pod_certificate.is_some() {
        Err("projected podCertificate is not supported: use a Secret".into())
    } else {
        Err("a projected source is empty".into())
    }
}

fn wish(pod: &Pod, source: &ServiceAccountTokenProjection) -> TokenWish {
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
    TokenWish {
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        service_account: account.filter(|name| !name.is_empty()).unwrap_or("default".into()),
        pod: (
            pod.metadata.name.clone().unwrap_or_default(),
            pod.metadata.uid.clone().unwrap_or_default(),
        ),
        audience: source.audience.clone().unwrap_or_default(),
        expiration_seconds: source.expiration_seconds.unwrap_or(DEFAULT_TOKEN_SECONDS),
    }
}

fn unsupported(volume: &Volume) -> String {
    // The only field of a volume beside its name is the one that says what it is.
    let kind = serde_json::to_value(volume)
        .ok()
        .and_then(|value| value.as_object()?.keys().find(|key| key.as_str() != "name").cloned());
    match kind.as_deref() {
        None => "it does not say what it is: one of emptyDir, hostPath, configMap, secret, \
                 downwardAPI and projected is needed"
            .to_owned(),
        Some(kind) => format!(
            "volumes of kind {kind} are not supported: emptyDir, hostPath, configMap, secret, \
             downwardAPI and projected are"
        ),
    }
}

/// Whether containers may only ever read the volume, whatever their mount says.
pub fn is_read_only(volume: &Volume) -> bool {
    volume.config_map.is_some()
        || volume.secret.is_some()
        || volume.downward_api.is_some()
        || volume.projected.is_some()
}

impl FilesPlan {
    /// The objects whose change changes the files.
    pub(crate) fn objects(&self) -> BTreeSet<DataName> {
        let object = |source: &Source| match source {
            Source::Data { object, .. } => Some(object.clone()),
            _ => None,
        };
        self.sources.iter().filter_map(object).collect()
    }

    /// The tokens that are among the files.
    pub(crate) fn tokens(&self) -> Vec<TokenWish> {
        let token = |source: &Source| match source {
            Source::Token { wish, .. } => Some(wish.clone()),
            _ => None,
        };
        self.sources.iter().filter_map(token).collect()
    }

    /// The files, from what is known of the objects and tokens.
    ///
    /// # Errors
    /// Something that is not optional is missing.
    pub(crate) fn files(
        &self,
        pod: &Pod,
        allocatable: &Allocatable,
        object: impl Fn(&DataName) -> Watched,
        token: impl Fn(&TokenWish) -> Option<String>,
    ) -> Result<Files, FilesError> {
        let mut files = Files::new();
        let (owner, group) = owners(pod);
        for source in &self.sources {
            match source {
                Source::Data { object: name, items, optional } => {
                    let data = match object(name) {
                        Watched::Present(data) => data,
                        Watched::Missing(ObjectError::NotFound(_)) if *optional => continue,
                        Watched::Missing(error) => return Err(FilesError::Object(error)),
                        Watched::Pending => {
                            let reason = format!("{name}: timed out waiting for it");
                            return Err(FilesError::Object(ObjectError::Unreachable(reason)));
                        }
                    };
                    self.data_files(name, &data, items.as_deref(), *optional, &mut files)?;
                }
                Source::Downward(items) => {
                    for item in items {
                        let text = match (&item.field_ref, &item.resource_field_ref) {
                            (Some(field), _) => environment::field(pod, field, Place::File),
                            (None, Some(resource)) => {
                                environment::resource(pod, None, resource, allocatable)
                            }
                            (None, None) => Err(format!("{}: it says no field", item.path)),
                        };
                        let bytes = text.map_err(FilesError::Invalid)?.into_bytes();
                        let mode = self.mode_of(item.mode)?;
                        insert(&mut files, &item.path, FileContent { bytes, mode, owner: None })?;
                    }
                }
                Source::Token { wish, path } => {
                    let Some(token) = token(wish) else { continue };
                    // As documented: only its user may read it where there is one user, or a
                    // group is given; everybody in the pod otherwise.
                    let private = owner.is_some() || group.is_some();
                    let mode = if private { 0o600 } else { self.mode };
                    insert(&mut files, path, FileContent { bytes: token.into(), mode, owner })?;
                }
            }
        }
        Ok(files)
    }

    fn data_files(
        &self,
        name: &DataName,
        data: &Data,
        items: Option<&[KeyToPath]>,
        optional: bool,
        files: &mut Files,
    ) -> Result<(), FilesError> {
        let Some(items) = items.filter(|items| !items.is_empty()) else {
            for (key, bytes) in data.values.iter().chain(&data.binary) {
                let content = FileContent { bytes: bytes.clone(), mode: self.mode, owner: None };
                insert(files, key, content)?;
            }
            return Ok(());
        };
        for item in items {
            match data.get(&item.key) {
                Some(bytes) => {
                    let mode = self.mode_of(item.mode)?;
                    let content = FileContent { bytes: bytes.clone(), mode, owner: None };
                    insert(files, &item.path, content)?;
                }
                None if optional => {}
                None => {
                    let kind = match name.kind {
                        DataKind::ConfigMap => "config",
                        DataKind::Secret => "secret",
                    };
                    let key = &item.key;
                    let reason = format!("references non-existent {kind} key: {key}");
                    return Err(FilesError::Invalid(reason));
                }
            }
        }
        Ok(())
    }

    fn mode_of(&self, item: Option<i32>) -> Result<u32, FilesError> {
        match item {
            None => Ok(self.mode),
            some => checked_mode(some).map_err(FilesError::Invalid),
        }
    }
}

/// Why a volume's files can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FilesError {
    /// An object is missing.
    #[error("{0}")]
    Object(ObjectError),
    /// What the pod asks for is not there or makes no sense.
    #[error("{0}")]
    Invalid(String),
}

fn checked_mode(mode: Option<i32>) -> Result<u32, String> {
    match mode {
        None => Ok(DEFAULT_MODE),
        Some(mode) => u32::try_from(mode)
            .ok()
            .filter(|mode| *mode <= 0o777)
            .ok_or_else(|| format!("mode {mode} must be a number between 0 and 0777 octal")),
    }
}

fn insert(files: &mut Files, path: &str, content: FileContent) -> Result<(), FilesError> {
    files.insert(checked_path(path).map_err(FilesError::Invalid)?, content);
    Ok(())
}

/// A path inside a volume: relative, without `..`, and not one of the writer's own names.
fn checked_path(path: &str) -> Result<PathBuf, String> {
    let parsed = Path::new(path);
    let names: Option<PathBuf> = parsed
        .components()
        .map(|component| match component {
            Component::Normal(name) if name.len() <= 255 => Some(name),
            _ => None,
        })
        .collect();
    match names {
        Some(names) if !path.is_empty() && !path.starts_with("..") && path.len() < 4096 => {
            Ok(names)
        }
        _ => Err(format!("invalid path {path:?}: it must be relative and must not contain '..'")),
    }
}

/// The one user that all containers run as, if there is one, and the volumes' group.
pub(crate) fn owners(pod: &Pod) -> (Option<u32>, Option<u32>) {
    let Some(spec) = &pod.spec else { return (None, None) };
    let context = spec.security_context.as_ref();
    let of_pod = context.and_then(|context| context.run_as_user);
    let users: BTreeSet<Option<i64>> = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .map(|container| {
            let own = container.security_context.as_ref().and_then(|own| own.run_as_user);
            own.or(of_pod)
        })
        .collect();
    let user = match users.into_iter().collect::<Vec<_>>()[..] {
        [Some(user)] => u32::try_from(user).ok(),
        _ => None,
    };
    let group = context.and_then(|context| context.fs_group);
    (user, group.and_then(|group| u32::try_from(group).ok()))
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
