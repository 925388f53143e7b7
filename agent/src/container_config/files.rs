//! The texts of `/etc/hosts` as pods see them.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{HostAlias, Pod};

use super::hostname::PodNames;
use crate::worker::view;

/// The pod's `/etc/hosts`. With `hostNetwork` it begins with the node's own, `node_hosts`.
pub(crate) fn hosts(pod: &Pod, ips: &[IpAddr], names: &PodNames, node_hosts: &str) -> String {
    let mut text = String::new();
    if view::spec(pod).host_network == Some(true) {
        text.push_str("# Kubernetes-managed hosts file (host network).\n");
        text.push_str(node_hosts);
        if !text.ends_with('\n') {
            text.push('\n');
        }
    } else {
        text.push_str(
            "# Kubernetes-managed hosts file.\n\
             127.0.0.1\tlocalhost\n\
             ::1\tlocalhost ip6-localhost ip6-loopback\n\
             fe00::\tip6-localnet\n\
             fe00::\tip6-mcastprefix\n\
             fe00::1\tip6-allnodes\n\
             fe00::2\tip6-allrouters\n",
        );
        for ip in ips {
            match &names.domain {
                Some(domain) => {
                    let name = &names.hostname;
                    text.push_str(&format!("{ip}\t{name}.{domain}\t{name}\n"));
                }
                None => text.push_str(&format!("{ip}\t{}\n", names.hostname)),
            }
        }
    }
    let aliases = view::spec(pod).host_aliases.as_deref().unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for HostAlias { ip, hostnames } in aliases {
            let names = hostnames.as_deref().unwrap_or_default();
            text.push_str(&format!("{ip}\t{}\n", names.join("\t")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{container_config::hostname, worker::fixture};

    #[test]
    fn a_pod_finds_itself_and_its_aliases() {
        let mut pod = fixture::pod(&["a"]);
        let spec = pod.spec.as_mut().unwrap();
        spec.host_aliases = Some(vec![HostAlias {
            ip: "10.1.2.3".to_owned(),
            hostnames: Some(vec!["foo".to_owned(), "bar".to_owned()]),
        }]);
        let names = hostname::pod_names(&pod, "cluster.local");
        let text = hosts(&pod, &["10.244.0.5".parse().unwrap()], &names, "");
        assert!(text.contains("\n10.244.0.5\tweb\n"), "{text}");
        assert!(text.contains("\n10.1.2.3\tfoo\tbar\n"), "{text}");
        pod.spec.as_mut().unwrap().host_network = Some(true);
        let text = hosts(&pod, &[], &names, "127.0.0.1 localhost node");
        assert!(text.contains("\n127.0.0.1 localhost node\n"), "{text}");
    }
}
