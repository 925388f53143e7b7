//! The instance that runs over a set of folders: at most one, found and stopped by others through a
//! file in its run folder.

use std::{
    fs::{self, File, TryLockError},
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use crate::paths::Paths;

/// What others must know of a running instance, and `down` of the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Its process id.
    pub(crate) pid: i32,
    /// `up`, `agent`, `control-plane`.
    pub(crate) role: String,
    /// The version that wrote this.
    pub(crate) version: String,
    /// The node's name.
    pub(crate) node_name: String,
    /// `https://address:port` of the API server, if it is in the process.
    pub(crate) api_server: Option<String>,
    /// Whether it has told that it is ready.
    pub(crate) ready: bool,
    /// The pods' parent cgroup.
    pub(crate) cgroup_root: String,
}

impl Record {
    /// What is the same for every role.
    pub(crate) fn of_this_process(node_name: &str) -> Self {
        Self {
            // Process ids are below 2^22.
            pid: i32::try_from(std::process::id()).unwrap_or(i32::MAX),
            role: String::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node_name: node_name.to_owned(),
            api_server: None,
            ready: false,
            cgroup_root: String::new(),
        }
    }
}

/// Holds the folders for this process until dropped.
#[derive(Debug)]
pub(crate) struct Held {
    _lock: File,
    record_path: PathBuf,
    record: Record,
}

fn record_path(paths: &Paths) -> PathBuf {
    paths.run.join("instance.json")
}

fn lock_path(paths: &Paths) -> PathBuf {
    paths.run.join("instance.lock")
}

/// Takes the folders for this process.
///
/// # Errors
/// When another process has them, or the run folder can't be written.
pub(crate) fn hold(paths: &Paths, record: Record) -> anyhow::Result<Held> {
    fs::create_dir_all(&paths.run).with_context(|| format!("folder {}", paths.run.display()))?;
    let path = lock_path(paths);
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("lock {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let running =
                read(paths)?.map_or_else(String::new, |r| format!(" (process {})", r.pid));
            bail!(
                "keelson already runs here{running}: stop it with `keelson down{}`, or choose \
                 another folder with --data-dir",
                paths.flag()
            );
        }
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("lock {}", path.display()));
        }
    }
    let held = Held { _lock: lock, record_path: record_path(paths), record };
    held.write()?;
    Ok(held)
}

impl Held {
    /// Tells others that the instance is ready.
    ///
    /// # Errors
    /// When the record can't be written.
    pub(crate) fn ready(&mut self) -> anyhow::Result<()> {
        self.record.ready = true;
        self.write()
    }

    fn write(&self) -> anyhow::Result<()> {
        let context = || format!("record {}", self.record_path.display());
        let temporary = self.record_path.with_extension("tmp");
        let mut file = File::create(&temporary).with_context(context)?;
        file.write_all(&serde_json::to_vec(&self.record)?).with_context(context)?;
        fs::rename(&temporary, &self.record_path).with_context(context)
    }
}

/// The record of the running or the last instance.
///
/// # Errors
/// When it is there but can't be read.
pub(crate) fn read(paths: &Paths) -> anyhow::Result<Option<Record>> {
    let path = record_path(paths);
    match fs::read(&path) {
        Ok(text) => Ok(Some(
            serde_json::from_slice(&text).with_context(|| format!("record {}", path.display()))?,
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("record {}", path.display())),
    }
}

/// Whether a process holds the folders now.
pub(crate) fn is_running(paths: &Paths) -> bool {
    // The lock, not the process id, tells: ids are used again.
    File::options()
        .write(true)
        .open(lock_path(paths))
        .is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Asks the running process to end, waits for it, and after `patience` kills it.
/// Returns whether there was one.
///
/// # Errors
/// When it can't be signalled, or is still there after it was killed.
pub(crate) fn stop(paths: &Paths, patience: Duration) -> anyhow::Result<bool> {
    if !is_running(paths) {
        return Ok(false);
    }
    let record =
        read(paths)?.context("something holds the folders, but left no record of itself")?;
    let pid = Pid::from_raw(record.pid);
    for (signal, wait) in [(Signal::SIGTERM, patience), (Signal::SIGKILL, Duration::from_secs(10))]
    {
        if !is_running(paths) {
            return Ok(true);
        }
        match kill(pid, signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => return Err(error).with_context(|| format!("signal process {pid}")),
        }
        if wait_stopped(paths, wait) {
            return Ok(true);
        }
    }
    bail!("process {pid} did not end");
}

/// Another process of this program that keeps Service rules in this network namespace.
pub(crate) fn other_proxy() -> Option<u32> {
    let network = fs::read_link("/proc/self/ns/net").ok()?;
    let own = std::process::id();
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        // the arguments of a process that has ended are gone
        let arguments = fs::read(entry.path().join("cmdline")).ok()?;
        let same = fs::read_link(entry.path().join("ns/net")).is_ok_and(|net| net == network);
        (pid != own && same && keeps_rules(&arguments)).then_some(pid)
    })
}

/// Whether a command line, its parts ended by zeros, is `keelson up` or `keelson proxy`.
fn keeps_rules(arguments: &[u8]) -> bool {
    let mut parts = arguments.split(|byte| *byte == 0);
    let program = parts.next().and_then(|program| program.rsplit(|byte| *byte == b'/').next());
    let ours = program == Some(b"keelson".as_slice()) || arguments.starts_with(b"/proc/self/exe\0");
    let command = parts.find(|part| !part.starts_with(b"-"));
    ours && (command == Some(b"up".as_slice()) || command == Some(b"proxy".as_slice()))
}

/// Waits until nobody holds the folders.
fn wait_stopped(paths: &Paths, deadline: Duration) -> bool {
    let start = Instant::now();
    while is_running(paths) {
        if start.elapsed() > deadline {
            return false;
        }
        // The kernel offers no way to wait for another's flock without taking it; this is the
        // step between two looks.
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Forgets the last instance, after everything of it is gone.
///
/// # Errors
/// When its record can't be removed.
pub(crate) fn forget(paths: &Paths) -> anyhow::Result<()> {
    for path in [record_path(paths), lock_path(paths)] {
        remove_if_there(&path)?;
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            pid: 1,
            role: "up".into(),
            version: "0".into(),
            node_name: "n".into(),
            api_server: None,
            ready: false,
            cgroup_root: String::new(),
        }
    }

    #[test]
    fn who_keeps_rules_is_known_by_its_command_line() {
        for line in ["/usr/bin/keelson up --demo", "keelson proxy", "/proc/self/exe up -x"] {
            assert!(keeps_rules(line.replace(' ', "\0").as_bytes()), "{line}");
        }
        for line in ["keelson down", "keelson agent up", "vi up", ""] {
            assert!(!keeps_rules(line.replace(' ', "\0").as_bytes()), "{line}");
        }
    }

    #[test]
    fn folders_are_held_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(Some(dir.path())).unwrap();
        assert!(!is_running(&paths));
        let mut held = hold(&paths, record()).unwrap();
        assert!(is_running(&paths));
        let error = hold(&paths, record()).unwrap_err().to_string();
        assert!(error.contains("already runs here (process 1)"), "{error}");
        held.ready().unwrap();
        assert!(read(&paths).unwrap().unwrap().ready);
        drop(held);
        assert!(!is_running(&paths));
        forget(&paths).unwrap();
        assert_eq!(read(&paths).unwrap(), None);
    }
}
