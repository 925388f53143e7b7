//! Where everything is kept: at Kubernetes' usual places, or all under one folder.

use std::path::{Path, PathBuf};

use keelson_api::hash::fnv1a;

/// The folders and files of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Paths {
    /// The folder given with `--data-dir`, if one was.
    pub(crate) data_dir: Option<PathBuf>,
    /// The kubelet's folder: volumes, plugins.
    pub(crate) kubelet: PathBuf,
    /// `/var/log/pods`.
    pub(crate) pod_logs: PathBuf,
    /// `/var/log/containers`.
    pub(crate) container_logs: PathBuf,
    /// Certificates and keys.
    pub(crate) pki: PathBuf,
    /// The administrator's kubeconfig.
    pub(crate) admin_kubeconfig: PathBuf,
    /// The kubeconfig of this machine's node, which a control plane of its own process writes.
    pub(crate) kubelet_kubeconfig: PathBuf,
    /// The kubeconfig of the service proxy, likewise.
    pub(crate) proxy_kubeconfig: PathBuf,
    /// The store's folder.
    pub(crate) store: PathBuf,
    /// Images, sandboxes and containers.
    pub(crate) runtime: PathBuf,
    /// Sockets, the process id, and what `down` must know; gone after a reboot.
    pub(crate) run: PathBuf,
    /// The default folder of static pods.
    pub(crate) manifests: PathBuf,
    /// The log of a detached `up`.
    pub(crate) log_file: PathBuf,
}

impl Paths {
    /// The usual places, or all under `data_dir` (made absolute, since pods' mounts and other
    /// processes use these paths too).
    pub(crate) fn new(data_dir: Option<&Path>) -> std::io::Result<Self> {
        let Some(dir) = data_dir else { return Ok(Self::usual()) };
        let dir = std::path::absolute(dir)?;
        Ok(Self {
            kubelet: dir.join("kubelet"),
            pod_logs: dir.join("log/pods"),
            container_logs: dir.join("log/containers"),
            pki: dir.join("pki"),
            admin_kubeconfig: dir.join("admin.conf"),
            kubelet_kubeconfig: dir.join("kubelet.conf"),
            proxy_kubeconfig: dir.join("kube-proxy.conf"),
            store: dir.join("store"),
            runtime: dir.join("runtime"),
            run: run_folder(&dir),
            manifests: dir.join("manifests"),
            log_file: dir.join("log/keelson.log"),
            data_dir: Some(dir),
        })
    }

    fn usual() -> Self {
        Self {
            data_dir: None,
            kubelet: "/var/lib/kubelet".into(),
            pod_logs: "/var/log/pods".into(),
            container_logs: "/var/log/containers".into(),
            pki: "/etc/kubernetes/pki".into(),
            admin_kubeconfig: "/etc/kubernetes/admin.conf".into(),
            kubelet_kubeconfig: "/etc/kubernetes/kubelet.conf".into(),
            proxy_kubeconfig: "/etc/kubernetes/kube-proxy.conf".into(),
            store: "/var/lib/keelson/store".into(),
            runtime: "/var/lib/keelson/runtime".into(),
            run: "/run/keelson".into(),
            manifests: "/etc/keelson/manifests".into(),
            log_file: "/var/log/keelson.log".into(),
        }
    }

    /// What `down --purge` removes.
    pub(crate) fn stored(&self) -> Vec<&Path> {
        let mut stored: Vec<&Path> = vec![
            &self.kubelet,
            &self.pod_logs,
            &self.container_logs,
            &self.pki,
            &self.admin_kubeconfig,
            &self.kubelet_kubeconfig,
            &self.proxy_kubeconfig,
            &self.store,
            &self.runtime,
            &self.run,
            &self.log_file,
        ];
        // The usual place of static pods is the user's own; under a data folder it is ours.
        if self.data_dir.is_some() {
            stored.push(&self.manifests);
        }
        stored
    }

    /// The flag that other commands need to find this instance.
    pub(crate) fn flag(&self) -> String {
        self.data_dir
            .as_ref()
            .map_or_else(String::new, |dir| format!(" --data-dir {}", dir.display()))
    }
}

/// How long the path of the folder with the sockets may be: a socket's address has 107 characters at
/// most (unix(7)), of which the runtime takes 32 for a name of its own.
const RUN_LENGTH: usize = 68;

/// The folder with the sockets below a data folder, or, if that would be too long a path for a
/// socket, one that is named after it.
fn run_folder(dir: &Path) -> PathBuf {
    let run = dir.join("run");
    let bytes = run.as_os_str().as_encoded_bytes();
    if bytes.len() <= RUN_LENGTH {
        return run;
    }
    // The same in every release, so that `down` finds what an older `up` left.
    PathBuf::from(format!("/run/keelson-{:016x}", fnv1a(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_folder_holds_everything() {
        let paths = Paths::new(Some(Path::new("/tmp/k"))).unwrap();
        for path in paths.stored() {
            assert!(path.starts_with("/tmp/k"), "{}", path.display());
        }
        assert_eq!(paths.flag(), " --data-dir /tmp/k");
    }

    #[test]
    fn sockets_fit_however_long_the_folder_is() {
        let long = |length: usize| PathBuf::from("/").join("x".repeat(length));
        let run = |length| Paths::new(Some(&long(length))).unwrap().run;
        assert_eq!(run(63), long(63).join("run"));
        assert!(run(64).starts_with("/run") && run(64) != run(65));
        assert_eq!(run(200), run(200));
    }

    #[test]
    fn the_usual_places_are_kubernetes_own() {
        let paths = Paths::new(None).unwrap();
        assert_eq!(paths.kubelet, Path::new("/var/lib/kubelet"));
        assert_eq!(paths.pki, Path::new("/etc/kubernetes/pki"));
        assert!(!paths.stored().contains(&Path::new("/etc/keelson/manifests")));
    }
}
