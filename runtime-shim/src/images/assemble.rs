//! Makes an image from files of this machine.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::{Component, Path, PathBuf},
};

use oci_spec::image::{Arch, Config, ImageConfigurationBuilder, Os, RootFsBuilder};

use super::{
    ImageStore,
    hashing::digest_of,
    install::Names,
    reference::{Digest, ImageName},
};
use crate::runtime::{Image, Result, RuntimeError};

/// A file of this machine and its place in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInImage {
    /// Its path in the image.
    pub path: PathBuf,
    /// The file, or a link to it. It belongs to root in the image.
    pub source: PathBuf,
    /// Its permission bits in the image.
    pub mode: u32,
}

impl ImageStore {
    pub(super) async fn assemble(
        &self,
        name: &str,
        files: &[FileInImage],
        config: &Config,
    ) -> Result<Image> {
        let parsed = ImageName::parse(name)?;
        let Some(tag) = parsed.tagged().filter(|_| parsed.digest.is_none()) else {
            return Err(RuntimeError::Invalid(format!(
                "image name {name}: a digest can't be given"
            )));
        };
        let mut files = files.to_vec();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        for file in &files {
            let leaves = |c: Component<'_>| !matches!(c, Component::RootDir | Component::Normal(_));
            if file.path.components().any(leaves) || file.path.file_name().is_none() {
                let path = file.path.display();
                return Err(RuntimeError::Invalid(format!("image {name}: path {path} leaves it")));
            }
        }
        let (layer, diff_id) = self
            .blocking(move |inner| {
                let layer = inner.records.temporary();
                let diff_id = write_layer(&layer, &files)?;
                Ok((layer, diff_id))
            })
            .await?;
        let config = configuration(config, &diff_id).map_err(RuntimeError::Invalid)?;
        let names = Names { tags: vec![tag], digests: Vec::new(), pinned: true };
        let opened = |_| {
            let opened = File::open(&layer).map_err(|source| failed(&layer, source));
            async move { opened.map(|file| (Box::new(file) as Box<_>, None)) }
        };
        let image = self.install(name, config, names, 1, opened).await;
        // It is in the temporary folder, so whatever goes wrong here, it does not stay.
        let _ = tokio::fs::remove_file(&layer).await;
        image
    }
}

fn failed(path: &Path, source: io::Error) -> RuntimeError {
    RuntimeError::Io { what: path.display().to_string(), source }
}

fn configuration(config: &Config, diff_id: &Digest) -> Result<Vec<u8>, String> {
    let rootfs = RootFsBuilder::default()
        .typ("layers")
        .diff_ids(vec![diff_id.to_string()])
        .build()
        .map_err(|error| error.to_string())?;
    let image = ImageConfigurationBuilder::default()
        .architecture(Arch::default())
        .os(Os::Linux)
        .config(config.clone())
        .rootfs(rootfs)
        .build()
        .map_err(|error| error.to_string())?;
    serde_json::to_vec(&image).map_err(|error| error.to_string())
}

/// Writes the files as a tar archive that depends on nothing but their content, place and mode.
fn write_layer(layer: &Path, files: &[FileInImage]) -> Result<Digest> {
    let archive = File::create_new(layer).map_err(|source| failed(layer, source))?;
    let out = BufWriter::with_capacity(128 << 10, archive);
    let mut archive = tar::Builder::new(Hashing { out, hash: sha2::Digest::new() });
    for file in files {
        let told = |source| failed(&file.source, source);
        let mut source = File::open(&file.source).map_err(told)?;
        let metadata = source.metadata().map_err(told)?;
        if !metadata.is_file() {
            let path = file.source.display();
            return Err(RuntimeError::Invalid(format!("{path}: only files can go into an image")));
        }
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(metadata.len());
        header.set_mode(file.mode & 0o7777);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        let path = file.path.strip_prefix("/").unwrap_or(&file.path);
        archive.append_data(&mut header, path, &mut source).map_err(told)?;
    }
    let written = archive.into_inner().and_then(|mut out| out.flush().map(|()| out));
    written.map(|out| digest_of(out.hash)).map_err(|source| failed(layer, source))
}

struct Hashing<W> {
    out: W,
    hash: sha2::Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        sha2::Digest::update(&mut self.hash, &bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
