//! Certificates for other machines and users, signed with the cluster's authority and kept by whom
//! they are for.

use std::{net::IpAddr, path::Path, time::Duration};

use jiff::Timestamp;

use super::{
    CertificateAndKey, PkiError, apply, lock,
    plan::{LEAF_LIFE, Wanted},
};

/// The cluster's authority, for issuing certificates that are not kept here.
pub struct Signer(apply::Authority);

impl Signer {
    /// Opens the authority of a folder; `None` if there is none. Makes nothing.
    ///
    /// # Errors
    /// Files that cannot be read or understood, each by its path.
    pub fn open(dir: &Path) -> Result<Option<Self>, PkiError> {
        if !dir.join("ca.crt").exists() {
            return Ok(None);
        }
        let _lock = lock(dir)?;
        apply::authority(dir, Timestamp::now()).map(|authority| Some(Self(authority)))
    }

    /// The authority's certificate in PEM.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        self.0.certificate_pem()
    }

    /// A client certificate for a user, good for `life` (a year if absent), and for the authority's
    /// own life at most.
    ///
    /// # Errors
    /// A name that no certificate can hold.
    pub fn client(
        &self,
        name: &str,
        group: Option<&str>,
        life: Option<Duration>,
    ) -> Result<CertificateAndKey, PkiError> {
        self.issue(&Wanted::client(name, group), life)
    }

    /// A certificate for the HTTPS port of a node's kubelet.
    ///
    /// # Errors
    /// A name that no certificate can hold.
    pub fn kubelet_server(
        &self,
        node: &str,
        addresses: &[IpAddr],
        life: Option<Duration>,
    ) -> Result<CertificateAndKey, PkiError> {
        self.issue(&Wanted::kubelet_server(node, addresses)?, life)
    }

    fn issue(
        &self,
        wanted: &Wanted,
        life: Option<Duration>,
    ) -> Result<CertificateAndKey, PkiError> {
        self.0.issue(wanted, life.unwrap_or(LEAF_LIFE), Timestamp::now())
    }
}
