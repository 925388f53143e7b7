//! Ports out of objects: which of them can be served.

use k8s_openapi::api::core::v1 as core;

use super::{Problem, Protocol, services::ServicePort};

/// A Service's ports; `external` if it may have node ports. Of two with one number and protocol, or
/// one node port, the first has it: the API server lets no Service have both.
pub(super) fn service_ports(
    spec: &core::ServiceSpec,
    external: bool,
    problems: &mut Vec<Problem>,
) -> Vec<ServicePort> {
    let mut ports: Vec<ServicePort> = Vec::new();
    for listed in spec.ports.iter().flatten() {
        let mut port = match service_port(listed, external) {
            Ok(port) => port,
            Err(why) => {
                problems.push(refused(listed, "is not served", &why));
                continue;
            }
        };
        let mut same = ports.iter().filter(|other| other.protocol == port.protocol);
        if same.clone().any(|other| other.port == port.port) {
            problems.push(refused(listed, "is not served", "another one has its number"));
            continue;
        }
        if let Some(node_port) = port.node_port
            && same.any(|other| other.node_port == Some(node_port))
        {
            let why = format!("another port has node port {node_port}");
            problems.push(refused(listed, "has no node port", &why));
            port.node_port = None;
        }
        ports.push(port);
    }
    ports
}

fn refused(port: &core::ServicePort, what: &str, why: &str) -> Problem {
    let name = port.name.as_deref().unwrap_or_default();
    Problem::new("InvalidPort", format!("port {} {name:?} {what}: {why}", port.port))
}

fn service_port(port: &core::ServicePort, external: bool) -> Result<ServicePort, String> {
    let protocol = Protocol::parse(port.protocol.as_deref()).ok_or_else(|| {
        let unknown = port.protocol.as_deref().unwrap_or_default();
        format!("protocol {unknown:?} is not known")
    })?;
    let number = port_number(port.port).ok_or("it is not a port number")?;
    // 0 is how "none" looks on the wire.
    let node_port = match port.node_port.filter(|n| external && *n != 0) {
        None => None,
        Some(n) => {
            Some(port_number(n).ok_or_else(|| format!("node port {n} is not a port number"))?)
        }
    };
    let name = port.name.as_deref().unwrap_or_default().into();
    Ok(ServicePort { name, protocol, port: number, node_port })
}

/// A number that a port can have.
pub(super) fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|n| *n != 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn of_two_ports_with_one_number_the_first_has_it() {
        let spec = json!({"ports": [
            {"name": "web", "port": 80, "nodePort": 30_080},
            {"name": "again", "port": 80, "nodePort": 30_081},
            {"name": "dns", "port": 80, "protocol": "UDP", "nodePort": 30_080},
            {"name": "more", "port": 81, "nodePort": 30_080},
        ]});
        let mut problems = Vec::new();
        let spec = serde_json::from_value(spec).unwrap();
        let ports = service_ports(&spec, true, &mut problems);
        let ports: Vec<_> = ports.iter().map(|p| (&*p.name, p.port, p.node_port)).collect();
        assert_eq!(
            ports,
            [("web", 80, Some(30_080)), ("dns", 80, Some(30_080)), ("more", 81, None)]
        );
        let messages: Vec<&str> = problems.iter().map(|p| &*p.message).collect();
        assert_eq!(
            messages,
            [
                "port 80 \"again\" is not served: another one has its number",
                "port 81 \"more\" has no node port: another port has node port 30080",
            ]
        );
    }
}
