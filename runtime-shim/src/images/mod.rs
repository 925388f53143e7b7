//! Images: from a registry or a file into a store of unpacked layers.
//!
//! ```text
//!   registry ─┐                           ┌─► layers/<diff id>/fs   stacked by overlay
//!   archive  ─┼─► verify ─► unpack once ──┤
//!   files    ─┘                           └─► images/<id>, references   written when all is there
//! ```
//!
//! Everything is named by its digest, so what is there is right, and nothing is unpacked twice. An
//! image becomes visible by one rename after all that it needs is on the disk; a process that is
//! killed on the way leaves nothing but a temporary folder, which the next one removes.
//!
//! It must never trust an archive or a registry (see `layers`), and never contact a registry that
//! the image's name or the configuration does not name.
//!
//! * `reference`: the names of images
//! * `plan`: what is chosen, stacked and removed: pure
//! * `records`: what is on the disk, and under which lock it changes
//! * `layers`: one archive to one folder
//! * `registry`, `archive`, `assemble`: where images come from

mod archive;
mod assemble;
mod hashing;
mod install;
mod layers;
mod plan;
mod records;
mod reference;
mod registry;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use oci_spec::image::ImageConfiguration;
use tokio::sync::{OnceCell, Semaphore};

pub use assemble::FileInImage;
use install::Names;
use records::{ImageRecord, Records, References};
use reference::{Digest, ImageName};

use crate::runtime::{Image, ImageFsInfo, ImageId, RegistryAuth, Result, RuntimeError};

/// How the store gets images, and how large they may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageOptions {
    /// Where names without a registry are looked for: `host[:port]`, with a path in front of names
    /// of one component if it has one (`host/library`). Without it such names are only ever those
    /// of images that are in the store.
    pub default_registry: Option<String>,
    /// Registries (`host[:port]`, as image names have it) that are spoken to without TLS.
    pub insecure_registries: Vec<String>,
    /// The bytes that one image may unpack to.
    pub max_image_bytes: u64,
    /// The files, folders and all else that one image may unpack to.
    pub max_image_entries: u64,
    /// Layers that are downloaded at the same time, over all images.
    pub concurrent_downloads: usize,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            default_registry: None,
            insecure_registries: Vec::new(),
            max_image_bytes: 32 << 30,
            max_image_entries: 4_000_000,
            concurrent_downloads: 3,
        }
    }
}

/// What a pull that several callers wait for came to.
type Flight = OnceCell<Result<Image, Arc<RuntimeError>>>;

/// The images of one node. Cheap to clone; any number of processes may open the same folder.
#[derive(Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

struct Inner {
    records: Records,
    options: ImageOptions,
    downloads: Semaphore,
    /// Pulls at work, by name and credentials.
    flights: Mutex<HashMap<String, Weak<Flight>>>,
    /// Layers being made, so that two images that share one wait for each other.
    making: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    /// Layers that an image which is not recorded yet needs, with how many such images there are.
    leases: Mutex<BTreeMap<Digest, usize>>,
}

/// Whether a name can be the name of an image.
///
/// # Errors
/// [`RuntimeError::InvalidImageName`].
pub(crate) fn check_name(image: &str) -> Result<()> {
    ImageName::parse(image).map(drop)
}

