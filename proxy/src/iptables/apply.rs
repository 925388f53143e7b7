//! Writing: only what has changed, and each change whole.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use keelson_api::object::ObjectKey;

use super::{
    Settings, Variant,
    base::{CHAINS, GUARD, LOCALNET_SET, guard},
    canary::Canary,
    chain::Table,
    counters::Counters,
    held::{Delta, Held, Jump, Next, Present},
    observe,
    parts::is_nobodys,
    program::{Programs, has_legacy_tables},
    restore::Script,
    rule::Rule,
    service::{Look, Rendered},
};
use crate::{
    backend::{Applied, Backend, BackendError, Forget, Goal, TableRules},
    config::DetectLocal,
    model::{Family, Protocol},
    nftables::look,
    ruleset::{AddressSet, Unit, desired::Desired},
};

/// With more endpoints than this, rules that there are many of carry no comments.
pub(super) const COMMENTED_MAX: usize = 1_000;
/// Lets node ports answer on loopback addresses.
const ROUTE_LOCALNET: &str = "net/ipv4/conf/all/route_localnet";
/// A chain for trying what the kernel takes; nothing ever goes through it.
pub(super) const PROBE: &str = "KUBE-PROXY-PROBE";

/// The proxy's rules in one family.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(super) settings: Settings,
    pub(super) programs: Arc<Programs>,
    held: Arc<Mutex<Held>>,
    pub(super) node: Vec<IpAddr>,
    commented: bool,
    random_fully: bool,
    /// A change that was refused has shown that others changed the rules; it isn't told yet.
    drifted: bool,
}

impl Rules {
    /// Finds the programs; nothing is read or written yet.
    ///
    /// # Errors
    /// When they are missing or too old, or a setting can't stand in a rule.
    pub(crate) fn open(settings: Settings) -> Result<Self, BackendError> {
        check(&settings)?;
        let programs = Arc::new(Programs::find(settings.family, settings.variant)?);
        tracing::info!(version = programs.version, "iptables found");
        Ok(Self {
            settings,
            programs,
            held: Arc::default(),
            node: Vec::new(),
            commented: true,
            random_fully: true,
            drifted: false,
        })
    }

    /// Has the kernel take every kind of rule, in a chain that nothing goes through. Where it has
    /// taken them before, nothing is written.
    ///
    /// # Errors
    /// When it lacks something, with the rule that needs it.
    pub(crate) fn probe(&mut self) -> Result<(), BackendError> {
        let nat = self.programs.save(Table::Nat)?;
        if let Some(masquerade) = masquerade(&nat) {
            self.random_fully = masquerade.ends_with("--random-fully");
            return Ok(());
        }
        if let Err(error) = self.programs.restore(probe_input(self.settings.family, true)) {
            self.programs.restore(probe_input(self.settings.family, false))?;
            tracing::warn!(%error, "masqueraded connections won't get random ports");
            self.random_fully = false;
        }
        self.programs.restore(format!("*nat\n:{PROBE} - [0:0]\n-X {PROBE}\nCOMMIT\n"))
    }

    /// What notices when another program changes these rules.
    pub(crate) fn canary(&self) -> Canary {
        Canary::new(Arc::clone(&self.programs), Arc::clone(&self.held))
    }

    /// What reads how many packets met the rules that count them.
    pub(crate) fn counters(&self) -> Counters {
        Counters::new(Arc::clone(&self.programs))
    }

    pub(super) fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn observe(&self) -> Result<(), BackendError> {
        let present = read(&self.programs)?;
        self.held().observed(present);
        Ok(())
    }

