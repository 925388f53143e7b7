//! What the relays don't serve is told where operators look: as an event on the Service.

use std::sync::mpsc;

use serde_json::{Value, json};

use crate::{Mode, ProxyConfig, netns::Namespace, stand_in::ApiServer, until::PATIENCE};

fn listed(path: &str) -> Value {
    let items = match path {
        "/api/v1/services" => json!([
            {"metadata": {"name": "calls", "namespace": "d", "resourceVersion": "1"},
             "spec": {"clusterIP": "10.96.0.1", "ports": [
                 {"name": "web", "port": 80},
                 {"name": "signals", "port": 2905, "protocol": "SCTP"}]}},
        ]),
        "/apis/discovery.k8s.io/v1/endpointslices" => json!([
            {"metadata": {"name": "calls-1", "namespace": "d", "resourceVersion": "1",
                          "labels": {"kubernetes.io/service-name": "calls"}},
             "addressType": "IPv4", "endpoints": [{"addresses": ["10.244.0.5"]}],
             "ports": [{"name": "web", "port": 8080},
                       {"name": "signals", "port": 2905, "protocol": "SCTP"}]},
        ]),
        "/api/v1/nodes" => json!([
            {"metadata": {"name": "here", "resourceVersion": "1"},
             "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.7"}]}},
        ]),
        _ => json!([]),
    };
    json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items})
}

#[test]
fn a_service_with_a_port_of_sctp_gets_an_event_and_its_other_ports_are_served() {
    let host = Namespace::new();
    host.sh("ip addr add 192.0.2.7/32 dev lo");
    let (sender, events) = mpsc::channel();
    let config = ProxyConfig { mode: Mode::Userspace, ..ProxyConfig::new("here") };
    let api = ApiServer { lists: listed, events: Some(sender) };
    let (shutdown, running) = api.run(&host, config);
    let started = events.recv_timeout(PATIENCE).unwrap();
    let told = [&started["involvedObject"]["kind"], &started["reason"]].map(Value::as_str);
    assert_eq!(told, [Some("Node"), Some("Starting")], "{started}");
    let event = events.recv_timeout(PATIENCE).unwrap();
    assert_eq!(event["involvedObject"]["name"], "calls", "{event}");
    let told = [&event["type"], &event["reason"]].map(|text| text.as_str().unwrap());
    assert_eq!(told, ["Warning", "FailedToUpdateRules"], "{event}");
    let message = event["message"].as_str().unwrap();
    let expected = "SCTP 10.96.0.1:2905 is not served: the userspace mode doesn't relay SCTP";
    assert!(message.starts_with(expected), "{message}");
    let listening = host.sh("ss -Hltn");
    assert!(listening.contains("10.96.0.1:80"), "{listening}");

    shutdown.cancel();
    running.join().unwrap().unwrap();
    assert_eq!(events.try_iter().count(), 0, "it is told once");
}
