//! Reads a layer's archive and writes its tree.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ffi::{CString, OsStr},
    io::{self, BufRead, BufReader, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::sys::{stat::SFlag, time::TimeSpec};
use sha2::{Digest as _, Sha256};
use tar::EntryType;

use super::{
    LayerError,
    framing::Framed,
    tree::{Attributes, Names, Tree},
};
use crate::images::{hashing, reference::Digest};

/// How much all layers of one image may still hold.
pub(crate) struct Budget {
    bytes: AtomicU64,
    entries: AtomicU64,
}

impl Budget {
    /// A budget of unpacked bytes and of entries.
    pub(crate) fn new(bytes: u64, entries: u64) -> Self {
        Self { bytes: AtomicU64::new(bytes), entries: AtomicU64::new(entries) }
    }

    fn take(left: &AtomicU64, amount: u64, what: &str) -> io::Result<()> {
        left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(amount))
            .map(drop)
            .map_err(|_| {
                let reason = format!("the image holds more {what} than is allowed");
                io::Error::new(io::ErrorKind::InvalidData, reason)
            })
    }
}

/// A layer as it came.
pub(crate) struct LayerBlob {
    /// The bytes: a tar archive, plain or compressed.
    pub(crate) reader: Box<dyn Read + Send>,
    /// What the bytes must hash to, where a manifest says so and nobody has checked it yet.
    pub(crate) digest: Option<Digest>,
    /// What the archive inside must hash to.
    pub(crate) diff_id: Digest,
}

/// What a layer turned out to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// Bytes on the disk, holes not counted.
    pub(crate) bytes: u64,
    /// Files, folders and all else.
    pub(crate) entries: u64,
}

/// Unpacks a layer into `folder`, which must be there and empty, and waits until it is on the disk.
///
/// Blocks the thread. What is in the folder after an error is of no use.
pub(crate) fn unpack(
    blob: LayerBlob,
    folder: &Path,
    budget: &Budget,
) -> Result<Unpacked, LayerError> {
    let layer = blob.diff_id.clone();
    let told = |source: io::Error| explain(&layer, source);
    let outer = Rc::new(RefCell::new(Sha256::new()));
    let inner = Rc::new(RefCell::new(Sha256::new()));
    let came = Hashed { inner: blob.reader, hash: Rc::clone(&outer) };
    let mut came = BufReader::with_capacity(128 << 10, came);
    let plain = decompressed(&mut came).map_err(told)?;
    let bounded = Bounded { inner: plain, budget };
    let hashed = Hashed { inner: bounded, hash: Rc::clone(&inner) };
    let mut framed = Framed::new(BufReader::with_capacity(128 << 10, hashed));

    let mut tree = Tree::open(folder).map_err(told)?;
    let unpacked = entries(&mut framed, &mut tree, budget).map_err(told)?;
    // What follows the end of the archive still counts for the digests.
    io::copy(&mut framed, &mut io::sink()).map_err(told)?;
    drop(framed);
    io::copy(&mut came, &mut io::sink()).map_err(told)?;

    if let Some(expected) = &blob.digest {
        check(&layer, expected, &outer)?;
    }
    check(&layer, &blob.diff_id, &inner)?;
    tree.finish().map_err(told)?;
    Ok(unpacked)
}

fn check(layer: &Digest, expected: &Digest, hash: &RefCell<Sha256>) -> Result<(), LayerError> {
    let actual = hashing::digest_of(hash.take());
    if actual == *expected {
        return Ok(());
    }
    Err(LayerError::DigestMismatch {
        layer: layer.to_string(),
        expected: expected.to_string(),
        actual: actual.to_string(),
    })
}

/// An error with a system's number is the disk's; any other is the archive's.
fn explain(layer: &Digest, source: io::Error) -> LayerError {
    let layer = layer.to_string();
    if source.raw_os_error().is_some() {
        return LayerError::Io { layer, what: "unpacking".to_owned(), source };
    }
    LayerError::Refused { layer, reason: source.to_string() }
}

/// Compression is told by its magic number: media types are often wrong, and `docker save` has none.
pub(crate) fn decompressed<'a, R: BufRead + 'a>(mut reader: R) -> io::Result<Box<dyn Read + 'a>> {
    let start = reader.fill_buf()?;
    if start.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(flate2::bufread::MultiGzDecoder::new(reader)))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Ok(Box::new(zstd::stream::read::Decoder::with_buffer(reader)?))
    } else if start.starts_with(b"BZh") || start.starts_with(&[0xfd, b'7', b'z', b'X', b'Z']) {
        let reason = "the compression is not supported: gzip, zstd and none are";
        Err(io::Error::new(io::ErrorKind::InvalidData, reason))
    } else {
        Ok(Box::new(reader))
    }
}

fn entries(stream: &mut impl Read, tree: &mut Tree, budget: &Budget) -> io::Result<Unpacked> {
    let mut unpacked = Unpacked { bytes: 0, entries: 0 };
    let mut archive = tar::Archive::new(stream);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            continue;
        }
        Budget::take(&budget.entries, 1, "files")?;
        let path = path_of(&entry.path_bytes());
        let described = |error: io::Error| match error.raw_os_error() {
            // The kernel's word on an impossible path is about the archive, not about the disk.
            Some(libc::ENAMETOOLONG | libc::ENOTDIR | libc::ELOOP | libc::EISDIR) | None => {
                io::Error::new(io::ErrorKind::InvalidData, format!("entry {path:?}: {error}"))
            }
            Some(_) => error,
        };
        unpacked.bytes += write(&mut entry, kind, &path, tree, budget).map_err(described)?;
        unpacked.entries += 1;
    }
    Ok(unpacked)
}

