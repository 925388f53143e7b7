//! What inputs come to: a fuzzer that never gets to a feature finds nothing in it.

use std::collections::BTreeSet;

use crate::{
    Mode, Protocol,
    model::{Family, Problem, eligible::Topology, table::ServiceTable},
    ruleset::{
        Action, AddressSet, Lane, Masquerade, Unit,
        desired::{Desired, Outcome},
    },
};

/// What was reached, by name and, where it is of one, family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Reached(BTreeSet<(&'static str, Option<Family>)>);

/// What can be reached in each family.
const OF_A_FAMILY: [&str; 31] = [
    "TCP",
    "UDP",
    "SCTP",
    "a service address",
    "an address for clients inside",
    "a node port",
    "a node port for clients inside",
    "drop",
    "reject",
    "masquerade off cluster",
    "masquerade always",
    "masquerade never",
    "affinity",
    "source ranges",
    "nobody admitted",
    "more than 8 endpoints",
    "more than 100 endpoints",
    "endpoints with different ports",
    "hairpin",
    "a node address",
    "hints for nodes",
    "hints for zones",
    "endpoints that drain",
    "local endpoints that are others than the cluster's",
    "several slices",
    "an endpoint that is named twice",
    "endpoints replaced",
    "endpoints gone",
    "endpoints come",
    "a service gone",
    "a service from another claimant",
];

/// What can be reached besides.
const OF_NONE: [&str; 15] = [
    "iptables",
    "a step while rules are in force",
    "a port taken",
    "a port won",
    "a node that moved",
    "a slice gone",
    "ranges of services",
    "a slice of another service",
    "InvalidClusterIP",
    "InvalidEndpointSlice",
    "InvalidExternalIP",
    "InvalidPort",
    "InvalidSourceRange",
    "KubeProxyIncorrectIPVersion",
    "not served",
];

impl Reached {
    /// That this was reached.
    pub(super) fn note(&mut self, what: &'static str) {
        debug_assert!(OF_NONE.contains(&what), "{what} has no line above");
        self.0.insert((what, None));
    }

    fn of(&mut self, family: Family, what: &'static str) {
        debug_assert!(OF_A_FAMILY.contains(&what), "{what} has no line above");
        self.0.insert((what, Some(family)));
    }

    /// What that can be reached was not.
    #[cfg(test)]
    pub(super) fn missing(&self) -> Vec<(&'static str, Option<Family>)> {
        let of_a_family = [Family::V4, Family::V6]
            .into_iter()
            .flat_map(|family| OF_A_FAMILY.map(|what| (what, Some(family))));
        let all = of_a_family.chain(OF_NONE.map(|what| (what, None)));
        all.filter(|one| !self.0.contains(one)).collect()
    }

    /// What it reached that others didn't, as names of files.
    #[cfg(test)]
    pub(super) fn beyond(&self, others: &Self) -> Vec<String> {
        let name = |(what, family): &(&str, Option<Family>)| {
            let family = family.map(|family| format!("-{}", family.as_str())).unwrap_or_default();
            format!("{}{family}", what.replace([' ', '\''], "-"))
        };
        self.0.difference(&others.0).map(name).collect()
    }

    /// What another input reached counts too.
    #[cfg(test)]
    pub(super) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Problems that were told.
    pub(super) fn problems(&mut self, problems: &[Problem]) {
        for problem in problems.iter().filter(|problem| problem.reason != "TooManyEndpoints") {
            self.note(problem.reason);
        }
    }

    /// What a change came to.
    pub(super) fn change(&mut self, outcome: &Outcome, desired: &Desired, mode: Mode) {
        self.note("a step while rules are in force");
        if mode == Mode::Iptables {
            self.note("iptables");
        }
        if !outcome.taken.is_empty() {
            self.note("a port taken");
        }
        if !outcome.won.is_empty() {
            self.note("a port won");
        }
        let count = |action: Option<&Action>| match action {
            Some(Action::Forward { endpoints, .. }) => endpoints.len(),
            _ => 0,
        };
        for (frontend, before) in &outcome.before {
            let after = desired.action(frontend);
            match (count(Some(before)), count(after)) {
                (0, 1..) => self.of(frontend.family, "endpoints come"),
                (1.., 0) if after.is_some() => self.of(frontend.family, "endpoints gone"),
                (1.., 1..) => self.of(frontend.family, "endpoints replaced"),
                _ => {}
            }
            if after.is_none() {
                self.of(frontend.family, "a service gone");
            }
            if outcome.won.iter().any(|(won, _)| won == frontend) {
                self.of(frontend.family, "a service from another claimant");
            }
        }
    }

