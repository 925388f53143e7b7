//! What a container may do, from its own and its pod's security context.

use std::path::Path;

use k8s_openapi::api::core::v1::{Container, Pod, SeccompProfile as ApiSeccomp, SecurityContext};
use keelson_runtime_shim::runtime::{ContainerSecurity, Image, SeccompProfile};

use super::ConfigError;
use crate::{config::AgentConfig, worker::view};

/// The container's security settings: its own before its pod's.
pub(crate) fn container_security(
    config: &AgentConfig,
    pod: &Pod,
    container: &Container,
    image: &Image,
) -> Result<ContainerSecurity, ConfigError> {
    let of_pod = view::spec(pod).security_context.clone().unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    let privileged = own.privileged == Some(true);
    let run_as_user = own.run_as_user.or(of_pod.run_as_user);
    let run_as_non_root = own.run_as_non_root.or(of_pod.run_as_non_root);
    if run_as_non_root == Some(true) {
        verify_non_root(pod, container, run_as_user, image)?;
    }
    let capabilities = own.capabilities.clone().unwrap_or_default();
    let plain = |list: Option<Vec<String>>| -> Vec<String> {
        let names = list.unwrap_or_default().into_iter();
        names.map(|name| name.trim_start_matches("CAP_").to_owned()).collect()
    };
    let mut supplemental_groups = of_pod.supplemental_groups.clone().unwrap_or_default();
    supplemental_groups.extend(of_pod.fs_group);
    Ok(ContainerSecurity {
        privileged,
        run_as_user,
        run_as_group: own.run_as_group.or(of_pod.run_as_group),
        run_as_username: run_as_user.is_none().then(|| image.username.clone()).flatten(),
        supplemental_groups,
        strict_supplemental_groups: of_pod.supplemental_groups_policy.as_deref() == Some("Strict"),
        no_new_privileges: no_new_privileges(&own),
        readonly_rootfs: own.read_only_root_filesystem == Some(true),
        seccomp: if privileged {
            SeccompProfile::Unconfined
        } else {
            seccomp(config, own.seccomp_profile.as_ref().or(of_pod.seccomp_profile.as_ref()))?
        },
        unmasked_proc: own.proc_mount.as_deref() == Some("Unmasked"),
        add_capabilities: plain(capabilities.add),
        drop_capabilities: plain(capabilities.drop),
    })
}

/// `allowPrivilegeEscalation: false`; privileged containers and those with `SYS_ADMIN` always may.
fn no_new_privileges(own: &SecurityContext) -> bool {
    let added = own.capabilities.as_ref().and_then(|capabilities| capabilities.add.as_ref());
    let admin = added.is_some_and(|added| {
        added.iter().any(|name| matches!(name.as_str(), "SYS_ADMIN" | "CAP_SYS_ADMIN"))
    });
    own.allow_privilege_escalation == Some(false) && own.privileged != Some(true) && !admin
}

/// The documented check of `runAsNonRoot`, with its documented messages.
fn verify_non_root(
    pod: &Pod,
    container: &Container,
    run_as_user: Option<i64>,
    image: &Image,
) -> Result<(), ConfigError> {
    let place = format!("pod: {:?}, container: {}", view::format_pod(pod), container.name);
    let refused = |what: String| Err(ConfigError(format!("{what} ({place})")));
    match (run_as_user, image.uid, &image.username) {
        (Some(0), ..) => refused("container's runAsUser breaks non-root policy".to_owned()),
        (Some(_), ..) => Ok(()),
        (None, Some(0), _) => {
            refused("container has runAsNonRoot and image will run as root".to_owned())
        }
        (None, Some(_), _) => Ok(()),
        (None, None, Some(name)) if !name.is_empty() => refused(format!(
            "container has runAsNonRoot and image has non-numeric user ({name}), cannot verify \
             user is non-root"
        )),
        (None, None, _) => {
            refused("container has runAsNonRoot and image will run as root".to_owned())
        }
    }
}

fn seccomp(
    config: &AgentConfig,
    profile: Option<&ApiSeccomp>,
) -> Result<SeccompProfile, ConfigError> {
    let Some(profile) = profile else {
        return Ok(if config.seccomp_default {
            SeccompProfile::RuntimeDefault
        } else {
            SeccompProfile::Unconfined
        });
    };
    match profile.type_.as_str() {
        "RuntimeDefault" => Ok(SeccompProfile::RuntimeDefault),
        "Unconfined" => Ok(SeccompProfile::Unconfined),
        "Localhost" => {
            let name = profile.localhost_profile.as_deref().unwrap_or_default();
            let relative = Path::new(name);
            let inside = !name.is_empty()
                && relative
                    .components()
                    .all(|part| matches!(part, std::path::Component::Normal(_)));
            if !inside {
                return Err(ConfigError(format!(
                    "localhostProfile {name:?} must be a path relative to the node's seccomp folder"
                )));
            }
            Ok(SeccompProfile::Localhost(config.root_dir.join("seccomp").join(relative)))
        }
        other => Err(ConfigError(format!("seccomp profile type {other:?} is not supported"))),
    }
}

#[cfg(test)]
mod tests {
    use keelson_runtime_shim::runtime::ImageId;

    use super::*;
    use crate::worker::fixture;

    fn image(uid: Option<i64>, username: Option<&str>) -> Image {
        Image {
            id: ImageId("sha256:0".to_owned()),
            repo_tags: vec![],
            repo_digests: vec![],
            size: 0,
            uid,
            username: username.map(str::to_owned),
            pinned: false,
            volumes: vec![],
        }
    }

    #[test]
    fn non_root_is_verified() {
        let rows = [
            (Some(0), None, None, Some("breaks non-root policy")),
            (Some(5), None, None, None),
            (None, Some(0), None, Some("image will run as root")),
            (None, Some(7), None, None),
            (None, None, Some("app"), Some("non-numeric user (app)")),
            (None, None, None, Some("image will run as root")),
        ];
        for (user, uid, name, refusal) in rows {
            let pod = fixture::pod(&["a"]);
            let mut container = fixture::container("a");
            container.security_context = Some(SecurityContext {
                run_as_non_root: Some(true),
                run_as_user: user,
                ..Default::default()
            });
            let config = AgentConfig::new("node", vec![]);
            let result = container_security(&config, &pod, &container, &image(uid, name));
            match (result, refusal) {
                (Ok(_), None) => {}
                (Err(error), Some(text)) => assert!(error.0.contains(text), "{error}"),
                (result, refusal) => panic!("{user:?} {uid:?}: {result:?}, wanted {refusal:?}"),
            }
        }
    }

    #[test]
    fn a_local_profile_stays_in_its_folder() {
        let config = AgentConfig::new("node", vec![]);
        let profile = |name: &str| ApiSeccomp {
            type_: "Localhost".to_owned(),
            localhost_profile: Some(name.to_owned()),
        };
        assert!(seccomp(&config, Some(&profile("../x"))).is_err());
        assert!(seccomp(&config, Some(&profile("/etc/x"))).is_err());
        assert_eq!(
            seccomp(&config, Some(&profile("a/b.json"))).unwrap(),
            SeccompProfile::Localhost("/var/lib/kubelet/seccomp/a/b.json".into())
        );
    }
}
