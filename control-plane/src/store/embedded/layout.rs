//! What the tables mean.

use std::sync::Arc;

use bytes::Bytes;
use redb::{
    Database, ReadOnlyTable, ReadableDatabase, ReadableTable, Table, TableDefinition,
    WriteTransaction,
};

use super::{
    super::{Change, Expect, ListRange, Page, Revision, StoreError, Stored},
    backend,
};

type ObjectKey = (&'static str, u64);

const OBJECTS: TableDefinition<'_, ObjectKey, &[u8]> = TableDefinition::new("objects");
const LOG: TableDefinition<'_, u64, ObjectKey> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const FORMAT: (&str, u64) = ("format", 1);
const CURRENT: &str = "revision";
const COMPACTED: &str = "compacted";

const PUT: u8 = 1;
const DELETED: u8 = 0;
/// Kind and created revision before the value.
const HEADER: usize = 9;

/// Makes the tables if they are missing; the current revision.
pub(super) fn prepare(db: &Database) -> Result<Revision, redb::Error> {
    let transaction = db.begin_write()?;
    let revision = {
        transaction.open_table(OBJECTS)?;
        transaction.open_table(LOG)?;
        let mut meta = transaction.open_table(META)?;
        let format = meta.get(FORMAT.0)?.map(|value| value.value());
        match format {
            Some(format) if format != FORMAT.1 => {
                return Err(redb::Error::Corrupted(format!(
                    "its format is {format}, and this version knows {} only",
                    FORMAT.1
                )));
            }
            Some(_) => {}
            None => {
                meta.insert(FORMAT.0, FORMAT.1)?;
                meta.insert(CURRENT, 1)?;
                meta.insert(COMPACTED, 0)?;
            }
        }
        number(&meta, CURRENT)?
    };
    transaction.commit()?;
    Ok(Revision(revision))
}

fn number(meta: &impl ReadableTable<&'static str, u64>, name: &str) -> Result<u64, redb::Error> {
    match meta.get(name)? {
        Some(value) => Ok(value.value()),
        None => Err(redb::Error::Corrupted(format!("it has no {name}"))),
    }
}

fn record(value: Option<&[u8]>, created: u64) -> Vec<u8> {
    let mut record = Vec::with_capacity(HEADER + value.map_or(0, <[u8]>::len));
    record.push(if value.is_some() { PUT } else { DELETED });
    record.extend_from_slice(&created.to_be_bytes());
    record.extend_from_slice(value.unwrap_or_default());
    record
}

/// The value, if it is not a deletion, and when the key came to be.
fn parse(record: &[u8]) -> Result<(Option<&[u8]>, Revision), redb::Error> {
    let Some((header, value)) = record.split_at_checked(HEADER) else {
        return Err(redb::Error::Corrupted("a record is cut short".to_owned()));
    };
    let mut created = [0; 8];
    created.copy_from_slice(&header[1..]);
    let value = (header[0] == PUT).then_some(value);
    Ok((value, Revision(u64::from_be_bytes(created))))
}

/// The newest version of a key at or before `revision`, unless that is a deletion.
fn newest(
    objects: &impl ReadableTable<ObjectKey, &'static [u8]>,
    key: &str,
    revision: u64,
) -> Result<Option<Stored>, redb::Error> {
    let Some(entry) = objects.range((key, 0)..=(key, revision))?.next_back() else {
        return Ok(None);
    };
    let (position, record) = entry?;
    let (value, created) = parse(record.value())?;
    Ok(value.map(|value| Stored {
        key: key.into(),
        value: Bytes::copy_from_slice(value),
        created,
        modified: Revision(position.value().1),
    }))
}

/// The store at one moment.
pub(super) struct Snapshot {
    objects: ReadOnlyTable<ObjectKey, &'static [u8]>,
    log: ReadOnlyTable<u64, ObjectKey>,
    path: Arc<str>,
    current: Revision,
    pub(super) compacted: Revision,
}

impl Snapshot {
    pub(super) fn open(db: &Database, path: Arc<str>) -> Result<Self, StoreError> {
        let open = || -> Result<_, redb::Error> {
            let transaction = db.begin_read()?;
            let meta = transaction.open_table(META)?;
            Ok((
                transaction.open_table(OBJECTS)?,
                transaction.open_table(LOG)?,
                Revision(number(&meta, CURRENT)?),
                Revision(number(&meta, COMPACTED)?),
            ))
        };
        let (objects, log, current, compacted) = open().map_err(|error| backend(&path, &error))?;
        Ok(Self { objects, log, path, current, compacted })
    }

    /// Whether history since `revision` is still there.
    pub(super) fn check(&self, revision: Revision) -> Result<(), StoreError> {
        if revision < self.compacted {
            return Err(StoreError::Compacted { requested: revision, compacted: self.compacted });
        }
        if revision > self.current {
            return Err(StoreError::Future { requested: revision, current: self.current });
        }
        Ok(())
    }

    pub(super) fn get(&self, key: &str) -> Result<Option<Stored>, StoreError> {
        newest(&self.objects, key, u64::MAX).map_err(|error| backend(&self.path, &error))
    }

    pub(super) fn list(&self, range: &ListRange) -> Result<Page, StoreError> {
        let revision = range.revision.unwrap_or(self.current);
        self.check(revision)?;
        let (items, more) =
            self.scan(range, revision.0).map_err(|error| backend(&self.path, &error))?;
        Ok(Page { items, revision, more })
    }

    fn scan(&self, range: &ListRange, revision: u64) -> Result<(Vec<Stored>, bool), redb::Error> {
        let mut items: Vec<Stored> = Vec::new();
        let from = match &range.after {
            Some(after) if after.as_str() >= range.prefix.as_str() => (after.as_str(), u64::MAX),
            _ => (range.prefix.as_str(), 0),
        };
        let mut entries = self.objects.range(from..)?.peekable();
        while let Some(entry) = entries.next() {
            let (position, record) = entry?;
            let (key, modified) = position.value();
            if !key.starts_with(&range.prefix) {
                break;
            }
            if modified > revision {
                continue;
            }
            // A newer version of the same key that is not too new comes first.
            if let Some(Ok((next, _))) = entries.peek() {
                let (next_key, next_modified) = next.value();
                if next_key == key && next_modified <= revision {
                    continue;
                }
            }
            let (Some(value), created) = parse(record.value())? else { continue };
            if range.limit > 0 && items.len() == range.limit {
                return Ok((items, true));
            }
            items.push(Stored {
                key: key.into(),
                value: Bytes::copy_from_slice(value),
                created,
                modified: Revision(modified),
            });
        }
        Ok((items, false))
    }

    /// The next changes after `seen`.
    pub(super) fn changes(&self, seen: Revision, limit: usize) -> Result<Vec<Change>, StoreError> {
        self.check(seen)?;
        let read = || -> Result<Vec<Change>, redb::Error> {
            let mut changes = Vec::new();
            for entry in self.log.range(seen.0 + 1..)?.take(limit) {
                let (revision, value) = entry?;
                let (key, _) = value.value();
                let revision = revision.value();
                let Some(record) = self.objects.get((key, revision))? else {
                    return Err(redb::Error::Corrupted(format!(
                        "{key} has no version {revision}, of which the log tells"
                    )));
                };
                let (value, created) = parse(record.value())?;
                changes.push(Change {
                    revision: Revision(revision),
                    key: key.into(),
                    value: value.map(Bytes::copy_from_slice),
                    created,
                });
            }
            Ok(changes)
        };
        read().map_err(|error| backend(&self.path, &error))
    }
}

/// The tables of a transaction that writes.
pub(super) struct Tables<'t> {
    objects: Table<'t, ObjectKey, &'static [u8]>,
    log: Table<'t, u64, ObjectKey>,
    meta: Table<'t, &'static str, u64>,
    revision: u64,
    compacted: u64,
}

