//! The cluster's own certificates: made once, kept, renewed in time.
//!
//! ```text
//!                       ca.crt ca.key ── signs ──┬─ apiserver.crt                 (server)
//!                    (ten years, never replaced) ├─ kubelet.crt                   (server)
//!                                                ├─ apiserver-kubelet-client.crt  (client)
//!                                                ├─ admin.crt                     (client)
//!                                                ├─ kubelet-client.crt            (client)
//!                                                ├─ controller-manager.crt        (client)
//!                                                ├─ scheduler.crt                 (client)
//!                                                └─ kube-proxy.crt                (client)
//!                       sa.key sa.pub ── signs service-account tokens
//! ```
//!
//! The files lie in one folder under the names that kubeadm gives them, so tools and habits apply.
//!
//! * `plan.rs`: which certificates there should be, and whether one has to be issued again (pure).
//! * `observe.rs`: reads what is in the folder.
//! * `apply.rs`: makes keys and certificates, and writes each file in one step.
//! * [`tls`]: rustls configurations that follow a renewal without a restart.
//! * [`client_certificates`]: the API server's judgement of what clients show.
//! * `signer.rs`: certificates for others, which are not kept here.
//! * [`mod@kubeconfig`]: the file that kubectl takes.
//!
//! What is never done: a certificate authority that exists is not replaced and not written to, not
//! even when it is broken or has run out. Whoever trusts it must hear of that from the error.
//!
//! A kill at any point leaves a folder that the next start completes: each file appears whole or not
//! at all, a key before its certificate; a pair that does not belong together is issued again.

pub(crate) mod apply;
pub(crate) mod client_certificates;
pub mod kubeconfig;
pub(crate) mod observe;
pub(crate) mod plan;
mod signer;
pub mod tls;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fs::File,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

pub use client_certificates::ApiServerTls;
pub use kubeconfig::{Kubeconfig, kubeconfig};
pub use plan::Leaf;
use plan::Wanted;
pub use signer::Signer;

/// How often the certificates are looked at while the process runs.
const RENEWAL_CHECK: Duration = Duration::from_secs(3600);

/// What the certificates are to say.
#[derive(Clone, Debug)]
pub struct PkiConfig {
    /// The node's name, as its `Node` object has it.
    pub node_name: String,
    /// The addresses by which this machine is reached; all of them go into the certificates.
    pub advertise_addresses: Vec<IpAddr>,
    /// The address of the `kubernetes` Service, by which pods reach the API server.
    pub service_ip: IpAddr,
    /// The cluster's DNS domain, such as `cluster.local`.
    pub cluster_domain: String,
    /// More names or addresses for the API server's certificate.
    pub extra_sans: Vec<String>,
}

/// Why the certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The file system refused.
    #[error("could not {action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is there but is not what its name says.
    #[error("{path} cannot be used: {problem}; mend it or, to have a new one made, move it away")]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The certificate authority lacks its key.
    #[error(
        "{missing} is missing while {present} is there: put it back, or move {present} away to begin a new cluster"
    )]
    HalfAuthority {
        /// The file that is not there.
        missing: PathBuf,
        /// The file that is.
        present: PathBuf,
    },
    /// The certificate authority has run out.
    #[error(
        "the cluster's certificate authority {path} ran out at {not_after}: move the folder away to have a new one made, and give its ca.crt to all clients"
    )]
    AuthorityExpired {
        /// The file.
        path: PathBuf,
        /// Since when.
        not_after: Timestamp,
    },
    /// A name that no certificate can hold.
    #[error("{0:?} is neither an IP address nor a DNS name, and cannot go into a certificate")]
    BadName(String),
    /// A certificate could not be made.
    #[error("could not issue the certificate {name}: {problem}")]
    Issue {
        /// Which one.
        name: String,
        /// Why.
        problem: String,
    },
    /// A TLS configuration could not be made.
    #[error("could not set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// Client certificates cannot be verified.
    #[error("could not set up the verification of client certificates: {0}")]
    ClientVerifier(#[from] rustls::server::VerifierBuilderError),
}

