//! The chains and lines of one Service, as a pure function.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use keelson_api::object::ObjectKey;

use super::{
    Settings,
    base::{FromPods, MARK, MARK_OUTSIDE},
    chain::{Kind, OwnChain, Place, PortName, protocol_name},
    rule::{Rule, host, recent_mask, reject},
};
use crate::{
    model::{
        Endpoint,
        services::TrafficPolicy,
        table::{PortPlan, ServiceTable},
    },
    ruleset::{Action, Frontend, Lane, desired::Desired},
};

/// What a rendering depends on besides the Service.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look<'a> {
    pub(crate) settings: &'a Settings,
    /// The node's addresses.
    pub(crate) node: &'a [IpAddr],
    /// Whether rules that there are many of say what they are for.
    pub(crate) commented: bool,
}

/// One Service, in one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rendered {
    /// Chains of its own, in the nat table.
    pub(crate) chains: BTreeMap<OwnChain, Vec<Arc<str>>>,
    /// Its lines in chains that it shares.
    pub(crate) lines: BTreeSet<(Place, Arc<str>)>,
    /// What clients can connect to.
    pub(crate) frontends: BTreeSet<Frontend>,
}

impl Rendered {
    /// All chains and lines of a Service.
    pub(crate) fn of(
        key: &ObjectKey,
        objects: &ServiceTable,
        desired: &Desired,
        look: Look<'_>,
    ) -> Self {
        let mut rendered = Self::default();
        let families = [look.settings.family];
        let Some((plans, _)) = objects.ports(key, &families) else { return rendered };
        for plan in &plans {
            let name = PortName {
                namespace: key.namespace(),
                service: key.name(),
                port: &plan.port.name,
                protocol: plan.port.protocol,
            };
            PortRenderer { key, name, plan, desired, look, out: &mut rendered }.render();
        }
        let health_check =
            plans.first().and_then(|plan| plan.service.outside().health_check_node_port);
        // One that another Service has taken everything from has nothing to be asked about; and no
        // change of it would be heard of.
        if let Some(port) = health_check.filter(|_| !rendered.frontends.is_empty()) {
            let rule = Rule::new()
                .words("-p tcp")
                .comment(format_args!("{key} health check node port"))
                .words(format_args!("-m tcp --dport {port}"));
            rendered.lines.insert((Place::HealthChecks, rule.jump("ACCEPT")));
        }
        rendered
    }

    /// How many endpoints have chains.
    pub(crate) fn endpoints(&self) -> usize {
        self.chains.keys().filter(|chain| chain.kind() == Kind::Endpoint).count()
    }
}

struct PortRenderer<'a> {
    key: &'a ObjectKey,
    name: PortName<'a>,
    plan: &'a PortPlan<'a>,
    desired: &'a Desired,
    look: Look<'a>,
    out: &'a mut Rendered,
}

/// What an address or port for the outside does, from outside and from inside.
struct External<'a> {
    outside: Option<&'a Action>,
    inside: Option<&'a Action>,
}

impl External<'_> {
    fn forwards(&self) -> bool {
        [self.outside, self.inside].iter().any(|a| matches!(a, Some(Action::Forward { .. })))
    }

    fn sources(&self) -> Option<Arc<[IpNet]>> {
        [self.outside, self.inside].into_iter().find_map(|action| match action {
            Some(Action::Forward { sources, .. }) => sources.clone(),
            _ => None,
        })
    }
}

impl<'a> PortRenderer<'a> {
    fn render(&mut self) {
        self.cluster_address();
        let mut external = Vec::new();
        let balanced: Vec<IpAddr> = self.plan.load_balancer_ips().collect();
        for address in &balanced {
            external.extend(self.external_address(*address, "loadbalancer IP"));
        }
        for address in self.plan.external_ips().filter(|a| !balanced.contains(a)) {
            external.extend(self.external_address(address, "external IP"));
        }
        external.extend(self.node_port());
        let outside = external.iter().any(|e| matches!(e.outside, Some(Action::Forward { .. })));
        let inside = external.iter().any(|e| matches!(e.inside, Some(Action::Forward { .. })));
        if outside || inside {
            self.external_chain(outside, inside);
        }
    }

