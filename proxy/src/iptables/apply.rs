//! Writing: only what has changed, and each change whole.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use keelson_api::object::ObjectKey;

use super::{
    Settings,
    canary::Canary,
    chain::Table,
    cleanup,
    counters::Counters,
    held::{Delta, Held, Next, Present},
    observe,
    parts::is_nobodys,
    program::Programs,
    restore::Script,
    rule::Rule,
    service::{Look, Rendered},
};
use crate::{
    backend::{Applied, Backend, BackendError, Forget, Goal, TableRules},
    config::DetectLocal,
    model::{Family, Protocol},
    ruleset::{AddressSet, Unit, desired::Desired},
};

/// With more endpoints than this, rules that there are many of carry no comments.
pub(super) const COMMENTED_MAX: usize = 1_000;
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
        cleanup::remove(&self.programs)?;
        self.held().removed();
        Ok(())
    }
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
