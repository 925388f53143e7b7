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
//! was there to see it. So is a flood that is more than may wait, once there is room again; and what
//! the kernel refuses is tried again.
//!
//! [`ConntrackConfig::remove_stale_tcp`]: crate::ConntrackConfig::remove_stale_tcp

pub(crate) mod stale;
mod table;
#[cfg(test)]
mod table_test;

use std::{
    io,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use keelson_api::backoff::Backoff;

use crate::{backend::Stale, metrics::Metrics, model::Family};

use stale::Expected;
pub(crate) use table::ConntrackTable;

/// How many stale connections may wait: a few megabytes. With more, everything is compared.
const WAITING_MAX: usize = 65_536;
/// It is there where connections are tracked.
const TRACKED: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
/// The first and the longest wait before what the kernel refused is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));

/// What there is to remove.
#[derive(Debug, Default)]
struct Work {
    /// Connections that went these ways.
    stale: Vec<Stale>,
    /// All that don't go where they should; each of other families.
    expected: Vec<Expected>,
}

impl Work {
    fn is_empty(&self) -> bool {
        self.stale.is_empty() && self.expected.is_empty()
    }

    /// Adds what is to be compared; what is newer holds for its families.
    fn compare(&mut self, expected: Expected) {
        self.expected
            .retain(|older| !older.families().all(|f| expected.families().any(|g| f == g)));
        self.expected.push(expected);
    }
}

/// What waits for the thread.
#[derive(Debug, Default)]
struct Backlog {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    work: Work,
    /// The thread is at work.
    busy: bool,
    /// Nobody will hand on anything any more.
    closed: bool,
    /// There was no room for what has to be tried again.
    missed: bool,
}

impl Backlog {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that waits, once there is something; `None` when there never will be. Not before `pause`
    /// is over.
    fn take(&self, pause: Option<Duration>) -> Option<Work> {
        let mut waiting = self.waiting();
        waiting.busy = false;
        if let Some(pause) = pause {
            let wait = self.changed.wait_timeout_while(waiting, pause, |waiting| !waiting.closed);
            (waiting, _) = wait.unwrap_or_else(PoisonError::into_inner);
            if waiting.closed {
                return None;
            }
        }
        let idle = |waiting: &mut Waiting| waiting.work.is_empty() && !waiting.closed;
        let wait = self.changed.wait_while(waiting, idle);
        let mut waiting = wait.unwrap_or_else(PoisonError::into_inner);
        waiting.busy = !waiting.work.is_empty();
        waiting.busy.then(|| std::mem::take(&mut waiting.work))
    }

    /// Puts back what could not be done; what came meanwhile is newer.
    fn put_back(&self, failed: Work) {
        let mut waiting = self.waiting();
        let newer = std::mem::take(&mut waiting.work.expected);
        waiting.work.expected = failed.expected;
        newer.into_iter().for_each(|expected| waiting.work.compare(expected));
        waiting.work.stale.extend(failed.stale);
        if waiting.work.stale.len() > WAITING_MAX {
            waiting.work.stale = Vec::new();
            waiting.missed = true;
        }
    }
}

/// The kernel's table, or what stands for it in a test.
trait Table {
    /// Removes connections that went these ways: how many.
    fn forget(&mut self, stale: &[Stale]) -> io::Result<u64>;

    /// Removes connections of a family that don't go where they should: how many.
    fn compare(&mut self, family: Family, expected: &Expected) -> io::Result<u64>;
}

impl Table for ConntrackTable {
    fn forget(&mut self, stale: &[Stale]) -> io::Result<u64> {
        self.forget(stale)
    }

    fn compare(&mut self, family: Family, expected: &Expected) -> io::Result<u64> {
        self.delete_where(family, |original, reply| expected.is_stale(original, reply))
    }
}

/// Hands stale connections to the thread that removes them, and waits for its end.
#[derive(Debug)]
pub(crate) struct Cleaner {
    backlog: Arc<Backlog>,
    thread: Option<JoinHandle<()>>,
}

impl Cleaner {
    /// Starts the thread, in the network namespace of the calling one. It ends when this is dropped.
    ///
    /// # Errors
    /// When the kernel has no connection tracking to talk to.
    pub(crate) fn start(metrics: Metrics) -> io::Result<Self> {
        Self::start_with(ConntrackTable::open()?, metrics)
    }

    fn start_with(mut table: impl Table + Send + 'static, metrics: Metrics) -> io::Result<Self> {
        let backlog = Arc::new(Backlog::default());
        let handed_on = Arc::clone(&backlog);
        let thread = std::thread::Builder::new()
            .name("proxy-conntrack".into())
            .spawn(move || run(&handed_on, &mut table, &metrics))?;
        Ok(Self { backlog, thread: Some(thread) })
    }

    /// Has these connections forgotten soon. False if too many wait: then none of those that wait
    /// will be, unless everything is [compared](Self::compare).
    pub(crate) fn forget(&self, stale: Vec<Stale>) -> bool {
        if stale.is_empty() {
            return true;
        }
        let mut waiting = self.backlog.waiting();
        let count = waiting.work.stale.len() + stale.len();
        if std::mem::take(&mut waiting.missed) || count > WAITING_MAX {
            waiting.work.stale = Vec::new();
            return false;
        }
        waiting.work.stale.extend(stale);
        self.backlog.changed.notify_all();
        true
    }

    /// Has everything forgotten that doesn't go where it should.
    pub(crate) fn compare(&self, expected: Expected) {
        self.backlog.waiting().work.compare(expected);
        self.backlog.changed.notify_all();
    }

    /// Whether there is nothing left to do.
    pub(crate) fn is_idle(&self) -> bool {
        let waiting = self.backlog.waiting();
        waiting.work.is_empty() && !waiting.busy
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        self.backlog.waiting().closed = true;
        self.backlog.changed.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that removes stale connections panicked");
        }
    }
}