impl ImageStore {
    /// Opens the store below `root`, made if it is not there. Removes what was left half-made.
    ///
    /// Blocks the thread for as long as that takes.
    ///
    /// # Errors
    /// The folder can't be made or written.
    pub fn open(root: impl Into<PathBuf>, options: ImageOptions) -> Result<Self> {
        let root = root.into();
        let records = Records::open(&root).map_err(|source| RuntimeError::Io {
            what: format!("image store {}", root.display()),
            source,
        })?;
        let inner = Inner {
            records,
            downloads: Semaphore::new(options.concurrent_downloads.max(1)),
            options,
            flights: Mutex::default(),
            making: Mutex::default(),
            leases: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Gets an image from its registry and unpacks it. Layers that are there are not fetched.
    ///
    /// The credentials are tried in their order; without any the registry is asked anonymously.
    /// Callers that ask for the same image with the same credentials at the same time share one
    /// pull; it goes on as long as one of them waits.
    ///
    /// # Errors
    /// [`RuntimeError::InvalidImageName`], [`RuntimeError::ImagePull`] with what the registry said,
    /// or [`RuntimeError::Io`] of the store.
    pub async fn pull(&self, image: &str, auth: &[RegistryAuth]) -> Result<Image> {
        let name = ImageName::parse(image)?;
        let default = self.inner.options.default_registry.as_deref();
        let Some(full) = name.in_default_registry(default) else {
            return self.find(image).await?.ok_or_else(|| RuntimeError::ImagePull {
                image: name.to_string(),
                reason: "it is not in the local store, its name has no registry, and no default \
                         registry is configured"
                    .to_owned(),
            });
        };
        let flight = self.flight(&full, auth);
        let outcome = flight
            .get_or_init(|| async {
                // On a task of its own the future's size is nobody's concern but the heap's.
                Box::pin(self.pull_from_registry(&full, auth)).await.map_err(Arc::new)
            })
            .await;
        match outcome {
            Ok(image) => Ok(image.clone()),
            Err(error) => Err(shared(error)),
        }
    }

    /// The image, if it is in the store; `image` is a name, a `name@digest` or an id.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] of the store. A name that can't be parsed names no image.
    pub async fn find(&self, image: &str) -> Result<Option<Image>> {
        let image = image.to_owned();
        self.blocking(move |inner| {
            let references = inner.references()?;
            let Some(id) = inner.resolve(&image, &references)? else { return Ok(None) };
            inner.image(&id, &references)
        })
        .await
    }

    /// All images.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] of the store.
    pub async fn list(&self) -> Result<Vec<Image>> {
        self.blocking(|inner| {
            let references = inner.references()?;
            let images = inner.records.images().map_err(|e| inner.failed("reading images", e))?;
            images
                .iter()
                .filter_map(|record| Digest::parse(&record.id).ok())
                .filter_map(|id| inner.image(&id, &references).transpose())
                .collect()
        })
        .await
    }

    /// Removes an image with all its names, and the layers that no other image needs. Succeeds if
    /// it is not there.
    ///
    /// `in_use` are the images that containers are made from: they are not removed.
    ///
    /// # Errors
    /// [`RuntimeError::Invalid`] for an image in use, [`RuntimeError::Io`] of the store.
    pub async fn remove(&self, image: &str, in_use: &BTreeSet<ImageId>) -> Result<()> {
        let (image, in_use) = (image.to_owned(), in_use.clone());
        self.blocking(move |inner| inner.remove(&image, &in_use)).await
    }

    /// Gives an image that is in the store one more name.
    ///
    /// # Errors
    /// [`RuntimeError::NotFound`], [`RuntimeError::InvalidImageName`], [`RuntimeError::Invalid`] if
    /// the new name has a digest, [`RuntimeError::Io`] of the store.
    pub async fn tag(&self, image: &str, name: &str) -> Result<Image> {
        let parsed = ImageName::parse(name)?;
        let Some(tagged) = parsed.tagged().filter(|_| parsed.digest.is_none()) else {
            return Err(RuntimeError::Invalid(format!(
                "image name {name}: a digest can't be given"
            )));
        };
        let image = image.to_owned();
        self.blocking(move |inner| {
            let _lock = inner.lock()?;
            let mut references = inner.references()?;
            let Some(id) = inner.resolve(&image, &references)? else {
                return Err(RuntimeError::NotFound(format!("image {image}")));
            };
            references.tags.insert(tagged, id.to_string());
            inner.set_references(&references)?;
            inner
                .image(&id, &references)?
                .ok_or_else(|| RuntimeError::NotFound(format!("image {image}")))
        })
        .await
    }

    /// The image's configuration: its command, environment, user, working folder.
    ///
    /// # Errors
    /// [`RuntimeError::NotFound`], [`RuntimeError::Io`] of the store.
    pub async fn config(&self, id: &ImageId) -> Result<ImageConfiguration> {
        let id = parse_id(id)?;
        self.blocking(move |inner| inner.config(&id)).await
    }

    /// The folders of the image's layers, bottom first, ready to be stacked by overlay: whiteouts
    /// are 0/0 character devices and `trusted.overlay.opaque` attributes.
    ///
    /// # Errors
    /// [`RuntimeError::NotFound`], [`RuntimeError::Io`] of the store.
    pub async fn layers(&self, id: &ImageId) -> Result<Vec<PathBuf>> {
        let id = parse_id(id)?;
        self.blocking(move |inner| {
            let record = inner.record(&id)?;
            let diff_ids = parse_layers(&record)?;
            Ok(plan::stacked(&diff_ids).iter().map(|l| inner.records.layer_files(l)).collect())
        })
        .await
    }

    /// What the images use, as counted when they were unpacked.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] of the store.
    pub async fn fs_info(&self) -> Result<ImageFsInfo> {
        self.blocking(|inner| {
            let failed = |error| inner.failed("reading layers", error);
            let mut info =
                ImageFsInfo { mountpoint: inner.records.root().to_owned(), ..Default::default() };
            for layer in inner.records.layers().map_err(failed)? {
                // One that is removed meanwhile is not there.
                if let Some(record) = inner.records.layer(&layer).map_err(failed)? {
                    info.used_bytes += record.bytes;
                    info.inodes_used += record.entries;
                }
            }
            Ok(info)
        })
        .await
    }

    /// Takes in all images of a file or folder: an OCI image layout (a folder, or an archive of
    /// one) or what `docker save` writes, plain or compressed. Its content tells which.
    ///
    /// # Errors
    /// [`RuntimeError::ImagePull`] with the file's name and what is wrong with it,
    /// [`RuntimeError::Io`] of the store or the file.
    pub async fn import(&self, path: &Path) -> Result<Vec<Image>> {
        Box::pin(self.import_archive(path)).await
    }

    /// Makes an image of one layer from files of this machine. The same files and configuration
    /// make the same image. It is pinned, for there is nowhere to get it from again.
    ///
    /// # Errors
    /// [`RuntimeError::InvalidImageName`], [`RuntimeError::Invalid`] for a path that leaves the
    /// image, [`RuntimeError::Io`] of the store or a file.
    pub async fn build_from_files(
        &self,
        name: &str,
        files: &[FileInImage],
        config: &oci_spec::image::Config,
    ) -> Result<Image> {
        Box::pin(self.assemble(name, files, config)).await
    }

    fn flight(&self, name: &ImageName, auth: &[RegistryAuth]) -> Arc<Flight> {
        // Whoever has other credentials must not get what they don't open.
        let credentials = auth
            .iter()
            .map(|a| (a.username.as_str(), a.password.as_str(), a.registry_token.as_str()));
        let key = format!("{name} {:?}", credentials.collect::<Vec<_>>());
        let key = hashing::digest(key.as_bytes()).to_string();
        let mut flights = self.inner.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(&key).and_then(Weak::upgrade)
            && flight.get().is_none()
        {
            return flight;
        }
        flights.retain(|_, flight| flight.strong_count() > 0);
        let flight = Arc::new(Flight::new());
        flights.insert(key, Arc::downgrade(&flight));
        flight
    }

    /// Runs something that reads or writes the disk where that blocks nobody.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(error) => Err(RuntimeError::Internal(format!("image store: {error}"))),
        }
    }
}

