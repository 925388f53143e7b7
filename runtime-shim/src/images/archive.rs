//! Images from a file or folder: an OCI image layout, or what `docker save` writes.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, BufReader, Read, Seek},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest};
use serde::Deserialize;

use super::{
    ImageStore, hashing,
    install::{Fetched, MAX_CONFIG, Names, refused},
    layers::decompressed,
    plan,
    reference::{Digest, ImageName},
    registry::{self, Document},
};
use crate::runtime::{Image, Result, RuntimeError};

/// The entries of an archive that are looked at.
const MAX_MEMBERS: usize = 100_000;
/// The images in one archive.
const MAX_IMAGES: usize = 1_000;
/// Links from one name in an archive to another, one after the other.
const MAX_LINKS: usize = 8;

/// Where an image's parts are in an archive.
struct Planned {
    config: Vec<u8>,
    names: Names,
    /// The files of its layers, with their digests where the archive says them.
    layers: Vec<(String, Option<Digest>)>,
}

impl ImageStore {
    pub(super) async fn import_archive(&self, path: &Path) -> Result<Vec<Image>> {
        let subject = path.display().to_string();
        let (from, about) = (path.to_owned(), subject.clone());
        let (members, images) = self
            .blocking(move |inner| {
                let told = |source: io::Error| match source.raw_os_error() {
                    Some(_) => RuntimeError::Io { what: about.clone(), source },
                    None => refused(&about, source.to_string()),
                };
                let limit = inner.options.max_image_bytes;
                let spare = inner.records.temporary();
                let members = Members::open(&from, &spare, limit).map_err(told)?;
                let images = plan_images(&members, &from).map_err(told)?;
                Ok((Arc::new(members), images))
            })
            .await?;
        let mut installed = Vec::with_capacity(images.len());
        for image in images {
            let fetch = |at: usize| {
                let (name, digest) = image.layers[at].clone();
                let (members, about) = (Arc::clone(&members), subject.clone());
                self.blocking(move |_| {
                    let reader = members
                        .open_member(&name)
                        .map_err(|error| refused(&about, format!("{name}: {error}")))?;
                    Ok::<Fetched, _>((reader, digest))
                })
            };
            let count = image.layers.len();
            installed.push(
                self.install(&subject, image.config.clone(), image.names.clone(), count, fetch)
                    .await?,
            );
        }
        Ok(installed)
    }
}

/// The named files of a folder or an archive.
enum Members {
    Folder(File),
    Archive { file: Arc<File>, index: BTreeMap<String, Member> },
}

/// What an archive has under a name.
enum Member {
    File { at: u64, size: u64 },
    Link(String),
}

impl Members {
    /// A compressed archive is unpacked once to `spare`, which has no name any more afterwards.
    fn open(path: &Path, spare: &Path, limit: u64) -> io::Result<Self> {
        let mut file = File::open(path)?;
        if file.metadata()?.is_dir() {
            return Ok(Self::Folder(file));
        }
        if !file.metadata()?.is_file() {
            return Err(invalid("it is neither a file nor a folder"));
        }
        let mut start = [0; 4];
        let read = file.read(&mut start)?;
        file.rewind()?;
        if !is_plain(&start[..read]) {
            let mut plain = File::options().read(true).write(true).create_new(true).open(spare)?;
            std::fs::remove_file(spare)?;
            hashing::copy(&mut decompressed(BufReader::new(file))?, &mut plain, limit)?;
            plain.rewind()?;
            file = plain;
        }
        let index = index(&file)?;
        Ok(Self::Archive { file: Arc::new(file), index })
    }