/// A certificate with its private key, both in PEM.
#[derive(Clone)]
pub struct CertificateAndKey {
    /// The certificate.
    pub certificate_pem: String,
    /// Its private key, PKCS#8.
    pub key_pem: String,
}

impl std::fmt::Debug for CertificateAndKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateAndKey").finish_non_exhaustive() // never the key
    }
}

/// One certificate of the folder, in use.
struct Held {
    files: CertificateAndKey,
    tls: Arc<tls::ReloadingKey>,
}

/// All certificates and keys of the cluster.
pub struct ClusterPki {
    dir: PathBuf,
    config: PkiConfig,
    authority: apply::Authority,
    service_account_key: String,
    held: RwLock<BTreeMap<Leaf, Held>>,
}

impl ClusterPki {
    /// Reads the folder, and makes what is missing, about to run out, or no longer what `config`
    /// says. Blocks on the file system; two processes that do this at once wait for each other.
    ///
    /// # Errors
    /// Files that cannot be read, written or understood, each by its path.
    pub fn load_or_create(dir: impl Into<PathBuf>, config: &PkiConfig) -> Result<Self, PkiError> {
        Self::load_or_create_at(dir.into(), config, Timestamp::now())
    }

    /// As [`Self::load_or_create`], at another time than now.
    pub(crate) fn load_or_create_at(
        dir: PathBuf,
        config: &PkiConfig,
        now: Timestamp,
    ) -> Result<Self, PkiError> {
        apply::create_folder(&dir)?;
        let _lock = lock(&dir)?;
        let authority = apply::authority(&dir, now)?;
        let service_account_key = apply::service_account_key(&dir)?;
        let pki = Self {
            dir,
            config: config.clone(),
            authority,
            service_account_key,
            held: RwLock::default(),
        };
        pki.renew_locked(now)?;
        Ok(pki)
    }

    /// Issues again what has to be, and hands it to all TLS configurations made from here.
    /// Returns what was renewed. Blocks on the file system.
    ///
    /// # Errors
    /// As [`Self::load_or_create`]; what was in use before stays in use.
    pub fn renew(&self) -> Result<Vec<Leaf>, PkiError> {
        let _lock = lock(&self.dir)?;
        self.renew_locked(Timestamp::now())
    }

    pub(crate) fn renew_locked(&self, now: Timestamp) -> Result<Vec<Leaf>, PkiError> {
        let mut renewed = Vec::new();
        for leaf in Leaf::ALL {
            let wanted = Wanted::of(leaf, &self.config)?;
            let found = observe::leaf(&self.dir, wanted.file, &self.authority)?;
            let reason = plan::reissue(found.as_ref().map(|f| &f.seen), &wanted, now);
            let files = match (found, reason) {
                (Some(found), None) => found.files,
                (_, reason) => {
                    if let Some(reason) = reason {
                        tracing::info!(certificate = wanted.file, %reason, "issuing a certificate");
                    }
                    let files = self.authority.issue(&wanted, plan::LEAF_LIFE, now)?;
                    apply::write_pair(&self.dir, wanted.file, &files)?;
                    renewed.push(leaf);
                    files
                }
            };
            self.hold(leaf, files)?;
        }
        Ok(renewed)
    }