    fn look(&self) -> Look<'_> {
        Look { settings: &self.settings, node: &self.node, commented: self.commented }
    }

    /// Brings these Services in line; `whole`, if all that they share is to be looked at too.
    pub(super) fn commit(
        &mut self,
        keys: &BTreeSet<ObjectKey>,
        whole: Whole,
        goal: Goal<'_>,
        applied: &mut Applied,
    ) -> Result<(), Refusal> {
        let mut services = self.render(keys.iter().cloned(), goal);
        let commented = self.held().endpoints_after(&services) <= COMMENTED_MAX;
        let mut whole = whole;
        if commented != self.commented {
            // All others change too.
            self.commented = commented;
            let mut keys = keys.clone();
            keys.extend(self.held().services().cloned());
            services = self.render(keys.into_iter(), goal);
            if whole == Whole::No {
                whole = Whole::Base;
            }
        }
        let base = (whole != Whole::No).then(|| self.settings.base(&self.node, self.random_fully));
        let sweep = matches!(whole, Whole::Swept | Whole::Emptied);
        let next = Next { base, services, sweep };
        let mut held = self.held();
        let mut delta = held.plan(&next);
        delta.emptied = whole == Whole::Emptied;
        let script = Script::of(&delta);
        let input = script.text();
        if !input.is_empty() {
            held.version += 1;
            if let Err(error) = self.programs.restore(input) {
                return Err(Refusal { error, change: Box::new(delta) });
            }
        }
        applied.elements += script.rules();
        held.enter(next, delta);
        for table in [Table::Filter, Table::Nat] {
            applied.count(table, held.present.rules(table), script.written(table));
        }
        Ok(())
    }

    fn render(
        &self,
        keys: impl Iterator<Item = ObjectKey>,
        goal: Goal<'_>,
    ) -> Vec<(ObjectKey, Option<Rendered>)> {
        let look = self.look();
        keys.map(|key| {
            let rendered = Rendered::of(&key, goal.objects, goal.desired, look);
            let empty = rendered == Rendered::default();
            (key, (!empty).then_some(rendered))
        })
        .collect()
    }

    /// Has node ports answer on loopback, if that is wanted: what needs more rights than writing
    /// rules does.
    ///
    /// # Errors
    /// When the guard can't be written, without which it would be dangerous.
    pub(crate) fn open_loopback(&self) -> Result<(), BackendError> {
        if !self.settings.node_ports_on_loopback() {
            return Ok(());
        }
        let mut present = read(&self.programs)?;
        let mut delta = Delta::default();
        for guest in guard().into_iter().filter(|guest| !present.guests.contains(guest)) {
            let at = (guest.table, guest.chain);
            if guest.chain == GUARD && present.guest_chains.insert(at) {
                delta.guest_chains.push(at);
            }
            delta.guests.push(guest);
        }
        // The chain before those who jump there.
        delta.guests.sort_by_key(|guest| guest.chain != GUARD);
        let input = Script::of(&delta).text();
        if !input.is_empty() {
            self.programs.restore(input)?;
        }
        self.route_localnet();
        Ok(())
    }

    /// After the rules that guard against its misuse are in force, and never without them.
    pub(super) fn route_localnet(&self) {
        if !self.settings.node_ports_on_loopback() {
            return;
        }
        let closed = self.programs.setting(ROUTE_LOCALNET).is_ok_and(|value| value == "0");
        if let Err(error) = self.programs.set(ROUTE_LOCALNET, "1") {
            tracing::warn!(
                %error, setting = ROUTE_LOCALNET,
                "node ports won't answer on loopback addresses; set it, or localhostNodePorts to false"
            );
            return;
        }
        let mut held = self.held();
        held.note |= closed;
        if held.note && !held.present.noted {
            match self.programs.restore(format!("*filter\n:{LOCALNET_SET} - [0:0]\nCOMMIT\n")) {
                Ok(()) => held.present.noted = true,
                Err(error) => tracing::warn!(
                    %error, setting = ROUTE_LOCALNET,
                    "no note of who set it: another mode will leave it set, and guarded"
                ),
            }
        }
    }
}

impl Applied {
    fn count(&mut self, table: Table, rules: usize, written: usize) {
        let table = table.as_str();
        match self.tables.iter_mut().find(|counted| counted.table == table) {
            Some(counted) => {
                counted.rules = rules;
                counted.written += written;
            }
            None => self.tables.push(TableRules { table, rules, written }),
        }
    }
}

/// A change that iptables refused.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) error: BackendError,
    pub(super) change: Box<Delta>,
}

/// How much is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whole {
    /// Some Services.
    No,
    /// What all share too.
    Base,
    /// Everything, and what else is there goes.
    Swept,
    /// Everything; chains that nobody needs stay, but empty.
    Emptied,
}

impl Backend for Rules {
    fn family(&self) -> Family {
        self.settings.family
    }

    fn synchronize(&mut self, goal: Goal<'_>) -> Result<Applied, BackendError> {
        self.observe()?;
        let applied = self.bring_all_in_line(goal)?;
        Ok(Applied { drifted: std::mem::take(&mut self.drifted), ..applied })
    }