    fn open_member(&self, name: &str) -> io::Result<Box<dyn Read + Send>> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "it is not in the archive");
        match self {
            Self::Folder(folder) => {
                let how = OpenHow::new()
                    .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC)
                    .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
                let file = File::from(openat2(folder, Path::new(name), how)?);
                if !file.metadata()?.is_file() {
                    return Err(invalid("it is not a file"));
                }
                Ok(Box::new(file))
            }
            Self::Archive { file, index } => {
                let mut name = name;
                for _ in 0..MAX_LINKS {
                    match index.get(name).ok_or_else(missing)? {
                        Member::Link(target) => name = target,
                        Member::File { at, size } => {
                            let (at, left) = (*at, *size);
                            return Ok(Box::new(Slice { file: Arc::clone(file), at, left }));
                        }
                    }
                }
                Err(invalid("it is a link to a link to a link"))
            }
        }
    }

    /// A small file, whole; nothing if it is not there.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let reader = match self.open_member(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            reader => reader?,
        };
        let mut bytes = Vec::new();
        reader.take(MAX_CONFIG + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_CONFIG {
            return Err(invalid(format!("{name} has more than {MAX_CONFIG} bytes")));
        }
        Ok(Some(bytes))
    }

    fn require(&self, name: &str) -> io::Result<Vec<u8>> {
        self.read(name)?.ok_or_else(|| invalid(format!("{name} is missing")))
    }

    /// A blob of an image layout, which must be what its name says.
    fn blob(&self, descriptor: &Descriptor) -> io::Result<Vec<u8>> {
        let digest = Digest::parse(descriptor.digest().as_ref()).map_err(invalid)?;
        let bytes = self.require(&blob_path(&digest))?;
        let actual = hashing::digest(&bytes);
        if actual != digest {
            let reason = format!("blob {digest}: digest mismatch: it is {actual}");
            return Err(invalid(reason));
        }
        Ok(bytes)
    }
}

fn is_plain(start: &[u8]) -> bool {
    !(start.starts_with(&[0x1f, 0x8b])
        || start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
        || start.starts_with(b"BZh")
        || start.starts_with(&[0xfd, b'7', b'z', b'X']))
}

/// Where each file is in a tar archive. Nothing of it is unpacked.
fn index(file: &File) -> io::Result<BTreeMap<String, Member>> {
    let mut index = BTreeMap::new();
    let mut archive = tar::Archive::new(BufReader::new(file));
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        if index.len() >= MAX_MEMBERS {
            return Err(invalid(format!("it has more than {MAX_MEMBERS} files")));
        }
        let Some(name) = lexical(Path::new(""), &entry.path()?) else { continue };
        let kind = entry.header().entry_type();
        if kind.is_file() {
            let (at, size) = (entry.raw_file_position(), entry.size());
            index.insert(name, Member::File { at, size });
        } else if (kind.is_symlink() || kind.is_hard_link())
            && let Some(target) = entry.link_name()?
        {
            // Old versions of `docker save` write a layer that comes twice as a link to the first.
            let base = match kind.is_symlink() {
                true => Path::new(&name).parent().unwrap_or(Path::new("")),
                false => Path::new(""),
            };
            if let Some(target) = lexical(base, &target) {
                index.insert(name, Member::Link(target));
            }
        }
    }
    Ok(index)
}

