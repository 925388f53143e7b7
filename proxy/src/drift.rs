//! Hearing of others who change the rules: each mode has its own ear.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    iptables::canary::Canary,
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

/// Looks from time to time whether others changed the proxy's iptables, and tells the loop.
pub(crate) async fn canary(
    mut canary: Canary,
    period: Duration,
    changes: mpsc::Sender<Change>,
    shutdown: CancellationToken,
) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(period) => {}
            () = shutdown.cancelled() => return,
        }
        // It runs programs and waits for them.
        let looked = tokio::task::spawn_blocking(move || {
            let changed = canary.changed();
            (canary, changed)
        });
        let Ok((back, changed)) = looked.await else { return };
        canary = back;
        match changed {
            Ok(false) => {}
            Ok(true) => {
                if changes.send(ChangeKind::Drift("canary").into()).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::warn!(%error, "can't look whether others changed the rules"),
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
