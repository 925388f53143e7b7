//! What each port should do, from what is desired. Pure.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;

use crate::{
    model::{Endpoint, Family, Protocol},
    ruleset::{Action, AddressSet, Frontend, Lane, Unit, desired::Desired},
};

/// What a client connects to, whichever lane it comes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Front {
    /// Node ports have none.
    pub(super) address: Option<IpAddr>,
    pub(super) protocol: Protocol,
    pub(super) port: u16,
}

impl Front {
    fn of(frontend: &Frontend) -> Self {
        let Frontend { address, protocol, port, .. } = *frontend;
        Self { address, protocol, port }
    }

    fn lane(self, family: Family, lane: Lane) -> Frontend {
        let Self { address, protocol, port } = self;
        Frontend { family, lane, address, protocol, port }
    }

    /// Its lanes: for everybody, and for clients from inside.
    fn lanes(self, family: Family) -> [Frontend; 2] {
        let lanes = match self.address {
            Some(_) => [Lane::Address, Lane::AddressInside],
            None => [Lane::NodePort, Lane::NodePortInside],
        };
        lanes.map(|lane| self.lane(family, lane))
    }

    /// The unit that stands for it in reports: a lane that has an owner.
    pub(super) fn frontend(self, family: Family, desired: &Desired) -> Frontend {
        let [everybody, inside] = self.lanes(family);
        if desired.action(&everybody).is_none() && desired.action(&inside).is_some() {
            return inside;
        }
        everybody
    }
}

/// Where a socket listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Listen {
    pub(super) address: IpAddr,
    pub(super) protocol: Protocol,
    pub(super) port: u16,
}

impl Listen {
    pub(super) fn socket_address(self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }
}

/// Where clients of one lane go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Treatment {
    /// To one of some endpoints.
    Forward(Choice),
    /// Nowhere. A packet filter would drop some and reject others; a socket can only be closed.
    Refuse,
}

/// The endpoints behind a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// Sorted, none twice, at least one.
    pub(super) endpoints: Arc<[Endpoint]>,
    /// How long a client stays with its endpoint.
    pub(super) affinity: Option<Duration>,
    /// From where clients may come.
    pub(super) sources: Option<Arc<[IpNet]>>,
}

impl Choice {
    /// Whether a client may use it at all.
    pub(super) fn admits(&self, client: IpAddr) -> bool {
        self.sources.as_ref().is_none_or(|ranges| ranges.iter().any(|r| r.contains(&client)))
    }

    /// Whether an endpoint is among those.
    pub(super) fn has(&self, endpoint: Endpoint) -> bool {
        self.endpoints.binary_search(&endpoint).is_ok()
    }
}

/// What a port does with whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    everybody: Treatment,
    /// For clients from inside the cluster, if they are treated otherwise.
    inside: Option<Treatment>,
}

impl Rule {
    /// The rule of a port; `None` if it is nobody's.
    fn of(front: Front, family: Family, desired: &Desired) -> Option<Self> {
        let [everybody, inside] =
            front.lanes(family).map(|lane| desired.action(&lane).map(treatment));
        if everybody.is_none() && inside.is_none() {
            return None;
        }
        Some(Self { everybody: everybody.unwrap_or(Treatment::Refuse), inside })
    }

    /// Whether any client is let through: without one there is no listener, and the kernel resets.
    pub(super) fn listens(&self) -> bool {
        [Some(&self.everybody), self.inside.as_ref()]
            .into_iter()
            .flatten()
            .any(|treatment| matches!(treatment, Treatment::Forward(_)))
    }

    /// Whether it counts where a client is.
    pub(super) fn tells_inside(&self) -> bool {
        self.inside.is_some()
    }

    /// The endpoints for a client from inside or outside.
    pub(super) fn choice(&self, inside: bool) -> Option<&Choice> {
        let treatment = self.inside.as_ref().filter(|_| inside).unwrap_or(&self.everybody);
        match treatment {
            Treatment::Forward(choice) => Some(choice),
            Treatment::Refuse => None,
        }
    }

    /// Whether any client may be sent to this endpoint and be kept there.
    pub(super) fn sticks_to(&self, endpoint: Endpoint) -> bool {
        [false, true].into_iter().any(|inside| {
            self.choice(inside).is_some_and(|c| c.affinity.is_some() && c.has(endpoint))
        })
    }
}

fn treatment(action: &Action) -> Treatment {
    match action {
        Action::Forward { endpoints, affinity, sources, .. } => Treatment::Forward(Choice {
            endpoints: endpoints.clone(),
            affinity: *affinity,
            sources: sources.clone(),
        }),
        Action::Drop | Action::Reject | Action::Nothing => Treatment::Refuse,
    }
}

/// What is to be brought in line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Whether this is everything there should be.
    pub(super) full: bool,
    /// Ports, with `None` for those that are nobody's.
    pub(super) rules: Vec<(Front, Option<Rule>)>,
    /// Cluster addresses that are or aren't a Service's.
    pub(super) cluster_addresses: Vec<(IpAddr, bool)>,
    /// Addresses that are or aren't this node's, as its object says.
    pub(super) node_addresses: Vec<(IpAddr, bool)>,
}

