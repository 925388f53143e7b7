//! Rotation of container logs: a log that is too large is put aside, old ones are packed, the
//! oldest removed.
//!
//! `0.log` is renamed to `0.log.<time>` and the runtime opens a new one; when it is rotated again,
//! the older one is packed to `0.log.<time>.gz`. That is what the kubelet does, so that log
//! collectors find what they expect.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use flate2::{Compression, write::GzEncoder};
use jiff::Timestamp;
use keelson_runtime_shim::runtime::{ContainerState, ContainerStatus};

use crate::{pods::PodDirectory, worker::Context};

/// The suffix of a packed log.
const PACKED: &str = ".gz";
/// The suffix of a log that is being packed.
const PACKING: &str = ".tmp";

/// Rotates logs until the agent stops.
pub(crate) async fn run(context: Arc<Context>) {
    let mut ticks = tokio::time::interval(context.config.container_log_monitor_interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = context.shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        for pod in context.directory.pods() {
            let uid = pod.metadata.uid.as_deref().unwrap_or_default();
            let Some(runtime) = context.directory.runtime_pod(uid) else { continue };
            for status in runtime.containers {
                if status.state == ContainerState::Running
                    && let Err(error) = rotate(&context, &status).await
                {
                    tracing::warn!(log = %status.log_path.display(), %error, "log not rotated");
                }
            }
        }
    }
}

async fn rotate(context: &Context, status: &ContainerStatus) -> io::Result<()> {
    let log = status.log_path.clone();
    let (limit, files) =
        (context.config.container_log_max_size, context.config.container_log_max_files.max(2));
    let due = tokio::task::spawn_blocking(move || put_aside(&log, limit, files));
    let aside = match due.await.map_err(io::Error::other)?? {
        Due::No => return Ok(()),
        Due::Missing => None,
        Due::Aside(aside) => Some(aside),
    };
    let reopened = context.runtime.reopen_container_log(&status.id);
    if let Err(error) = context.timed("reopen_container_log", reopened).await {
        // the container still writes to the file under its new name: put it back
        let log = status.log_path.clone();
        if let Some(aside) = aside {
            tokio::task::spawn_blocking(move || fs::rename(aside, log))
                .await
                .map_err(io::Error::other)??;
        }
        return Err(io::Error::other(error));
    }
    Ok(())
}

/// Whether a log has to be opened anew.
#[derive(Debug, PartialEq, Eq)]
enum Due {
    No,
    /// It was put aside, and its new name.
    Aside(PathBuf),
    /// It is not there although its container runs: an agent was killed after it had put it aside.
    Missing,
}

/// Puts a log aside if it is too large. Blocks on the file system.
fn put_aside(log: &Path, limit: u64, files: u32) -> io::Result<Due> {
    let length = match fs::metadata(log) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Due::Missing),
        Err(error) => return Err(error),
    };
    if length < limit {
        return Ok(Due::No);
    }
    tidy(log, files)?;
    let aside = aside(log, Timestamp::now());
    fs::rename(log, &aside)?;
    Ok(Due::Aside(aside))
}

/// The name of a log that is put aside at some moment.
fn aside(log: &Path, now: Timestamp) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(now.strftime(".%Y%m%d-%H%M%S").to_string());
    name.into()
}

/// Makes room for one more: packs what was put aside before, removes the oldest.
fn tidy(log: &Path, files: u32) -> io::Result<()> {
    let (Some(folder), Some(name)) = (log.parent(), log.file_name().and_then(|name| name.to_str()))
    else {
        return Ok(());
    };
    let mut aside: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let other = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(rest) = other.strip_prefix(name).and_then(|rest| rest.strip_prefix('.')) else {
            continue;
        };
        if rest.ends_with(PACKING) {
            // left by an agent that was killed while packing
            fs::remove_file(&path)?;
        } else {
            aside.push(path);
        }
    }
    // names end in their time: the oldest first
    aside.sort();
    // beside the log itself and the one that is about to be put aside
    let kept = usize::try_from(files.saturating_sub(2)).unwrap_or(0);
    let surplus = aside.len().saturating_sub(kept);
    for path in aside.drain(..surplus) {
        fs::remove_file(path)?;
    }
    for path in aside {
        if !path.to_string_lossy().ends_with(PACKED) {
            pack(&path)?;
        }
    }
    Ok(())
}

fn pack(path: &Path) -> io::Result<()> {
    let suffixed = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let packing = suffixed(PACKING);
    let mut encoder = GzEncoder::new(File::create(&packing)?, Compression::default());
    io::copy(&mut File::open(path)?, &mut encoder)?;
    encoder.finish()?;
    fs::rename(&packing, suffixed(PACKED))?;
    fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::fixture;

    #[tokio::test]
    async fn a_log_whose_rotation_was_cut_short_is_opened_anew() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = fixture::FakeRuntime::new();
        let context = fixture::context(Arc::clone(&runtime), folder.path());
        let mut status = fixture::running("a", 0);
        status.log_path = folder.path().join("0.log");
        fs::write(folder.path().join("0.log.20260101-000000"), "put aside, then killed").unwrap();
        rotate(&context, &status).await.unwrap();
        assert_eq!(runtime.calls(), ["reopen a-0"]);
        fs::write(&status.log_path, "small").unwrap();
        rotate(&context, &status).await.unwrap();
        assert_eq!(runtime.calls().len(), 1, "nothing to do");
    }

    #[test]
    fn old_logs_are_packed_and_the_oldest_removed() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("0.log");
        for name in
            ["0.log", "0.log.1.gz", "0.log.2.gz", "0.log.3", "0.log.4.tmp", "1.log", "0.log.0"]
        {
            fs::write(folder.path().join(name), name).unwrap();
        }
        tidy(&log, 5).unwrap();
        let mut names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["0.log", "0.log.1.gz", "0.log.2.gz", "0.log.3.gz", "1.log"]);
        let mut text = String::new();
        let packed = File::open(folder.path().join("0.log.3.gz")).unwrap();
        io::Read::read_to_string(&mut flate2::read::GzDecoder::new(packed), &mut text).unwrap();
        assert_eq!(text, "0.log.3");
    }
}
