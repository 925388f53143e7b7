//! A pod's `/etc/resolv.conf`.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use keelson_runtime_shim::runtime::DnsConfig;

use crate::worker::view;

/// Most name servers that resolvers take.
const SERVERS: usize = 3;
/// Most search domains that Kubernetes allows.
const SEARCHES: usize = 32;
/// Most characters of all search domains together.
const SEARCH_CHARS: usize = 2048;

/// Reads a resolver configuration: `nameserver`, `search` and `options` lines.
pub(crate) fn parse_resolv_conf(text: &str) -> DnsConfig {
    let mut config = DnsConfig::default();
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with(['#', ';']) {
            continue;
        }
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("nameserver") => config.servers.extend(words.next().map(str::to_owned)),
            // the last search line wins, as resolv.conf(5) has it
            Some("search") => {
                config.searches = words
                    .map(|word| if word == "." { word } else { word.trim_end_matches('.') })
                    .map(str::to_owned)
                    .collect();
            }
            Some("options") => config.options = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    config
}

/// The pod's resolver configuration by `dnsPolicy` and `dnsConfig`, and what had to be left out.
pub(crate) fn pod_dns(
    pod: &Pod,
    host: &DnsConfig,
    cluster_dns: &[IpAddr],
    cluster_domain: &str,
) -> (DnsConfig, Vec<String>) {
    let spec = view::spec(pod);
    let host_network = spec.host_network == Some(true);
    let policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
    let mut notes = Vec::new();
    let cluster = match policy {
        "None" => None,
        "ClusterFirstWithHostNet" => Some(true),
        "ClusterFirst" => Some(!host_network),
        _ => Some(false),
    };
    let mut config = match cluster {
        None => DnsConfig::default(),
        Some(true) if !cluster_dns.is_empty() => {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
            let mut searches = Vec::new();
            if !cluster_domain.is_empty() {
                searches.push(format!("{namespace}.svc.{cluster_domain}"));
                searches.push(format!("svc.{cluster_domain}"));
                searches.push(cluster_domain.to_owned());
            }
            searches.extend(host.searches.iter().cloned());
            DnsConfig {
                servers: cluster_dns.iter().map(ToString::to_string).collect(),
                searches,
                options: vec!["ndots:5".to_owned()],
            }
        }
        Some(true) => {
            notes.push(
                "no cluster DNS is configured: the pod uses the node's name servers".to_owned(),
            );
            host.clone()
        }
        Some(false) => host.clone(),
    };
    add_pod_config(&mut config, pod);
    limit(&mut config, &mut notes);
    (config, notes)
}

fn add_pod_config(config: &mut DnsConfig, pod: &Pod) {
    let Some(own) = &view::spec(pod).dns_config else { return };
    config.servers.extend(own.nameservers.iter().flatten().cloned());
    config.searches.extend(own.searches.iter().flatten().cloned());
    for option in own.options.iter().flatten() {
        let name = option.name.clone().unwrap_or_default();
        // the pod's value of an option takes the place of the one that was there
        config.options.retain(|old| old.split(':').next() != Some(&name));
        config.options.push(match &option.value {
            Some(value) if !value.is_empty() => format!("{name}:{value}"),
            _ => name,
        });
    }
    dedupe(&mut config.servers);
    dedupe(&mut config.searches);
}

fn dedupe(list: &mut Vec<String>) {
    let mut seen = std::collections::BTreeSet::new();
    list.retain(|item| seen.insert(item.clone()));
}

fn limit(config: &mut DnsConfig, notes: &mut Vec<String>) {
    dedupe(&mut config.searches);
    if config.servers.len() > SERVERS {
        config.servers.truncate(SERVERS);
        notes.push(format!(
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied \
             nameserver line is: {}",
            config.servers.join(" ")
        ));
    }
    let mut chars = 0;
    let fitting = config
        .searches
        .iter()
        .take(SEARCHES)
        .take_while(|domain| {
            chars += domain.len() + 1;
            chars <= SEARCH_CHARS + 1
        })
        .count();
    if fitting < config.searches.len() {
        config.searches.truncate(fitting);
        notes.push(format!(
            "Search Line limits were exceeded, some search paths have been omitted, the applied \
             search line is: {}",
            config.searches.join(" ")
        ));
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodDNSConfig, PodDNSConfigOption};

    use super::*;
    use crate::worker::fixture;

    fn host() -> DnsConfig {
        parse_resolv_conf("# c\nnameserver 192.0.2.1\nsearch a.example. b.example\noptions edns0\n")
    }

    #[test]
    fn a_resolv_conf_is_read() {
        let host = host();
        assert_eq!(host.servers, ["192.0.2.1"]);
        assert_eq!(host.searches, ["a.example", "b.example"]);
        assert_eq!(host.options, ["edns0"]);
    }

    #[test]
    fn each_policy_has_its_servers() {
        let dns: Vec<IpAddr> = vec!["10.96.0.10".parse().unwrap()];
        let rows = [
            ("ClusterFirst", false, vec!["10.96.0.10"]),
            ("ClusterFirst", true, vec!["192.0.2.1"]),
            ("ClusterFirstWithHostNet", true, vec!["10.96.0.10"]),
            ("Default", false, vec!["192.0.2.1"]),
            ("None", false, vec!["192.0.2.9"]),
        ];
        for (policy, host_network, servers) in rows {
            let mut pod = fixture::pod(&["a"]);
            let spec = pod.spec.as_mut().unwrap();
            spec.dns_policy = Some(policy.to_owned());
            spec.host_network = Some(host_network);
            if policy == "None" {
                spec.dns_config = Some(PodDNSConfig {
                    nameservers: Some(vec!["192.0.2.9".to_owned()]),
                    ..Default::default()
                });
            }
            let (config, _) = pod_dns(&pod, &host(), &dns, "cluster.local");
            assert_eq!(config.servers, servers, "{policy} host network {host_network}");
        }
    }

    #[test]
    fn cluster_names_come_first_and_the_pods_options_win() {
        let mut pod = fixture::pod(&["a"]);
        pod.spec.as_mut().unwrap().dns_config = Some(PodDNSConfig {
            options: Some(vec![PodDNSConfigOption {
                name: Some("ndots".to_owned()),
                value: Some("2".to_owned()),
            }]),
            ..Default::default()
        });
        let dns = ["10.96.0.10".parse().unwrap()];
        let (config, notes) = pod_dns(&pod, &host(), &dns, "cluster.local");
        assert_eq!(
            config.searches,
            [
                "default.svc.cluster.local",
                "svc.cluster.local",
                "cluster.local",
                "a.example",
                "b.example"
            ]
        );
        assert_eq!(config.options, ["ndots:2"]);
        assert!(notes.is_empty());
    }
}
