//! What is in the kernel, from what `iptables-save` prints.

use std::{collections::HashMap, sync::Arc};

use super::{
    base::{CHAINS, GUARD, OF_IPVS, all_guests},
    chain::{OwnChain, Place, Table, is_outdated},
    held::{Contents, Jump, Lines, Present},
    loopback::LOCALNET_SET,
};

/// Where a rule's line goes.
enum Reader {
    Own(OwnChain),
    Base(&'static str),
    Place(Place),
    Guests,
    Other,
}

/// Adds what one table has, as printed by `iptables-save -t`.
pub(crate) fn read(table: Table, text: &str, present: &mut Present) {
    let mut own: HashMap<OwnChain, Contents> = HashMap::new();
    let mut base: HashMap<&'static str, Contents> = HashMap::new();
    let guests: Vec<_> = all_guests().filter(|guest| guest.table == table).collect();
    for line in text.lines() {
        if let Some(declared) = line.strip_prefix(':') {
            let name = declared.split(' ').next().unwrap_or_default();
            present.noted |= table == Table::Filter && name == LOCALNET_SET;
            match reader(table, name) {
                Reader::Own(chain) => {
                    own.entry(chain).or_default();
                }
                Reader::Base(name) => {
                    base.entry(name).or_default();
                }
                Reader::Place(place) => {
                    present.places.entry(place).or_default();
                }
                Reader::Guests if name == GUARD => {
                    present.guest_chains.insert((table, GUARD));
                }
                Reader::Other if table == Table::Nat && is_outdated(name) => {
                    present.outdated.push(name.to_owned());
                }
                Reader::Other => present.of_ipvs.extend(of_ipvs(table, name)),
                Reader::Guests => {}
            }
            continue;
        }
        let Some(rule) = line.strip_prefix("-A ") else { continue };
        let (chain, rule) = rule.split_once(' ').unwrap_or((rule, ""));
        match reader(table, chain) {
            Reader::Own(chain) => own.entry(chain).or_default().add(rule),
            Reader::Base(name) => base.entry(name).or_default().add(rule),
            Reader::Place(place) => read_line(place, rule, present),
            Reader::Guests => {
                let found = guests.iter().find(|g| g.chain == chain && &*g.rule == rule);
                present.guests.extend(found.cloned());
                read_jump(table, chain, rule, present);
            }
            Reader::Other => {}
        }
    }
    present.own.extend(own.into_iter().map(|(chain, contents)| (chain, contents.finish())));
    let base = base.into_iter().map(|(name, contents)| ((table, name), contents.finish()));
    present.base.extend(base);
}

/// The chain of kube-proxy's ipvs mode with this name.
fn of_ipvs(table: Table, chain: &str) -> Option<(Table, &'static str)> {
    OF_IPVS.into_iter().find(|(t, name)| *t == table && *name == chain)
}

fn reader(table: Table, chain: &str) -> Reader {
    if table == Table::Nat
        && let Some(chain) = OwnChain::parse(chain)
    {
        return Reader::Own(chain);
    }
    if let Some((_, name)) = CHAINS.iter().find(|(t, name)| *t == table && *name == chain) {
        return Reader::Base(name);
    }
    let place = Place::ALL.into_iter().find(|p| p.table() == table && p.name() == chain);
    if let Some(place) = place {
        return Reader::Place(place);
    }
    let guests = !chain.starts_with("KUBE-") || (table == Table::Filter && chain == GUARD);
    if guests { Reader::Guests } else { Reader::Other }
}

fn read_jump(table: Table, chain: &str, rule: &str, present: &mut Present) {
    let ours = |target: &str| {
        target == GUARD
            || of_ipvs(table, target).is_some()
            || CHAINS.iter().any(|(t, name)| *t == table && *name == target)
            || Place::ALL.iter().any(|p| p.table() == table && p.name() == target)
            || table == Table::Nat && (OwnChain::parse(target).is_some() || is_outdated(target))
    };
    let words = rule.split(' ').rev();
    let mut targets = words.clone().zip(words.skip(1));
    if let Some((target, _)) =
        targets.find(|(target, word)| matches!(*word, "-j" | "-g") && ours(target))
    {
        let (chain, rule, target) = (chain.to_owned(), rule.to_owned(), target.to_owned());
        present.jumps.push(Jump { table, chain, rule, target });
    }
}

fn read_line(place: Place, rule: &str, present: &mut Present) {
    let lines: &mut Lines = present.places.entry(place).or_default();
    let rule: Arc<str> = rule.into();
    // The last ones say on which addresses node ports are; what comes after them is never reached.
    if place == Place::Services
        && (rule.ends_with("-j KUBE-NODEPORTS") || rule.ends_with("-j RETURN"))
    {
        present.tail.push(rule);
        return;
    }
    let after_the_last = place == Place::Services && !present.tail.is_empty();
    if !lines.set.insert(rule) || after_the_last {
        lines.disorderly = true;
    }
}
