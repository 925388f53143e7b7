//! Hearing of others who change the rules: each mode has its own ear.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    nftables::monitor::{Heard, Monitor},
    watches::{Change, ChangeKind},
};

/// Tells the loop when another program changed the proxy's nftables. Ends when the monitor fails.
pub(crate) async fn monitor(
    mut monitor: Monitor,
    changes: mpsc::Sender<Change>,
    shutdown: CancellationToken,
) {
    loop {
        let heard = tokio::select! {
            heard = monitor.heard() => heard,
            () = shutdown.cancelled() => return,
        };
        let cause = match heard {
            Ok(Heard::Edited) => "edit",
            Ok(Heard::Overflow) => "overflow",
            Err(error) => {
                tracing::error!(%error, "the monitor of the kernel's tables failed");
                return;
            }
        };
        if changes.send(ChangeKind::Drift(cause).into()).await.is_err() {
            return;
        }
    }
}

/// Has the loop look from time to time whether the rules are as they should be, where nobody tells.
pub(crate) async fn periodically(
    period: Duration,
    changes: mpsc::Sender<Change>,
    shutdown: CancellationToken,
) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(period) => {}
            () = shutdown.cancelled() => return,
        }
        if changes.send(ChangeKind::Drift("period").into()).await.is_err() {
            return;
        }
    }
}
