//! Users by client certificate.

use x509_parser::prelude::*;

use super::UserInfo;
use crate::pki::observe::strings;

/// The user that a certificate names: common name → user name, organizations → groups, as
/// Kubernetes documents it. Chain, dates and that it may be used by clients are verified already.
///
/// # Errors
/// It is no certificate, or names nobody.
pub fn user(der: &[u8]) -> Result<UserInfo, String> {
    let (_, certificate) = X509Certificate::from_der(der)
        .map_err(|error| format!("the client certificate cannot be read: {error}"))?;
    let subject = certificate.subject();
    let Some(username) = strings(subject.iter_common_name()).pop().filter(|name| !name.is_empty())
    else {
        return Err("the client certificate has no common name".to_owned());
    };
    Ok(UserInfo { username, groups: strings(subject.iter_organization()), ..UserInfo::default() })
}
