//! From EndpointSlices of the API to what the proxy needs of them, as one node sees them.
//!
//! What is wrong in a slice is left out and reported; the rest of it works on.

use std::{net::IpAddr, sync::Arc};

use jiff::Timestamp;
use k8s_openapi::api::discovery::v1 as discovery;
use keelson_api::object::ObjectKey;

use super::{
    Family, Problem, Protocol, address::usable_address, ports::port_number,
    services::SERVICE_PROXY_NAME,
};

/// Headless services carry this label on their slices.
pub(crate) const HEADLESS: &str = "service.kubernetes.io/headless";
/// Names the service of a slice.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// When the change that led to this slice happened.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// The most addresses in one slice; the API has 1,000 as its limit.
const SLICE_ENDPOINTS: usize = 1_000;
/// The most ports in one slice; the API has 100 as its limit.
const SLICE_PORTS: usize = 100;
/// How many endpoints that are left out an event names.
const NAMED: usize = 3;
/// How much of a text that is no address an event shows.
const TEXT_MAX: usize = 64;

/// One endpoint of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SliceEndpoint {
    pub(crate) address: IpAddr,
    pub(crate) ready: bool,
    pub(crate) serving: bool,
    pub(crate) terminating: bool,
    /// Whether it runs on this node.
    pub(crate) local: bool,
    /// Whether it may run on this node: so too when its node isn't named.
    pub(crate) maybe_local: bool,
    /// Whether its hints name this node.
    pub(crate) node_hint: Hint,
    /// Whether its hints name this node's zone.
    pub(crate) zone_hint: Hint,
}

/// Whom an endpoint is meant for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Hint {
    /// It doesn't say.
    #[default]
    Absent,
    /// Clients here, among others.
    Here,
    /// Clients elsewhere.
    Elsewhere,
}

impl Hint {
    fn read<'a>(names: impl Iterator<Item = &'a str>, here: Option<&str>) -> Self {
        let mut hint = Self::Absent;
        for name in names {
            if Some(name) == here {
                return Self::Here;
            }
            hint = Self::Elsewhere;
        }
        hint
    }
}

/// Where the proxy runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// The node's name.
    pub(crate) node: String,
    /// Its label `topology.kubernetes.io/zone`.
    pub(crate) zone: Option<String>,
}

/// What the proxy needs of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) service: ObjectKey,
    pub(crate) family: Family,
    pub(crate) ports: Box<[(Box<str>, Protocol, u16)]>,
    /// By address.
    pub(crate) endpoints: Arc<[SliceEndpoint]>,
    /// When the change that this slice tells of happened.
    pub(crate) triggered: Option<Timestamp>,
}

impl Slice {
    /// Reads an EndpointSlice as it is seen from `place`. `None` if it belongs to no service or
    /// holds names, not addresses.
    pub(crate) fn read(
        object: &discovery::EndpointSlice,
        place: &Place,
    ) -> (Option<Self>, Vec<Problem>) {
        let mut problems = Vec::new();
        let labels = object.metadata.labels.as_ref();
        let label = |name: &str| labels.and_then(|l| l.get(name)).map(String::as_str);
        let family = match object.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            _ => return (None, problems),
        };
        let Some(service) = label(SERVICE_NAME).filter(|name| !name.is_empty()) else {
            return (None, problems);
        };
        if label(HEADLESS).is_some() || label(SERVICE_PROXY_NAME).is_some() {
            return (None, problems);
        }
        let name = object.metadata.name.as_deref().unwrap_or_default();
        let mut ports = Vec::new();
        let listed = object.ports.as_deref().unwrap_or_default();
        if listed.len() > SLICE_PORTS {
            problems.push(too_many("ports", name, listed.len(), SLICE_PORTS));
        }
        for port in listed.iter().take(SLICE_PORTS) {
            let protocol = Protocol::parse(port.protocol.as_deref());
            // A port without a number stands for all ports, which a proxy can't serve.
            let (Some(protocol), Some(number)) = (protocol, port.port) else { continue };
            match port_number(number) {
                Some(number) => {
                    let name = port.name.as_deref().unwrap_or_default();
                    ports.push((name.into(), protocol, number));
                }
                None => problems.push(Problem::new(
                    "InvalidEndpointSlice",
                    format!("port {number} of slice {name} is not a port number and is left out"),
                )),
            }
        }
        let listed = object.endpoints.as_deref().unwrap_or_default();
        if listed.len() > SLICE_ENDPOINTS {
            problems.push(too_many("endpoints", name, listed.len(), SLICE_ENDPOINTS));
        }
        let mut endpoints = Vec::new();
        let mut left_out = Vec::new();
        for endpoint in listed.iter().take(SLICE_ENDPOINTS) {
            // All addresses of an endpoint are the same place; the first is the one to use.
            let Some(text) = endpoint.addresses.first() else { continue };
            match usable_address(text) {
                Ok(address) if Family::of(address) == family => {
                    endpoints.push(slice_endpoint(address, endpoint, place));
                }
                Ok(_) => left_out.push((text, "it is not of the slice's address type")),
                Err(why) => left_out.push((text, why)),
            }
        }
        endpoints.sort_by_key(|endpoint| endpoint.address);
        problems.extend(left_out_of(name, &left_out));
        let triggered = object
            .metadata
            .annotations
            .as_ref()
            .and_then(|a| a.get(TRIGGER_TIME)?.parse::<Timestamp>().ok());
        let namespace = object.metadata.namespace.clone().unwrap_or_default();
        let slice = Self {
            service: ObjectKey::new(namespace, service),
            family,
            ports: ports.into(),
            endpoints: endpoints.into(),
            triggered,
        };
        (Some(slice), problems)
    }
}