/// Forgets what other modes' rules, gone by now, translated and where relays serve: the kernel would
/// go on translating it. In the network namespace of the calling thread; does nothing where nothing
/// tracks connections.
pub(crate) fn forget_translated(expected: &Expected) {
    // The socket alone would have the kernel load what tracks connections.
    if !Path::new(TRACKED).exists() {
        return;
    }
    let mut table = match ConntrackTable::open() {
        Ok(table) => table,
        Err(error) => {
            tracing::warn!(%error, "flows that were translated stay with their endpoints");
            return;
        }
    };
    for family in expected.families() {
        match Table::compare(&mut table, family, expected) {
            Ok(deleted) => {
                tracing::info!(deleted, family = family.as_str(), "translated flows are forgotten");
            }
            Err(error) => tracing::warn!(
                %error, family = family.as_str(),
                "flows that were translated stay with their endpoints"
            ),
        }
    }
}

fn run(backlog: &Backlog, table: &mut impl Table, metrics: &Metrics) {
    let mut backoff = Backoff::new(RETRY.0, RETRY.1);
    let mut pause = None;
    while let Some(work) = backlog.take(pause) {
        let mut failed = Work::default();
        for expected in work.expected {
            if !compare(table, &expected, metrics) {
                failed.expected.push(expected);
            }
        }
        failed.stale = forget(table, work.stale, metrics);
        pause = if failed.is_empty() {
            backoff.reset();
            None
        } else {
            backlog.put_back(failed);
            Some(backoff.next_wait())
        };
    }
}

/// Removes these; which could not be.
fn forget(table: &mut impl Table, stale: Vec<Stale>, metrics: &Metrics) -> Vec<Stale> {
    let (v4, v6): (Vec<Stale>, Vec<Stale>) =
        stale.into_iter().partition(|stale| stale.frontend.family == Family::V4);
    let mut failed = Vec::new();
    for (family, own) in [(Family::V4, v4), (Family::V6, v6)] {
        if own.is_empty() {
            continue;
        }
        let begin = Instant::now();
        match table.forget(&own) {
            Ok(deleted) => metrics.conntrack_cleaned(family, deleted, begin.elapsed()),
            Err(error) => {
                tracing::warn!(
                    %error, count = own.len(), family = family.as_str(),
                    "stale connections not removed; trying again"
                );
                failed.extend(own);
            }
        }
    }
    failed
}

