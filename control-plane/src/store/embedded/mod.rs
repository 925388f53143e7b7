//! The store in one redb file.
//!
//! ```text
//!   objects: (key, revision) -> kind, created, value     every version that is not compacted
//!   log:     revision -> (key, revision it superseded)   what changed, in order
//!   meta:    name -> number                              current and compacted revision
//!
//!   put/delete ──► queue ──► one writer thread: all that wait in one transaction, one fsync
//!                                 │ commit, then
//!                                 ├──► broadcast of changes ──► watches (who lag re-read the log)
//!                                 └──► answers
//! ```
//!
//! [`layout`] is what the tables mean: functions over an open transaction. [`writer`] is the thread
//! that commits. Reads run on blocking threads over a snapshot of their own.
//!
//! A commit that fails, as on a full disk, fails for those who wait for it. redb takes nothing more
//! then until the file is opened anew, which the writer does before the next write.
//!
//! Group commit adds no wait: an idle writer commits a lone write at once; while it is in `fsync`,
//! others queue up and share the next one.

mod layout;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use async_trait::async_trait;
use bytes::Bytes;
use redb::Database;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::{Change, Expect, ListRange, Page, Revision, Store, StoreError, Stored, Watch};
use writer::{Order, Write};

/// How the embedded store is tuned.
#[derive(Clone, Debug)]
pub struct EmbeddedOptions {
    /// redb's page cache, in bytes. The watch cache serves reads, so little is enough.
    pub cache_bytes: usize,
    /// So many revisions of history are kept; older ones go a little at a time with each commit.
    pub history: u64,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        Self { cache_bytes: 2 << 20, history: 10_000 }
    }
}

/// Writes that wait for the next commit at most; further ones wait in their callers.
const QUEUE: usize = 512;
/// Commits that a watch may lag before it re-reads the log.
const BROADCAST: usize = 64;
/// Changes that a watch reads from the log at a time.
const REPLAY: usize = 256;

/// Where the open database is. Whoever reads holds it for as long as that takes; it isn't there once
/// the store is closed, and for a moment while it is opened anew.
type Shelf = RwLock<Option<Arc<Database>>>;

/// See the [module](self).
pub struct EmbeddedStore {
    db: Arc<Shelf>,
    path: Arc<str>,
    orders: Mutex<Option<mpsc::Sender<Order>>>,
    changes: broadcast::Sender<Arc<[Change]>>,
    current: watch::Receiver<Revision>,
    writer: Mutex<Option<JoinHandle<()>>>,
    broken: Arc<AtomicBool>,
}

impl EmbeddedStore {
    /// Opens the file, or makes it. Blocks.
    ///
    /// # Errors
    /// The file cannot be opened, is in use by another process, or is not such a store.
    pub fn open(path: &Path, options: &EmbeddedOptions) -> Result<Self, StoreError> {
        let name: Arc<str> = path.display().to_string().into();
        let (db, revision) =
            open_file(path, options.cache_bytes).map_err(|error| backend(&name, &error))?;
        let db = Arc::new(RwLock::new(Some(Arc::new(db))));
        let (orders, queue) = mpsc::channel(QUEUE);
        let (changes, _) = broadcast::channel(BROADCAST);
        let broken = Arc::new(AtomicBool::new(false));
        let (publish, current) = watch::channel(revision);
        let thread = writer::Writer {
            shelf: Arc::clone(&db),
            path: Arc::clone(&name),
            file: path.to_owned(),
            cache_bytes: options.cache_bytes,
            history: options.history,
            queue,
            changes: changes.clone(),
            publish,
            broken: Arc::clone(&broken),
        };
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || thread.run())
            .map_err(|error| backend(&name, &error))?;
        Ok(Self {
            db,
            path: name,
            orders: Mutex::new(Some(orders)),
            changes,
            current,
            writer: Mutex::new(Some(writer)),
            broken,
        })
    }

    /// Lets the writer answer what waits, and end.
    fn stop(&self) -> Option<JoinHandle<()>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// As [`Store::close`], for where nothing is async. Blocks.
    pub fn close_blocking(&self) {
        if let Some(writer) = self.stop()
            && writer.join().is_err()
        {
            tracing::error!(path = %self.path, "the store's writer had panicked");
        }
        self.db.write().unwrap_or_else(PoisonError::into_inner).take();
    }

    async fn order<T>(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Order,
    ) -> Result<T, StoreError> {
        let closed = || closed(&self.path);
        let orders = self
            .orders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .ok_or_else(closed)?;
        let (answer, answered) = oneshot::channel();
        orders.send(make(answer)).await.map_err(|_| closed())?;
        drop(orders); // a close does not wait for callers that only wait for their answer
        answered.await.map_err(|_| closed())?
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&layout::Snapshot) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let db = self.database().ok_or_else(|| closed(&self.path))?;
        read_blocking(db, Arc::clone(&self.path), read).await
    }

    fn database(&self) -> Option<Arc<Database>> {
        taken(&self.db)
    }
}

