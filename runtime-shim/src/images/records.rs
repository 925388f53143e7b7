//! What the store knows of its images, on the disk.
//!
//! ```text
//!   <root>/lock                    held while anything below is changed
//!   <root>/references.json         names and digests, each with the image it stands for
//!   <root>/images/<id>.json        one image: its layers, its size
//!   <root>/images/<id>.config      its configuration, byte for byte: its digest is the image's id
//!   <root>/layers/<diff id>/fs     one unpacked layer
//!   <root>/layers/<diff id>/layer.json
//!   <root>/tmp/<instance>/         what is being made; of a process that is gone, removed at open
//! ```
//!
//! Nothing is kept in memory: several processes (the node, and `keelson image`) may use one store.
//! Every file appears by a rename of a complete one. All functions block the thread.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{layers::Unpacked, reference::Digest};

/// One image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    /// The digest of its configuration.
    pub(crate) id: String,
    /// The diff ids of its layers, bottom first.
    pub(crate) layers: Vec<String>,
    /// Bytes of its layers, unpacked.
    pub(crate) size: u64,
    /// It can't be had again from elsewhere, so it is never collected as garbage.
    pub(crate) pinned: bool,
}

/// What names stand for: image ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct References {
    /// `name:tag`.
    #[serde(default)]
    pub(crate) tags: BTreeMap<String, String>,
    /// `name@sha256:…`.
    #[serde(default)]
    pub(crate) digests: BTreeMap<String, String>,
}

/// What a layer's folder holds, as counted when it was unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    /// Bytes on the disk.
    pub(crate) bytes: u64,
    /// Files, folders and all else.
    pub(crate) entries: u64,
}

impl From<Unpacked> for LayerRecord {
    fn from(unpacked: Unpacked) -> Self {
        Self { bytes: unpacked.bytes, entries: unpacked.entries }
    }
}

/// The folders of the store.
#[derive(Debug)]
pub(crate) struct Records {
    root: PathBuf,
    scratch: PathBuf,
    /// Says that this process is alive, to whoever cleans `tmp`.
    _alive: File,
}

