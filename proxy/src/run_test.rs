//! The whole proxy against a stand-in for the API server that answers lists and never ends watches.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{
    Mode, ProxyConfig, ProxyError,
    netns::Namespace,
    run,
    stand_in::ApiServer,
    until::{PATIENCE, until, until_some},
};

fn answer(path: &str) -> Value {
    let metadata = json!({"resourceVersion": "1"});
    match path {
        "/api/v1/services" => {
            json!({"kind": "ServiceList", "apiVersion": "v1", "metadata": metadata, "items": [
                {"metadata": {"name": "web", "namespace": "d", "resourceVersion": "1"},
                 "spec": {"clusterIP": "10.96.0.1", "type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]}},
                {"metadata": {"name": "lb", "namespace": "d", "resourceVersion": "1"},
                 "spec": {"clusterIP": "10.96.0.2", "type": "LoadBalancer", "ports": [{"port": 80}],
                          "externalTrafficPolicy": "Local", "healthCheckNodePort": 31999}},
                {"metadata": {"name": "six", "namespace": "d", "resourceVersion": "1"},
                 "spec": {"clusterIP": "fd00::10", "ports": [{"port": 80}]}},
                {"metadata": {"name": "headless", "namespace": "d", "resourceVersion": "1"},
                 "spec": {"clusterIP": "None", "ports": [{"port": 81}]}},
                {"metadata": {"name": "loop", "namespace": "d", "resourceVersion": "1"},
                 "spec": {"clusterIP": "127.0.0.1", "ports": [{"port": 82}]}},
            ]})
        }
        "/apis/discovery.k8s.io/v1/endpointslices" => json!({
            "kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1", "metadata": metadata, "items": [
            {"metadata": {"name": "web-1", "namespace": "d", "resourceVersion": "1",
                          "labels": {"kubernetes.io/service-name": "web"}},
             "addressType": "IPv4", "ports": [{"port": 8080}],
             "endpoints": [{"addresses": ["10.244.0.5"]}, {"addresses": ["169.254.169.254"]}]},
            {"metadata": {"name": "lb-1", "namespace": "d", "resourceVersion": "1",
                          "labels": {"kubernetes.io/service-name": "lb"}},
             "addressType": "IPv4", "ports": [{"port": 8080}],
             "endpoints": [{"addresses": ["10.244.0.6"], "nodeName": "here"},
                           {"addresses": ["10.244.1.6"], "nodeName": "elsewhere"}]},
        ]}),
        "/api/v1/nodes" => {
            json!({"kind": "NodeList", "apiVersion": "v1", "metadata": metadata, "items": [
                {"metadata": {"name": "here", "resourceVersion": "1"},
                 "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.7"}]}},
            ]})
        }
        _ => json!({}),
    }
}

const API: ApiServer = ApiServer { lists: answer, events: None };

fn get(namespace: &Namespace, port: u16, path: &str) -> Option<String> {
    get_at(namespace, "127.0.0.1", port, path)
}

fn get_at(namespace: &Namespace, address: &'static str, port: u16, path: &str) -> Option<String> {
    let path = path.to_owned();
    namespace.run(move || {
        let mut stream = TcpStream::connect((address, port)).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    })
}

#[test]
fn it_starts_serves_tells_of_its_health_and_stops() {
    let host = Namespace::new();
    host.sh("ip addr add 192.0.2.7/32 dev lo");
    let (shutdown, running) = API.run(&host, ProxyConfig::new("here"));
    let listed = until_some("the first sync", || {
        let (_, listed) = host.try_sh("nft list ruleset");
        (listed.contains("goto endpoints-1") && listed.contains("192.0.2.7")).then_some(listed)
    });
    let six = host.sh("nft list table ip6 keelson-proxy");
    assert!(six.contains("fd00::10 . tcp . 80 : goto reject-at-once"), "{six}");
    assert!(listed.contains("10.96.0.1 . tcp . 80 . 0x00000000 : 10.244.0.5 . 8080"), "{listed}");
    assert!(!listed.contains("127.0.0.1") && !listed.contains("169.254"), "{listed}");

    for path in ["/healthz", "/livez"] {
        let page = get(&host, 10256, path).unwrap();
        assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        for field in ["\"lastUpdated\":", "\"currentTime\":"] {
            assert!(page.contains(field), "{page}");
        }
        assert_eq!(page.contains("\"nodeEligible\":true"), path == "/healthz", "{page}");
    }
    let six = until_some("its configured address, 0.0.0.0, is that of IPv6 too", || {
        get_at(&host, "::1", 10256, "/livez")
    });
    assert!(six.starts_with("HTTP/1.1 200"), "{six}");
    assert!(get(&host, 10249, "/proxyMode").unwrap().ends_with("\r\n\r\nnftables"));
    assert!(get(&host, 10249, "/configz").unwrap().contains("\"masqueradeBit\":14"));
    assert!(get(&host, 10249, "/nothing").unwrap().starts_with("HTTP/1.1 404"));
    let check = || get_at(&host, "192.0.2.7", 31999, "/");
    let check = until_some("health checks are answered", check);
    assert!(check.starts_with("HTTP/1.1 200"), "{check}");
    for part in ["x-load-balancing-endpoint-weight: 1", "\"localEndpoints\": 1", "\"name\": \"lb\""]
    {
        assert!(check.contains(part), "{check}");
    }
    let metrics = get(&host, 10249, "/metrics").unwrap();
    for name in [
        "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} ",
        "kubeproxy_sync_proxy_rules_service_changes_total 5",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 2",
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"} ",
        "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
        "kubernetes_build_info{",
        "process_start_time_seconds ",
        "registered_metrics_total{deprecated_version=\"\",stability_level=\"ALPHA\"} ",
    ] {
        assert!(metrics.contains(name), "{name} isn't in {metrics}");
    }

    shutdown.cancel();
    running.join().unwrap().unwrap();
    assert!(host.sh("nft list ruleset").contains("goto endpoints-1"), "the rules stay");
    host.run(|| crate::cleanup().unwrap());
    assert_eq!(host.sh("nft list ruleset"), "");
}