    /// Looks at the certificates every hour until `shutdown`, and renews them in time. Each time it
    /// calls `afterwards`, which may block, for what is made of certificates elsewhere.
    pub async fn keep_renewed(
        self: Arc<Self>,
        afterwards: impl Fn(&Self) + Send + Sync + 'static,
        shutdown: CancellationToken,
    ) {
        let afterwards = Arc::new(afterwards);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(RENEWAL_CHECK) => {}
            }
            let (pki, afterwards) = (Arc::clone(&self), Arc::clone(&afterwards));
            let renewal = tokio::task::spawn_blocking(move || {
                let renewed = pki.renew();
                afterwards(&pki);
                renewed
            });
            match renewal.await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::error!(%error, "could not renew the certificates"),
                Err(error) => tracing::error!(%error, "the renewal of certificates broke off"),
            }
        }
    }

    fn hold(&self, leaf: Leaf, files: CertificateAndKey) -> Result<(), PkiError> {
        let key = tls::certified_key(&files, self.dir.join(leaf.file()))?;
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        match held.get_mut(&leaf) {
            Some(present) => {
                present.tls.replace(key);
                present.files = files;
            }
            None => {
                held.insert(leaf, Held { files, tls: Arc::new(tls::ReloadingKey::new(key)) });
            }
        }
        Ok(())
    }

    /// The folder that holds the files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The cluster's certificate authority in PEM: what clients trust, and `kube-root-ca.crt`.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        self.authority.certificate_pem()
    }

    /// The private key that signs service-account tokens (`sa.key`): PKCS#8 PEM, ECDSA P-256.
    #[must_use]
    pub fn service_account_key_pem(&self) -> &str {
        &self.service_account_key
    }

    /// One of the cluster's own certificates as it is now.
    #[must_use]
    pub fn certificate(&self, leaf: Leaf) -> CertificateAndKey {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held[&leaf].files.clone() // all leaves are held since `load_or_create`
    }

    /// The API server's TLS: its certificate, and client certificates, which are optional and are
    /// judged request by request.
    ///
    /// # Errors
    /// rustls refuses the certificates.
    pub fn api_server_tls(&self) -> Result<ApiServerTls, PkiError> {
        ApiServerTls::new(self.ca_pem(), self.key(Leaf::ApiServer))
    }

    /// The kubelet's TLS: its certificate, and client certificates that are optional but, where
    /// given, must come from the cluster's authority.
    ///
    /// # Errors
    /// rustls refuses the certificates.
    pub fn kubelet_server_config(&self) -> Result<Arc<rustls::ServerConfig>, PkiError> {
        tls::server_config(self.ca_pem(), self.key(Leaf::KubeletServer))
    }

    /// A client's TLS that trusts the cluster's authority alone and, with `identity`, shows that
    /// certificate.
    ///
    /// # Errors
    /// rustls refuses the certificates.
    pub fn client_config(
        &self,
        identity: Option<Leaf>,
    ) -> Result<Arc<rustls::ClientConfig>, PkiError> {
        tls::client_config(self.ca_pem(), identity.map(|leaf| self.key(leaf)))
    }

    fn key(&self, leaf: Leaf) -> Arc<tls::ReloadingKey> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&held[&leaf].tls)
    }

    /// A kubeconfig with one of the cluster's client certificates in it, and with what else is said
    /// of the cluster.
    #[must_use]
    pub fn kubeconfig(
        &self,
        leaf: Leaf,
        server_url: &str,
        user: &str,
        extension: Option<(&str, &serde_json::Value)>,
    ) -> String {
        kubeconfig(&Kubeconfig {
            server_url,
            ca_pem: self.ca_pem(),
            client: &self.certificate(leaf),
            cluster: "keelson",
            user,
            context: &format!("{user}@keelson"),
            extension,
        })
    }
}

/// A serving certificate that is signed by itself, for a year: what a kubelet shows that was given
/// none.
///
/// # Errors
/// A name that no certificate can hold.
pub fn self_signed(names: &[String]) -> Result<CertificateAndKey, PkiError> {
    let issue = |problem: String| PkiError::Issue { name: "kubelet.crt".to_owned(), problem };
    let key = rcgen::KeyPair::generate().map_err(|error| issue(error.to_string()))?;
    let mut parameters = rcgen::CertificateParams::new(names.to_vec())
        .map_err(|_| PkiError::BadName(names.join(", ")))?;
    let year = std::time::Duration::from_secs(365 * 24 * 3600);
    parameters.not_after = (std::time::SystemTime::now() + year).into();
    if let Some(name) = names.first() {
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name.as_str());
    }
    let certificate = parameters.self_signed(&key).map_err(|error| issue(error.to_string()))?;
    Ok(CertificateAndKey { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
}

/// Holds other processes off the folder until dropped.
fn lock(dir: &Path) -> Result<File, PkiError> {
    let path = dir.join(".lock");
    let open = || {
        let file = apply::private_file(File::options().create(true).write(true).truncate(false))
            .open(&path)?;
        file.lock()?;
        Ok(file)
    };
    open().map_err(|source| PkiError::Io { action: "lock", path: path.clone(), source })
}