impl Changes {
    /// All that should be there.
    pub(super) fn all(family: Family, desired: &Desired) -> Self {
        let units: Vec<Unit> = desired.units().collect();
        Self { full: true, ..Self::of(family, &units, desired) }
    }

    /// What these units should be.
    pub(super) fn of(family: Family, units: &[Unit], desired: &Desired) -> Self {
        let mut changes = Self::default();
        let mut fronts = BTreeSet::new();
        for unit in units.iter().filter(|unit| unit.family() == family) {
            match unit {
                Unit::Frontend(frontend) => {
                    fronts.insert(Front::of(frontend));
                }
                Unit::Address(set, address) => {
                    let addresses = match set {
                        AddressSet::ClusterAddresses => &mut changes.cluster_addresses,
                        AddressSet::NodeAddresses => &mut changes.node_addresses,
                        // A relay may be its own endpoint's client as it is.
                        AddressSet::Hairpin => continue,
                    };
                    addresses.push((*address, desired.has_address(*set, *address)));
                }
                // Where nobody listens the route decides.
                Unit::ServiceRanges(_) => {}
            }
        }
        changes.rules =
            fronts.into_iter().map(|front| (front, Rule::of(front, family, desired))).collect();
        changes
    }
}

#[cfg(test)]
mod tests {
    use keelson_api::object::ObjectKey;

    use super::*;
    use crate::ruleset::{Masquerade, desired::ServiceRules};

    fn endpoint(n: u8) -> Endpoint {
        Endpoint { address: [10, 244, 0, n].into(), port: 80 }
    }

    fn forward(endpoints: &[u8]) -> Action {
        Action::Forward {
            endpoints: endpoints.iter().map(|n| endpoint(*n)).collect(),
            masquerade: Masquerade::Never,
            affinity: None,
            sources: Some(vec!["192.0.2.0/24".parse().unwrap()].into()),
        }
    }

    #[test]
    fn each_client_is_treated_as_its_lane_says() {
        // (the address lane, the lane for inside) → whether it listens, and the endpoints for
        // clients from outside and inside.
        type Case<'a> = (&'a str, Action, Action, bool, Option<u8>, Option<u8>);
        let table: Vec<Case<'_>> = vec![
            ("one lane for all", forward(&[1]), Action::Nothing, true, Some(1), Some(1)),
            ("policy Local", forward(&[1]), forward(&[2]), true, Some(1), Some(2)),
            ("policy Local, none here", Action::Drop, forward(&[2]), true, None, Some(2)),
            ("no endpoint", Action::Reject, Action::Nothing, false, None, None),
            ("inside is refused too", Action::Drop, Action::Reject, false, None, None),
        ];
        for (what, everybody, inside, listens, outer, inner) in table {
            let front =
                Front { address: Some([192, 0, 2, 9].into()), protocol: Protocol::Tcp, port: 80 };
            let lanes = front.lanes(Family::V4);
            let mut desired = Desired::default();
            let rules = ServiceRules {
                frontends: vec![(lanes[0], everybody), (lanes[1], inside)],
                ..ServiceRules::default()
            };
            desired.replace(&ObjectKey::new("d", "web"), Some(rules));
            let changes = Changes::all(Family::V4, &desired);
            let [(planned, Some(rule))] = &changes.rules[..] else { panic!("{what}: {changes:?}") };
            assert_eq!((*planned, rule.listens()), (front, listens), "{what}");
            let first = |inside| rule.choice(inside).map(|choice: &Choice| choice.endpoints[0]);
            assert_eq!(first(false), outer.map(endpoint), "{what}: outside");
            assert_eq!(first(true), inner.map(endpoint), "{what}: inside");

            desired.replace(&ObjectKey::new("d", "web"), None);
            let gone = Changes::of(Family::V4, &[Unit::Frontend(lanes[1])], &desired);
            assert_eq!(gone.rules, [(front, None)], "{what}");
            assert!(
                Changes::of(Family::V6, &[Unit::Frontend(lanes[1])], &desired).rules.is_empty()
            );
        }
    }

    #[test]
    fn clients_are_kept_where_any_of_them_may_be_kept() {
        let mut sticky = forward(&[1]);
        let Action::Forward { affinity, .. } = &mut sticky else { panic!() };
        *affinity = Some(Duration::from_secs(60));
        let rule = |everybody: &Action, inside: &Action| Rule {
            everybody: treatment(everybody),
            inside: Some(treatment(inside)),
        };
        for (rule, expected) in [
            (rule(&sticky, &Action::Drop), true),
            (rule(&Action::Drop, &sticky), true),
            (rule(&forward(&[1]), &forward(&[1])), false),
            (rule(&Action::Drop, &Action::Reject), false),
        ] {
            assert_eq!(rule.sticks_to(endpoint(1)), expected, "{rule:?}");
            assert!(!rule.sticks_to(endpoint(2)), "it is none of them: {rule:?}");
        }
    }

    #[test]
    fn source_ranges_admit_whom_they_name() {
        let Treatment::Forward(choice) = treatment(&forward(&[1])) else { panic!() };
        assert!(choice.admits([192, 0, 2, 7].into()));
        assert!(!choice.admits([198, 51, 100, 7].into()));
    }
}
