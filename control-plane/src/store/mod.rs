//! Where the cluster's objects are kept.
//!
//! A [`Store`] is what etcd is to Kubernetes, and no more than that, so that etcd fits behind the
//! trait: keys and opaque values; one revision counter for the whole store, which every change
//! moves by one; writes that happen only if the key is as the writer last saw it; lists as of a
//! revision; watches from a revision without a gap; and compaction, after which older revisions
//! are [`StoreError::Compacted`].
//!
//! [`embedded`] is the backend that needs nothing installed: one redb file.
//!
//! What a store never does: answer a write that a power cut could undo, or tell a watcher of a
//! write before it is durable.

pub mod embedded;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

/// A point in the store's history. An empty store is at 1, as in etcd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A value with its history's two ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its key.
    pub key: Arc<str>,
    /// What was written.
    pub value: Bytes,
    /// When the key came to be (it may have existed before, and been deleted).
    pub created: Revision,
    /// When this value was written.
    pub modified: Revision,
}

/// How a key must be for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// It must not exist.
    Absent,
    /// Its value must be the one written at this revision.
    Modified(Revision),
}

/// Which part of the keys to list, and as of when.
#[derive(Clone, Debug, Default)]
pub struct ListRange {
    /// Keys that begin so.
    pub prefix: String,
    /// Only keys that sort behind this one.
    pub after: Option<String>,
    /// As of this revision; now if absent.
    pub revision: Option<Revision>,
    /// At most so many; 0 for all.
    pub limit: usize,
}

/// A part of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// In the order of their keys.
    pub items: Vec<Stored>,
    /// As of when.
    pub revision: Revision,
    /// Whether more follow behind the last item.
    pub more: bool,
}

/// A change, as a watch tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// When it happened; no two changes share a revision.
    pub revision: Revision,
    /// To which key.
    pub key: Arc<str>,
    /// What was written; `None` if the key was deleted.
    pub value: Option<Bytes>,
    /// When the key came to be.
    pub created: Revision,
}

/// Why a store could not do as told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The key is not as the writer expected.
    #[error("{key} is at another revision than the writer saw")]
    Conflict {
        /// The key.
        key: String,
        /// What it holds now.
        current: Option<Stored>,
    },
    /// The revision has been compacted away.
    #[error("revision {requested} is gone: history begins behind {compacted}")]
    Compacted {
        /// What was asked for.
        requested: Revision,
        /// What is left is newer than this.
        compacted: Revision,
    },
    /// The revision is yet to come.
    #[error("revision {requested} is yet to come: the store is at {current}")]
    Future {
        /// What was asked for.
        requested: Revision,
        /// Where the store is.
        current: Revision,
    },
    /// The backend failed. For a write, whether it happened is not known.
    #[error("the store {path} failed: {problem}")]
    Backend {
        /// Which store.
        path: String,
        /// What it said.
        problem: String,
    },
    /// The store was closed.
    #[error("the store {path} is closed")]
    Closed {
        /// Which store.
        path: String,
    },
}

/// Changes from a revision on, in order and without a gap. Ends when dropped, or with an error.
#[derive(Debug)]
pub struct Watch {
    receiver: mpsc::Receiver<Result<Vec<Change>, StoreError>>,
}

impl Watch {
    pub(crate) fn new(receiver: mpsc::Receiver<Result<Vec<Change>, StoreError>>) -> Self {
        Self { receiver }
    }

    /// Waits for the next changes: at least one, and all that became durable at once together.
    /// `None` once the store is closed. After an error nothing more comes. Loses nothing when
    /// dropped before it is ready.
    pub async fn next(&mut self) -> Option<Result<Vec<Change>, StoreError>> {
        self.receiver.recv().await
    }
}

/// See the [module](self).
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The newest value of a key.
    ///
    /// # Errors
    /// The backend failed.
    async fn get(&self, key: &str) -> Result<Option<Stored>, StoreError>;

    /// The keys of a range, in order.
    ///
    /// # Errors
    /// [`StoreError::Compacted`], [`StoreError::Future`], or the backend failed.
    async fn list(&self, range: ListRange) -> Result<Page, StoreError>;

    /// Writes a value if the key is as expected; durable when this returns.
    ///
    /// # Errors
    /// [`StoreError::Conflict`], or the backend failed.
    async fn put(&self, key: &str, value: Bytes, expect: Expect) -> Result<Revision, StoreError>;

    /// Deletes a key if its value is the one written at `expect`; durable when this returns.
    ///
    /// # Errors
    /// [`StoreError::Conflict`], or the backend failed.
    async fn delete(&self, key: &str, expect: Revision) -> Result<Revision, StoreError>;

    /// All changes to keys with this prefix that are newer than `after`.
    ///
    /// # Errors
    /// [`StoreError::Compacted`], [`StoreError::Future`], or the backend failed.
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError>;

    /// Forgets what was superseded at or before `revision`.
    ///
    /// # Errors
    /// [`StoreError::Future`], or the backend failed.
    async fn compact(&self, revision: Revision) -> Result<(), StoreError>;

    /// The revision up to which history is gone.
    ///
    /// # Errors
    /// The backend failed.
    async fn compacted(&self) -> Result<Revision, StoreError>;

    /// The newest durable revision.
    ///
    /// # Errors
    /// The backend failed.
    async fn current_revision(&self) -> Result<Revision, StoreError>;

    /// Whether writes can be expected to succeed: no failure is known that only a restart mends.
    fn is_healthy(&self) -> bool;

    /// Answers what waits and lets go of what is open. All later calls may fail.
    async fn close(&self);
}
