//! What the kubelet's HTTPS port of `keelson agent` shows.

use std::{net::IpAddr, path::Path, sync::Arc};

use anyhow::{Context, bail};
use keelson_control_plane::pki::tls;

use crate::{config::KubeletSettings, credentials::Credentials, paths::Paths};

/// The kubelet API's TLS: the configured certificate, else the one that came with the kubeconfig,
/// else one that is signed by itself, as the kubelet makes one.
///
/// # Errors
/// When a certificate can't be read, made or used.
pub(crate) fn serving_tls(
    paths: &Paths,
    settings: &KubeletSettings,
    credentials: Option<&Credentials>,
    name: &str,
    address: IpAddr,
) -> anyhow::Result<Arc<rustls::ServerConfig>> {
    let configured = settings.tls_cert_file.is_some() || settings.tls_private_key_file.is_some();
    if !configured
        && settings.authentication.x509.client_ca_file.is_none()
        && let Some(tls) = credentials.map(Credentials::serving_tls).transpose()?.flatten()
    {
        return Ok(tls);
    }
    let read = |path: &Path| {
        std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
    };
    let client_ca = settings.authentication.x509.client_ca_file.as_deref().map(read).transpose()?;
    let (certificate, key) = match (&settings.tls_cert_file, &settings.tls_private_key_file) {
        (Some(certificate), Some(key)) => (read(certificate)?, read(key)?),
        (None, None) => self_signed(&paths.kubelet.join("pki"), name, address)?,
        _ => bail!("tlsCertFile and tlsPrivateKeyFile are needed together"),
    };
    Ok(tls::static_server_config(&certificate, &key, client_ca.as_deref())?)
}

/// Reads or makes `kubelet.crt` and `kubelet.key`.
fn self_signed(dir: &Path, name: &str, address: IpAddr) -> anyhow::Result<(String, String)> {
    let (certificate_path, key_path) = (dir.join("kubelet.crt"), dir.join("kubelet.key"));
    if let (Ok(certificate), Ok(key)) =
        (std::fs::read_to_string(&certificate_path), std::fs::read_to_string(&key_path))
    {
        return Ok((certificate, key));
    }
    let made = keelson_control_plane::pki::self_signed(&[name.to_owned(), address.to_string()])?;
    crate::kubeconfig::write_private(&key_path, &made.key_pem)?;
    crate::kubeconfig::write_private(&certificate_path, &made.certificate_pem)?;
    Ok((made.certificate_pem, made.key_pem))
}
