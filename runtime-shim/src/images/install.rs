//! The way into the store that all sources share: layers first, then the image.

use std::{
    fs,
    future::Future,
    io::Read,
    sync::{Arc, PoisonError, Weak},
};

use futures::{StreamExt, TryStreamExt, stream};
use oci_spec::image::ImageConfiguration;

use super::{
    ImageStore, Inner,
    layers::{self, Budget, LayerBlob, LayerError},
    reference::Digest,
};
use crate::runtime::{Image, Result, RuntimeError};

/// How often layers that somebody else removed meanwhile are fetched again.
const ATTEMPTS: usize = 3;
/// A configuration is a few kilobytes; its history may make it longer.
pub(super) const MAX_CONFIG: u64 = 8 << 20;
/// Overlay takes 500 layers; registries and builders allow far fewer.
const MAX_LAYERS: usize = 500;

/// What an image is to be called, and how long it stays.
#[derive(Clone, Debug, Default)]
pub(super) struct Names {
    /// `name:tag`.
    pub(super) tags: Vec<String>,
    /// `name@digest`.
    pub(super) digests: Vec<String>,
    /// Never collected as garbage.
    pub(super) pinned: bool,
}

/// A layer's bytes, with the digest that they must have if nobody has checked it yet.
pub(super) type Fetched = (Box<dyn Read + Send>, Option<Digest>);

impl ImageStore {
    /// Makes the layers that are missing with what `fetch` gets for their position, and records the
    /// image. `subject` is what errors are about: the image's name, or the archive's.
    pub(super) async fn install<F, Fut>(
        &self,
        subject: &str,
        config: Vec<u8>,
        names: Names,
        layer_count: usize,
        fetch: F,
    ) -> Result<Image>
    where
        F: Fn(usize) -> Fut,
        Fut: Future<Output = Result<Fetched>>,
    {
        let diff_ids = diff_ids(&config, layer_count).map_err(|reason| refused(subject, reason))?;
        let _lease = Lease::take(&self.inner, &diff_ids);
        let fetch = &fetch;
        for _ in 0..ATTEMPTS {
            let options = &self.inner.options;
            let budget = Arc::new(Budget::new(options.max_image_bytes, options.max_image_entries));
            // Owned, not borrowed: else the future is not `Send` for all lifetimes, and no trait
            // object's method can await it.
            stream::iter(diff_ids.clone().into_iter().enumerate())
                .map(|(at, diff_id)| {
                    let budget = &budget;
                    async move { self.layer(subject, &diff_id, budget, move || fetch(at)).await }
                })
                .buffer_unordered(options.concurrent_downloads.max(1))
                .try_collect::<()>()
                .await?;
            let (config, diff_ids, names) = (config.clone(), diff_ids.clone(), names.clone());
            let recorded =
                self.blocking(move |inner| inner.commit(&config, &diff_ids, &names)).await?;
            if let Some(image) = recorded {
                return Ok(image);
            }
        }
        Err(refused(subject, "its layers are being removed as fast as they are unpacked".into()))
    }

    /// Unpacks one layer, if it is not there.
    async fn layer<Fut: Future<Output = Result<Fetched>>>(
        &self,
        subject: &str,
        diff_id: &Digest,
        budget: &Arc<Budget>,
        fetch: impl FnOnce() -> Fut,
    ) -> Result<()> {
        let making = self.making(diff_id);
        let _only_here = making.lock().await;
        let wanted = diff_id.clone();
        let there = self
            .blocking(move |inner| {
                inner.records.layer(&wanted).map_err(|e| inner.failed("reading a layer", e))
            })
            .await?;
        if there.is_some() {
            return Ok(());
        }
        let (reader, digest) = fetch().await?;
        let (subject, budget) = (subject.to_owned(), Arc::clone(budget));
        let blob = LayerBlob { reader, digest, diff_id: diff_id.clone() };
        self.blocking(move |inner| inner.make_layer(&subject, blob, &budget)).await
    }

    fn making(&self, diff_id: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut making = self.inner.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = making.get(diff_id).and_then(Weak::upgrade) {
            return lock;
        }
        making.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        making.insert(diff_id.clone(), Arc::downgrade(&lock));
        lock
    }
}

impl Inner {
    fn make_layer(&self, subject: &str, blob: LayerBlob, budget: &Budget) -> Result<()> {
        let diff_id = blob.diff_id.clone();
        let made = self.records.temporary();
        let failed = |error| self.failed("making a layer", error);
        fs::create_dir_all(made.join("fs")).map_err(failed)?;
        let unpacked = match layers::unpack(blob, &made.join("fs"), budget) {
            Ok(unpacked) => unpacked,
            Err(error) => {
                // What was unpacked is of no use; if it can't be removed now, it goes with `tmp`.
                let _ = fs::remove_dir_all(&made);
                return Err(match error {
                    LayerError::Io { layer, what, source } => {
                        self.failed(&format!("layer {layer}: {what}"), source)
                    }
                    other => refused(subject, other.to_string()),
                });
            }
        };
        self.records.set_layer(&diff_id, &made, unpacked.into()).map_err(failed)
    }
}

/// The diff ids of a configuration, which must be as many as there are layers.
fn diff_ids(config: &[u8], layers: usize) -> Result<Vec<Digest>, String> {
    let config: ImageConfiguration =
        serde_json::from_slice(config).map_err(|error| format!("its configuration: {error}"))?;
    let diff_ids = config.rootfs().diff_ids();
    if diff_ids.len() != layers {
        return Err(format!(
            "it has {layers} layers, but its configuration names {}",
            diff_ids.len()
        ));
    }
    if diff_ids.len() > MAX_LAYERS {
        return Err(format!("it has more than {MAX_LAYERS} layers"));
    }
    diff_ids.iter().map(|id| Digest::parse(id)).collect()
}

/// An image that can't be had, and why.
pub(super) fn refused(subject: &str, reason: String) -> RuntimeError {
    RuntimeError::ImagePull { image: subject.to_owned(), reason }
}

/// Keeps layers from being removed as nobody's while their image is on its way.
struct Lease<'a> {
    inner: &'a Inner,
    layers: Vec<Digest>,
}

impl<'a> Lease<'a> {
    fn take(inner: &'a Inner, layers: &[Digest]) -> Self {
        let mut leases = inner.leases.lock().unwrap_or_else(PoisonError::into_inner);
        for layer in layers {
            *leases.entry(layer.clone()).or_default() += 1;
        }
        drop(leases);
        Self { inner, layers: layers.to_vec() }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let mut leases = self.inner.leases.lock().unwrap_or_else(PoisonError::into_inner);
        for layer in &self.layers {
            if let Some(count) = leases.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    leases.remove(layer);
                }
            }
        }
    }
}
