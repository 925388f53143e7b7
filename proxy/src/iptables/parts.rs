//! Bringing everything in line, in parts where iptables refuses it as a whole.
//!
//! Whose fault a refusal is decides what becomes of it. Where iptables writes nothing at all, or has
//! no room for anything, no Service is to blame: everything waits, and the family counts as failed.
//! Otherwise the Services that are refused by themselves are found by halves; each keeps its old
//! rules, and all that nobody needs any more goes nevertheless.

use std::collections::{BTreeSet, HashMap};

use keelson_api::object::ObjectKey;

use super::{
    Rules,
    apply::{PROBE, Refusal, Whole, node_addresses},
    chain::{OwnChain, Table},
};
use crate::{
    backend::{Applied, BackendError, Goal},
    model::Family,
    ruleset::{Frontend, Unit, desired::Desired},
};

/// So many Services that there is no room for, and none that there is: no room for any.
const ROOMLESS: usize = 64;
/// What iptables says where others hold its lock for too long; its status says the same of rules
/// that the kernel refuses.
const LOCKED: &str = "xtables lock";
/// What it says where the kernel has no room or no time, in the C library's words and in its own.
const SHORTAGES: [&str; 7] = [
    "Cannot allocate memory",
    "Memory allocation problem",
    "No space left on device",
    "No buffer space available",
    "Resource temporarily unavailable",
    "Device or resource busy",
    "Too many open files",
];

/// What came of writing in parts.
#[derive(Default)]
struct Parts {
    /// Services that were refused by themselves, and why.
    refused: Vec<(ObjectKey, BackendError)>,
    /// Whether any Service had something written.
    wrote: bool,
}

impl Parts {
    /// Whether there was no room for any Service; one alone may need too much.
    fn had_no_room(&self) -> bool {
        let shortage = |error: &BackendError| {
            let message = error.to_string();
            SHORTAGES.iter().any(|shortage| message.contains(shortage))
        };
        !self.wrote && self.refused.len() > 1 && self.refused.iter().all(|(_, e)| shortage(e))
    }
}

impl Rules {
    /// Brings everything in line; what there is was read just now.
    pub(super) fn bring_all_in_line(&mut self, goal: Goal<'_>) -> Result<Applied, BackendError> {
        let mut applied = Applied::default();
        self.node = node_addresses(goal.desired, self.settings.family);
        self.leave_loopback()?;
        if self.held().present.is_empty() {
            applied.rebuilt = Some("there were no rules".to_owned());
        }
        let keys: BTreeSet<ObjectKey> = goal.objects.keys().cloned().collect();
        match self.commit(&keys, Whole::Swept, goal, &mut applied) {
            Ok(()) => {}
            Err(Refusal { error, .. }) if is_nobodys(&error) => return Err(error),
            Err(Refusal { error, .. }) => self.write_parts(error, keys, goal, &mut applied)?,
        }
        self.route_localnet();
        Ok(applied)
    }

    /// Writes what can be written of what was refused as a whole.
    fn write_parts(
        &mut self,
        error: BackendError,
        mut keys: BTreeSet<ObjectKey>,
        goal: Goal<'_>,
        applied: &mut Applied,
    ) -> Result<(), BackendError> {
        if let Err(why) = self.try_to_write() {
            tracing::debug!(%why, "iptables writes nothing at all");
            return Err(error);
        }
        tracing::warn!(%error, "iptables refused the rules as a whole; writing them in parts");
        // Without any Service it has to work, or nothing does.
        let mut parts = Parts::default();
        self.write_halves(&BTreeSet::new(), goal, applied, &mut parts)?;
        self.write_halves(&keys, goal, applied, &mut parts)?;
        if parts.had_no_room() {
            return Err(error);
        }
        self.observe()?;
        let refused = parts.refused;
        self.keep_old(refused.iter().map(|(key, _)| key), goal.desired)?;
        for (key, _) in &refused {
            keys.remove(key);
        }
        // A chain can't be removed while a foreign rule leads to it.
        let swept = if refused.is_empty() { Whole::Emptied } else { Whole::Swept };
        if let Err(Refusal { error, .. }) = self.commit(&keys, swept, goal, applied) {
            if swept == Whole::Emptied || is_nobodys(&error) {
                return Err(error);
            }
            let emptied = self.commit(&keys, Whole::Emptied, goal, applied);
            emptied.map_err(|refusal| refusal.error)?;
        }
        for (key, error) in refused {
            let (program, message) = (self.programs.version.clone(), error.to_string());
            for frontend in frontends(&key, goal.desired, self.settings.family) {
                let (program, message) = (program.clone(), message.clone());
                let error = BackendError::Program { program, message };
                applied.refused.push((Unit::Frontend(frontend), error));
            }
        }
        Ok(())
    }