    /// What this Service has of a frontend; nothing if another one has it.
    fn action(&mut self, lane: Lane, address: Option<IpAddr>, port: u16) -> Option<&'a Action> {
        let frontend = Frontend {
            family: self.plan.family,
            lane,
            address,
            protocol: self.plan.port.protocol,
            port,
        };
        if self.desired.owner(&frontend) != Some(self.key) {
            return None;
        }
        self.out.frontends.insert(frontend);
        self.desired.action(&frontend)
    }

    fn line(&mut self, place: Place, line: Arc<str>) {
        self.out.lines.insert((place, line));
    }

    /// A rule for what is sent to an address at the Service's port.
    fn to(&self, address: IpAddr, comment: &str) -> Rule {
        let (name, protocol) = (self.name, self.plan.port.protocol);
        Rule::new()
            .destination(host(address))
            .protocol(protocol)
            .comment(format_args!("{name} {comment}"))
            .port(protocol, self.plan.port.port)
    }

    fn cluster_address(&mut self) {
        let (address, port) = (self.plan.cluster_ip, self.plan.port.port);
        match self.action(Lane::Address, Some(address), port) {
            Some(Action::Forward { .. }) => {
                let chain = self.picking(self.plan.service.internal_policy);
                let line = self.to(address, "cluster IP").jump(chain);
                self.line(Place::Services, line);
                if let Some(mark) = self.mark_outside() {
                    self.out.chains.entry(chain).or_default().insert(0, mark);
                }
            }
            action => {
                let refusal = self.refusal(action, self.to(address, refusal_reason(action)));
                self.out.lines.extend(refusal.map(|line| (Place::RejectedServices, line)));
            }
        }
    }

    fn refusal(&self, action: Option<&Action>, rule: Rule) -> Option<Arc<str>> {
        match action? {
            Action::Drop => Some(rule.jump("DROP")),
            Action::Reject => Some(rule.jump(reject(self.plan.family, self.plan.port.protocol))),
            Action::Forward { .. } | Action::Nothing => None,
        }
    }

    /// Marks clients of the cluster address that aren't pods.
    fn mark_outside(&self) -> Option<Arc<str>> {
        let settings = self.look.settings;
        let pods = settings.pods_are_from();
        let everybody = |pods: &FromPods| match pods {
            FromPods::Source(range) => range.prefix_len() == 0,
            FromPods::Interface(_) => false,
        };
        let (mut rule, mut target) = (Rule::new(), MARK);
        let mut interface = None;
        if !settings.masquerade_all {
            match &pods[..] {
                // Nobody is known to be outside, or nobody is.
                [] => return None,
                pods if pods.iter().any(everybody) => return None,
                [FromPods::Source(range)] => rule = rule.words(format_args!("! -s {range}")),
                [FromPods::Interface(name)] => interface = Some(name),
                _ => target = MARK_OUTSIDE,
            }
        }
        rule = rule.destination(host(self.plan.cluster_ip));
        if let Some(name) = interface {
            rule = rule.words(format_args!("! -i {name}"));
        }
        let protocol = self.plan.port.protocol;
        let rule = rule
            .protocol(protocol)
            .comment_if(self.look.commented, format_args!("{} cluster IP", self.name))
            .port(protocol, self.plan.port.port);
        Some(rule.jump(target))
    }

    fn external_address(&mut self, address: IpAddr, what: &str) -> Option<External<'a>> {
        if address == self.plan.cluster_ip {
            return None;
        }
        let port = self.plan.port.port;
        let external = External {
            outside: self.action(Lane::Address, Some(address), port),
            inside: self.action(Lane::AddressInside, Some(address), port),
        };
        if external.forwards() {
            let chain = match external.sources() {
                Some(sources) => self.firewall(address, &sources),
                None => OwnChain::of_port(Kind::External, self.name),
            };
            let line = self.to(address, what).jump(chain);
            self.line(Place::Services, line);
        }
        let rule = self.to(address, refusal_reason(external.outside));
        let refusal = self.refusal(external.outside, rule);
        self.out.lines.extend(refusal.map(|line| (Place::RejectedExternal, line)));
        Some(external)
    }

    /// The chain that lets clients from these ranges through. Whoever it leaves is dropped in the
    /// filter table.
    fn firewall(&mut self, address: IpAddr, sources: &[IpNet]) -> OwnChain {
        let (name, commented) = (self.name, self.look.commented);
        let chain = OwnChain::of_port(Kind::Firewall, name);
        let external = OwnChain::of_port(Kind::External, name);
        let of_range = |range: IpNet| {
            Rule::new()
                .source(range)
                .comment_if(commented, format_args!("{name} loadbalancer IP"))
                .jump(external)
        };
        let rules = self
            .out
            .chains
            .entry(chain)
            .or_insert_with(|| sources.iter().map(|range| of_range(*range)).collect());
        // A node that has the load balancer's address as one of its own uses it as its source too.
        if self.look.node.iter().any(|node| sources.iter().any(|range| range.contains(node))) {
            rules.push(of_range(host(address)));
        }
        let line = self.to(address, &format!("traffic not accepted by {chain}")).jump("DROP");
        self.line(Place::Firewall, line);
        chain
    }

    fn node_port(&mut self) -> Option<External<'a>> {
        let port = self.plan.port.node_port?;
        let external = External {
            outside: self.action(Lane::NodePort, None, port),
            inside: self.action(Lane::NodePortInside, None, port),
        };
        let (name, protocol) = (self.name, self.plan.port.protocol);
        if external.forwards() {
            let rule = Rule::new().protocol(protocol).comment(name).port(protocol, port);
            let line = rule.jump(OwnChain::of_port(Kind::External, name));
            self.line(Place::NodePorts, line);
        }
        let rule = Rule::new()
            .protocol(protocol)
            .comment(format_args!("{name} {}", refusal_reason(external.outside)))
            .words("-m addrtype --dst-type LOCAL")
            .port(protocol, port);
        let refusal = self.refusal(external.outside, rule);
        self.out.lines.extend(refusal.map(|line| (Place::RejectedExternal, line)));
        Some(external)
    }

    /// Where traffic to addresses for the outside and node ports goes.
    fn external_chain(&mut self, outside: bool, inside: bool) {
        let (name, commented) = (self.name, self.look.commented);
        let comment = |rule: Rule, what: &str| {
            rule.comment_if(commented, format_args!("{what} {name} external destinations"))
        };
        let mut rules = Vec::new();
        if self.plan.service.external_policy == TrafficPolicy::Cluster {
            rules.push(comment(Rule::new(), "masquerade traffic for").jump(MARK));
            rules.push(Rule::new().jump(self.picking(TrafficPolicy::Cluster)));
        } else {
            if inside {
                let cluster = self.picking(TrafficPolicy::Cluster);
                for pods in self.look.settings.pods_are_from() {
                    let rule = match pods {
                        FromPods::Source(range) => Rule::new().source(range),
                        FromPods::Interface(name) => Rule::new().words(format_args!("-i {name}")),
                    };
                    rules.push(comment(rule, "pod traffic for").jump(cluster));
                }
                let own =
                    |what: &str| comment(Rule::new(), what).words("-m addrtype --src-type LOCAL");
                rules.push(own("masquerade LOCAL traffic for").jump(MARK));
                rules.push(own("route LOCAL traffic for").jump(cluster));
            }
            if outside {
                rules.push(Rule::new().jump(self.picking(TrafficPolicy::Local)));
            }
        }
        self.out.chains.insert(OwnChain::of_port(Kind::External, name), rules);
    }

    /// The chain that picks one of the endpoints that this policy admits.
    fn picking(&mut self, policy: TrafficPolicy) -> OwnChain {
        let (kind, endpoints) = match policy {
            TrafficPolicy::Cluster => (Kind::Cluster, &self.plan.eligible.cluster),
            TrafficPolicy::Local => (Kind::Local, &self.plan.eligible.local),
        };
        let chain = OwnChain::of_port(kind, self.name);
        if self.out.chains.contains_key(&chain) {
            return chain;
        }
        let (name, commented) = (self.name, self.look.commented);
        let affinity = self.plan.service.affinity;
        let to = |endpoint: &Endpoint| {
            let target = OwnChain::of_endpoint(name, *endpoint);
            (Rule::new().comment_if(commented, format_args!("{name} -> {endpoint}")), target)
        };
        let mut rules = Vec::new();
        if let Some(timeout) = affinity {
            let mask = recent_mask(self.plan.family);
            rules.extend(endpoints.iter().map(|endpoint| {
                let (rule, target) = to(endpoint);
                rule.words(format_args!(
                    "-m recent --rcheck --seconds {} --reap --name {target} {mask}",
                    timeout.as_secs()
                ))
                .jump(target)
            }));
        }
        for (n, endpoint) in endpoints.iter().enumerate() {
            let (rule, target) = to(endpoint);
            let left = endpoints.len() - n;
            let rule = if left > 1 { rule.one_of(left) } else { rule };
            rules.push(rule.jump(target));
        }
        self.out.chains.insert(chain, rules);
        for endpoint in endpoints {
            self.endpoint_chain(*endpoint);
        }
        chain
    }

    fn endpoint_chain(&mut self, endpoint: Endpoint) {
        let (name, commented) = (self.name, self.look.commented);
        let chain = OwnChain::of_endpoint(name, endpoint);
        let protocol = self.plan.port.protocol;
        // An endpoint that is its own client would see its own address, and answer itself.
        let hairpin =
            Rule::new().source(host(endpoint.address)).comment_if(commented, name).jump(MARK);
        let mut rule = Rule::new().protocol(protocol).comment_if(commented, name);
        if self.plan.service.affinity.is_some() {
            let mask = recent_mask(self.plan.family);
            rule = rule.words(format_args!("-m recent --set --name {chain} {mask}"));
        }
        let translate = rule
            .words(format_args!("-m {}", protocol_name(protocol)))
            .jump(format_args!("DNAT --to-destination {endpoint}"));
        self.out.chains.insert(chain, vec![hairpin, translate]);
    }
}

fn refusal_reason(action: Option<&Action>) -> &'static str {
    match action {
        Some(Action::Drop) => "has no local endpoints",
        _ => "has no endpoints",
    }
}
