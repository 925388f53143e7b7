//! A container's mounts from its `volumeMounts`.

use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod, VolumeMount};
use keelson_runtime_shim::runtime::{Mount, MountPropagation};

use super::ConfigError;
use crate::{
    environment,
    volumes::{self, MountedVolumes},
    worker::view,
};

/// A single file of the host in the container.
pub(crate) fn file(container_path: &str, host_path: PathBuf, readonly: bool) -> Mount {
    Mount {
        container_path: container_path.into(),
        host_path,
        readonly,
        recursive_readonly: false,
        propagation: MountPropagation::Private,
    }
}

/// A mount, and the part of the volume that it is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PlannedMount {
    /// The volume's name.
    pub(crate) volume: String,
    /// Which of the container's `volumeMounts` it is.
    pub(crate) index: usize,
    /// The mount; its host path is the whole volume's while `sub_path` is set.
    pub(crate) mount: Mount,
    /// Set for `subPath` and `subPathExpr`, expanded.
    pub(crate) sub_path: Option<String>,
}

/// The container's volume mounts, outer ones first.
pub(crate) fn volume_mounts(
    pod: &Pod,
    container: &Container,
    volumes: &MountedVolumes,
    env: &[(String, String)],
) -> Result<Vec<PlannedMount>, ConfigError> {
    let mut mounts = Vec::new();
    for (index, wanted) in container.volume_mounts.iter().flatten().enumerate() {
        let Some(path) = volumes.paths.get(&wanted.name) else {
            return Err(ConfigError(format!(
                "cannot find volume {:?} to mount into container {:?}",
                wanted.name, container.name
            )));
        };
        mounts.push(planned(pod, container, (index, wanted), path, env)?);
    }
    mounts.sort_by_key(|planned| planned.mount.container_path.components().count());
    Ok(mounts)
}

fn planned(
    pod: &Pod,
    container: &Container,
    (index, wanted): (usize, &VolumeMount),
    path: &Path,
    env: &[(String, String)],
) -> Result<PlannedMount, ConfigError> {
    let propagation = match wanted.mount_propagation.as_deref() {
        None | Some("None" | "") => MountPropagation::Private,
        Some("HostToContainer") => MountPropagation::HostToContainer,
        Some("Bidirectional") => MountPropagation::Bidirectional,
        Some(other) => {
            return Err(ConfigError(format!("invalid MountPropagation mode: {other:?}")));
        }
    };
    let volume = view::spec(pod).volumes.iter().flatten().find(|volume| volume.name == wanted.name);
    let read_only_volume = volume.is_some_and(volumes::is_read_only);
    let readonly = wanted.read_only == Some(true) || read_only_volume;
    let container_path = if wanted.mount_path.starts_with('/') {
        PathBuf::from(&wanted.mount_path)
    } else {
        Path::new("/").join(&wanted.mount_path)
    };
    Ok(PlannedMount {
        volume: wanted.name.clone(),
        index,
        mount: Mount {
            container_path,
            host_path: path.to_owned(),
            readonly,
            recursive_readonly: readonly
                && matches!(wanted.recursive_read_only.as_deref(), Some("Enabled" | "IfPossible")),
            propagation,
        },
        sub_path: sub_path(container, wanted, env)?,
    })
}

fn sub_path(
    container: &Container,
    wanted: &VolumeMount,
    env: &[(String, String)],
) -> Result<Option<String>, ConfigError> {
    let place = || format!("volume mount {:?} of container {:?}", wanted.name, container.name);
    let text = match (&wanted.sub_path, &wanted.sub_path_expr) {
        (Some(path), _) if !path.is_empty() => path.clone(),
        (_, Some(expression)) if !expression.is_empty() => {
            environment::expand_sub_path(expression, env).map_err(|missing| {
                ConfigError(format!("subPathExpr {expression:?} of {}: {missing}", place()))
            })?
        }
        _ => return Ok(None),
    };
    let relative = Path::new(&text);
    if relative.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(ConfigError(format!(
            "subPath {text:?} of {} must be relative and must not contain '..'",
            place()
        )));
    }
    let plain: PathBuf = relative.components().filter(|part| *part != Component::CurDir).collect();
    Ok(Some(plain.to_string_lossy().into_owned()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::worker::fixture;

    fn mount(path: &str, sub_path: Option<&str>, expression: Option<&str>) -> VolumeMount {
        VolumeMount {
            name: "data".to_owned(),
            mount_path: path.to_owned(),
            sub_path: sub_path.map(str::to_owned),
            sub_path_expr: expression.map(str::to_owned),
            ..Default::default()
        }
    }

    fn plan(mounts: Vec<VolumeMount>) -> Result<Vec<PlannedMount>, ConfigError> {
        let pod = fixture::pod(&["a"]);
        let mut container = fixture::container("a");
        container.volume_mounts = Some(mounts);
        let volumes =
            MountedVolumes { paths: BTreeMap::from([("data".to_owned(), "/v/data".into())]) };
        let env = vec![("NAME".to_owned(), "one".to_owned())];
        volume_mounts(&pod, &container, &volumes, &env)
    }

    #[test]
    fn outer_mounts_come_first() {
        let planned = plan(vec![mount("/a/b", None, None), mount("/a", None, None)]).unwrap();
        assert_eq!(planned[0].mount.container_path, Path::new("/a"));
    }

    #[test]
    fn sub_paths_stay_inside_the_volume() {
        let inside = plan(vec![mount("/a", Some("x/./y"), None)]).unwrap();
        assert_eq!(inside[0].sub_path.as_deref(), Some("x/y"));
        let expanded = plan(vec![mount("/a", None, Some("$(NAME)/z"))]).unwrap();
        assert_eq!(expanded[0].sub_path.as_deref(), Some("one/z"));
        for bad in ["../x", "/x", "a/../b"] {
            assert!(plan(vec![mount("/a", Some(bad), None)]).is_err(), "{bad}");
        }
        assert!(plan(vec![mount("/a", None, Some("$(NO)"))]).is_err());
    }

    #[test]
    fn a_missing_volume_is_named() {
        let mut missing = mount("/a", None, None);
        missing.name = "other".to_owned();
        assert!(plan(vec![missing]).unwrap_err().0.contains("\"other\""));
    }
}