impl Inner {
    fn failed(&self, what: &str, source: std::io::Error) -> RuntimeError {
        let root = self.records.root().display();
        RuntimeError::Io { what: format!("image store {root}: {what}"), source }
    }

    fn lock(&self) -> Result<fs::File> {
        self.records.lock().map_err(|error| self.failed("locking", error))
    }

    fn references(&self) -> Result<References> {
        self.records.references().map_err(|error| self.failed("reading names", error))
    }

    fn set_references(&self, references: &References) -> Result<()> {
        self.records.set_references(references).map_err(|error| self.failed("writing names", error))
    }

    fn record(&self, id: &Digest) -> Result<ImageRecord> {
        self.records
            .image(id)
            .map_err(|error| self.failed("reading an image", error))?
            .ok_or_else(|| RuntimeError::NotFound(format!("image {id}")))
    }

    fn config(&self, id: &Digest) -> Result<ImageConfiguration> {
        let bytes = match self.records.config(id) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(RuntimeError::NotFound(format!("image {id}")));
            }
            bytes => bytes.map_err(|error| self.failed("reading a configuration", error))?,
        };
        serde_json::from_slice(&bytes)
            .map_err(|error| RuntimeError::Invalid(format!("image {id}: configuration: {error}")))
    }

    /// The id of the image that a name, a `name@digest` or an id stands for.
    fn resolve(&self, image: &str, references: &References) -> Result<Option<Digest>> {
        let id = Digest::parse(image).ok().or_else(|| Digest::from_hex(image));
        if let Some(id) = id {
            let there = self.records.image(&id).map_err(|e| self.failed("reading an image", e))?;
            return Ok(there.map(|_| id));
        }
        let Ok(name) = ImageName::parse(image) else { return Ok(None) };
        let default = self.options.default_registry.as_deref();
        let id = [Some(name.clone()), name.in_default_registry(default)]
            .into_iter()
            .flatten()
            .find_map(|name| match &name.digest {
                Some(digest) => references.digests.get(&name.with_digest(digest)),
                None => references.tags.get(&name.tagged()?),
            });
        Ok(id.and_then(|id| Digest::parse(id).ok()))
    }

    fn image(&self, id: &Digest, references: &References) -> Result<Option<Image>> {
        let record = match self.record(id) {
            Err(RuntimeError::NotFound(_)) => return Ok(None),
            record => record?,
        };
        let config = match self.config(id) {
            Err(RuntimeError::NotFound(_)) => return Ok(None),
            config => config?,
        };
        let named = |names: &BTreeMap<String, String>| {
            names
                .iter()
                .filter(|(_, of)| *of == id.as_str())
                .map(|(name, _)| name.clone())
                .collect()
        };
        let (uid, username) = plan::configured_user(&config);
        let volumes = config.config().as_ref().and_then(|c| c.volumes().clone());
        Ok(Some(Image {
            id: ImageId(id.to_string()),
            repo_tags: named(&references.tags),
            repo_digests: named(&references.digests),
            size: record.size,
            uid,
            username,
            pinned: record.pinned,
            volumes: volumes.unwrap_or_default().into_iter().map(PathBuf::from).collect(),
        }))
    }

    fn remove(&self, image: &str, in_use: &BTreeSet<ImageId>) -> Result<()> {
        let taken = {
            let _lock = self.lock()?;
            let mut references = self.references()?;
            let Some(id) = self.resolve(image, &references)? else { return Ok(()) };
            if in_use.contains(&ImageId(id.to_string())) {
                return Err(RuntimeError::Invalid(format!(
                    "image {image}: a container is made from it: remove the container first"
                )));
            }
            references.tags.retain(|_, of| of != id.as_str());
            references.digests.retain(|_, of| of != id.as_str());
            // Names first: a kill in between leaves an image without names, which can be removed
            // by its id, and never a name without an image.
            self.set_references(&references)?;
            let failed = |error| self.failed("removing an image", error);
            self.records.remove_image(&id).map_err(failed)?;
            let leased = self.leased();
            let (present, images) =
                (self.records.layers().map_err(failed)?, self.records.images().map_err(failed)?);
            plan::unused_layers(&present, &images, &leased)
                .iter()
                .map(|layer| self.records.take_layer(layer).map_err(failed))
                .collect::<Result<Vec<_>>>()?
        };
        for folder in taken {
            fs::remove_dir_all(folder).map_err(|error| self.failed("removing a layer", error))?;
        }
        Ok(())
    }

    fn leased(&self) -> BTreeSet<Digest> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Records an image whose layers are all there; says `None` if one of them is not (another
    /// process may have removed it as nobody's).
    fn commit(&self, config: &[u8], diff_ids: &[Digest], names: &Names) -> Result<Option<Image>> {
        let id = hashing::digest(config);
        let _lock = self.lock()?;
        let failed = |error| self.failed("recording an image", error);
        let mut size = config.len() as u64;
        for layer in plan::stacked(diff_ids) {
            match self.records.layer(&layer).map_err(failed)? {
                Some(record) => size += record.bytes,
                None => return Ok(None),
            }
        }
        let known = self.records.image(&id).map_err(failed)?;
        let record = ImageRecord {
            id: id.to_string(),
            layers: diff_ids.iter().map(Digest::to_string).collect(),
            size,
            pinned: names.pinned || known.as_ref().is_some_and(|known| known.pinned),
        };
        if known.as_ref() != Some(&record) {
            self.records.set_image(&id, &record, config).map_err(failed)?;
        }
        let mut references = self.references()?;
        let before = references.clone();
        references.tags.extend(names.tags.iter().map(|name| (name.clone(), id.to_string())));
        references.digests.extend(names.digests.iter().map(|name| (name.clone(), id.to_string())));
        if references != before {
            self.set_references(&references)?;
        }
        self.image(&id, &references)
    }
}

fn parse_id(id: &ImageId) -> Result<Digest> {
    Digest::parse(id.as_str()).map_err(|_| RuntimeError::NotFound(format!("image {id}")))
}

fn parse_layers(record: &ImageRecord) -> Result<Vec<Digest>> {
    record
        .layers
        .iter()
        .map(|layer| Digest::parse(layer))
        .collect::<Result<_, _>>()
        .map_err(|error| RuntimeError::Invalid(format!("image {}: {error}", record.id)))
}

/// The same error once more, for the next who waited for it.
fn shared(error: &RuntimeError) -> RuntimeError {
    match error {
        RuntimeError::ImagePull { image, reason } => {
            RuntimeError::ImagePull { image: image.clone(), reason: reason.clone() }
        }
        RuntimeError::Io { what, source } => RuntimeError::Io {
            what: what.clone(),
            source: std::io::Error::new(source.kind(), source.to_string()),
        },
        RuntimeError::Invalid(reason) => RuntimeError::Invalid(reason.clone()),
        other => RuntimeError::Internal(other.to_string()),
    }
}

#[cfg(test)]
mod tests;
