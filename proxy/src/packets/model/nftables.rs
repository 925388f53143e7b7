//! The proxy's table as the distribution's nft lists it, as maps and chains that a packet can be
//! walked through.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

use super::packet::{Fate, Hook, Packet, Rules};
use crate::{model::Family, netns::Namespace};

/// Elements by key; those of sets have no value.
type Elements = BTreeMap<String, String>;

/// A table.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Maps and sets.
    pub(super) sets: BTreeMap<String, Elements>,
    pub(super) chains: BTreeMap<String, Chain>,
}

/// A chain.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// Where packets come in, and when.
    hook: Option<(Hook, i32)>,
    pub(super) rules: Vec<String>,
}

/// What a rule does: packets that are through with the chain, and those that go on to the next rule.
type Ways = (Vec<Packet>, Vec<Packet>);

impl Table {
    /// Reads what the kernel holds.
    pub(super) fn read(host: &Namespace, family: Family) -> Self {
        let name = if family == Family::V4 { "ip" } else { "ip6" };
        // Somebody may have removed it.
        let (there, listing) = host.try_sh(&format!("nft -s list table {name} keelson-proxy"));
        if there { Self::parse(&listing) } else { Self::default() }
    }

    fn parse(listing: &str) -> Self {
        let mut table = Self::default();
        let mut lines = listing.lines().map(str::trim);
        while let Some(line) = lines.next() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let mut body = lines.by_ref().take_while(|line| *line != "}");
            match words[..] {
                ["map" | "set", name, "{"] => {
                    let text: String = body.collect();
                    table.sets.insert(name.to_owned(), elements(&text));
                }
                ["chain", name, "{"] => {
                    let mut chain = Chain::default();
                    for line in &mut body {
                        match line.strip_prefix("type ") {
                            Some(kind) => chain.hook = Some(hook(kind)),
                            None => chain.rules.push(line.to_owned()),
                        }
                    }
                    table.chains.insert(name.to_owned(), chain);
                }
                _ => {}
            }
        }
        table
    }

    fn has(&self, set: &str, key: &str) -> bool {
        let Some(name) = set.strip_prefix('@') else { return in_range(key, set) };
        let set = &self.sets[name];
        set.contains_key(key) || set.keys().any(|range| in_range(key, range))
    }

    fn walk(&self, chain: &str, packet: Packet) -> Vec<Packet> {
        let mut through = Vec::new();
        let mut here = vec![packet];
        for rule in &self.chains[chain].rules {
            let words: Vec<&str> = rule.split(" comment ").next().unwrap().split(' ').collect();
            let ways = here.into_iter().map(|packet| self.step(&words, packet));
            let (done, on): (Vec<_>, Vec<_>) = ways.unzip();
            through.extend(done.into_iter().flatten());
            here = on.into_iter().flatten().collect();
        }
        through.into_iter().chain(here).collect()
    }

    fn verdict(&self, verdict: &[&str], packet: Packet) -> Vec<Packet> {
        match verdict {
            ["goto", chain] => self.walk(chain, packet),
            ["drop"] => vec![packet.stopped(Fate::Dropped)],
            other => panic!("verdict {other:?}"),
        }
    }

    /// One rule.
    fn step(&self, rule: &[&str], mut packet: Packet) -> Ways {
        let mut key: Vec<String> = Vec::new();
        let mut words = rule;
        loop {
            let (holds, rest) = match words {
                [] => return (vec![], vec![packet]),
                ["ip" | "ip6", "saddr", rest @ ..] => {
                    key.push(packet.source.to_string());
                    (true, rest)
                }
                ["ip" | "ip6", "daddr", rest @ ..] => {
                    key.push(packet.destination.ip().to_string());
                    (true, rest)
                }
                ["meta", "l4proto", rest @ ..] => {
                    key.push(packet.protocol.to_string().to_lowercase());
                    (true, rest)
                }
                ["th", "dport", rest @ ..] => {
                    key.push(packet.destination.port().to_string());
                    (true, rest)
                }
                [".", rest @ ..] => (true, rest),
                ["ct", "state", "new", rest @ ..] => (true, rest),
                ["ct", "status", "dnat", rest @ ..] => (packet.translated, rest),
                // What is remembered of a connection doesn't lead it.
                ["ct", "original", ..] | ["update", ..] => return (vec![], vec![packet]),
                ["meta", "mark", "set", "meta", "mark", "|", mark, rest @ ..] => {
                    packet.mark |= number(mark);
                    (true, rest)
                }
                ["meta", "mark", "set", "meta", "mark", "&", mask, rest @ ..] => {
                    packet.mark &= number(mask);
                    (true, rest)
                }
                ["meta", "mark", "&", mask, "!=", zero, rest @ ..] => {
                    (packet.mark & number(mask) != number(zero), rest)
                }
                ["vmap", map, ..] => {
                    let verdict = self.sets[map.trim_start_matches('@')].get(&key.join(" . "));
                    let Some(verdict) = verdict else { return (vec![], vec![packet]) };
                    let verdict: Vec<&str> = verdict.split(' ').collect();
                    return (self.verdict(&verdict, packet), vec![]);
                }
                ["accept"] => return (vec![packet], vec![]),
                ["goto", ..] | ["drop"] => return (self.verdict(words, packet), vec![]),
                ["reject", ..] => return (vec![packet.stopped(Fate::Refused)], vec![]),
                ["masquerade", ..] => {
                    packet.hidden = true;
                    return (vec![packet], vec![]);
                }
                ["dnat", "ip" | "ip6", "to", rest @ ..] => return self.translate(rest, packet),
                ["!=", set, rest @ ..] => (!self.has(set, &take(&mut key)), rest),
                [set, rest @ ..] if !key.is_empty() => (self.has(set, &take(&mut key)), rest),
                other => panic!("{other:?} of the rule {rule:?}"),
            };
            if !holds {
                return (vec![], vec![packet]);
            }
            words = rest;
        }
    }

    /// To what a map has for a packet, whatever the dice say. Where a client went before, it might
    /// have forgotten.
    fn translate(&self, words: &[&str], packet: Packet) -> Ways {
        let text = words.join(" ");
        let (fields, map) = text.split_once(" map @").unwrap();
        let mut keys = vec![String::new()];
        let mut sure = true;
        for field in fields.split(" . ") {
            let values: Vec<String> = match field {
                "ip saddr" | "ip6 saddr" => {
                    sure = false;
                    vec![packet.source.to_string()]
                }
                "ip daddr" | "ip6 daddr" => vec![packet.destination.ip().to_string()],
                "meta l4proto" => vec![packet.protocol.to_string().to_lowercase()],
                "th dport" => vec![packet.destination.port().to_string()],
                dice => {
                    let sides = dice.strip_prefix("numgen random mod ").unwrap();
                    (0..sides.parse().unwrap()).map(|n: u32| format!("0x{n:08x}")).collect()
                }
            };
            keys = keys
                .iter()
                .flat_map(|key| values.iter().map(move |value| format!("{key} . {value}")))
                .collect();
        }
        let keys = keys.iter().map(|key| key.trim_start_matches(" . "));
        let found: Vec<Option<&String>> = keys.map(|key| self.sets[map].get(key)).collect();
        let on =
            if sure && found.iter().all(Option::is_some) { vec![] } else { vec![packet.clone()] };
        let to = |endpoint: &String| packet.clone().translated(endpoint_of(endpoint));
        (found.into_iter().flatten().map(to).collect(), on)
    }

    /// Chains that packets may come to.
    pub(super) fn used_chains(&self) -> BTreeSet<&str> {
        let mut used = BTreeSet::new();
        let hooked = self.chains.iter().filter(|(_, chain)| chain.hook.is_some());
        let mut next: Vec<&str> = hooked.map(|(name, _)| &**name).collect();
        next.extend(self.sets.values().flat_map(BTreeMap::values).flat_map(|to| targets(to)));
        while let Some(name) = next.pop() {
            if used.insert(name) {
                next.extend(self.chains[name].rules.iter().flat_map(|rule| targets(rule)));
            }
        }
        used
    }

    /// Rows of endpoints, of which each index from 0 on should lead to another one.
    pub(super) fn rows(&self, map: &str) -> BTreeMap<String, BTreeSet<String>> {
        let mut rows: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for (key, endpoint) in self.sets.get(map).into_iter().flatten() {
            let (frontend, index) = key.rsplit_once(" . ").unwrap();
            let row = rows.entry(frontend.to_owned()).or_default();
            row.insert(index.to_owned(), endpoint.clone());
        }
        let without_indices = |(frontend, row): (String, BTreeMap<String, String>)| {
            let indices: Vec<String> = (0..row.len()).map(|i| format!("0x{i:08x}")).collect();
            let whole = row.keys().eq(&indices);
            let mut endpoints: BTreeSet<String> = row.into_values().collect();
            if !whole || endpoints.len() < indices.len() {
                endpoints.insert("with holes, or one of them twice".to_owned());
            }
            (frontend, endpoints)
        };
        rows.into_iter().map(without_indices).collect()
    }
}

