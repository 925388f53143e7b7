//! A queue of keys to look at.
//!
//! A key waits at most once however often it is added; while it is being worked on it is not given
//! to a second worker, and if it is added meanwhile it comes again afterwards. What failed comes
//! back later and later, with jitter. The number of keys is bounded by the number of objects.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    future::Future,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

/// The first wait after a failure; client-go's controllers begin there.
const FIRST_WAIT: Duration = Duration::from_millis(5);
/// The longest wait after failures.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Stands for a wait that can't be counted.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

struct State<K> {
    ready: VecDeque<K>,
    /// In `ready`.
    queued: HashSet<K>,
    running: HashSet<K>,
    /// Added while running.
    again: HashSet<K>,
    /// When a key becomes ready by itself; at most one time for each key, the earliest.
    due: HashMap<K, (Instant, u64)>,
    by_time: BTreeMap<(Instant, u64), K>,
    sequence: u64,
    failures: HashMap<K, u32>,
}

/// See the module.
pub(crate) struct WorkQueue<K> {
    state: Mutex<State<K>>,
    changed: Notify,
}

impl<K: Clone + Eq + Hash> WorkQueue<K> {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                ready: VecDeque::new(),
                queued: HashSet::new(),
                running: HashSet::new(),
                again: HashSet::new(),
                due: HashMap::new(),
                by_time: BTreeMap::new(),
                sequence: 0,
                failures: HashMap::new(),
            }),
            changed: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a key to be looked at, now.
    pub(crate) fn add(&self, key: K) {
        self.lock().add(key);
        self.changed.notify_one();
    }

    /// Asks for a key to be looked at after a time, or earlier if that is already asked for.
    pub(crate) fn add_after(&self, key: K, wait: Duration) {
        let now = Instant::now();
        let at = now.checked_add(wait).unwrap_or_else(|| now + FAR);
        self.lock().add_at(key, at);
        self.changed.notify_one();
    }

    /// Takes the next ready key, or says when the next will be.
    fn take(&self) -> Result<K, Option<Instant>> {
        let mut state = self.lock();
        let now = Instant::now();
        while let Some((&(at, sequence), _)) = state.by_time.first_key_value() {
            if at > now {
                break;
            }
            if let Some(key) = state.by_time.remove(&(at, sequence)) {
                state.due.remove(&key);
                state.add(key);
            }
        }
        match state.ready.pop_front() {
            Some(key) => {
                state.queued.remove(&key);
                state.running.insert(key.clone());
                Ok(key)
            }
            None => Err(state.by_time.first_key_value().map(|((at, _), _)| *at)),
        }
    }

    /// Ends the work on a key; `failed` brings it back with back-off, which is returned.
    fn done(&self, key: K, failed: bool) -> Option<Duration> {
        let mut state = self.lock();
        state.running.remove(&key);
        let mut wait = None;
        if failed {
            let failures = state.failures.entry(key.clone()).or_default();
            *failures = failures.saturating_add(1);
            let doubled = FIRST_WAIT.saturating_mul(1 << (*failures - 1).min(20));
            let bounded = doubled.min(LONGEST_WAIT);
            let jittered = bounded.mul_f64(1.0 + rand::random::<f64>() * 0.1);
            state.add_at(key.clone(), Instant::now() + jittered);
            wait = Some(jittered);
        } else {
            state.failures.remove(&key);
        }
        if state.again.remove(&key) {
            state.add(key);
        }
        drop(state);
        self.changed.notify_one();
        wait
    }

    /// Works on keys, at most `workers` at a time, until `shutdown`.
    ///
    /// `work` says when to look again, if at all.
    pub(crate) async fn run<F, Fut, E>(
        self: Arc<Self>,
        name: &'static str,
        workers: usize,
        shutdown: CancellationToken,
        work: F,
    ) where
        K: std::fmt::Display,
        F: Fn(K) -> Fut,
        Fut: Future<Output = Result<Option<Duration>, E>>,
        E: Retry,
    {
        let mut running = FuturesUnordered::new();
        loop {
            let mut next_due = None;
            while running.len() < workers {
                match self.take() {
                    Ok(key) => {
                        let future = work(key.clone());
                        running.push(Box::pin(async move { (key, future.await) }));
                    }
                    Err(due) => {
                        next_due = due;
                        break;
                    }
                }
            }
            let due = async {
                match next_due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some((key, result)) = running.next() => self.finish(name, key, result),
                () = self.changed.notified() => {}
                () = due => {}
            }
        }
    }

    fn finish<E: Retry>(&self, name: &str, key: K, result: Result<Option<Duration>, E>)
    where
        K: std::fmt::Display,
    {
        match result {
            Ok(again) => {
                self.done(key.clone(), false);
                if let Some(wait) = again {
                    self.add_after(key, wait);
                }
            }
            Err(error) => {
                let quiet = error.is_ordinary();
                let wait = self.done(key.clone(), true).unwrap_or_default();
                if quiet {
                    tracing::debug!(controller = name, %key, %error, ?wait, "trying again");
                } else {
                    tracing::warn!(controller = name, %key, %error, ?wait, "trying again");
                }
            }
        }
    }
}

impl<K: Clone + Eq + Hash> State<K> {
    fn add(&mut self, key: K) {
        if self.running.contains(&key) {
            self.again.insert(key);
        } else if self.queued.insert(key.clone()) {
            self.ready.push_back(key);
        }
    }

    fn add_at(&mut self, key: K, at: Instant) {
        if let Some(known) = self.due.get(&key).copied() {
            if known.0 <= at {
                return;
            }
            self.by_time.remove(&known);
        }
        self.sequence += 1;
        let slot = (at, self.sequence);
        self.due.insert(key.clone(), slot);
        self.by_time.insert(slot, key);
    }
}

/// An error after which the same work is tried again.
pub(crate) trait Retry: std::fmt::Display {
    /// Whether it is part of normal operation (somebody else was faster) and not worth a warning.
    fn is_ordinary(&self) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_waits_once_and_comes_again_if_added_while_worked_on() {
        let queue = WorkQueue::new();
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.take(), Ok("a"));
        assert_eq!(queue.take(), Err(None));
        queue.add("a");
        assert_eq!(queue.take(), Err(None));
        queue.done("a", false);
        assert_eq!(queue.take(), Ok("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_wait_longer_each_time() {
        let queue = WorkQueue::new();
        queue.add("a");
        let mut last = Duration::ZERO;
        for _ in 0..5 {
            let key = loop {
                match queue.take() {
                    Ok(key) => break key,
                    Err(Some(at)) => tokio::time::sleep_until(at).await,
                    Err(None) => panic!("the key is lost"),
                }
            };
            let wait = queue.done(key, true).unwrap();
            assert!(wait > last);
            last = wait;
        }
        assert!(last >= FIRST_WAIT * 16);
    }

    #[tokio::test(start_paused = true)]
    async fn the_earliest_time_counts() {
        let queue = WorkQueue::new();
        let start = Instant::now();
        queue.add_after("a", Duration::from_secs(9));
        queue.add_after("a", Duration::from_secs(3));
        queue.add_after("a", Duration::from_secs(6));
        assert_eq!(queue.take(), Err(Some(start + Duration::from_secs(3))));
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(queue.take(), Ok("a"));
        queue.done("a", false);
        assert_eq!(queue.take(), Err(None));
    }
}