/// Compares the whole table; whether that went well.
fn compare(table: &mut impl Table, expected: &Expected, metrics: &Metrics) -> bool {
    let mut well = true;
    for family in expected.families() {
        let begin = Instant::now();
        match table.compare(family, expected) {
            Ok(deleted) => {
                metrics.conntrack_cleaned(family, deleted, begin.elapsed());
                if deleted > 0 {
                    tracing::info!(
                        deleted,
                        family = family.as_str(),
                        "connections removed that don't go where they should"
                    );
                }
            }
            Err(error) => {
                tracing::warn!(
                    %error,
                    family = family.as_str(),
                    "the connection table was not compared with the endpoints; trying again"
                );
                well = false;
            }
        }
    }
    well
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use prometheus::Registry;

    use super::*;
    use crate::{
        model::{Protocol, table::ServiceTable},
        ruleset::{Frontend, desired::Desired},
        until::{PATIENCE, until},
    };

    #[derive(Debug, PartialEq)]
    enum Did {
        Forgot(usize),
        Compared(Family),
    }

    /// Does as it is told, one thing after another, and fails when told so.
    struct Told {
        did: mpsc::Sender<Did>,
        go: mpsc::Receiver<bool>,
    }

    impl Told {
        fn answer(&self, did: Did) -> io::Result<u64> {
            let _ = self.did.send(did);
            match self.go.recv_timeout(PATIENCE) {
                Ok(true) => Ok(1),
                _ => Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
            }
        }
    }

    impl Table for Told {
        fn forget(&mut self, stale: &[Stale]) -> io::Result<u64> {
            self.answer(Did::Forgot(stale.len()))
        }

        fn compare(&mut self, family: Family, _: &Expected) -> io::Result<u64> {
            self.answer(Did::Compared(family))
        }
    }

    fn start() -> (Cleaner, mpsc::Receiver<Did>, mpsc::Sender<bool>) {
        let ((did, log), (go, told)) = (mpsc::channel(), mpsc::channel());
        let metrics = Metrics::register(&Registry::new()).unwrap();
        (Cleaner::start_with(Told { did, go: told }, metrics).unwrap(), log, go)
    }

    fn stale(count: usize) -> Vec<Stale> {
        let frontend = Frontend::at([10, 96, 0, 1], Protocol::Udp, 53);
        vec![Stale { frontend, endpoint: None }; count]
    }

    fn everything(families: &[Family]) -> Expected {
        Expected::of(&Desired::default(), &ServiceTable::default(), families, false)
    }

    #[test]
    fn more_than_may_wait_is_told_and_made_up_by_comparing() {
        let (cleaner, log, go) = start();
        assert!(cleaner.forget(stale(1)));
        assert_eq!(log.recv_timeout(PATIENCE), Ok(Did::Forgot(1)));
        // The thread is busy from here on; batches of any size count by what is in them.
        assert!(cleaner.forget(stale(WAITING_MAX)));
        assert!(!cleaner.forget(stale(1)), "there is no room");
        assert!(!cleaner.is_idle());
        cleaner.compare(everything(&[Family::V4]));
        cleaner.compare(everything(&[Family::V6]));
        cleaner.compare(everything(&[Family::V4]));
        go.send(true).unwrap();
        // Each once, and nothing of what had no room by itself.
        for family in [Family::V6, Family::V4] {
            assert_eq!(log.recv_timeout(PATIENCE), Ok(Did::Compared(family)));
            go.send(true).unwrap();
        }
        until("all is done", || cleaner.is_idle());
        assert_eq!(log.try_recv(), Err(mpsc::TryRecvError::Empty));
    }

    #[test]
    fn what_the_kernel_refuses_is_tried_again() {
        let (cleaner, log, go) = start();
        cleaner.forget(stale(3));
        assert_eq!(log.recv_timeout(PATIENCE), Ok(Did::Forgot(3)));
        cleaner.compare(everything(&[Family::V4]));
        go.send(false).unwrap();
        assert_eq!(log.recv_timeout(PATIENCE), Ok(Did::Compared(Family::V4)));
        go.send(false).unwrap();
        assert_eq!(log.recv_timeout(PATIENCE), Ok(Did::Forgot(3)));
        go.send(true).unwrap();
        assert_eq!(log.recv_timeout(PATIENCE), Ok(Did::Compared(Family::V4)));
        go.send(true).unwrap();
        until("all is done", || cleaner.is_idle());
    }
}
