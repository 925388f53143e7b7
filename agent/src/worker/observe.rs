//! What the runtime has of one pod.

use std::collections::{BTreeMap, BTreeSet};

use keelson_runtime_shim::runtime::{ContainerId, RuntimeError, SandboxId, SandboxStatus};

use super::{Context, last_words, view, view::Observed};

/// Looks at one pod's sandboxes and containers.
#[derive(Debug, Default)]
pub(crate) struct Observer {
    sandboxes: BTreeSet<SandboxId>,
    /// Termination messages that were read once: the files don't change any more.
    last_words: BTreeMap<ContainerId, String>,
}

impl Observer {
    /// An observer that knows of these sandboxes.
    pub(crate) fn new(sandboxes: impl IntoIterator<Item = SandboxId>) -> Self {
        Self { sandboxes: sandboxes.into_iter().collect(), last_words: BTreeMap::new() }
    }

    /// A sandbox was made.
    pub(crate) fn add(&mut self, id: SandboxId) {
        self.sandboxes.insert(id);
    }

    /// Asks the runtime.
    pub(crate) async fn observe(&mut self, context: &Context) -> Result<Observed, RuntimeError> {
        let mut sandboxes: Vec<SandboxStatus> = Vec::with_capacity(self.sandboxes.len());
        let mut containers = Vec::new();
        let mut gone = Vec::new();
        for id in &self.sandboxes {
            match context.timed("podsandbox_status", context.runtime.pod_sandbox_status(id)).await {
                Ok(sandbox) => sandboxes.push(sandbox),
                Err(RuntimeError::NotFound(_)) => {
                    gone.push(id.clone());
                    continue;
                }
                Err(error) => return Err(error),
            }
            let listed = context.runtime.list_containers(Some(id));
            containers.extend(context.timed("list_containers", listed).await?);
        }
        for id in gone {
            self.sandboxes.remove(&id);
        }
        let unread: Vec<_> = containers
            .iter()
            .filter(|status| view::ended(status) && !self.last_words.contains_key(&status.id))
            .cloned()
            .collect();
        if !unread.is_empty() {
            let read = tokio::task::spawn_blocking(move || {
                unread
                    .into_iter()
                    .map(|status| (status.id.clone(), last_words::read(&status)))
                    .collect::<Vec<_>>()
            });
            self.last_words.extend(read.await.unwrap_or_default());
        }
        self.last_words.retain(|id, _| containers.iter().any(|status| status.id == *id));
        for status in &mut containers {
            if let Some(words) = self.last_words.get(&status.id)
                && !words.is_empty()
            {
                status.message.clone_from(words);
            }
        }
        Ok(Observed::new(sandboxes, containers))
    }
}