fn too_many(what: &str, slice: &str, there: usize, most: usize) -> Problem {
    Problem::new(
        "InvalidEndpointSlice",
        format!("slice {slice} has {there} {what}; those after the first {most} are left out"),
    )
}

/// One event for all of a slice's endpoints that are of no use: there may be a thousand of them, and
/// other events must not be lost for it.
fn left_out_of(slice: &str, endpoints: &[(&String, &'static str)]) -> Option<Problem> {
    // What the API server would never let through may have any length.
    let shown = |text: &str| text.chars().take(TEXT_MAX).collect::<String>();
    let named: Vec<String> = endpoints
        .iter()
        .take(NAMED)
        .map(|(text, why)| format!("{:?}: {why}", shown(text)))
        .collect();
    let message = match endpoints.len() {
        0 => return None,
        count if count > NAMED => format!(
            "{count} endpoints of slice {slice} are left out ({}, and {} more)",
            named.join("; "),
            count - NAMED
        ),
        1 => format!("1 endpoint of slice {slice} is left out ({})", named.join("; ")),
        count => {
            format!("{count} endpoints of slice {slice} are left out ({})", named.join("; "))
        }
    };
    Some(Problem::new("InvalidEndpointSlice", message))
}

fn slice_endpoint(address: IpAddr, endpoint: &discovery::Endpoint, place: &Place) -> SliceEndpoint {
    let conditions = endpoint.conditions.as_ref();
    // Absent means ready (discovery.k8s.io/v1, EndpointConditions).
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let local = endpoint.node_name.as_deref() == Some(&place.node);
    let hints = endpoint.hints.as_ref();
    let nodes = hints.and_then(|h| h.for_nodes.as_deref()).unwrap_or_default();
    let zones = hints.and_then(|h| h.for_zones.as_deref()).unwrap_or_default();
    SliceEndpoint {
        address,
        ready,
        serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        local,
        maybe_local: local || endpoint.node_name.is_none(),
        node_hint: Hint::read(nodes.iter().map(|n| n.name.as_str()), Some(&place.node)),
        zone_hint: Hint::read(zones.iter().map(|z| z.name.as_str()), place.zone.as_deref()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn slice(value: serde_json::Value) -> (Option<Slice>, Vec<Problem>) {
        let place = Place { node: "here".into(), zone: Some("a".into()) };
        Slice::read(&serde_json::from_value(value).unwrap(), &place)
    }

    #[test]
    fn a_slice_without_any_use_is_one_event_and_bounded() {
        let endpoints: Vec<_> = (0..3_000).map(|_| json!({"addresses": ["::1"]})).collect();
        let ports: Vec<_> =
            (0..300).map(|n| json!({"name": format!("p{n}"), "port": 80})).collect();
        let (read, problems) = slice(json!({
            "metadata": {"name": "s-1", "namespace": "d", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv6", "ports": ports, "endpoints": endpoints,
        }));
        assert_eq!(read.unwrap().ports.len(), SLICE_PORTS);
        let messages: Vec<&str> = problems.iter().map(|p| &*p.message).collect();
        let [ports, endpoints, left_out] = messages[..] else { panic!("{messages:?}") };
        assert_eq!(ports, "slice s-1 has 300 ports; those after the first 100 are left out");
        assert_eq!(
            endpoints,
            "slice s-1 has 3000 endpoints; those after the first 1000 are left out"
        );
        assert!(
            left_out.starts_with("1000 endpoints of slice s-1 are left out (\"::1\""),
            "{left_out}"
        );
        assert!(left_out.ends_with("and 997 more)") && left_out.len() < 300, "{left_out}");
    }

    #[test]
    fn slices_that_are_another_ones_or_nobodys_are_ignored() {
        let read = |label: Option<&str>| {
            let mut labels = json!({"kubernetes.io/service-name": "s"});
            label.into_iter().for_each(|label| labels[label] = "".into());
            slice(json!({"metadata": {"name": "s-1", "namespace": "d", "labels": labels},
                "addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}]}))
        };
        assert!(read(None).0.is_some());
        for label in [HEADLESS, SERVICE_PROXY_NAME, SERVICE_NAME] {
            assert_eq!(read(Some(label)), (None, vec![]), "{label}");
        }
    }

    #[test]
    fn absent_conditions_mean_ready_and_serving() {
        let (read, problems) = slice(json!({
            "metadata": {"name": "s-1", "namespace": "d", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 80}, {"name": "all"}, {"name": "z", "port": 0}],
            "endpoints": [
                {"addresses": ["10.0.0.1"], "nodeName": "here",
                 "hints": {"forNodes": [{"name": "there"}], "forZones": [{"name": "b"}, {"name": "a"}]}},
                {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["127.0.0.1"]}, {"addresses": ["fd00::1"]}, {"addresses": []},
            ],
        }));
        let read = read.unwrap();
        assert_eq!(read.ports, [(Box::from(""), Protocol::Tcp, 80)].into());
        let messages: Vec<&str> = problems.iter().map(|p| &*p.message).collect();
        assert_eq!(
            messages,
            [
                "port 0 of slice s-1 is not a port number and is left out",
                "2 endpoints of slice s-1 are left out (\"127.0.0.1\": it is a loopback address; \
                 \"fd00::1\": it is not of the slice's address type)",
            ]
        );
        let [first, second] = &read.endpoints[..] else { panic!("{:?}", read.endpoints) };
        assert!(first.ready && first.serving && !first.terminating && first.local);
        assert_eq!((first.node_hint, first.zone_hint), (Hint::Elsewhere, Hint::Here));
        assert_eq!((second.node_hint, second.zone_hint), (Hint::Absent, Hint::Absent));
        assert!(!second.ready && second.serving && second.terminating && second.maybe_local);
    }
}
