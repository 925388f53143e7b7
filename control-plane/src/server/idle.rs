//! Whether a connection has something to do. One without is closed after a time, so that clients who
//! connect and say nothing, or go silent, keep no place that others need.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::{sync::watch, time::timeout};

use super::respond::{Body, BoxError};

/// Counts the requests of one connection that are being served.
#[derive(Clone, Debug)]
pub(super) struct Busy(Arc<watch::Sender<usize>>);

impl Default for Busy {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

/// One request, until its answer has been sent or given up.
#[derive(Debug)]
pub(super) struct Served(Arc<watch::Sender<usize>>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

impl Busy {
    /// A request begins.
    pub(super) fn begin(&self) -> Served {
        self.0.send_modify(|open| *open += 1);
        Served(Arc::clone(&self.0))
    }

    /// Returns when the connection had nothing to do for so long: `first` before its first request,
    /// `later` after one.
    pub(super) async fn idle(&self, first: Duration, later: Duration) {
        let mut open = self.0.subscribe();
        let mut wait = first;
        // The sender lives as long as `self`: neither wait fails.
        while open.wait_for(|open| *open == 0).await.is_ok() {
            if timeout(wait, open.changed()).await.is_err() {
                return;
            }
            wait = later;
        }
    }
}

/// The body of an answer, by which its request counts as being served.
pub(super) struct ServedBody {
    pub(super) body: Body,
    pub(super) _served: Served,
}

impl http_body::Body for ServedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_between_requests_only() {
        let (first, later) = (Duration::from_secs(10), Duration::from_secs(90));
        let began = tokio::time::Instant::now();
        Busy::default().idle(first, later).await;
        assert_eq!(began.elapsed(), first);

        let busy = Busy::default();
        let watch = busy.begin();
        let stays = timeout(Duration::from_secs(3600), busy.idle(first, later)).await;
        assert!(stays.is_err(), "a watch keeps it open");
        let idle = busy.idle(first, later);
        let requests = async {
            drop(watch);
            tokio::time::sleep(Duration::from_secs(9)).await;
            // Begun and over before anybody looked.
            drop(busy.begin());
        };
        let began = tokio::time::Instant::now();
        tokio::join!(idle, requests);
        assert_eq!(began.elapsed(), Duration::from_secs(99));
    }
}