fn write(
    entry: &mut tar::Entry<'_, impl Read>,
    kind: EntryType,
    path: &Path,
    tree: &mut Tree,
    budget: &Budget,
) -> io::Result<u64> {
    let names = Names::parse(path)?;
    if let Some((_, name)) = names.split()
        && let Some(hidden) = name.as_bytes().strip_prefix(b".wh.")
    {
        hide(tree, path, hidden)?;
        return Ok(0);
    }
    let attributes = attributes(entry)?;
    let is_folder = kind.is_dir() || (kind.is_file() && entry.path_bytes().ends_with(b"/"));
    match kind {
        _ if is_folder => tree.folder(&names, &attributes)?,
        EntryType::Regular | EntryType::Continuous => {
            return tree.file(&names, &attributes, entry);
        }
        EntryType::GNUSparse => {
            // Its holes are not in the stream, so they have not been counted there.
            Budget::take(&budget.bytes, entry.size(), "bytes")?;
            return tree.file(&names, &attributes, entry);
        }
        EntryType::Symlink => tree.symlink(&names, &link_target(entry)?, &attributes)?,
        EntryType::Link => tree.hard_link(&names, &Names::parse(&link_target(entry)?)?)?,
        EntryType::Char => tree.node(&names, SFlag::S_IFCHR, device(entry)?, &attributes)?,
        EntryType::Block => tree.node(&names, SFlag::S_IFBLK, device(entry)?, &attributes)?,
        EntryType::Fifo => tree.node(&names, SFlag::S_IFIFO, (0, 0), &attributes)?,
        other => {
            let reason = format!("entries of type {:?} are not supported", other.as_byte() as char);
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
    }
    Ok(0)
}

/// Whiteouts, as the image specification names them ("representing changes").
fn hide(tree: &mut Tree, path: &Path, hidden: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new(""));
    match hidden {
        b".wh..opq" => tree.opaque(&Names::parse(folder)?),
        // What aufs kept for itself.
        _ if hidden.starts_with(b".wh.") => Ok(()),
        b"" | b"." | b".." => {
            Err(io::Error::new(io::ErrorKind::InvalidData, "a whiteout of no name"))
        }
        _ => tree.whiteout(&Names::parse(&folder.join(OsStr::from_bytes(hidden)))?),
    }
}

fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

fn link_target(entry: &tar::Entry<'_, impl Read>) -> io::Result<PathBuf> {
    match entry.link_name_bytes() {
        Some(target) if !target.is_empty() => Ok(path_of(&target)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "a link without a target")),
    }
}

fn device(entry: &tar::Entry<'_, impl Read>) -> io::Result<(u32, u32)> {
    let header = entry.header();
    Ok((header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0)))
}

fn attributes(entry: &mut tar::Entry<'_, impl Read>) -> io::Result<Attributes> {
    let id = |id: u64| {
        u32::try_from(id).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, format!("owner {id} is out of range"))
        })
    };
    let header = entry.header();
    let fields = header.as_old();
    // A field that was left empty means zero to every other reader.
    let blank = |field: &[u8]| field.iter().all(|b| matches!(b, 0 | b' '));
    let uid = if blank(&fields.uid) { 0 } else { id(header.uid()?)? };
    let gid = if blank(&fields.gid) { 0 } else { id(header.gid()?)? };
    let mode = if blank(&fields.mode) { 0 } else { header.mode()? & 0o7777 };
    let modified = if blank(&fields.mtime) { 0 } else { header.mtime()? };
    let mut mtime = TimeSpec::new(i64::try_from(modified).unwrap_or(i64::MAX), 0);
    let mut xattrs = BTreeMap::new();
    if let Some(records) = entry.pax_extensions()? {
        for record in records {
            let record = record?;
            if record.key_bytes() == b"mtime" {
                mtime = record.value().ok().and_then(parse_time).unwrap_or(mtime);
            } else if let Some(name) = record.key_bytes().strip_prefix(b"SCHILY.xattr.")
                && may_be_set(name)
                && let Ok(name) = CString::new(name)
            {
                xattrs.insert(name, record.value_bytes().to_vec());
            }
        }
    }
    Ok(Attributes { uid, gid, mode, mtime, xattrs: xattrs.into_iter().collect() })
}

/// Only what a program in the container can see. Overlay's own attributes would let an archive
/// redirect names, and labels of the machine where it was made mean nothing here.
fn may_be_set(name: &[u8]) -> bool {
    name == b"security.capability"
        || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
}

/// `[-]seconds[.fraction]`.
fn parse_time(text: &str) -> Option<TimeSpec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let whole: i64 = seconds.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: i64 = digits.parse().ok()?;
    match seconds.starts_with('-') && nanos > 0 {
        true => Some(TimeSpec::new(whole.checked_sub(1)?, 1_000_000_000 - nanos)),
        false => Some(TimeSpec::new(whole, nanos)),
    }
}

/// Hashes what is read through it.
struct Hashed<R> {
    inner: R,
    hash: Rc<RefCell<Sha256>>,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.borrow_mut().update(&buffer[..read]);
        Ok(read)
    }
}

/// Ends in an error where the budget does: a small blob may unpack to any size.
struct Bounded<'a, R> {
    inner: R,
    budget: &'a Budget,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        Budget::take(&self.budget.bytes, read as u64, "bytes")?;
        Ok(read)
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