impl Rules for Table {
    fn ask(&self, hook: Hook, packet: Packet) -> Vec<Packet> {
        let at = |chain: &Chain| chain.hook.filter(|(at, _)| *at == hook).map(|(_, when)| when);
        let mut chains: Vec<(i32, &str)> =
            self.chains.iter().filter_map(|(name, c)| Some((at(c)?, &**name))).collect();
        chains.sort_unstable();
        let mut ways = vec![packet];
        for (_, chain) in chains {
            let next = ways.into_iter().flat_map(|packet| match packet.stopped {
                Some(_) => vec![packet],
                None => self.walk(chain, packet),
            });
            ways = next.collect();
        }
        ways
    }
}

fn take(key: &mut Vec<String>) -> String {
    std::mem::take(key).join(" . ")
}

fn number(text: &str) -> u32 {
    u32::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

/// Where a rule or verdict leads.
fn targets(rule: &str) -> Vec<&str> {
    let words: Vec<&str> = rule.split(' ').collect();
    words.windows(2).filter(|pair| pair[0] == "goto").map(|pair| pair[1]).collect()
}

fn endpoint_of(text: &str) -> SocketAddr {
    let (address, port) = text.split_once(" . ").unwrap();
    SocketAddr::new(address.parse().unwrap(), port.parse().unwrap())
}

fn in_range(address: &str, range: &str) -> bool {
    let (Ok(address), Ok(range)) = (address.parse::<IpAddr>(), range.parse::<IpNet>()) else {
        return address == range;
    };
    range.contains(&address)
}

fn elements(body: &str) -> Elements {
    let Some((_, text)) = body.split_once("elements = {") else { return Elements::new() };
    let text = text.split('}').next().unwrap();
    let element = |text: &str| {
        let (key, value) = text.split_once(" : ").unwrap_or((text, ""));
        let words = |text: &str| {
            let words = text.split_whitespace();
            words.take_while(|w| !["timeout", "expires"].contains(w)).collect::<Vec<_>>().join(" ")
        };
        (words(key), words(value))
    };
    text.split(',').map(element).collect()
}

/// From `nat hook prerouting priority dstnat + 10; policy accept;`.
fn hook(text: &str) -> (Hook, i32) {
    let (before, priority) = text.split(';').next().unwrap().split_once(" priority ").unwrap();
    let hook = match before.split_once(" hook ").unwrap().1 {
        "prerouting" => Hook::Prerouting,
        "input" => Hook::Input,
        "forward" => Hook::Forward,
        "output" => Hook::Output,
        "postrouting" => Hook::Postrouting,
        other => panic!("hook {other}"),
    };
    let terms = priority.replace("- ", "-").replace("+ ", "");
    let term = |term: &str| match term {
        "dstnat" => -100,
        "srcnat" => 100,
        "filter" => 0,
        number => number.parse::<i32>().unwrap(),
    };
    (hook, terms.split(' ').map(term).sum())
}
