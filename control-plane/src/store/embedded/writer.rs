//! The one thread that writes.

use std::{
    path::PathBuf,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use redb::{Database, Durability};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::{
    super::{Change, Expect, Revision, StoreError},
    Shelf, backend, closed,
    layout::{Snapshot, Tables},
    open_file, taken,
};

/// Writes that share a commit at most.
const BATCH: usize = 256;
/// So many revisions are forgotten with one commit: more than it adds, so that compaction catches
/// up, and few enough that no write waits for it.
const COMPACT_STEP: u64 = 512;

/// How long those who read may hold up the file's being opened anew.
const READERS: Duration = Duration::from_secs(2);

type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

pub(super) enum Order {
    Write(Write),
    Compact { revision: Revision, answer: Answer<()> },
}

pub(super) struct Write {
    pub(super) key: Arc<str>,
    /// `None` deletes.
    pub(super) value: Option<Bytes>,
    pub(super) expect: Expect,
    pub(super) answer: Answer<Revision>,
}

pub(super) struct Writer {
    pub(super) shelf: Arc<Shelf>,
    /// As it is named in errors.
    pub(super) path: Arc<str>,
    pub(super) file: PathBuf,
    pub(super) cache_bytes: usize,
    pub(super) history: u64,
    pub(super) queue: mpsc::Receiver<Order>,
    pub(super) changes: broadcast::Sender<Arc<[Change]>>,
    pub(super) publish: watch::Sender<Revision>,
    /// Set while a commit has failed and the file could not be opened anew.
    pub(super) broken: Arc<AtomicBool>,
}

/// What one commit did.
#[derive(Default)]
struct Committed {
    changes: Vec<Change>,
    /// For each write, in order.
    results: Vec<Result<Revision, StoreError>>,
}

impl Writer {
    /// Until all senders are gone.
    pub(super) fn run(mut self) {
        let mut orders = Vec::with_capacity(BATCH);
        while let Some(first) = self.queue.blocking_recv() {
            orders.push(first);
            while orders.len() < BATCH
                && let Ok(order) = self.queue.try_recv()
            {
                orders.push(order);
            }
            let mut writes = Vec::with_capacity(orders.len());
            for order in orders.drain(..) {
                match order {
                    Order::Write(write) => writes.push(write),
                    Order::Compact { revision, answer } => {
                        // Whoever asked may have gone; the same below.
                        let _ = answer.send(self.compact(revision));
                    }
                }
            }
            if !writes.is_empty() {
                self.write(writes);
            }
        }
    }

    /// Opens the file anew after a failure, and tells of what was written although it had failed.
    fn reopen(&self) -> Result<(), StoreError> {
        let failed = |error: redb::Error| backend(&self.path, &error);
        let old = self.shelf.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut old) = old {
            // One process has the file once: those who still read have to be done.
            let deadline = Instant::now() + READERS;
            while let Err(shared) = Arc::try_unwrap(old).map(drop) {
                old = shared;
                if Instant::now() > deadline {
                    self.shelf.write().unwrap_or_else(PoisonError::into_inner).replace(old);
                    return Err(backend(&self.path, &"it is still being read"));
                }
                std::thread::sleep(READERS / 1_000);
            }
        }
        let (db, newest) = open_file(&self.file, self.cache_bytes).map_err(failed)?;
        let db = Arc::new(db);
        loop {
            let published = *self.publish.borrow();
            if published >= newest {
                break;
            }
            let snapshot = Snapshot::open(&db, Arc::clone(&self.path))?;
            let changes = snapshot.changes(published, BATCH)?;
            let Some(last) = changes.last() else { break };
            self.publish.send_replace(last.revision);
            let _ = self.changes.send(changes.into());
        }
        self.shelf.write().unwrap_or_else(PoisonError::into_inner).replace(db);
        self.broken.store(false, Ordering::Release);
        tracing::info!(path = %self.path, "the store takes writes again");
        Ok(())
    }

    /// The open database, after a failure opened anew.
    fn database(&self) -> Result<Arc<Database>, StoreError> {
        if self.broken.load(Ordering::Acquire) {
            self.reopen()?;
        }
        taken(&self.shelf).ok_or_else(|| closed(&self.path))
    }

    fn failed(&self, error: &redb::Error) -> StoreError {
        tracing::error!(path = %self.path, %error, "a commit failed");
        self.broken.store(true, Ordering::Release);
        backend(&self.path, error)
    }

    fn write(&self, writes: Vec<Write>) {
        match self.commit(&writes) {
            Ok(committed) => {
                if let Some(last) = committed.changes.last() {
                    self.publish.send_replace(last.revision);
                    // No receiver: nobody watches.
                    let _ = self.changes.send(committed.changes.into());
                }
                for (write, result) in writes.into_iter().zip(committed.results) {
                    let _ = write.answer.send(result);
                }
            }
            Err(error) => {
                let problem = match error {
                    StoreError::Backend { problem, .. } => problem,
                    other => other.to_string(),
                };
                for write in writes {
                    let _ = write.answer.send(Err(backend(&self.path, &problem)));
                }
            }
        }
    }

    fn commit(&self, writes: &[Write]) -> Result<Committed, StoreError> {
        let db = self.database()?;
        self.commit_to(&db, writes).map_err(|error| self.failed(&error))
    }

    fn commit_to(&self, db: &Database, writes: &[Write]) -> Result<Committed, redb::Error> {
        let mut transaction = db.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        transaction.set_quick_repair(QUICK_REPAIR);
        let mut committed = Committed::default();
        {
            let mut tables = Tables::open(&transaction)?;
            for write in writes {
                let result = match tables.write(&write.key, write.value.as_ref(), write.expect)? {
                    Ok(change) => {
                        let revision = change.revision;
                        committed.changes.push(change);
                        Ok(revision)
                    }
                    Err(current) => {
                        Err(StoreError::Conflict { key: write.key.to_string(), current })
                    }
                };
                committed.results.push(result);
            }
            let target = Revision(tables.revision().0.saturating_sub(self.history));
            if target > tables.compacted() {
                tables.compact(target, COMPACT_STEP)?;
            }
            tables.finish()?;
        }
        if committed.changes.is_empty() {
            transaction.abort()?; // only refusals: nothing to wait for a disk for
        } else {
            transaction.commit()?;
        }
        Ok(committed)
    }

    fn compact(&self, target: Revision) -> Result<(), StoreError> {
        let current = *self.publish.borrow();
        if target > current {
            return Err(StoreError::Future { requested: target, current });
        }
        let db = self.database()?;
        let step = || -> Result<bool, redb::Error> {
            let mut transaction = db.begin_write()?;
            transaction.set_quick_repair(QUICK_REPAIR);
            let done = {
                let mut tables = Tables::open(&transaction)?;
                tables.compact(target, COMPACT_STEP)?;
                let done = tables.compacted() >= target;
                tables.finish()?;
                done
            };
            transaction.commit()?;
            Ok(done)
        };
        loop {
            if step().map_err(|error| self.failed(&error))? {
                return Ok(());
            }
        }
    }
}

/// Whether each commit also records which pages are in use, so that a start after a kill need not
/// walk the file. It does not: with it a commit needs two syncs. Measured with a debug build on two
/// busy cores, values of 1.5 kB:
///
/// | objects | file | commit, median | with it | open after a kill | with it |
/// |---|---|---|---|---|---|
/// | 5,000 | 16 MB | 4.0 ms | 7.9 ms | 0.34 s | 0.13 s |
/// | 50,000 | 128 MB | 4.0 ms | 8.8 ms | 3.6 s | 1.9 s |
///
/// Each write would pay at every time for what a kill of a store far larger than one machine needs
/// would cost once.
const QUICK_REPAIR: bool = false;