/// A path with its dots taken out; nothing if it leaves the archive.
fn lexical(base: &Path, path: &Path) -> Option<String> {
    use std::path::Component;
    let mut names: Vec<&str> = Vec::new();
    for component in base.components().chain(path.components()) {
        match component {
            Component::Normal(name) => names.push(name.to_str()?),
            Component::ParentDir => drop(names.pop()?),
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!names.is_empty()).then(|| names.join("/"))
}

/// A part of a file, read without moving a position that others share.
struct Slice {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Slice {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

/// One image in the `manifest.json` of `docker save`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn plan_images(members: &Members, path: &Path) -> io::Result<Vec<Planned>> {
    // Newer versions of `docker save` write both; only its own manifest has the whole names.
    let images = if let Some(saved) = members.read("manifest.json")? {
        plan_saved(members, &saved)?
    } else if let Some(index) = members.read("index.json")? {
        plan_layout(members, &index, path)?
    } else {
        return Err(invalid(
            "it is neither an OCI image layout (no index.json) nor a docker archive (no \
             manifest.json)",
        ));
    };
    match images.len() {
        0 => Err(invalid(format!("it has no image for linux/{}", Arch::default()))),
        1..=MAX_IMAGES => Ok(images),
        _ => Err(invalid(format!("it has more than {MAX_IMAGES} images"))),
    }
}

fn plan_saved(members: &Members, saved: &[u8]) -> io::Result<Vec<Planned>> {
    let saved: Vec<Saved> = serde_json::from_slice(saved)
        .map_err(|error| invalid(format!("manifest.json: {error}")))?;
    let plan = |image: Saved| {
        let tags = image.repo_tags.unwrap_or_default();
        let tags = tags
            .iter()
            .map(|tag| ImageName::parse(tag).map_err(|error| invalid(error.to_string())))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Planned {
            config: members.require(&image.config)?,
            names: Names {
                tags: tags.iter().filter_map(ImageName::tagged).collect(),
                ..Names::default()
            },
            layers: image.layers.into_iter().map(|layer| (layer, None)).collect(),
        })
    };
    saved.into_iter().map(plan).collect()
}

fn plan_layout(members: &Members, index: &[u8], path: &Path) -> io::Result<Vec<Planned>> {
    let index: ImageIndex =
        serde_json::from_slice(index).map_err(|error| invalid(format!("index.json: {error}")))?;
    let mut images: HashMap<Digest, usize> = HashMap::new();
    let mut planned: Vec<Planned> = Vec::new();
    let entries = index.manifests();
    // A layout of one image for several platforms may name them all at the top.
    let platforms = entries.iter().filter(|entry| entry.platform().is_some()).count();
    let chosen = plan::choose_platform(entries, &Arch::default()).map(|d| d.digest().clone());
    for entry in entries {
        let name = name_of(entry, path);
        let other_platform = platforms == entries.len() && name.is_none();
        if other_platform && chosen.as_ref() != Some(entry.digest()) {
            continue;
        }
        let Some((manifest_digest, manifest)) = manifest(members, entry)? else { continue };
        let at = match images.get(&manifest_digest) {
            Some(at) => *at,
            None => {
                planned.push(plan_manifest(members, &manifest)?);
                images.insert(manifest_digest, planned.len() - 1);
                planned.len() - 1
            }
        };
        if let Some(name) = name {
            let digest = Digest::parse(entry.digest().as_ref()).map_err(invalid)?;
            planned[at].names.tags.extend(name.tagged());
            planned[at].names.digests.push(name.with_digest(&digest));
        }
    }
    Ok(planned)
}

fn plan_manifest(members: &Members, manifest: &ImageManifest) -> io::Result<Planned> {
    let layers = manifest.layers().iter().map(|layer| {
        let digest = Digest::parse(layer.digest().as_ref()).map_err(invalid)?;
        Ok((blob_path(&digest), Some(digest)))
    });
    Ok(Planned {
        config: members.blob(manifest.config())?,
        names: Names::default(),
        layers: layers.collect::<io::Result<_>>()?,
    })
}

/// The manifest behind an entry of the index, for this machine.
fn manifest(members: &Members, entry: &Descriptor) -> io::Result<Option<(Digest, ImageManifest)>> {
    let mut entry = entry.clone();
    for _ in 0..MAX_LINKS {
        let digest = Digest::parse(entry.digest().as_ref()).map_err(invalid)?;
        let described = |reason| invalid(format!("manifest {digest}: {reason}"));
        match registry::parse(&members.blob(&entry)?).map_err(described)? {
            Document::Manifest(manifest) => return Ok(Some((digest, *manifest))),
            Document::Index(index) => {
                match plan::choose_platform(index.manifests(), &Arch::default()) {
                    Some(chosen) => entry = chosen.clone(),
                    None => return Ok(None),
                }
            }
        }
    }
    Err(invalid("its index is an index of an index of an index"))
}

/// The name of an entry, by the annotations that containerd and others write. A name that is only
/// a tag gets the archive's own name in front, since a layout has no name of its own.
fn name_of(entry: &Descriptor, path: &Path) -> Option<ImageName> {
    let annotations = entry.annotations().as_ref()?;
    let written = |key: &str| annotations.get(key).filter(|name| !name.is_empty());
    if let Some(name) = written("io.containerd.image.name") {
        return ImageName::parse(name).ok();
    }
    let name = written("org.opencontainers.image.ref.name")?;
    if name.contains(['/', ':']) {
        return ImageName::parse(name).ok();
    }
    let archive = path.file_name()?.to_str()?.to_lowercase();
    let stem = archive.split(".tar").next()?;
    ImageName::parse(&format!("{stem}:{name}")).ok()
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}
