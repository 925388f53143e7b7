//! The routes and listeners that there would be, as a table.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use crate::{
    model::Family,
    ruleset::{Action, Lane, Unit, desired::Desired},
};

/// All that would be there for a goal.
pub(crate) fn text(family: Family, desired: &Desired) -> String {
    let mut routes = BTreeSet::new();
    let mut listeners = BTreeMap::new();
    for unit in desired.units().filter(|unit| unit.family() == family) {
        let Unit::Frontend(frontend) = unit else { continue };
        routes.extend(frontend.address);
        let Some(Action::Forward { endpoints, sources, .. }) = desired.action(&frontend) else {
            continue;
        };
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
    text
}