    /// What should be in force.
    pub(super) fn desired(&mut self, desired: &Desired) {
        for unit in desired.units() {
            let frontend = match unit {
                Unit::Frontend(frontend) => frontend,
                Unit::Address(AddressSet::Hairpin, _) => {
                    self.of(unit.family(), "hairpin");
                    continue;
                }
                Unit::Address(AddressSet::NodeAddresses, _) => {
                    self.of(unit.family(), "a node address");
                    continue;
                }
                Unit::Address(AddressSet::ClusterAddresses, _) | Unit::ServiceRanges(_) => continue,
            };
            let family = frontend.family;
            let Some(action) = desired.action(&frontend) else { continue };
            self.of(
                family,
                match action {
                    Action::Forward { masquerade: Masquerade::OffCluster, .. } => {
                        "masquerade off cluster"
                    }
                    Action::Forward { masquerade: Masquerade::Always, .. } => "masquerade always",
                    Action::Forward { masquerade: Masquerade::Never, .. } => "masquerade never",
                    Action::Drop => "drop",
                    Action::Reject | Action::Nothing => "reject",
                },
            );
            let Action::Forward { endpoints, affinity, sources, .. } = action else { continue };
            let lane = match frontend.lane {
                Lane::Address => "a service address",
                Lane::AddressInside => "an address for clients inside",
                Lane::NodePort => "a node port",
                Lane::NodePortInside => "a node port for clients inside",
            };
            let protocol = match frontend.protocol {
                Protocol::Tcp => "TCP",
                Protocol::Udp => "UDP",
                Protocol::Sctp => "SCTP",
            };
            let ports: BTreeSet<u16> = endpoints.iter().map(|endpoint| endpoint.port).collect();
            for (holds, what) in [
                (true, lane),
                (true, protocol),
                (affinity.is_some(), "affinity"),
                (sources.as_ref().is_some_and(|list| !list.is_empty()), "source ranges"),
                (sources.as_ref().is_some_and(|list| list.is_empty()), "nobody admitted"),
                (endpoints.len() > 8, "more than 8 endpoints"),
                (endpoints.len() > 100, "more than 100 endpoints"),
                (ports.len() > 1, "endpoints with different ports"),
            ] {
                if holds {
                    self.of(family, what);
                }
            }
        }
    }

    /// Which endpoints are chosen, and from what.
    pub(super) fn choices(&mut self, objects: &ServiceTable, families: &[Family]) {
        for key in objects.keys() {
            let Some((plans, problems)) = objects.ports(key, families) else { continue };
            self.problems(&problems);
            for plan in plans {
                let eligible = &plan.eligible;
                let family = plan.family;
                let slices: Vec<_> =
                    objects.slices_of(key).filter(|slice| slice.family == family).collect();
                let all = slices.iter().flat_map(|slice| slice.endpoints.iter());
                let distinct: BTreeSet<_> = all.clone().map(|e| e.address).collect();
                let draining = all.clone().filter(|e| e.serving && e.terminating && !e.ready);
                let drains = draining
                    .clone()
                    .any(|e| eligible.cluster.iter().any(|chosen| chosen.address == e.address));
                for (holds, what) in [
                    (eligible.topology == Topology::Node, "hints for nodes"),
                    (eligible.topology == Topology::Zone, "hints for zones"),
                    (
                        eligible.local.iter().any(|e| !eligible.cluster.contains(e)),
                        "local endpoints that are others than the cluster's",
                    ),
                    (drains, "endpoints that drain"),
                    (slices.len() > 1, "several slices"),
                    (distinct.len() < all.clone().count(), "an endpoint that is named twice"),
                ] {
                    if holds {
                        self.of(family, what);
                    }
                }
            }
        }
    }
}
