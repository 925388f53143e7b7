//! A config file that changes while it is in use.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::MAX_BYTES;
use crate::bounded;

/// How often the file is looked at. It is read, since a ConfigMap's file changes by a link that
/// leads elsewhere, of which the kernel tells nothing to who follows the file itself.
const CHECK: Duration = Duration::from_secs(5);

/// A config file, what is in use of it, and what was in it when it was last looked at.
pub(crate) struct Watched {
    path: PathBuf,
    used: Content,
    seen: Content,
}

impl Watched {
    /// The file as it is now. To be called before its settings are read: what changes between the
    /// two is read twice, and nothing is missed.
    pub(crate) fn new(path: PathBuf) -> Self {
        let used = Content::of(&path);
        Self { path, seen: used.clone(), used }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the file has other content that is right, and still has it once that is known.
    /// Content that is wrong is told once, and nothing follows from it, nor from its being taken
    /// back. Returns false if `shutdown` came first.
    pub(crate) async fn changed(
        mut self,
        check: impl Fn(&Path) -> anyhow::Result<()>,
        shutdown: CancellationToken,
    ) -> bool {
        let mut ticks = tokio::time::interval(CHECK);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = shutdown.cancelled() => return false,
            }
            let Some(found) = self.look().await else { continue };
            if !self.seen.is_new(found) || self.seen == self.used {
                continue;
            }
            match check(&self.path) {
                // What was changed and restored meanwhile has not changed.
                Ok(()) if self.look().await.as_ref() == Some(&self.seen) => return true,
                Ok(()) => {}
                Err(error) => {
                    tracing::error!("{error:#}; going on with the configuration from before");
                }
            }
        }
    }

    /// What is in the file now.
    async fn look(&self) -> Option<Content> {
        let path = self.path.clone();
        // If it panics, the next look may not.
        tokio::task::spawn_blocking(move || Content::of(&path)).await.ok()
    }
}

/// What is in a file; `None` if that can't be told.
#[derive(Clone, PartialEq, Eq)]
struct Content(Option<Vec<u8>>);

impl Content {
    fn of(path: &Path) -> Self {
        Self(bounded::read(path, MAX_BYTES).ok())
    }

    /// Whether there is something else now. A file that is gone is about to be replaced.
    fn is_new(&mut self, found: Self) -> bool {
        if found.0.is_none() || found == *self {
            return false;
        }
        *self = found;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_content_is_new_and_only_once() {
        let mut content = Content(Some(b"one".to_vec()));
        let table: [(Option<&[u8]>, bool); 6] = [
            (Some(b"one"), false),
            (Some(b"wrong"), true),
            (Some(b"wrong"), false),
            (None, false),
            (Some(b"wrong"), false),
            (Some(b"two"), true),
        ];
        for (found, new) in table {
            let now = Content(found.map(<[u8]>::to_vec));
            assert_eq!(content.is_new(now), new, "{found:?}");
        }
    }

    #[tokio::test]
    async fn a_change_before_the_watch_begins_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        std::fs::write(&path, "read at the start").unwrap();
        let watched = Watched::new(path.clone());
        std::fs::write(&path, "changed meanwhile").unwrap();
        assert!(watched.changed(|_| Ok(()), CancellationToken::new()).await);
        let (watched, shutdown) = (Watched::new(path), CancellationToken::new());
        shutdown.cancel();
        assert!(!watched.changed(|_| Ok(()), shutdown).await);
    }

    /// Each content that is met, in turn, and what is in the file once it was checked.
    #[tokio::test(start_paused = true)]
    async fn what_is_changed_and_restored_has_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        std::fs::write(&path, "in use").unwrap();
        let watched = Watched::new(path.clone());
        std::fs::write(&path, "wrong").unwrap();
        let checked = std::sync::Mutex::new(Vec::new());
        let check = |path: &Path| {
            let found = std::fs::read_to_string(path)?;
            checked.lock().unwrap().push(found.clone());
            match found.as_str() {
                // Restored, and changed for a moment: neither is to be acted on.
                "wrong" => {
                    std::fs::write(path, "in use")?;
                    tokio::spawn(write_after(2 * CHECK, path.to_owned(), "brief"));
                    anyhow::bail!("it is wrong");
                }
                "brief" => {
                    std::fs::write(path, "in use")?;
                    tokio::spawn(write_after(2 * CHECK, path.to_owned(), "other"));
                }
                _ => {}
            }
            Ok(())
        };
        assert!(watched.changed(check, CancellationToken::new()).await);
        assert_eq!(*checked.lock().unwrap(), ["wrong", "brief", "other"]);
    }

    async fn write_after(time: Duration, path: PathBuf, content: &str) {
        // The test's clock is paused: this places the write between two of the watch's looks, and
        // takes no time.
        tokio::time::sleep(time + CHECK / 2).await;
        std::fs::write(path, content).unwrap();
    }
}