    fn apply(&mut self, units: &[Unit], goal: Goal<'_>) -> Result<Applied, BackendError> {
        let mut keys: BTreeSet<ObjectKey> = BTreeSet::new();
        let mut whole = Whole::No;
        for unit in units.iter().filter(|unit| unit.family() == self.settings.family) {
            match unit {
                Unit::Frontend(frontend) => {
                    keys.extend(goal.desired.owner(frontend).cloned());
                    keys.extend(self.held().owner(frontend).cloned());
                }
                Unit::Address(AddressSet::NodeAddresses, _) => whole = Whole::Base,
                // Endpoints masquerade themselves, and unused ports are nobody's.
                Unit::Address(AddressSet::ClusterAddresses | AddressSet::Hairpin, _)
                | Unit::ServiceRanges(_) => {}
            }
        }
        if whole == Whole::Base {
            self.node = node_addresses(goal.desired, self.settings.family);
            keys.extend(self.held().services().cloned());
        }
        if keys.is_empty() && whole == Whole::No {
            return Ok(Applied::default());
        }
        if self.held().version == 0 {
            return self.synchronize(goal);
        }
        let mut applied = Applied::default();
        match self.commit(&keys, whole, goal, &mut applied) {
            Ok(()) => Ok(applied),
            Err(Refusal { error, .. }) if is_nobodys(&error) => Err(error),
            // Somebody may have edited the rules: look before blaming a Service.
            Err(Refusal { error, change }) => {
                tracing::warn!(%error, "iptables refused a change; reading back what is there");
                let present = read(&self.programs)?;
                let expected = self.held().present.may_become(&change, &present);
                self.drifted |= !expected;
                self.held().observed(present);
                let applied = self.bring_all_in_line(goal)?;
                Ok(Applied { drifted: std::mem::take(&mut self.drifted), ..applied })
            }
        }
    }

    /// A list of recent clients goes with the rules of its endpoint.
    fn forget(&mut self, _forget: &[Forget]) -> Result<(), BackendError> {
        Ok(())
    }

    fn units(&self) -> usize {
        self.held().units()
    }

    fn endpoints_max(&self) -> usize {
        super::ENDPOINTS_MAX
    }

    fn remove(&mut self) -> Result<(), BackendError> {
        remove(&self.programs)?;
        self.held().removed();
        Ok(())
    }
}

/// Removes the chains and rules of any proxy, ours and kube-proxy's, that either variant of
/// iptables has; it is no error if there are none, or no iptables. Where there surely are none,
/// nothing is run.
///
/// # Errors
/// When they can't be removed.
pub(crate) fn cleanup(family: Family) -> Result<(), BackendError> {
    // Chains of the old tables are seen only by asking iptables itself. Where the kernel doesn't
    // say, that is asked too.
    let nft = look::has_chain(family, |chain| chain.starts_with("KUBE-")).unwrap_or(true);
    if !nft && !has_legacy_tables(family) {
        return Ok(());
    }
    let mut found = Vec::new();
    for variant in [Variant::Nft, Variant::Legacy] {
        match Programs::find(family, variant) {
            Ok(programs) => found.push(programs),
            Err(error) => tracing::debug!(%error, "no rules of this iptables are removed"),
        }
    }
    if found.is_empty() {
        // A host that has but one calls it nothing else.
        found.extend(Programs::find(family, Variant::Host));
    }
    found.iter().try_for_each(close_loopback)?;
    found.iter().try_for_each(remove)
}

/// Sets `route_localnet` back if the iptables mode has set it, while its guard is still there.
fn close_loopback(programs: &Programs) -> Result<(), BackendError> {
    let mut present = Present::default();
    observe::read(Table::Filter, &programs.save(Table::Filter)?, &mut present);
    if !present.noted {
        return Ok(());
    }
    match programs.set(ROUTE_LOCALNET, "0") {
        Ok(()) => tracing::info!(setting = ROUTE_LOCALNET, "set back to 0, as it was"),
        Err(error) => tracing::warn!(%error, setting = ROUTE_LOCALNET, "it can't be set back"),
    }
    Ok(())
}

/// Removes the chains and rules of any proxy that the variant has which is not the host's: one
/// that ran with it would go on translating. Where there surely are none, or it isn't installed,
/// nothing is run.
///
/// # Errors
/// As [`cleanup`].
pub(crate) fn cleanup_other_variant(family: Family) -> Result<(), BackendError> {
    let other = match Programs::find(family, Variant::Host)?.legacy {
        true => Variant::Nft,
        false => Variant::Legacy,
    };
    let some = match other {
        Variant::Legacy => has_legacy_tables(family),
        _ => look::has_chain(family, |chain| chain.starts_with("KUBE-")).unwrap_or(true),
    };
    if !some {
        return Ok(());
    }
    match Programs::find(family, other) {
        Ok(programs) => remove(&programs),
        Err(error) => {
            tracing::debug!(%error, "no rules of the other iptables are removed");
            Ok(())
        }
    }
}

