//! Forgetting connections whose translation is out of date.
//!
//! The kernel translates the packets of one UDP or SCTP flow alike for as long as they keep coming,
//! so a client that never pauses would go on talking to an endpoint that is gone, or to nobody,
//! long after the rules say otherwise. TCP ends by itself: what reaches nobody times out or is
//! answered with a reset; who wants that at once can have it ([`ConntrackConfig::remove_stale_tcp`]).
//!
//! [`stale`] knows which connections a change leaves behind, as a pure function of what was and is
//! desired; [`table`] talks to the kernel. Removal comes after the commit, on a thread of its own:
//! to walk the connection table takes milliseconds that no other change should wait for. The first
//! commit is followed by a look at the whole table, since endpoints may have gone while no proxy
//! was there to see it.
//!
//! [`ConntrackConfig::remove_stale_tcp`]: crate::ConntrackConfig::remove_stale_tcp

pub(crate) mod stale;
mod table;

use std::{io, thread::JoinHandle, time::Instant};

use tokio::sync::mpsc;

use crate::{backend::Stale, metrics::Metrics, model::Family};

use stale::Expected;
pub(crate) use table::ConntrackTable;

/// How many batches may wait; with more, the oldest flows end when they pause.
const QUEUE: usize = 1_024;

/// What there is to remove.
#[derive(Debug)]
enum Work {
    /// Connections that went these ways.
    Forget(Vec<Stale>),
    /// All that don't go where they should.
    Compare(Box<Expected>),
}

/// Hands stale connections to the thread that removes them, and waits for its end.
#[derive(Debug)]
pub(crate) struct Cleaner {
    queue: Option<mpsc::Sender<Work>>,
    thread: Option<JoinHandle<()>>,
}

impl Cleaner {
    /// Starts the thread, in the network namespace of the calling one. It ends when
    /// this is dropped.
    ///
    /// # Errors
    /// When the kernel has no connection tracking to talk to.
    pub(crate) fn start(metrics: Metrics) -> io::Result<Self> {
        let mut table = ConntrackTable::open()?;
        let (queue, mut work) = mpsc::channel::<Work>(QUEUE);
        let thread =
            std::thread::Builder::new().name("proxy-conntrack".into()).spawn(move || {
                while let Some(first) = work.blocking_recv() {
                    let mut stale = Vec::new();
                    let mut next = Some(first);
                    while let Some(one) = next {
                        match one {
                            Work::Forget(more) => stale.extend(more),
                            Work::Compare(expected) => compare(&mut table, &expected, &metrics),
                        }
                        next = work.try_recv().ok();
                    }
                    forget(&mut table, &stale, &metrics);
                }
            })?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Has these connections forgotten soon.
    pub(crate) fn forget(&self, stale: Vec<Stale>) {
        if !stale.is_empty() {
            self.hand(Work::Forget(stale));
        }
    }

    /// Has everything forgotten that doesn't go where it should.
    pub(crate) fn compare(&self, expected: Expected) {
        self.hand(Work::Compare(Box::new(expected)));
    }

    fn hand(&self, work: Work) {
        if self.queue.as_ref().is_some_and(|queue| queue.try_send(work).is_err()) {
            tracing::warn!("stale connections stay: too many wait to be removed");
        }
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        self.queue = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that removes stale connections panicked");
        }
    }
}

fn forget(table: &mut ConntrackTable, stale: &[Stale], metrics: &Metrics) {
    for family in [Family::V4, Family::V6] {
        let own: Vec<Stale> =
            stale.iter().filter(|s| s.frontend.family == family).cloned().collect();
        if own.is_empty() {
            continue;
        }
        let begin = Instant::now();
        match table.forget(&own) {
            Ok(deleted) => metrics.conntrack_cleaned(family, deleted, begin.elapsed()),
            Err(error) => {
                tracing::warn!(%error, count = own.len(), "stale connections not removed");
            }
        }
    }
}

fn compare(table: &mut ConntrackTable, expected: &Expected, metrics: &Metrics) {
    for family in expected.families() {
        let begin = Instant::now();
        let wanted = |original: &_, reply: &_| expected.is_stale(original, reply);
        match table.delete_where(family, wanted) {
            Ok(deleted) => {
                metrics.conntrack_cleaned(family, deleted, begin.elapsed());
                if deleted > 0 {
                    tracing::info!(
                        deleted,
                        family = family.as_str(),
                        "connections removed whose endpoints went while there was no proxy"
                    );
                }
            }
            Err(error) => tracing::warn!(
                %error,
                family = family.as_str(),
                "the connection table was not compared with the endpoints"
            ),
        }
    }
}