impl<'t> Tables<'t> {
    pub(super) fn open(transaction: &'t WriteTransaction) -> Result<Self, redb::Error> {
        let meta = transaction.open_table(META)?;
        Ok(Self {
            objects: transaction.open_table(OBJECTS)?,
            log: transaction.open_table(LOG)?,
            revision: number(&meta, CURRENT)?,
            compacted: number(&meta, COMPACTED)?,
            meta,
        })
    }

    pub(super) fn revision(&self) -> Revision {
        Revision(self.revision)
    }

    pub(super) fn compacted(&self) -> Revision {
        Revision(self.compacted)
    }

    /// Writes or deletes one key; `Err(current)` if it is not as expected.
    pub(super) fn write(
        &mut self,
        key: &Arc<str>,
        value: Option<&Bytes>,
        expect: Expect,
    ) -> Result<Result<Change, Option<Stored>>, redb::Error> {
        let current = newest(&self.objects, key, u64::MAX)?;
        let as_expected = match (expect, &current) {
            (Expect::Absent, None) => true,
            (Expect::Modified(revision), Some(current)) => current.modified == revision,
            _ => false,
        };
        if !as_expected {
            return Ok(Err(current));
        }
        self.revision += 1;
        let created = current.as_ref().map_or(Revision(self.revision), |current| current.created);
        // 0 if this is the key's first version since it was last compacted away. A deletion that
        // this creation follows goes when its own revision is compacted.
        let superseded = current.map_or(0, |current| current.modified.0);
        let record = record(value.map(AsRef::as_ref), created.0);
        self.objects.insert((&**key, self.revision), record.as_slice())?;
        self.log.insert(self.revision, (&**key, superseded))?;
        Ok(Ok(Change {
            revision: Revision(self.revision),
            key: Arc::clone(key),
            value: value.cloned(),
            created,
        }))
    }

    /// Forgets up to `target`, at most `limit` revisions of it.
    pub(super) fn compact(&mut self, target: Revision, limit: u64) -> Result<(), redb::Error> {
        let until = target.0.min(self.compacted.saturating_add(limit)).min(self.revision);
        for revision in self.compacted + 1..=until {
            let Some(entry) = self.log.remove(revision)? else { continue };
            let (key, superseded) = entry.value();
            if superseded > 0 {
                self.objects.remove((key, superseded))?;
            }
            let deleted = match self.objects.get((key, revision))? {
                Some(record) => parse(record.value())?.0.is_none(),
                None => false,
            };
            if deleted {
                self.objects.remove((key, revision))?;
            }
        }
        self.compacted = self.compacted.max(until);
        Ok(())
    }

    /// Writes down where the counters are.
    pub(super) fn finish(mut self) -> Result<(), redb::Error> {
        self.meta.insert(CURRENT, self.revision)?;
        self.meta.insert(COMPACTED, self.compacted)?;
        Ok(())
    }
}
