//! The input of `iptables-restore`: what is to be changed, as text.

use std::{
    collections::BTreeSet,
    fmt::{Display, Write},
};

use super::{
    chain::{Place, Table},
    held::{Delta, PlaceDelta},
};

/// One commit to one table: chains first, then rules, then chains that go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Part {
    declared: BTreeSet<String>,
    rules: String,
    removed: String,
    count: usize,
    written: usize,
}

impl Part {
    /// Makes a chain, or empties it if it is there.
    fn declare(&mut self, chain: impl Display) {
        self.declared.insert(format!(":{chain} - [0:0]\n"));
    }

    fn append(&mut self, chain: impl Display, rule: &str) {
        self.written += 1;
        self.rule("-A", chain, rule);
    }

    fn insert(&mut self, chain: impl Display, rule: &str) {
        self.written += 1;
        self.rule("-I", chain, rule);
    }

    fn delete(&mut self, chain: impl Display, rule: &str) {
        self.rule("-D", chain, rule);
    }

    fn rule(&mut self, verb: &str, chain: impl Display, rule: &str) {
        let separator = if rule.is_empty() { "" } else { " " };
        let _ = writeln!(self.rules, "{verb} {chain}{separator}{rule}");
        self.count += 1;
    }

    /// Removes a chain and what is in it.
    fn remove(&mut self, chain: impl Display) {
        self.declare(&chain);
        let _ = writeln!(self.removed, "-X {chain}");
        self.count += 1;
    }

    fn write(&self, table: Table, out: &mut String) {
        if !(self.declared.is_empty() && self.rules.is_empty() && self.removed.is_empty()) {
            let _ = writeln!(out, "*{}", table.as_str());
            // Sorted: iptables-nft takes twice as long for many new chains in another order.
            out.extend(self.declared.iter().map(String::as_str));
            let _ = writeln!(out, "{}{}COMMIT", self.rules, self.removed);
        }
    }
}

/// All commits of a change, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Script {
    mangle: Part,
    /// What the filter table gets before the nat table changes, so that nothing gets through.
    filter: Part,
    nat: Part,
    /// What it loses afterwards.
    filter_after: Part,
}

impl Script {
    /// The input of `iptables-restore --noflush`; empty if there is nothing to do.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        self.mangle.write(Table::Mangle, &mut text);
        self.filter.write(Table::Filter, &mut text);
        self.nat.write(Table::Nat, &mut text);
        self.filter_after.write(Table::Filter, &mut text);
        text
    }

    /// How many rules are written, or taken away.
    pub(crate) fn rules(&self) -> usize {
        [&self.mangle, &self.filter, &self.nat, &self.filter_after].iter().map(|p| p.count).sum()
    }

    /// How many rules are written to a table.
    pub(crate) fn written(&self, table: Table) -> usize {
        match table {
            Table::Mangle => self.mangle.written,
            Table::Filter => self.filter.written + self.filter_after.written,
            Table::Nat => self.nat.written,
        }
    }

    /// What brings a change about.
    pub(crate) fn of(delta: &Delta) -> Self {
        let mut script = Self::default();
        for chain in &delta.chains {
            let part = script.part(chain.table);
            part.declare(chain.name);
            chain.rules.iter().for_each(|rule| part.append(chain.name, rule));
        }
        let is_led_to = |table, chain: &dyn Display| {
            !delta.led_to.is_empty() && delta.led_to.contains(&(table, chain.to_string()))
        };
        for (table, chain) in &delta.unchained {
            let part = script.part(*table);
            if is_led_to(*table, chain) { part.declare(chain) } else { part.remove(chain) }
        }
        for (table, chain) in &delta.guest_chains {
            script.part(*table).declare(chain);
        }
        for (place, change) in &delta.places {
            script.place(*place, change);
        }
        if let Some((before, after)) = &delta.tail {
            let chain = Place::Services.name();
            before.iter().for_each(|rule| script.nat.delete(chain, rule));
            after.iter().for_each(|rule| script.nat.append(chain, rule));
        }
        for (chain, rules) in &delta.own {
            script.nat.declare(chain);
            rules.iter().for_each(|rule| script.nat.append(chain, rule));
        }
        let clear = |part: &mut Part, chain: &dyn Display| {
            if delta.emptied || is_led_to(Table::Nat, chain) {
                part.declare(chain);
            } else {
                part.remove(chain);
            }
        };
        delta.gone.iter().for_each(|chain| clear(&mut script.nat, chain));
        delta.outdated.iter().for_each(|chain| clear(&mut script.nat, chain));
        for guest in &delta.guests {
            let part = script.part(guest.table);
            if guest.chain.starts_with("KUBE-") {
                part.append(guest.chain, &guest.rule);
            } else {
                // Before what a firewall may say, as kube-proxy does.
                part.insert(guest.chain, &guest.rule);
            }
        }
        for jump in &delta.farewells {
            script.part(jump.table).delete(&jump.chain, &jump.rule);
        }
        script
    }

    fn part(&mut self, table: Table) -> &mut Part {
        match table {
            Table::Mangle => &mut self.mangle,
            Table::Filter => &mut self.filter,
            Table::Nat => &mut self.nat,
        }
    }

    fn place(&mut self, place: Place, change: &PlaceDelta) {
        let chain = place.name();
        let filter = place.table() == Table::Filter;
        if change.missing {
            self.part(place.table()).declare(chain);
        }
        if let Some(lines) = &change.anew {
            if filter && !change.missing {
                change.added.iter().for_each(|line| self.filter.append(chain, line));
            }
            let part = match (filter, change.missing) {
                (true, false) => &mut self.filter_after,
                (true, true) => &mut self.filter,
                (false, _) => &mut self.nat,
            };
            if !change.missing {
                part.declare(chain);
            }
            lines.iter().for_each(|line| part.append(chain, line));
            return;
        }
        for line in &change.added {
            if place == Place::Services {
                // The last rules stay the last ones.
                self.nat.insert(chain, line);
            } else {
                self.part(place.table()).append(chain, line);
            }
        }
        let part = if filter { &mut self.filter_after } else { &mut self.nat };
        change.removed.iter().for_each(|line| part.delete(chain, line));
    }
}