    /// Writes a chain that nothing goes through, and takes it away with it: whether iptables can
    /// write at all.
    fn try_to_write(&self) -> Result<(), BackendError> {
        let (made, gone) = (format!(":{PROBE} - [0:0]"), format!("-F {PROBE}\n-X {PROBE}"));
        self.programs.restore(format!("*nat\n{made}\n-A {PROBE} -j RETURN\n{gone}\nCOMMIT\n"))
    }

    /// Writes these Services, and by halves those that are not refused by themselves.
    fn write_halves(
        &mut self,
        keys: &BTreeSet<ObjectKey>,
        goal: Goal<'_>,
        applied: &mut Applied,
        parts: &mut Parts,
    ) -> Result<(), BackendError> {
        self.observe()?;
        let before = applied.elements;
        let Err(Refusal { error, .. }) = self.commit(keys, Whole::Base, goal, applied) else {
            parts.wrote |= !keys.is_empty() && applied.elements > before;
            return Ok(());
        };
        match keys.len() {
            _ if is_nobodys(&error) => Err(error),
            0 => Err(error),
            1 => {
                parts.refused.extend(keys.iter().cloned().zip([error]));
                Ok(())
            }
            // All the rest would be tried for nothing.
            _ if parts.refused.len() >= ROOMLESS && parts.had_no_room() => Err(error),
            count => {
                let half: Vec<_> = keys.iter().cloned().collect();
                let (first, second) = half.split_at(count / 2);
                for part in [first, second] {
                    self.write_halves(&part.iter().cloned().collect(), goal, applied, parts)?;
                }
                Ok(())
            }
        }
    }

    /// Has Services that were refused keep their old lines, and what these lead to.
    fn keep_old<'a>(
        &self,
        refused: impl Iterator<Item = &'a ObjectKey>,
        desired: &Desired,
    ) -> Result<(), BackendError> {
        let mut refused = refused.peekable();
        if refused.peek().is_none() {
            return Ok(());
        }
        let leads = Leads::read(&self.programs.save(Table::Nat)?);
        let mut held = self.held();
        for key in refused {
            let lines: Vec<_> = held.present.lines_of(key).map(|(_, line)| line).collect();
            let chains = leads.from(lines.iter().filter_map(|line| target(line)));
            held.keep(key, chains, frontends(key, desired, self.settings.family));
        }
        Ok(())
    }
}

/// To which chains of Services each of them leads.
struct Leads(HashMap<OwnChain, Vec<OwnChain>>);

impl Leads {
    /// As `iptables-save` prints the nat table.
    fn read(nat: &str) -> Self {
        let mut leads: HashMap<OwnChain, Vec<OwnChain>> = HashMap::new();
        for rule in nat.lines().filter_map(|line| line.strip_prefix("-A ")) {
            let chain = rule.split(' ').next().and_then(OwnChain::parse);
            if let (Some(chain), Some(target)) = (chain, target(rule)) {
                leads.entry(chain).or_default().push(target);
            }
        }
        Self(leads)
    }

    /// These chains, and all that they lead to.
    fn from(&self, chains: impl Iterator<Item = OwnChain>) -> BTreeSet<OwnChain> {
        let mut found = BTreeSet::new();
        let mut waiting: Vec<OwnChain> = chains.collect();
        while let Some(chain) = waiting.pop() {
            if found.insert(chain) {
                waiting.extend(self.0.get(&chain).into_iter().flatten());
            }
        }
        found
    }
}

/// The chain of a Service that a rule leads to.
fn target(rule: &str) -> Option<OwnChain> {
    OwnChain::parse(rule.rsplit_once("-j ")?.1)
}

/// Whether it is no Service's fault, so that nothing is gained by writing others without it: a
/// program can't be run, or others hold the lock.
pub(super) fn is_nobodys(error: &BackendError) -> bool {
    match error {
        BackendError::Io { .. } => true,
        BackendError::Busy { message, .. } => message.contains(LOCKED),
        _ => false,
    }
}

/// All that clients can connect to of a Service.
fn frontends(key: &ObjectKey, desired: &Desired, family: Family) -> impl Iterator<Item = Frontend> {
    desired.units().filter(move |unit| unit.family() == family).filter_map(move |unit| match unit {
        Unit::Frontend(frontend) if desired.owner(&frontend) == Some(key) => Some(frontend),
        _ => None,
    })
}
