//! The routes and listeners that there would be, as a table.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use crate::{
    model::{Family, Protocol},
    ruleset::{Action, Lane, Unit, desired::Desired},
};

/// All that would be there for a goal.
pub(crate) fn text(family: Family, desired: &Desired) -> String {
    let mut routes = BTreeSet::new();
    let mut listeners = BTreeMap::new();
    let mut refused = BTreeSet::new();
    for unit in desired.units().filter(|unit| unit.family() == family) {
        let Unit::Frontend(frontend) = unit else { continue };
        routes.extend(frontend.address);
        let Some(Action::Forward { endpoints, sources, .. }) = desired.action(&frontend) else {
            continue;
        };
        if frontend.protocol == Protocol::Sctp {
            refused.insert(frontend);
            continue;
        }
        let clients = match frontend.lane {
            Lane::Address | Lane::NodePort => "everybody",
            Lane::AddressInside | Lane::NodePortInside => "clients inside",
        };
        let endpoints: Vec<String> = endpoints.iter().map(ToString::to_string).collect();
        let mut line = format!("{clients} → {}", endpoints.join(", "));
        for (n, range) in sources.iter().flat_map(|all| all.iter()).enumerate() {
            let _ = write!(line, "{} {range}", if n == 0 { "; only from" } else { "," });
        }
        listeners.insert(frontend, line);
    }
    let mut text = format!("# {}\n", family.as_str());
    for address in routes {
        let _ = writeln!(text, "route local {address} dev lo");
    }
    for (frontend, line) in listeners {
        let _ = writeln!(text, "listen {frontend}: {line}");
    }
    for frontend in refused {
        let _ = writeln!(text, "# not served: {frontend}: relays speak TCP and UDP");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use keelson_api::object::ObjectKey;

    use super::*;
    use crate::{
        model::Endpoint,
        ruleset::{Frontend, Masquerade, desired::ServiceRules},
    };

    #[test]
    fn what_relays_do_not_serve_is_not_listed_as_if_they_did() {
        let address: std::net::IpAddr = "10.96.0.1".parse().unwrap();
        let endpoints: Arc<[Endpoint]> =
            Arc::new([Endpoint { address: "10.244.0.1".parse().unwrap(), port: 8080 }]);
        let action = Action::Forward {
            endpoints,
            masquerade: Masquerade::Never,
            affinity: None,
            sources: None,
        };
        let frontends = [Protocol::Tcp, Protocol::Sctp]
            .map(|protocol| (Frontend::at(address, protocol, 80), action.clone()));
        let rules = ServiceRules { frontends: frontends.into(), ..ServiceRules::default() };
        let mut desired = Desired::default();
        desired.replace(&ObjectKey::new("d", "s"), Some(rules));
        assert_eq!(
            text(Family::V4, &desired),
            "# IPv4\nroute local 10.96.0.1 dev lo\n\
             listen TCP 10.96.0.1:80: everybody → 10.244.0.1:8080\n\
             # not served: SCTP 10.96.0.1:80: relays speak TCP and UDP\n"
        );
    }
}
