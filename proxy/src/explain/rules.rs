//! The rules that a packet passes, by their names in the mode's own terms.

use keelson_api::object::ObjectKey;

use super::policy;
use crate::{
    config::Mode,
    iptables::chain::{Kind, OwnChain, PortName},
    model::{services::TrafficPolicy, table::PortPlan},
    nftables::{
        layout::{self, PickChain},
        sources::{Sources, SourcesId},
    },
    ruleset::{Action, Frontend},
    snapshot::Snapshot,
};

impl Snapshot {
    /// From the first to the last; who is not `admitted` gets only as far as the source ranges.
    pub(super) fn passes(
        &self,
        frontend: &Frontend,
        action: &Action,
        owner: &ObjectKey,
        plan: &PortPlan<'_>,
        admitted: bool,
    ) -> Vec<String> {
        let key = match frontend.address {
            Some(address) => format!("{address} . {} . {}", frontend.protocol, frontend.port),
            None => format!("{} . {}", frontend.protocol, frontend.port),
        };
        match self.config.mode {
            Mode::Nftables => {
                let sources = Sources::of(frontend, &self.desired).map(|sources| sources.id());
                nftables_rules(frontend, action, &key.to_lowercase(), sources, admitted)
            }
            Mode::Iptables => iptables_rules(frontend, action, owner, plan, admitted),
            Mode::Userspace => match action {
                Action::Forward { .. } if admitted => vec![format!("listener at {key}")],
                _ if !admitted => vec![format!("listener at {key}, which closes the connection")],
                _ => vec!["no listener: the kernel itself rejects".into()],
            },
        }
    }
}

fn nftables_rules(
    frontend: &Frontend,
    action: &Action,
    key: &str,
    sources: Option<SourcesId>,
    admitted: bool,
) -> Vec<String> {
    let maps = layout::lane_maps(frontend.lane);
    match action {
        Action::Forward { endpoints, masquerade, affinity, .. } => {
            let chain = PickChain {
                lane: frontend.lane,
                masquerade: *masquerade,
                sticky: affinity.is_some(),
                count: u32::try_from(endpoints.len()).unwrap_or(u32::MAX),
            };
            let mut rules = Vec::new();
            if let Some(sources) = sources.map(SourcesId::name) {
                rules.push(format!("map {}: {key} → goto {sources}", layout::FIREWALL));
                if !admitted {
                    rules.push(format!("chain {sources}: drops who isn't in the set {sources}"));
                    return rules;
                }
            }
            rules.push(format!("map {}: {key} → goto {}", maps.verdicts, chain.name()));
            if affinity.is_some() {
                rules.push(format!("map {}: the endpoint of this client before", layout::AFFINITY));
            }
            rules.push(format!("map {}: {key} . random → endpoint", maps.endpoints));
            rules
        }
        Action::Drop => vec![format!("map {}: {key} → drop", maps.verdicts)],
        Action::Reject | Action::Nothing => maps
            .rejects
            .map(|map| format!("map {map}: {key} → goto {}", layout::REJECT))
            .into_iter()
            .collect(),
    }
}

fn iptables_rules(
    frontend: &Frontend,
    action: &Action,
    owner: &ObjectKey,
    plan: &PortPlan<'_>,
    admitted: bool,
) -> Vec<String> {
    let name = PortName {
        namespace: owner.namespace(),
        service: owner.name(),
        port: &plan.port.name,
        protocol: plan.port.protocol,
    };
    let chain = |kind| format!("nat: chain {}", OwnChain::of_port(kind, name));
    let first = match frontend.address {
        Some(_) => "KUBE-SERVICES",
        None => "KUBE-NODEPORTS",
    };
    let Action::Forward { endpoints, sources, .. } = action else {
        let first = if frontend.address == Some(plan.cluster_ip) {
            "KUBE-SERVICES"
        } else {
            "KUBE-EXTERNAL-SERVICES"
        };
        return vec![format!("filter: chain {first}, the rule with \"{name}\"")];
    };
    let local = policy(frontend, plan) == TrafficPolicy::Local;
    let mut rules = vec![format!("nat: chain {first}, the rule with \"{name}\"")];
    if sources.is_some() {
        rules.push(chain(Kind::Firewall));
    }
    if !admitted {
        rules.push(format!("filter: chain KUBE-PROXY-FIREWALL, the rule with \"{name}\""));
        return rules;
    }
    if frontend.address != Some(plan.cluster_ip) {
        rules.push(chain(Kind::External));
    }
    rules.push(chain(if local { Kind::Local } else { Kind::Cluster }));
    let one = endpoints.iter().map(|e| OwnChain::of_endpoint(name, *e).to_string());
    rules.push(format!("nat: one of {}", one.collect::<Vec<_>>().join(", ")));
    rules
}
