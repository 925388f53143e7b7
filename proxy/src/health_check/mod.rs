//! Health-check node ports: where load balancers ask whether this node has endpoints of a Service.
//!
//! A Service of type LoadBalancer with `externalTrafficPolicy: Local` has one. The loop notes what
//! each Service wants and publishes it with the commit; [a task](listeners) opens and closes listeners
//! and answers from what was published last. A port that can't be had is told by an event on the
//! Service and tried again; one that is another Service's node port isn't opened at all, since its
//! packets never come here.

mod listeners;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use keelson_api::object::ObjectKey;
use tokio::sync::watch;

pub(crate) use self::listeners::{Listening, listen};
use crate::{
    model::{Family, Problem, Protocol, table::ServiceTable},
    ruleset::{Frontend, Lane, Unit, desired::Desired},
};

/// What is asked for at one port.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Check {
    service: ObjectKey,
    /// The Service's UID, for events.
    uid: Option<String>,
    /// Ready endpoints on this node.
    local: usize,
}

/// All health-check node ports, and the node's addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Checks {
    /// Of two Services with one port the older has it.
    by_port: BTreeMap<u16, Check>,
    node_addresses: BTreeSet<IpAddr>,
}

/// The loop's end: what each Service wants.
#[derive(Debug, Default)]
pub(crate) struct HealthChecks {
    services: BTreeMap<ObjectKey, (u16, i64, Check)>,
    /// Who wants a port, and since when it is there; the first has it.
    claims: BTreeMap<u16, BTreeSet<(i64, ObjectKey)>>,
    /// Ports that are another Service's node ports: who wanted them, and whose they are.
    taken: BTreeMap<u16, (ObjectKey, ObjectKey)>,
    node_addresses: BTreeSet<IpAddr>,
    changed: bool,
    published: Option<watch::Sender<Arc<Checks>>>,
}

impl HealthChecks {
    /// Publishes here.
    pub(crate) fn new(published: watch::Sender<Arc<Checks>>) -> Self {
        Self { published: Some(published), ..Self::default() }
    }

    /// Looks at a Service again. Whom to tell that it doesn't get its port, if that is news.
    pub(crate) fn note(
        &mut self,
        key: &ObjectKey,
        objects: &ServiceTable,
    ) -> Option<(ObjectKey, Problem)> {
        let wanted = objects.health_check_port(key).map(|port| {
            let uid = objects.uid(key);
            let check = Check { service: key.clone(), uid, local: objects.local_ready(key) };
            (port, objects.created(key), check)
        });
        let before = match wanted.clone() {
            Some(wanted) => self.services.insert(key.clone(), wanted),
            None => self.services.remove(key),
        };
        self.changed |= before != wanted;
        let claim = |(port, created, _): &(u16, i64, Check)| (*port, (*created, key.clone()));
        let (before, now) = (before.as_ref().map(claim), wanted.as_ref().map(claim));
        if before == now {
            return None;
        }
        if let Some((port, claim)) = before
            && let Some(claims) = self.claims.get_mut(&port)
        {
            claims.remove(&claim);
            if claims.is_empty() {
                self.claims.remove(&port);
            }
        }
        let (port, claim) = now?;
        let claims = self.claims.entry(port).or_default();
        let owner = claims.first().cloned();
        claims.insert(claim.clone());
        let (older, younger) = match owner? {
            owner if owner < claim => (owner.1, claim.1),
            owner => (claim.1, owner.1),
        };
        let message = format!("health check node port {port} is that of the older Service {older}");
        Some((younger, Problem::new("PortConflict", message)))
    }

    /// Takes in the node's addresses.
    pub(crate) fn set_node_addresses(&mut self, addresses: &[IpAddr]) {
        let addresses = addresses.iter().copied().collect();
        self.changed |= self.node_addresses != addresses;
        self.node_addresses = addresses;
    }

    /// Takes over the node's addresses from where they were noted first.
    pub(crate) fn take_node_addresses(&mut self, other: &mut Self) {
        self.node_addresses = std::mem::take(&mut other.node_addresses);
    }

    /// Looks again at ports that are among these node ports.
    pub(crate) fn touched(&mut self, units: &[Unit]) {
        self.changed |= !self.claims.is_empty()
            && units.iter().any(|unit| match unit {
                Unit::Frontend(frontend) => {
                    frontend.lane == Lane::NodePort
                        && frontend.protocol == Protocol::Tcp
                        && self.claims.contains_key(&frontend.port)
                }
                Unit::Address(..) | Unit::ServiceRanges(_) => false,
            });
    }

