//! Reads the certificates that are there.

use std::{
    collections::BTreeSet,
    fs,
    io::ErrorKind,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use rcgen::{KeyPair, PublicKeyData};
use x509_parser::{extensions::GeneralName, prelude::*};

use super::{CertificateAndKey, PkiError, apply::Authority, plan::Seen};

/// A certificate of the folder, and what it says.
pub(crate) struct Found {
    pub(crate) files: CertificateAndKey,
    pub(crate) seen: Seen,
}

/// Reads `<file>.crt` and `<file>.key`; `None` if either is missing.
pub(crate) fn leaf(
    dir: &Path,
    file: &str,
    authority: &Authority,
) -> Result<Option<Found>, PkiError> {
    let certificate_path = dir.join(format!("{file}.crt"));
    let key_path = dir.join(format!("{file}.key"));
    let (Some(certificate_pem), Some(key_pem)) = (read(&certificate_path)?, read(&key_path)?)
    else {
        return Ok(None);
    };
    let key = key_pair(&key_path, &key_pem)?;
    let seen = certificate(&certificate_path, &certificate_pem, &key, authority.der())?;
    Ok(Some(Found { files: CertificateAndKey { certificate_pem, key_pem }, seen }))
}

/// A file's text; `None` if it is not there.
pub(crate) fn read(path: &Path) -> Result<Option<String>, PkiError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PkiError::Io { action: "read", path: path.to_owned(), source }),
    }
}

/// A private key in PEM.
pub(crate) fn key_pair(path: &Path, pem: &str) -> Result<KeyPair, PkiError> {
    KeyPair::from_pem(pem).map_err(|error| bad(path, format!("it holds no private key: {error}")))
}

/// What a certificate in PEM says. `issuer` is the authority's certificate in DER.
pub(crate) fn certificate(
    path: &Path,
    pem: &str,
    key: &KeyPair,
    issuer: &[u8],
) -> Result<Seen, PkiError> {
    let (_, pem) = parse_x509_pem(pem.as_bytes())
        .map_err(|error| bad(path, format!("it holds no PEM: {error}")))?;
    let certificate =
        pem.parse_x509().map_err(|error| bad(path, format!("it holds no certificate: {error}")))?;
    let (_, issuer) = X509Certificate::from_der(issuer)
        .map_err(|error| bad(path, format!("its authority cannot be read: {error}")))?;
    let names = match certificate.subject_alternative_name() {
        Ok(Some(extension)) => extension.value.general_names.iter().filter_map(name).collect(),
        Ok(None) => BTreeSet::new(),
        Err(error) => return Err(bad(path, format!("its names cannot be read: {error}"))),
    };
    let time = |at: ASN1Time| Timestamp::from_second(at.timestamp()).unwrap_or(Timestamp::MIN);
    Ok(Seen {
        common_name: strings(certificate.subject().iter_common_name())
            .into_iter()
            .next()
            .unwrap_or_default(),
        organizations: strings(certificate.subject().iter_organization()),
        names,
        not_before: time(certificate.validity().not_before),
        not_after: time(certificate.validity().not_after),
        signed_by_authority: certificate.issuer() == issuer.subject()
            && certificate.verify_signature(Some(issuer.public_key())).is_ok(),
        key_matches: certificate.public_key().raw == key.subject_public_key_info(),
    })
}

/// The values of one kind of attribute of a subject.
pub(crate) fn strings<'a>(
    attributes: impl Iterator<Item = &'a AttributeTypeAndValue<'a>>,
) -> Vec<String> {
    attributes.filter_map(|a| a.as_str().ok()).map(str::to_owned).collect()
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        GeneralName::IPAddress(bytes) => {
            if let Ok(v4) = <[u8; 4]>::try_from(*bytes) {
                return Some(Ipv4Addr::from(v4).to_string());
            }
            <[u8; 16]>::try_from(*bytes).ok().map(|v6| Ipv6Addr::from(v6).to_string())
        }
        _ => None,
    }
}

pub(crate) fn bad(path: &Path, problem: impl Into<String>) -> PkiError {
    PkiError::BadFile { path: PathBuf::from(path), problem: problem.into() }
}