impl Records {
    /// Makes the folders, and removes what processes that are gone have left half-made.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        for folder in ["images", "layers", "tmp"] {
            fs::create_dir_all(root.join(folder))?;
        }
        let scratch = root.join("tmp").join(uuid::Uuid::new_v4().simple().to_string());
        let alive = {
            let _lock = lock(root)?;
            remove_stale(&root.join("tmp"))?;
            fs::create_dir(&scratch)?;
            let alive = File::open(&scratch)?;
            alive.lock()?;
            alive
        };
        Ok(Self { root: root.to_owned(), scratch, _alive: alive })
    }

    /// The store's folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Keeps every other process, and every other caller, from changing the store.
    pub(crate) fn lock(&self) -> io::Result<File> {
        lock(&self.root)
    }

    /// A path for something that is being made: on the store's file system, gone with the process.
    pub(crate) fn temporary(&self) -> PathBuf {
        self.scratch.join(uuid::Uuid::new_v4().simple().to_string())
    }

    /// All names.
    pub(crate) fn references(&self) -> io::Result<References> {
        Ok(self.read(&self.root.join("references.json"))?.unwrap_or_default())
    }

    /// Replaces all names. The caller holds the lock.
    pub(crate) fn set_references(&self, references: &References) -> io::Result<()> {
        self.write(&self.root.join("references.json"), &serde_json::to_vec(references)?)
    }

    /// One image.
    pub(crate) fn image(&self, id: &Digest) -> io::Result<Option<ImageRecord>> {
        self.read(&self.image_path(id, "json"))
    }

    /// All images, by id.
    pub(crate) fn images(&self) -> io::Result<Vec<ImageRecord>> {
        let mut ids = names(&self.root.join("images"))?
            .iter()
            .filter_map(|name| Digest::from_hex(name.strip_suffix(".json")?))
            .collect::<Vec<_>>();
        ids.sort();
        // One that is removed meanwhile is not there.
        ids.iter().filter_map(|id| self.image(id).transpose()).collect()
    }

    /// The image's configuration.
    pub(crate) fn config(&self, id: &Digest) -> io::Result<Vec<u8>> {
        fs::read(self.image_path(id, "config"))
    }

    /// Writes an image's record and configuration. The caller holds the lock.
    pub(crate) fn set_image(
        &self,
        id: &Digest,
        record: &ImageRecord,
        config: &[u8],
    ) -> io::Result<()> {
        self.write(&self.image_path(id, "config"), config)?;
        self.write(&self.image_path(id, "json"), &serde_json::to_vec(record)?)
    }

    /// Forgets an image. The caller holds the lock.
    pub(crate) fn remove_image(&self, id: &Digest) -> io::Result<()> {
        for kind in ["json", "config"] {
            match fs::remove_file(self.image_path(id, kind)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        sync_folder(&self.root.join("images"))
    }

    /// The folder of a layer's files.
    pub(crate) fn layer_files(&self, diff_id: &Digest) -> PathBuf {
        self.layer_path(diff_id).join("fs")
    }

    /// What was counted when the layer was unpacked, if it was.
    pub(crate) fn layer(&self, diff_id: &Digest) -> io::Result<Option<LayerRecord>> {
        self.read(&self.layer_path(diff_id).join("layer.json"))
    }

    /// All layers.
    pub(crate) fn layers(&self) -> io::Result<Vec<Digest>> {
        Ok(names(&self.root.join("layers"))?.iter().filter_map(|n| Digest::from_hex(n)).collect())
    }

    /// Puts an unpacked layer in its place: `made` holds its `fs`.
    pub(crate) fn set_layer(
        &self,
        diff_id: &Digest,
        made: &Path,
        record: LayerRecord,
    ) -> io::Result<()> {
        let mut file = File::create(made.join("layer.json"))?;
        file.write_all(&serde_json::to_vec(&record)?)?;
        file.sync_all()?;
        sync_folder(made)?;
        match fs::rename(made, self.layer_path(diff_id)) {
            // Somebody else was faster with the very same content.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                fs::remove_dir_all(made)
            }
            Err(error) => Err(error),
            Ok(()) => sync_folder(&self.root.join("layers")),
        }
    }

    /// Takes a layer out of its place; returns where it is now, to be deleted without the lock.
    pub(crate) fn take_layer(&self, diff_id: &Digest) -> io::Result<PathBuf> {
        let taken = self.temporary();
        fs::rename(self.layer_path(diff_id), &taken)?;
        sync_folder(&self.root.join("layers"))?;
        Ok(taken)
    }

    fn image_path(&self, id: &Digest, kind: &str) -> PathBuf {
        self.root.join("images").join(format!("{}.{kind}", id.hex()))
    }

    fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.root.join("layers").join(diff_id.hex())
    }

    fn read<T: DeserializeOwned>(&self, path: &Path) -> io::Result<Option<T>> {
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes?,
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()))
        })
    }

    fn write(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let temporary = self.temporary();
        let mut file = File::create_new(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_folder(path.parent().unwrap_or(&self.root))
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        // Best effort: whoever opens the store next removes it otherwise.
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

fn lock(root: &Path) -> io::Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(root.join("lock"))?;
    file.lock()?;
    Ok(file)
}

fn remove_stale(tmp: &Path) -> io::Result<()> {
    for name in names(tmp)? {
        let path = tmp.join(name);
        let left = match File::open(&path) {
            // Its process ended properly just now, and removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            left => left?,
        };
        match left.try_lock() {
            Ok(()) if path.is_dir() => fs::remove_dir_all(&path)?,
            Ok(()) => fs::remove_file(&path)?,
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(())
}

fn names(folder: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
