//! Client certificates that the handshake lets through, and the request's authentication judges.
//!
//! kube-apiserver answers a certificate of another authority, or one that has run out, with 401, or
//! goes on to the token that came along; an alert of the handshake would tell the client nothing. So
//! the handshake verifies only that the client holds the certificate's key. That is no reason to
//! believe the certificate: nothing gets at it but through [`ClientAuthority::judge`].

use std::sync::Arc;

use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{PkiError, tls};

/// The API server's TLS, and what it holds client certificates against. The two belong together.
#[derive(Clone)]
pub struct ApiServerTls {
    pub(crate) config: Arc<ServerConfig>,
    pub(crate) clients: ClientAuthority,
}

impl ApiServerTls {
    pub(crate) fn new(ca_pem: &str, key: Arc<tls::ReloadingKey>) -> Result<Self, PkiError> {
        let verifier = tls::client_verifier(ca_pem)?;
        let config = tls::server_config_with(Arc::new(Unjudged(Arc::clone(&verifier))), key)?;
        Ok(Self { config, clients: ClientAuthority(verifier) })
    }
}

/// What client certificates must come from.
#[derive(Clone, Debug)]
pub(crate) struct ClientAuthority(Arc<dyn ClientCertVerifier>);

/// A certificate that the cluster's authority signed for a client.
#[derive(Clone, Debug)]
pub(crate) struct ClientCertificate {
    der: Arc<[u8]>,
    /// The last second it is good for, since 1970.
    not_after: i64,
}

impl ClientAuthority {
    /// Verifies chain, dates and usage of what a client showed.
    ///
    /// # Errors
    /// Why it is no good, for the log.
    pub(crate) fn judge(
        &self,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertificate, String> {
        let refused = |error: &dyn std::fmt::Display| format!("the client certificate: {error}");
        let (certificate, intermediates) =
            chain.split_first().ok_or_else(|| refused(&"there is none"))?;
        self.0
            .verify_client_cert(certificate, intermediates, now)
            .map_err(|error| refused(&error))?;
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|error| refused(&error))?;
        let not_after = parsed.validity().not_after.timestamp();
        Ok(ClientCertificate { der: Arc::from(certificate.as_ref()), not_after })
    }
}

impl ClientCertificate {
    /// The certificate, unless it has run out since the connection began.
    ///
    /// # Errors
    /// It has.
    pub(crate) fn der_at(&self, now: UnixTime) -> Result<Vec<u8>, String> {
        if i64::try_from(now.as_secs()).is_ok_and(|now| now <= self.not_after) {
            Ok(self.der.to_vec())
        } else {
            Err("the client certificate has run out".to_owned())
        }
    }
}

/// Lets every certificate through whose key the client holds.
#[derive(Debug)]
struct Unjudged(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Unjudged {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
