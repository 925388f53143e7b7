//! Events do not stay for ever, and neither do documents that nobody asks for.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::core::{Core, Refused, revision_of, text};
use crate::lookup::Lookup as _;

/// How long a document is kept that nobody asks for.
const UNUSED: Duration = Duration::from_secs(600);

/// Deletes events that are older than `keep`, until the shutdown.
pub(crate) async fn run(core: Arc<Core>, keep: Duration) {
    let pause = (keep / 20).clamp(Duration::from_secs(1), Duration::from_secs(60));
    loop {
        tokio::select! {
            () = core.shutdown.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        core.documents.forget(UNUSED);
        let Some(resource) = core.registry.resource("", "v1", "events").cloned() else { return };
        let keep = SignedDuration::try_from(keep).unwrap_or(SignedDuration::MAX);
        let limit = Timestamp::now().checked_sub(keep).unwrap_or(Timestamp::MIN);
        for event in core.cache.list("", "events", None) {
            if core.shutdown.is_cancelled() {
                return;
            }
            if last_seen(&event).is_none_or(|seen| seen >= limit) {
                continue;
            }
            match core.remove(&resource, &event, revision_of(&event)).await {
                // Changed since: it is seen again next time.
                Ok(_) | Err(Refused::Conflict) => {}
                Err(Refused::Failed(status)) => {
                    tracing::warn!(%status, "could not delete an event that has expired");
                    break;
                }
            }
        }
    }
}

/// When an event happened last.
fn last_seen(event: &Value) -> Option<Timestamp> {
    ["/series/lastObservedTime", "/lastTimestamp", "/eventTime", "/metadata/creationTimestamp"]
        .iter()
        .filter_map(|pointer| text(event, pointer).parse().ok())
        .max()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_event_is_as_old_as_its_last_occurrence() {
        let event = json!({"metadata": {"creationTimestamp": "2030-01-01T00:00:00Z"},
            "lastTimestamp": "2030-01-01T01:00:00Z", "eventTime": null});
        assert_eq!(last_seen(&event).unwrap().to_string(), "2030-01-01T01:00:00Z");
        assert!(last_seen(&json!({})).is_none());
    }
}
