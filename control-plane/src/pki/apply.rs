//! Makes keys and certificates, and writes them so that a kill never leaves half a file.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SerialNumber,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};

use super::{
    CertificateAndKey, PkiError, observe,
    plan::{AUTHORITY_LIFE, CLOCK_SKEW, Usage, Wanted},
};

/// The cluster's certificate authority, ready to sign.
pub(crate) struct Authority {
    pem: String,
    der: CertificateDer<'static>,
    not_after: Timestamp,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn certificate_pem(&self) -> &str {
        &self.pem
    }

    pub(crate) fn der(&self) -> &[u8] {
        &self.der
    }

    /// Issues a certificate with a new key. It never outlasts the authority.
    pub(crate) fn issue(
        &self,
        wanted: &Wanted,
        life: Duration,
        now: Timestamp,
    ) -> Result<CertificateAndKey, PkiError> {
        let problem = |problem: String| PkiError::Issue { name: wanted.file.to_owned(), problem };
        let mut parameters =
            CertificateParams::new(wanted.names.iter().cloned().collect::<Vec<_>>())
                .map_err(|error| problem(error.to_string()))?;
        parameters.distinguished_name =
            subject(&wanted.common_name, wanted.organization.as_deref());
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![match wanted.usage {
            Usage::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Usage::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        parameters.use_authority_key_identifier_extension = true;
        let not_after = (now + life).min(self.not_after);
        set_life(&mut parameters, now, not_after);
        let key = KeyPair::generate().map_err(|error| problem(error.to_string()))?;
        let certificate =
            parameters.signed_by(&key, &self.issuer).map_err(|error| problem(error.to_string()))?;
        Ok(CertificateAndKey { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }
}

/// Reads `ca.crt` and `ca.key`, or makes them in an empty folder.
pub(crate) fn authority(dir: &Path, now: Timestamp) -> Result<Authority, PkiError> {
    let (certificate_path, key_path) = (dir.join("ca.crt"), dir.join("ca.key"));
    let (pem, key) = match (observe::read(&certificate_path)?, observe::read(&key_path)?) {
        (Some(pem), Some(key_pem)) => (pem, observe::key_pair(&key_path, &key_pem)?),
        (Some(_), None) => {
            return Err(PkiError::HalfAuthority { missing: key_path, present: certificate_path });
        }
        // A key alone is what a kill between the two writes leaves: nobody trusts it yet, so the
        // certificate is made from it.
        (None, key_pem) => {
            let key = match key_pem {
                Some(pem) => observe::key_pair(&key_path, &pem)?,
                None => {
                    let key = generate("ca")?;
                    write_file(&key_path, &key.serialize_pem())?;
                    key
                }
            };
            let pem = self_signed(&key, now)?;
            write_file(&certificate_path, &pem)?;
            (pem, key)
        }
    };
    let der = CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| observe::bad(&certificate_path, format!("it holds no PEM: {error}")))?;
    let seen = observe::certificate(&certificate_path, &pem, &key, &der)?;
    if !seen.key_matches {
        return Err(observe::bad(&certificate_path, "ca.key beside it is not its key"));
    }
    if seen.not_after <= now {
        return Err(PkiError::AuthorityExpired {
            path: certificate_path,
            not_after: seen.not_after,
        });
    }
    let issuer = Issuer::from_ca_cert_der(&der, key)
        .map_err(|error| observe::bad(&certificate_path, error.to_string()))?;
    Ok(Authority { pem, der, not_after: seen.not_after, issuer })
}

fn self_signed(key: &KeyPair, now: Timestamp) -> Result<String, PkiError> {
    let problem =
        |error: rcgen::Error| PkiError::Issue { name: "ca".to_owned(), problem: error.to_string() };
    let mut parameters = CertificateParams::new(vec!["kubernetes".to_owned()]).map_err(problem)?;
    parameters.distinguished_name = subject("kubernetes", None);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyEncipherment,
        KeyUsagePurpose::KeyCertSign,
    ];
    set_life(&mut parameters, now, now + AUTHORITY_LIFE);
    Ok(parameters.self_signed(key).map_err(problem)?.pem())
}

/// Reads `sa.key`, or makes it; `sa.pub` always follows it.
pub(crate) fn service_account_key(dir: &Path) -> Result<String, PkiError> {
    let path = dir.join("sa.key");
    let pem = match observe::read(&path)? {
        Some(pem) => pem,
        None => {
            let pem = generate("sa")?.serialize_pem();
            write_file(&path, &pem)?;
            pem
        }
    };
    let key = observe::key_pair(&path, &pem)?;
    if !key.is_compatible(&rcgen::PKCS_ECDSA_P256_SHA256) {
        return Err(observe::bad(
            &path,
            "service-account tokens are signed with ECDSA P-256 keys only",
        ));
    }
    let public = dir.join("sa.pub");
    let public_pem = key.public_key_pem();
    if observe::read(&public)?.as_deref() != Some(public_pem.as_str()) {
        write_file(&public, &public_pem)?;
    }
    Ok(key.serialize_pem()) // PKCS#8, whatever form the file has
}

/// Writes a key, then its certificate.
pub(crate) fn write_pair(
    dir: &Path,
    file: &str,
    files: &CertificateAndKey,
) -> Result<(), PkiError> {
    write_file(&dir.join(format!("{file}.key")), &files.key_pem)?;
    write_file(&dir.join(format!("{file}.crt")), &files.certificate_pem)
}

/// The folder, for the owner's eyes only.
pub(crate) fn create_folder(dir: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| PkiError::Io {
        action: "create the folder",
        path: dir.to_owned(),
        source,
    })
}

/// New files that only their owner may read.
pub(crate) fn private_file(options: &mut OpenOptions) -> &mut OpenOptions {
    options.mode(0o600)
}

/// Writes a file so that it is there whole, also after a power cut, or as it was before.
fn write_file(path: &Path, text: &str) -> Result<(), PkiError> {
    let temporary = path.with_extension(match path.extension().and_then(|e| e.to_str()) {
        Some("key") => "key.new",
        _ => "crt.new",
    });
    let write = || {
        // What a kill left there is of no use, and may have another mode.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file =
            private_file(OpenOptions::new().create_new(true).write(true)).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        match path.parent() {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    };
    write().map_err(|source| PkiError::Io { action: "write", path: path.to_owned(), source })
}

fn generate(name: &str) -> Result<KeyPair, PkiError> {
    // ECDSA P-256, rcgen's default.
    KeyPair::generate()
        .map_err(|error| PkiError::Issue { name: name.to_owned(), problem: error.to_string() })
}

fn subject(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, organization);
    }
    name.push(DnType::CommonName, common_name);
    name
}

fn set_life(parameters: &mut CertificateParams, now: Timestamp, not_after: Timestamp) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let at = |time: Timestamp| {
        epoch + Duration::from_secs(u64::try_from(time.as_second()).unwrap_or_default())
    };
    parameters.not_before = at(now - CLOCK_SKEW);
    parameters.not_after = at(not_after);
    let mut serial: [u8; 16] = rand::random();
    serial[0] = serial[0] & 0x7f | 1; // RFC 5280: positive, and no leading zero
    parameters.serial_number = Some(SerialNumber::from_slice(&serial));
}
