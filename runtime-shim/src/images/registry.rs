//! Images from a registry, by the OCI distribution protocol.

use std::{error::Error, fs::File, io::Seek, time::Duration};

use futures::TryStreamExt;
use oci_client::{
    Client, Reference, RegistryOperation,
    client::{ClientConfig, ClientProtocol},
    errors::{OciDistributionError, OciErrorCode},
    secrets::RegistryAuth as Credentials,
};
use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest};
use tokio::io::{AsyncWrite, AsyncWriteExt, BufWriter};

use super::{
    ImageStore,
    install::{Fetched, MAX_CONFIG, Names, refused},
    plan,
    reference::{Digest, ImageName},
};
use crate::runtime::{Image, RegistryAuth, Result};

const USER_AGENT: &str = concat!("keelson/", env!("CARGO_PKG_VERSION"));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Without a single byte for so long, the registry is gone.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// A manifest is a few kilobytes; none takes longer than this.
const MANIFEST_TIMEOUT: Duration = Duration::from_secs(60);
/// What registries themselves allow a manifest to be.
const MAX_MANIFEST: usize = 4 << 20;
/// How much of what a registry says goes into an error.
const MAX_MESSAGE: usize = 400;
/// Manifests and indexes, as OCI and as Docker name them.
const MANIFESTS: &[&str] = &[
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// Why one way to ask a registry did not work.
#[derive(Debug)]
enum Refusal {
    /// Other credentials may be let in.
    Access(String),
    /// No credentials help.
    Other(String),
}

impl ImageStore {
    pub(super) async fn pull_from_registry(
        &self,
        name: &ImageName,
        auth: &[RegistryAuth],
    ) -> Result<Image> {
        let subject = name.to_string();
        let mut credentials: Vec<Credentials> = auth.iter().map(credentials_of).collect();
        if credentials.is_empty() {
            credentials.push(Credentials::Anonymous);
        }
        let mut refusal = String::new();
        for credentials in credentials {
            let insecure = &self.inner.options.insecure_registries;
            let found = async {
                let source = Source::connect(name, credentials, insecure).await?;
                let found = source.find(name).await?;
                Ok((source, found))
            };
            match found.await {
                Ok((source, found)) => return self.fetch(&subject, name, &source, &found).await,
                Err(Refusal::Other(reason)) => return Err(refused(&subject, reason)),
                Err(Refusal::Access(reason)) => refusal = reason,
            }
        }
        Err(refused(&subject, refusal))
    }

    async fn fetch(
        &self,
        subject: &str,
        name: &ImageName,
        source: &Source,
        found: &Found,
    ) -> Result<Image> {
        let layers = found.manifest.layers();
        let announced = layers.iter().fold(0u64, |sum, layer| sum.saturating_add(layer.size()));
        let allowed = self.inner.options.max_image_bytes;
        if announced > allowed {
            let reason = format!("its layers have {announced} bytes, {allowed} are allowed");
            return Err(refused(subject, reason));
        }
        let config = found.manifest.config();
        if config.size() > MAX_CONFIG {
            let reason = format!("its configuration has more than {MAX_CONFIG} bytes");
            return Err(refused(subject, reason));
        }
        let mut bytes = Vec::new();
        source.download(config, &mut bytes).await.map_err(|reason| refused(subject, reason))?;
        let names = Names {
            tags: name.tagged().filter(|_| name.digest.is_none()).into_iter().collect(),
            digests: vec![name.with_digest(&found.digest)],
            pinned: false,
        };
        let layer = |at: usize| self.download_layer(subject, source, &layers[at]);
        self.install(subject, bytes, names, layers.len(), layer).await
    }

    /// Downloads a layer to a file that has no name any more.
    async fn download_layer(
        &self,
        subject: &str,
        source: &Source,
        layer: &Descriptor,
    ) -> Result<Fetched> {
        let _turn = self.inner.downloads.acquire().await;
        let path = self.inner.records.temporary();
        let file = self
            .blocking(move |inner| {
                let failed = |error| inner.failed("making a temporary file", error);
                let options = File::options().read(true).write(true).create_new(true).open(&path);
                let file = options.map_err(failed)?;
                std::fs::remove_file(&path).map_err(failed)?;
                Ok(file)
            })
            .await?;
        let mut out = BufWriter::with_capacity(1 << 20, tokio::fs::File::from_std(file));
        source.download(layer, &mut out).await.map_err(|reason| refused(subject, reason))?;
        let mut file = out.into_inner().into_std().await;
        file.rewind().map_err(|error| self.inner.failed("reading a layer", error))?;
        // The client has compared the digest while it read.
        Ok((Box::new(file), None))
    }
}

/// The manifest that a name stands for on this machine.
struct Found {
    /// What the name stands for: the index, if there is one. It is what Kubernetes shows.
    digest: Digest,
    manifest: ImageManifest,
}

/// A repository, and how to be let in.
struct Source {
    client: Client,
    credentials: Credentials,
    host: String,
    repository: String,
}

impl Source {
    async fn connect(
        name: &ImageName,
        credentials: Credentials,
        insecure: &[String],
    ) -> Result<Self, Refusal> {
        let host = name.registry.clone().unwrap_or_default();
        let protocol = match insecure.contains(&host) {
            true => ClientProtocol::HttpsExcept(vec![host.clone()]),
            false => ClientProtocol::Https,
        };
        let config = ClientConfig {
            protocol,
            // Which manifest fits is decided here, see `plan`.
            platform_resolver: None,
            read_timeout: Some(READ_TIMEOUT),
            connect_timeout: Some(CONNECT_TIMEOUT),
            user_agent: USER_AGENT,
            ..ClientConfig::default()
        };
        let client = Client::try_from(config)
            .map_err(|error| Refusal::Other(format!("no client for registry {host}: {error}")))?;
        let source = Self { client, credentials, host, repository: name.repository.clone() };
        // Asked first, since the client keeps silent about credentials that are refused later.
        let reference = source.tagged("latest");
        source
            .client
            .auth(&reference, &source.credentials, RegistryOperation::Pull)
            .await
            .map_err(|error| explain(&source.host, &error))?;
        Ok(source)
    }

    async fn find(&self, name: &ImageName) -> Result<Found, Refusal> {
        let reference = match (&name.digest, &name.tag) {
            (Some(digest), _) => self.digested(digest),
            (None, tag) => self.tagged(tag.as_deref().unwrap_or("latest")),
        };
        let (digest, document) = self.document(&reference).await?;
        let index = match document {
            Document::Manifest(manifest) => return Ok(Found { digest, manifest: *manifest }),
            Document::Index(index) => index,
        };
        let arch = Arch::default();
        let Some(chosen) = plan::choose_platform(index.manifests(), &arch) else {
            let host = &self.host;
            let reason = format!("registry {host} has it, but not for linux/{arch}");
            return Err(Refusal::Other(reason));
        };
        let chosen = Digest::parse(chosen.digest().as_ref()).map_err(Refusal::Other)?;
        match self.document(&self.digested(&chosen)).await? {
            (_, Document::Manifest(manifest)) => Ok(Found { digest, manifest: *manifest }),
            (_, Document::Index(_)) => {
                Err(Refusal::Other(format!("manifest {chosen} is an index in an index")))
            }
        }
    }

    async fn document(&self, reference: &Reference) -> Result<(Digest, Document), Refusal> {
        let asked = self.client.pull_manifest_raw(reference, &self.credentials, MANIFESTS);
        let (bytes, digest) = tokio::time::timeout(MANIFEST_TIMEOUT, asked)
            .await
            .map_err(|_| {
                Refusal::Other(format!(
                    "registry {} did not answer within {MANIFEST_TIMEOUT:?}",
                    self.host
                ))
            })?
            .map_err(|error| explain(&self.host, &error))?;
        let described = |reason| Refusal::Other(format!("manifest {reference}: {reason}"));
        if bytes.len() > MAX_MANIFEST {
            return Err(described(format!("it has more than {MAX_MANIFEST} bytes")));
        }
        let digest = Digest::parse(&digest).map_err(described)?;
        let document = parse(&bytes).map_err(described)?;
        Ok((digest, document))
    }

    /// Downloads a blob and compares its size and digest.
    async fn download(
        &self,
        blob: &Descriptor,
        out: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), String> {
        let digest = Digest::parse(blob.digest().as_ref())?;
        let described = |reason: String| format!("blob {digest}: {reason}");
        let wrong_size =
            |size: u64| described(format!("size mismatch: expected {}, got {size}", blob.size()));
        let reference = self.digested(&digest);
        let mut stream = self
            .client
            .pull_blob_stream(&reference, digest.as_str())
            .await
            .map_err(|error| described(explain(&self.host, &error).into_reason()))?;
        if let Some(length) = stream.content_length.filter(|length| *length != blob.size()) {
            return Err(wrong_size(length));
        }
        let mut received = 0;
        let interrupted = |error: std::io::Error| {
            let cause = error.get_ref().map_or_else(|| error.to_string(), |e| chain(e));
            // What the client says of a blob that is not what its name says.
            match cause.strip_prefix("Invalid digest. ") {
                Some(mismatch) => format!("digest mismatch: {mismatch}"),
                None => format!("registry {}: {cause}", self.host),
            }
        };
        while let Some(piece) =
            stream.stream.try_next().await.map_err(|error| described(interrupted(error)))?
        {
            received += piece.len() as u64;
            if received > blob.size() {
                return Err(wrong_size(received));
            }
            out.write_all(&piece).await.map_err(|error| described(error.to_string()))?;
        }
        if received != blob.size() {
            return Err(wrong_size(received));
        }
        out.flush().await.map_err(|error| described(error.to_string()))
    }

    fn tagged(&self, tag: &str) -> Reference {
        Reference::with_tag(self.host.clone(), self.repository.clone(), tag.to_owned())
    }

    fn digested(&self, digest: &Digest) -> Reference {
        Reference::with_digest(self.host.clone(), self.repository.clone(), digest.to_string())
    }
}

/// What stands behind a name in a registry or an archive.
pub(super) enum Document {
    /// One image.
    Manifest(Box<ImageManifest>),
    /// Images, one for each platform.
    Index(Box<ImageIndex>),
}

/// Parses a manifest or an index, of OCI or of Docker.
pub(super) fn parse(bytes: &[u8]) -> Result<Document, String> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Kind {
        #[serde(default)]
        schema_version: u32,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let kind: Kind = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if kind.schema_version != 2 {
        return Err(format!("schema version {} is not supported, only 2 is", kind.schema_version));
    }
    if kind.manifests.is_some() {
        serde_json::from_slice(bytes).map(|index| Document::Index(Box::new(index)))
    } else {
        serde_json::from_slice(bytes).map(|manifest| Document::Manifest(Box::new(manifest)))
    }
    .map_err(|error| error.to_string())
}

fn credentials_of(auth: &RegistryAuth) -> Credentials {
    if !auth.registry_token.is_empty() {
        Credentials::Bearer(auth.registry_token.clone())
    } else if auth.username.is_empty() && auth.password.is_empty() {
        Credentials::Anonymous
    } else {
        Credentials::Basic(auth.username.clone(), auth.password.clone())
    }
}

impl Refusal {
    fn into_reason(self) -> String {
        match self {
            Self::Access(reason) | Self::Other(reason) => reason,
        }
    }
}

/// What the client or the registry said, in one sentence about the registry.
fn explain(host: &str, error: &OciDistributionError) -> Refusal {
    use OciDistributionError as E;
    use OciErrorCode as Code;
    let denied = |said: &str| {
        let said = if said.is_empty() { "credentials are missing or wrong" } else { said };
        Refusal::Access(format!("registry {host} denies access: {}", shortened(said)))
    };
    let not_found = |said: &str| {
        let said = if said.is_empty() { String::new() } else { format!(": {}", shortened(said)) };
        Refusal::Other(format!("not found in registry {host}{said}"))
    };
    match error {
        E::RegistryError { envelope, .. } => {
            let said: Vec<&str> = envelope.errors.iter().map(|e| e.message.as_str()).collect();
            let said = said.join(", ");
            let any = |codes: &[Code]| envelope.errors.iter().any(|e| codes.contains(&e.code));
            if any(&[Code::Unauthorized, Code::Denied]) {
                denied(&said)
            } else if any(&[
                Code::ManifestUnknown,
                Code::NameUnknown,
                Code::NotFound,
                Code::BlobUnknown,
                Code::ManifestBlobUnknown,
            ]) {
                not_found(&said)
            } else {
                Refusal::Other(format!("registry {host}: {}", shortened(&said)))
            }
        }
        E::ImageManifestNotFoundError(said) => not_found(said),
        E::UnauthorizedError { .. } => denied(""),
        E::AuthenticationFailure(said) => denied(said),
        E::ServerError { code: 404, message, .. } => not_found(message),
        E::ServerError { code: 401 | 403, message, .. } => denied(message),
        E::ServerError { code, message, .. } => {
            let said = shortened(message);
            Refusal::Other(format!("registry {host} answered {code}: {said}"))
        }
        E::DigestError(mismatch) => {
            Refusal::Other(format!("registry {host}: digest mismatch: {mismatch}"))
        }
        E::RequestError(request) => {
            Refusal::Other(format!("registry {host} can't be reached: {}", chain(request)))
        }
        other => Refusal::Other(format!("registry {host}: {}", shortened(&other.to_string()))),
    }
}

/// An error with all its causes.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut said = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        said.push(error.to_string());
        cause = error.source();
    }
    said.dedup_by(|cause, error| error.contains(cause.as_str()));
    shortened(&said.join(": "))
}

/// A registry may say anything at any length; it ends up in events and terminals.
fn shortened(said: &str) -> String {
    let one_line = |c: char| if c.is_control() { ' ' } else { c };
    said.trim().chars().map(one_line).take(MAX_MESSAGE).collect()
}