#[test]
fn another_mode_takes_over_and_what_relays_need_goes_with_them() {
    let host = Namespace::new();
    host.sh("ip addr add 192.0.2.7/32 dev lo");
    let tables = || host.sh("nft list tables");
    let mode = || get(&host, 10249, "/proxyMode").unwrap_or_default();
    let (shutdown, running) = API.run(&host, ProxyConfig::new("here"));
    until("nftables", || mode().ends_with("nftables") && tables().contains("keelson-proxy"));
    shutdown.cancel();
    running.join().unwrap().unwrap();

    let userspace = ProxyConfig { mode: Mode::Userspace, ..ProxyConfig::new("here") };
    let (shutdown, running) = API.run(&host, userspace);
    let routes = || host.sh("ip route show table local");
    until("relays", || mode().ends_with("userspace") && routes().contains("10.96.0.1"));
    until("the tables go once the relays are there", || !tables().contains("keelson-proxy"));
    let metrics = get(&host, 10249, "/metrics").unwrap();
    assert!(!metrics.contains("nftables") && !metrics.contains("iptables"), "{metrics}");
    shutdown.cancel();
    running.join().unwrap().unwrap();
    assert!(!routes().contains("10.96.0.1"), "{}", routes());
}

#[test]
fn flows_that_another_mode_translated_come_to_the_relays() {
    let lists = |path: &str| match path {
        "/api/v1/services" => {
            json!({"kind": "ServiceList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": [
                {"metadata": {"name": "dns", "namespace": "d", "resourceVersion": "1"},
                 "spec": {"clusterIP": "10.96.0.53", "ports": [{"port": 53, "protocol": "UDP"}]}},
            ]})
        }
        "/apis/discovery.k8s.io/v1/endpointslices" => {
            json!({"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1",
                   "metadata": {"resourceVersion": "1"}, "items": []})
        }
        path => answer(path),
    };
    let host = Namespace::new();
    // As rules of another mode left it, and a port of the host's that is no Service's.
    for (to, port, from) in [("10.96.0.53", 53, 1000), ("192.0.2.7", 5353, 1001)] {
        host.sh(&format!(
            "conntrack -I -p udp -t 300 -s 10.244.0.9 --sport {from} -d {to} --dport {port} \
             -r 10.244.0.5 --reply-port-src 53 -q 10.244.0.9 --reply-port-dst {from}"
        ));
    }
    let tracked = || host.sh("conntrack -L -p udp 2>/dev/null");
    assert!(tracked().contains("dst=10.96.0.53"), "{}", tracked());
    let userspace = ProxyConfig { mode: Mode::Userspace, ..ProxyConfig::new("here") };
    let (shutdown, running) = ApiServer { lists, events: None }.run(&host, userspace);
    until("the flow is forgotten", || !tracked().contains("dst=10.96.0.53"));
    assert!(tracked().contains("dst=192.0.2.7"), "{}", tracked());
    shutdown.cancel();
    running.join().unwrap().unwrap();
}

#[test]
fn a_port_in_use_is_named() {
    let host = Namespace::new();
    let error = host.run(|| {
        let _taken = std::net::TcpListener::bind("0.0.0.0:10256").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let config = ProxyConfig { bind_address_hard_fail: true, ..ProxyConfig::new("here") };
            run(config, API.client(), CancellationToken::new()).await.unwrap_err()
        })
    });
    assert!(matches!(error, ProxyError::Listen { .. }), "{error}");
    assert!(error.to_string().contains("0.0.0.0:10256"), "{error}");
}
