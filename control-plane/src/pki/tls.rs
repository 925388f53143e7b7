//! rustls configurations over the cluster's certificates.
//!
//! They hold a [`ReloadingKey`] and not a certificate: a renewal reaches the next handshake, and
//! connections that are open go on.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SignatureScheme,
    client::{ResolvesClientCert, Resumption},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
        danger::ClientCertVerifier,
    },
    sign::CertifiedKey,
};

use super::{CertificateAndKey, PkiError, observe};

/// A certificate and key that can be replaced while they are in use.
#[derive(Debug)]
pub struct ReloadingKey(RwLock<Arc<CertifiedKey>>);

impl ReloadingKey {
    pub(crate) fn new(key: CertifiedKey) -> Self {
        Self(RwLock::new(Arc::new(key)))
    }

    /// One over a pair in PEM. `path` names it in errors.
    ///
    /// # Errors
    /// Certificate or key is none.
    pub fn of(files: &CertificateAndKey, path: &Path) -> Result<Self, PkiError> {
        certified_key(files, path.to_owned()).map(Self::new)
    }

    /// Takes another pair for the next handshakes.
    ///
    /// # Errors
    /// Certificate or key is none; the present one stays.
    pub fn reload(&self, files: &CertificateAndKey, path: &Path) -> Result<(), PkiError> {
        self.replace(certified_key(files, path.to_owned())?);
        Ok(())
    }

    pub(crate) fn replace(&self, key: CertifiedKey) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(key);
    }

    fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ResolvesServerCert for ReloadingKey {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for ReloadingKey {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A pair in PEM as rustls uses it. `path` names it in errors.
pub(crate) fn certified_key(
    files: &CertificateAndKey,
    path: PathBuf,
) -> Result<CertifiedKey, PkiError> {
    let chain = CertificateDer::pem_slice_iter(files.certificate_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| observe::bad(&path, error.to_string()))?;
    let key = PrivateKeyDer::from_pem_slice(files.key_pem.as_bytes())
        .map_err(|error| observe::bad(&path, error.to_string()))?;
    CertifiedKey::from_der(chain, key, &provider())
        .map_err(|error| PkiError::BadFile { path, problem: error.to_string() })
}

fn roots(ca_pem: &str) -> Result<Arc<RootCertStore>, PkiError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
        let certificate = certificate.map_err(|_| {
            rustls::Error::InvalidCertificate(rustls::CertificateError::BadEncoding)
        })?;
        roots.add(certificate)?;
    }
    Ok(Arc::new(roots))
}

/// Verifies client certificates against an authority; clients need not have one.
pub(crate) fn client_verifier(ca_pem: &str) -> Result<Arc<dyn ClientCertVerifier>, PkiError> {
    Ok(WebPkiClientVerifier::builder_with_provider(roots(ca_pem)?, provider())
        .allow_unauthenticated()
        .build()?)
}

/// A server's configuration: HTTP/2 and HTTP/1.1, client certificates optional, but refused in the
/// handshake if they are no good.
///
/// # Errors
/// The authority is no certificate that clients can be verified against.
pub fn server_config(ca_pem: &str, key: Arc<ReloadingKey>) -> Result<Arc<ServerConfig>, PkiError> {
    server_config_with(client_verifier(ca_pem)?, key)
}

/// A server's configuration with a verifier of its own.
pub(crate) fn server_config_with(
    verifier: Arc<dyn ClientCertVerifier>,
    key: Arc<ReloadingKey>,
) -> Result<Arc<ServerConfig>, PkiError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(key);
    // A resumed session would bring back a client certificate without looking whether it has run
    // out since, and a server certificate that has been replaced.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A server's configuration over files that this process does not renew: HTTP/1.1, client
/// certificates optional where an authority for them is given, and not asked for otherwise.
///
/// # Errors
/// The certificate, the key or the authority is none.
pub fn static_server_config(
    certificate_pem: &str,
    key_pem: &str,
    client_ca_pem: Option<&str>,
) -> Result<Arc<ServerConfig>, PkiError> {
    let files = CertificateAndKey {
        certificate_pem: certificate_pem.to_owned(),
        key_pem: key_pem.to_owned(),
    };
    let key = Arc::new(ReloadingKey::new(certified_key(&files, "the serving certificate".into())?));
    if let Some(ca) = client_ca_pem {
        return server_config(ca, key);
    }
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(key);
    Ok(Arc::new(config))
}

/// A client's configuration that trusts `ca_pem` alone.
///
/// # Errors
/// The authority is no certificate.
pub fn client_config(
    ca_pem: &str,
    key: Option<Arc<ReloadingKey>>,
) -> Result<Arc<ClientConfig>, PkiError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots(ca_pem)?);
    let mut config = match key {
        Some(key) => builder.with_client_cert_resolver(key),
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled(); // as above
    Ok(Arc::new(config))
}