    /// Hands on what was noted. Whom to tell that its port is another Service's node port, if that
    /// is news.
    pub(crate) fn publish(&mut self, desired: &Desired) -> Vec<(ObjectKey, Problem)> {
        let Some(published) = self.published.as_ref().filter(|_| self.changed) else {
            return Vec::new();
        };
        let (mut by_port, mut taken) = (BTreeMap::new(), BTreeMap::new());
        for (port, claims) in &self.claims {
            let Some((_, owner)) = claims.first() else { continue };
            if let Some(other) = node_port_of(desired, *port).filter(|other| *other != owner) {
                taken.insert(*port, (owner.clone(), other.clone()));
            } else if let Some((.., check)) = self.services.get(owner) {
                by_port.insert(*port, check.clone());
            }
        }
        let node_addresses = self.node_addresses.clone();
        published.send_replace(Arc::new(Checks { by_port, node_addresses }));
        self.changed = false;
        let before = std::mem::replace(&mut self.taken, taken);
        let news = self.taken.iter().filter(|(port, taken)| before.get(port) != Some(*taken));
        news.map(|(port, (owner, other))| {
            let message =
                format!("health check node port {port} is a node port of the Service {other}");
            (owner.clone(), Problem::new("PortConflict", message))
        })
        .collect()
    }
}

/// Whose node port of TCP this is.
fn node_port_of(desired: &Desired, port: u16) -> Option<&ObjectKey> {
    [Family::V4, Family::V6].into_iter().find_map(|family| {
        let (lane, protocol) = (Lane::NodePort, Protocol::Tcp);
        desired.owner(&Frontend { family, lane, address: None, protocol, port })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::{Action, desired::ServiceRules};

    fn balanced(created: i64, port: u16) -> crate::model::services::Service {
        let object = serde_json::json!({
            "metadata": {"creationTimestamp": jiff::Timestamp::from_second(created).unwrap().to_string()},
            "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.1", "healthCheckNodePort": port,
                     "externalTrafficPolicy": "Local", "ports": [{"port": 80}]},
        });
        let object = serde_json::from_value(object).unwrap();
        crate::model::services::Service::read(&object).0.unwrap()
    }

    #[test]
    fn the_older_service_has_a_port_the_younger_is_told_once_and_takes_over() {
        let (old, new) = (ObjectKey::new("d", "z-old"), ObjectKey::new("d", "a-new"));
        for order in [[(&old, 1), (&new, 2)], [(&new, 2), (&old, 1)]] {
            let (published, mut checks) = watch::channel(Arc::default());
            let (mut health, mut objects) = (HealthChecks::new(published), ServiceTable::default());
            let mut told = Vec::new();
            for (key, created) in order {
                objects.set_service(key, Some(balanced(created, 30_100)));
                told.extend(health.note(key, &objects));
                assert_eq!(health.note(key, &objects), None, "it is no news");
            }
            let [(younger, problem)] = &told[..] else { panic!("{told:?}") };
            assert_eq!((younger, problem.reason), (&new, "PortConflict"));
            assert_eq!(
                problem.message,
                "health check node port 30100 is that of the older Service d/z-old"
            );
            let mut owner = |health: &mut HealthChecks| {
                assert_eq!(health.publish(&Desired::default()), []);
                checks.borrow_and_update().by_port.get(&30_100).map(|c| c.service.clone())
            };
            assert_eq!(owner(&mut health), Some(old.clone()));
            objects.set_service(&old, Some(balanced(1, 30_101)));
            assert_eq!(health.note(&old, &objects), None);
            assert_eq!(owner(&mut health), Some(new.clone()));
            for key in [&new, &old] {
                objects.set_service(key, None);
                health.note(key, &objects);
            }
            assert_eq!(owner(&mut health), None);
            assert!(health.claims.is_empty() && health.services.is_empty());
        }
    }

    #[test]
    fn a_port_that_is_another_services_node_port_is_not_opened_and_that_is_told() {
        let (own, other) = (ObjectKey::new("d", "checked"), ObjectKey::new("d", "other"));
        let node_port = |port| {
            let (lane, protocol, family) = (Lane::NodePort, Protocol::Tcp, Family::V6);
            Frontend { family, lane, address: None, protocol, port }
        };
        let rules = |port| ServiceRules {
            frontends: vec![(node_port(port), Action::Reject)],
            ..ServiceRules::default()
        };
        for first in [&own, &other] {
            let (published, mut checks) = watch::channel(Arc::default());
            let (mut health, mut objects) = (HealthChecks::new(published), ServiceTable::default());
            let mut desired = Desired::default();
            let mut told = Vec::new();
            for key in [first, if *first == own { &other } else { &own }] {
                if *key == own {
                    objects.set_service(key, Some(balanced(1, 30_100)));
                    assert_eq!(health.note(key, &objects), None);
                } else {
                    health.touched(&desired.replace(key, Some(rules(30_100))).dirty);
                }
                told.extend(health.publish(&desired));
            }
            let [(checked, problem)] = &told[..] else { panic!("{told:?}") };
            assert_eq!((checked, problem.reason), (&own, "PortConflict"));
            let message = "health check node port 30100 is a node port of the Service d/other";
            assert_eq!(problem.message, message);
            assert!(checks.borrow_and_update().by_port.is_empty());
            health.touched(&desired.replace(&other, Some(rules(30_101))).dirty);
            assert_eq!(health.publish(&desired), []);
            assert!(checks.borrow_and_update().by_port.contains_key(&30_100));
            // One of its own is no other's.
            health.touched(&desired.replace(&other, None).dirty);
            health.touched(&desired.replace(&own, Some(rules(30_100))).dirty);
            assert_eq!(health.publish(&desired), []);
            assert!(checks.borrow_and_update().by_port.contains_key(&30_100));
        }
    }
}
