//! Variables that name the Services of a namespace, as Docker's links once did.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use k8s_openapi::api::core::v1::{Service, ServicePort};

/// The Service of the API server, which every container is told of.
const API_SERVICE: (&str, &str) = ("default", "kubernetes");

/// The variables for a pod in `namespace`: those of the API's Service always, those of the
/// namespace's own if `links` says so (`enableServiceLinks`, on unless it is turned off).
pub(crate) fn variables<'a>(
    services: impl IntoIterator<Item = &'a Service>,
    namespace: &str,
    links: bool,
) -> BTreeMap<String, String> {
    // By name: a Service of the pod's own namespace wins over the API's.
    let mut chosen: BTreeMap<&str, (&Service, bool)> = BTreeMap::new();
    for service in services {
        let metadata = &service.metadata;
        let (Some(of), Some(name)) = (metadata.namespace.as_deref(), metadata.name.as_deref())
        else {
            continue;
        };
        let own = links && of == namespace;
        if own || ((of, name) == API_SERVICE && !chosen.contains_key(name)) {
            chosen.insert(name, (service, own));
        }
    }
    let mut variables = BTreeMap::new();
    for (name, (service, _)) in chosen {
        describe(name, service, &mut variables);
    }
    variables
}

fn describe(name: &str, service: &Service, variables: &mut BTreeMap<String, String>) {
    let Some(spec) = &service.spec else { return };
    let Some(Ok(address)) = spec.cluster_ip.as_deref().map(str::parse::<IpAddr>) else {
        // Headless, not given an address yet, or of type ExternalName.
        return;
    };
    let ports = spec.ports.as_deref().unwrap_or_default();
    let Some(first) = ports.first() else { return };
    let prefix = variable_name(name);
    variables.insert(format!("{prefix}_SERVICE_HOST"), address.to_string());
    variables.insert(format!("{prefix}_SERVICE_PORT"), first.port.to_string());
    for port in ports {
        if let Some(port_name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            let key = format!("{prefix}_SERVICE_PORT_{}", variable_name(port_name));
            variables.insert(key, port.port.to_string());
        }
    }
    variables.insert(format!("{prefix}_PORT"), url(first, address));
    for port in ports {
        let protocol = protocol(port);
        let key = format!("{prefix}_PORT_{}_{}", port.port, protocol.to_uppercase());
        variables.insert(key.clone(), url(port, address));
        variables.insert(format!("{key}_PROTO"), protocol);
        variables.insert(format!("{key}_PORT"), port.port.to_string());
        variables.insert(format!("{key}_ADDR"), address.to_string());
    }
}

fn protocol(port: &ServicePort) -> String {
    port.protocol.as_deref().unwrap_or("TCP").to_lowercase()
}

fn url(port: &ServicePort, address: IpAddr) -> String {
    let number = u16::try_from(port.port).unwrap_or_default();
    format!("{}://{}", protocol(port), SocketAddr::new(address, number))
}

fn variable_name(name: &str) -> String {
    name.replace('-', "_").to_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(namespace: &str, name: &str, spec: &serde_json::Value) -> Service {
        serde_json::from_value(serde_json::json!({
            "metadata": {"namespace": namespace, "name": name}, "spec": spec,
        }))
        .unwrap()
    }

    #[test]
    fn services_are_named_as_links() {
        let services = [
            service(
                "default",
                "kubernetes",
                &serde_json::json!({"clusterIP": "10.96.0.1", "ports": [
                    {"name": "https", "port": 443}]}),
            ),
            service(
                "team",
                "redis-primary",
                &serde_json::json!({"clusterIP": "10.0.0.11", "ports": [
                    {"port": 6379}, {"name": "side-car", "port": 53, "protocol": "UDP"}]}),
            ),
            service(
                "team",
                "headless",
                &serde_json::json!({"clusterIP": "None", "ports": [
                {"port": 1}]}),
            ),
            service(
                "team",
                "v6",
                &serde_json::json!({"clusterIP": "fd00::1", "ports": [
                {"port": 80}]}),
            ),
            service(
                "other",
                "unseen",
                &serde_json::json!({"clusterIP": "10.0.0.12", "ports": [
                {"port": 1}]}),
            ),
            service(
                "default",
                "unseen",
                &serde_json::json!({"clusterIP": "10.0.0.13", "ports": [
                {"port": 1}]}),
            ),
        ];
        let found = variables(&services, "team", true);
        for (name, value) in [
            ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
            ("KUBERNETES_SERVICE_PORT", "443"),
            ("KUBERNETES_SERVICE_PORT_HTTPS", "443"),
            ("KUBERNETES_PORT", "tcp://10.96.0.1:443"),
            ("REDIS_PRIMARY_SERVICE_HOST", "10.0.0.11"),
            ("REDIS_PRIMARY_SERVICE_PORT", "6379"),
            ("REDIS_PRIMARY_SERVICE_PORT_SIDE_CAR", "53"),
            ("REDIS_PRIMARY_PORT", "tcp://10.0.0.11:6379"),
            ("REDIS_PRIMARY_PORT_6379_TCP", "tcp://10.0.0.11:6379"),
            ("REDIS_PRIMARY_PORT_6379_TCP_PROTO", "tcp"),
            ("REDIS_PRIMARY_PORT_6379_TCP_PORT", "6379"),
            ("REDIS_PRIMARY_PORT_6379_TCP_ADDR", "10.0.0.11"),
            ("REDIS_PRIMARY_PORT_53_UDP", "udp://10.0.0.11:53"),
            ("V6_PORT", "tcp://[fd00::1]:80"),
        ] {
            assert_eq!(found.get(name).map(String::as_str), Some(value), "{name}");
        }
        assert!(!found.keys().any(|name| name.contains("HEADLESS") || name.contains("UNSEEN")));
        let without = variables(&services, "team", false);
        assert!(without.keys().all(|name| name.starts_with("KUBERNETES_")) && !without.is_empty());
    }

    #[test]
    fn the_pods_own_namespace_wins() {
        let own = service(
            "team",
            "kubernetes",
            &serde_json::json!({"clusterIP": "10.0.0.9",
            "ports": [{"port": 1}]}),
        );
        let api = service(
            "default",
            "kubernetes",
            &serde_json::json!({"clusterIP": "10.96.0.1",
            "ports": [{"port": 443}]}),
        );
        for services in [[&own, &api], [&api, &own]] {
            let found = variables(services, "team", true);
            assert_eq!(found["KUBERNETES_SERVICE_HOST"], "10.0.0.9");
            let found = variables(services, "team", false);
            assert_eq!(found["KUBERNETES_SERVICE_HOST"], "10.96.0.1");
        }
    }
}
