//! The names of a pod inside itself.

use k8s_openapi::api::core::v1::Pod;

use crate::worker::view;

/// The longest host name that Linux takes.
const HOSTNAME_BYTES: usize = 63;

/// A pod's host name and, with `subdomain`, its DNS domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodNames {
    /// The short name.
    pub(crate) hostname: String,
    /// `<subdomain>.<namespace>.svc.<cluster domain>`.
    pub(crate) domain: Option<String>,
}

/// The pod's names.
pub(crate) fn pod_names(pod: &Pod, cluster_domain: &str) -> PodNames {
    let spec = view::spec(pod);
    if let Some(name) = spec.hostname_override.as_ref().filter(|name| !name.is_empty()) {
        return PodNames { hostname: name.clone(), domain: None };
    }
    let given = spec.hostname.as_ref().filter(|name| !name.is_empty());
    let name = given.or(pod.metadata.name.as_ref()).map_or("", String::as_str);
    let mut end = name.len().min(HOSTNAME_BYTES);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    // a name that is cut must not end in what a host name may not end in
    let hostname = name[..end].trim_end_matches(['-', '.']).to_owned();
    let domain =
        spec.subdomain.as_ref().filter(|subdomain| !subdomain.is_empty()).map(|subdomain| {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
            if cluster_domain.is_empty() {
                format!("{subdomain}.{namespace}.svc")
            } else {
                format!("{subdomain}.{namespace}.svc.{cluster_domain}")
            }
        });
    PodNames { hostname, domain }
}

/// What the kernel's host name is set to: with `setHostnameAsFQDN` the long name.
pub(crate) fn kernel_hostname(pod: &Pod, names: &PodNames) -> Result<String, String> {
    if view::spec(pod).set_hostname_as_fqdn == Some(true)
        && let Some(domain) = &names.domain
    {
        let long = format!("{}.{domain}", names.hostname);
        // the kernel's limit is 64 bytes
        if long.len() > 64 {
            return Err(format!(
                "failed to construct FQDN from pod hostname and cluster domain, FQDN {long} is too \
                 long (64 characters is the max, {} characters requested)",
                long.len()
            ));
        }
        return Ok(long);
    }
    Ok(names.hostname.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::fixture;

    #[test]
    fn names_come_from_the_pod_or_its_fields() {
        let mut pod = fixture::pod(&["a"]);
        assert_eq!(pod_names(&pod, "cluster.local").hostname, "web");
        let spec = pod.spec.as_mut().unwrap();
        spec.hostname = Some("db-0".to_owned());
        spec.subdomain = Some("db".to_owned());
        let names = pod_names(&pod, "cluster.local");
        assert_eq!(names.hostname, "db-0");
        assert_eq!(names.domain.as_deref(), Some("db.default.svc.cluster.local"));
        assert_eq!(kernel_hostname(&pod, &names).unwrap(), "db-0");
        pod.spec.as_mut().unwrap().set_hostname_as_fqdn = Some(true);
        assert_eq!(kernel_hostname(&pod, &names).unwrap(), "db-0.db.default.svc.cluster.local");
    }

    #[test]
    fn long_names_are_cut() {
        let mut pod = fixture::pod(&["a"]);
        pod.metadata.name = Some(format!("{}-x", "a".repeat(62)));
        assert_eq!(pod_names(&pod, "").hostname, "a".repeat(62));
    }
}