fn remove(programs: &Programs) -> Result<(), BackendError> {
    let present = read(programs)?;
    let mut delta = Delta { outdated: present.outdated, ..Delta::default() };
    // The guard stays while there is something to guard: whoever else needs that setting would be
    // open to the neighbours without it.
    let guarded = programs.setting(ROUTE_LOCALNET).is_ok_and(|value| value == "1");
    if guarded && !present.guest_chains.is_empty() {
        tracing::info!(
            "{GUARD} stays, since {ROUTE_LOCALNET} is 1: without it neighbours could reach loopback \
             addresses. It is not looked after from now on"
        );
    }
    let goes = |jump: &Jump| !(guarded && jump.rule.ends_with(GUARD));
    delta.farewells = present.jumps.into_iter().filter(goes).collect();
    delta.gone = present.own.into_keys().collect();
    delta.gone.sort_unstable();
    delta.unchained = CHAINS.into_iter().filter(|at| present.base.contains_key(at)).collect();
    let places = present.places.keys().map(|place| (place.table(), place.name()));
    delta.unchained.extend(places);
    delta.unchained.extend(present.of_ipvs);
    if !guarded {
        delta.unchained.extend(present.guest_chains);
        if present.noted {
            delta.unchained.push((Table::Filter, LOCALNET_SET));
        }
    }
    let input = Script::of(&delta).text();
    if input.is_empty() {
        return Ok(());
    }
    programs.restore(input)?;
    tracing::info!(iptables = programs.version, "rules of a proxy are removed");
    Ok(())
}

/// Everything that the kernel holds.
pub(crate) fn read(programs: &Programs) -> Result<Present, BackendError> {
    let mut present = Present::default();
    for table in Table::ALL {
        observe::read(table, &programs.save(table)?, &mut present);
    }
    Ok(present)
}

pub(super) fn node_addresses(desired: &Desired, family: Family) -> Vec<IpAddr> {
    let mut node: Vec<IpAddr> = desired
        .units()
        .filter_map(|unit| match unit {
            Unit::Address(AddressSet::NodeAddresses, address) => Some(address),
            _ => None,
        })
        .filter(|address| Family::of(*address) == family)
        .collect();
    node.sort_unstable();
    node
}

/// Interfaces' names are the only text of the configuration that gets into rules.
fn check(settings: &Settings) -> Result<(), BackendError> {
    let name = match &settings.detect_local {
        DetectLocal::Interface(name) | DetectLocal::InterfacePrefix(name) => name,
        _ => return Ok(()),
    };
    let valid = (1..=15).contains(&name.len())
        && name
            .chars()
            .all(|c| c.is_ascii_graphic() && !matches!(c, '/' | '"' | '\'' | '\\' | '+'));
    if valid {
        return Ok(());
    }
    Err(BackendError::Program {
        program: "iptables".to_owned(),
        message: format!("{name:?} is not the name of an interface"),
    })
}

/// The rule of an earlier start that hides addresses, in what `iptables-save` prints.
fn masquerade(nat: &str) -> Option<&str> {
    nat.lines()
        .find(|line| line.starts_with("-A KUBE-POSTROUTING ") && line.contains("-j MASQUERADE"))
}

fn probe_input(family: Family, random_fully: bool) -> String {
    let address = match family {
        Family::V4 => "192.0.2.1:80",
        Family::V6 => "[2001:db8::1]:80",
    };
    let masquerade = if random_fully { "MASQUERADE --random-fully" } else { "MASQUERADE" };
    let tcp = || Rule::new().protocol(Protocol::Tcp).comment("probe/probe");
    let rules = [
        tcp().words("-m addrtype --dst-type LOCAL").port(Protocol::Tcp, 80).jump("RETURN"),
        tcp().one_of(3).jump("RETURN"),
        Rule::new().words("-m conntrack --ctstate NEW").jump("RETURN"),
        Rule::new().words("-m mark --mark 0x1/0x1").jump("MARK --set-xmark 0x1/0x1"),
        tcp().words("-m tcp").jump(format_args!("DNAT --to-destination {address}")),
        Rule::new().jump(masquerade),
    ];
    let mut input = format!("*nat\n:{PROBE} - [0:0]\n");
    for rule in rules {
        input.push_str(&format!("-A {PROBE} {rule}\n"));
    }
    input.push_str("COMMIT\n");
    input
}