fn taken(shelf: &Shelf) -> Option<Arc<Database>> {
    shelf.read().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Opens the file, or makes it; its newest revision comes along.
fn open_file(path: &Path, cache_bytes: usize) -> Result<(Database, Revision), redb::Error> {
    let db = redb::Builder::new().set_cache_size(cache_bytes).create(path)?;
    let revision = layout::prepare(&db)?;
    Ok((db, revision))
}

fn closed(path: &str) -> StoreError {
    StoreError::Closed { path: path.to_owned() }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.close_blocking();
    }
}

async fn read_blocking<T: Send + 'static>(
    db: Arc<Database>,
    path: Arc<str>,
    read: impl FnOnce(&layout::Snapshot) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let name = Arc::clone(&path);
    tokio::task::spawn_blocking(move || {
        let snapshot = layout::Snapshot::open(&db, path)?;
        read(&snapshot)
    })
    .await
    .unwrap_or_else(|error| Err(backend(&name, &error)))
}

pub(crate) fn backend(path: &str, error: &impl std::fmt::Display) -> StoreError {
    StoreError::Backend { path: path.to_owned(), problem: error.to_string() }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &str) -> Result<Option<Stored>, StoreError> {
        let key = key.to_owned();
        self.read(move |snapshot| snapshot.get(&key)).await
    }

    async fn list(&self, range: ListRange) -> Result<Page, StoreError> {
        self.read(move |snapshot| snapshot.list(&range)).await
    }

    async fn put(&self, key: &str, value: Bytes, expect: Expect) -> Result<Revision, StoreError> {
        let key: Arc<str> = key.into();
        self.order(|answer| Order::Write(Write { key, value: Some(value), expect, answer })).await
    }

    async fn delete(&self, key: &str, expect: Revision) -> Result<Revision, StoreError> {
        let key: Arc<str> = key.into();
        self.order(|answer| {
            Order::Write(Write { key, value: None, expect: Expect::Modified(expect), answer })
        })
        .await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        // Subscribed before the log is read: what is committed in between comes twice, and the
        // second time is known by its revision.
        let live = self.changes.subscribe();
        self.read(move |snapshot| snapshot.check(after)).await?;
        let (sender, receiver) = mpsc::channel(4);
        let follower = Follower {
            db: Arc::downgrade(&self.db),
            path: Arc::clone(&self.path),
            prefix: prefix.to_owned(),
            seen: after,
            live,
            sender,
        };
        // Ends when the receiver is dropped or the store closed.
        tokio::spawn(follower.run());
        Ok(Watch::new(receiver))
    }

    async fn compact(&self, revision: Revision) -> Result<(), StoreError> {
        self.order(|answer| Order::Compact { revision, answer }).await
    }

    async fn compacted(&self) -> Result<Revision, StoreError> {
        self.read(|snapshot| Ok(snapshot.compacted)).await
    }

    async fn current_revision(&self) -> Result<Revision, StoreError> {
        Ok(*self.current.borrow())
    }

    fn is_healthy(&self) -> bool {
        !self.broken.load(Ordering::Acquire)
    }

    async fn close(&self) {
        let writer = self.stop();
        let db = self.db.write().unwrap_or_else(PoisonError::into_inner).take();
        // Closing writes to the file, so that the next start need not repair it.
        let closing = tokio::task::spawn_blocking(move || {
            let joined = writer.is_none_or(|writer| writer.join().is_ok());
            drop(db);
            joined
        });
        if !closing.await.unwrap_or(false) {
            tracing::error!(path = %self.path, "the store's writer had panicked");
        }
    }
}

/// One watch: the log up to now, then what is committed.
struct Follower {
    /// A watch does not keep the file open.
    db: Weak<Shelf>,
    path: Arc<str>,
    prefix: String,
    /// All up to here has been sent on.
    seen: Revision,
    live: broadcast::Receiver<Arc<[Change]>>,
    sender: mpsc::Sender<Result<Vec<Change>, StoreError>>,
}

impl Follower {
    async fn run(mut self) {
        loop {
            if let Err(error) = self.replay().await {
                // Nobody to tell if the receiver is gone.
                let _ = self.sender.send(Err(error)).await;
                return;
            }
            loop {
                let received = tokio::select! {
                    received = self.live.recv() => received,
                    () = self.sender.closed() => return,
                };
                match received {
                    Ok(changes) => {
                        let fresh = changes
                            .iter()
                            .filter(|change| change.revision > self.seen)
                            .cloned()
                            .collect();
                        if !self.pass_on(fresh).await {
                            return;
                        }
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => break,
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        }
    }

    /// Sends what the log has beyond `seen`.
    async fn replay(&mut self) -> Result<(), StoreError> {
        loop {
            let seen = self.seen;
            let shelf = self.db.upgrade();
            let db = shelf.and_then(|shelf| taken(&shelf)).ok_or_else(|| closed(&self.path))?;
            let changes = read_blocking(db, Arc::clone(&self.path), move |snapshot| {
                snapshot.changes(seen, REPLAY)
            })
            .await?;
            if changes.is_empty() || !self.pass_on(changes).await {
                return Ok(());
            }
        }
    }

    /// Whether anybody still listens.
    async fn pass_on(&mut self, mut changes: Vec<Change>) -> bool {
        if let Some(last) = changes.last() {
            self.seen = last.revision;
        }
        changes.retain(|change| change.key.starts_with(&self.prefix));
        changes.is_empty() || self.sender.send(Ok(changes)).await.is_ok()
    }
}
