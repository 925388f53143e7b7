//! `runc run` of the bundle that a pod's container was made from.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::api::milliseconds;

/// The parent of the containers' cgroups.
const CGROUP: &str = "keelson-bench";

/// A bundle on disk.
#[derive(Debug)]
pub(crate) struct Bundle {
    dir: PathBuf,
    next: u32,
}

impl Bundle {
    /// Makes one below `dir` from the OCI configuration of a container that runs now, and the files
    /// of its image's archive. What is the pod's own (its namespaces and files) is left out: runc
    /// makes the namespaces anew.
    ///
    /// # Errors
    /// When the configuration is not readable, or tar fails.
    pub(crate) fn like(config: &Path, archive: &Path, dir: &Path) -> anyhow::Result<Self> {
        let dir = dir.join("bundle");
        let root = dir.join("rootfs");
        fs::create_dir_all(&root)?;
        let unpack = |archive: &Path, to: &Path| -> anyhow::Result<()> {
            let status = Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(to).status()?;
            if status.success() { Ok(()) } else { bail!("tar -xf {}: {status}", archive.display()) }
        };
        unpack(archive, &dir)?;
        unpack(&dir.join("layer.tar"), &root)?;
        let text = fs::read(config).with_context(|| config.display().to_string())?;
        let spec = adapted(serde_json::from_slice(&text)?);
        fs::write(dir.join("config.json"), spec.to_string())?;
        Ok(Self { dir, next: 0 })
    }

    /// Runs a container in the background, as long as that takes; then removes it.
    ///
    /// # Errors
    /// When runc fails, with what it said.
    pub(crate) fn run(&mut self) -> anyhow::Result<f64> {
        let id = format!("kb{}-{}", std::process::id(), self.next);
        self.next += 1;
        let started = Instant::now();
        let error = self.dir.join("error");
        let status = self
            .runc(&["run", "--detach", "--bundle"])
            .arg(&self.dir)
            .arg(&id)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&error)?)
            .status()
            .context("runc")?;
        let took = milliseconds(started, Instant::now());
        let removed = self.runc(&["delete", "--force", &id]).output().context("runc delete")?;
        if !status.success() {
            bail!("runc run: {status}: {}", fs::read_to_string(&error).unwrap_or_default());
        }
        if !removed.status.success() {
            bail!("runc delete: {}", String::from_utf8_lossy(&removed.stderr));
        }
        Ok(took)
    }

    fn runc(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.dir.join("state")).args(arguments);
        command
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let controllers = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        for controller in controllers {
            let _ = fs::remove_dir(controller.path().join(CGROUP));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(CGROUP));
    }
}

/// The configuration as runc takes it outside the pod.
fn adapted(mut spec: Value) -> Value {
    spec["root"]["path"] = json!("rootfs");
    spec["process"]["terminal"] = json!(false);
    // Lowering it takes a privilege that not every machine gives, and runc insists.
    if let Some(process) = spec["process"].as_object_mut() {
        process.remove("oomScoreAdj");
        process.remove("rlimits");
    }
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("hooks");
    }
    let is_of_the_pod = |mount: &Value| {
        let binds = mount["type"] == "bind"
            || mount["options"]
                .as_array()
                .is_some_and(|all| all.iter().any(|option| option == "bind" || option == "rbind"));
        binds && mount["source"].as_str().is_some_and(|source| source.starts_with('/'))
    };
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.retain(|mount| !is_of_the_pod(mount));
    }
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        for namespace in namespaces.iter_mut().filter_map(Value::as_object_mut) {
            namespace.remove("path");
        }
        // A pod has one of each; what its shim holds is not in the container's configuration.
        for kind in ["pid", "network", "ipc", "uts", "mount"] {
            if !namespaces.iter().any(|namespace| namespace["type"] == kind) {
                namespaces.push(json!({"type": kind}));
            }
        }
    }
    spec["linux"]["cgroupsPath"] = json!(format!("/{CGROUP}/{}", std::process::id()));
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_pods_own_is_left_out() {
        let spec = adapted(json!({
            "process": {"args": ["sleep"], "oomScoreAdj": -997, "terminal": false},
            "root": {"path": "/data/rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/etc/hosts", "source": "/data/hosts", "options": ["rbind"]}
            ],
            "linux": {"namespaces": [{"type": "network", "path": "/run/netns/p"}, {"type": "mount"}]}
        }));
        assert_eq!(spec["process"], json!({"args": ["sleep"], "terminal": false}));
        assert_eq!(spec["mounts"].as_array().unwrap().len(), 1);
        assert_eq!(spec["root"]["path"], "rootfs");
        let namespaces = spec["linux"]["namespaces"].as_array().unwrap();
        assert_eq!(namespaces.len(), 5);
        assert!(namespaces.iter().all(|namespace| namespace["path"].is_null()));
    }
}
