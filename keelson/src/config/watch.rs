//! A config file that changes while it is in use.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

/// How often the file is looked at. It is read, since a ConfigMap's file changes by a link that
/// leads elsewhere, of which the kernel tells nothing to who follows the file itself.
const CHECK: Duration = Duration::from_secs(5);

/// Waits until the file has other content that is right. Content that is wrong is told once, and
/// nothing follows from it. Returns false if `shutdown` came first.
pub(crate) async fn changed(
    path: PathBuf,
    check: impl Fn(&Path) -> anyhow::Result<()>,
    shutdown: CancellationToken,
) -> bool {
    let mut content = Content(tokio::fs::read(&path).await.ok());
    let mut ticks = tokio::time::interval(CHECK);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return false,
        }
        let found = tokio::fs::read(&path).await.ok();
        if content.is_new(found) {
            match check(&path) {
                Ok(()) => return true,
                Err(error) => {
                    tracing::error!("{error:#}; going on with the configuration from before");
                }
            }
        }
    }
}

/// What was in the file when it was last looked at.
struct Content(Option<Vec<u8>>);

impl Content {
    /// Whether there is something else now. A file that is gone is about to be replaced.
    fn is_new(&mut self, found: Option<Vec<u8>>) -> bool {
        if found.is_none() || found == self.0 {
            return false;
        }
        self.0 = found;
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
            assert_eq!(content.is_new(found.map(<[u8]>::to_vec)), new, "{found:?}");
        }
    }
}
