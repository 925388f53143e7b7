//! The rules of `iptables-save`, as chains that a packet can be walked through.

use std::{collections::BTreeMap, net::SocketAddr};

use ipnet::IpNet;

use super::packet::{Fate, Hook, Packet, Rules, is_node};
use crate::{model::Family, netns::Namespace, packets::fixture::Addresses};

/// The tables that lead packets.
#[derive(Debug)]
pub(super) struct Tables {
    family: Family,
    /// By table and name.
    chains: BTreeMap<(String, String), Vec<Vec<String>>>,
}

/// Packets that are through with the table, and those that go on to the next rule.
type Ways = (Vec<Packet>, Vec<Packet>);

impl Tables {
    /// Reads what the kernel holds.
    pub(super) fn read(host: &Namespace, family: Family) -> Self {
        let save = if family == Family::V4 { "iptables-save" } else { "ip6tables-save" };
        let mut tables = Self { family, chains: BTreeMap::new() };
        let mut table = String::new();
        for line in host.sh(save).lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = name.to_owned();
            } else if let Some(chain) = line.strip_prefix(':') {
                let name = chain.split(' ').next().unwrap().to_owned();
                tables.chains.insert((table.clone(), name), Vec::new());
            } else if let Some(rule) = line.strip_prefix("-A ") {
                let mut words = words(rule);
                let chain = words.remove(0);
                tables.chains.get_mut(&(table.clone(), chain)).unwrap().push(words);
            }
        }
        tables
    }

    fn walk(&self, table: &str, chain: &str, packet: Packet) -> Ways {
        let Some(rules) = self.chains.get(&(table.to_owned(), chain.to_owned())) else {
            return (vec![], vec![packet]);
        };
        let (mut through, mut back) = (Vec::new(), Vec::new());
        let mut here = vec![packet];
        for rule in rules {
            let mut on = Vec::new();
            for packet in here {
                let (holds, chance, target) = self.matches(rule, &packet);
                if !holds || chance {
                    on.push(packet.clone());
                }
                if !holds {
                    continue;
                }
                let (jump, rest) = target.split_first().unwrap();
                match jump.as_str() {
                    "RETURN" => back.push(packet),
                    "ACCEPT" => through.push(packet),
                    "DROP" => through.push(packet.stopped(Fate::Dropped)),
                    "REJECT" => through.push(packet.stopped(Fate::Refused)),
                    "MASQUERADE" => through.push(Packet { hidden: true, ..packet }),
                    "MARK" => {
                        let (value, mask) = mark(&rest[1]);
                        on.push(Packet { mark: packet.mark & !mask ^ value, ..packet });
                    }
                    "DNAT" => {
                        let to: SocketAddr = rest[1].parse().unwrap();
                        through.push(packet.translated(to));
                    }
                    chain => {
                        let (done, returned) = self.walk(table, chain, packet);
                        through.extend(done);
                        on.extend(returned);
                    }
                }
            }
            here = on;
        }
        back.extend(here);
        (through, back)
    }

    /// Whether a rule is for a packet, whether that is a matter of chance, and what it does.
    fn matches<'a>(&self, rule: &'a [String], packet: &Packet) -> (bool, bool, &'a [String]) {
        let addresses = Addresses(self.family);
        let (mut holds, mut chance, mut negated) = (true, false, false);
        let mut at = 0;
        while at < rule.len() {
            let (option, value) = (rule[at].as_str(), rule.get(at + 1).map_or("", |v| v));
            let within = |address| value.parse::<IpNet>().unwrap().contains(&address);
            at += 2;
            let found = match option {
                "!" => {
                    negated = true;
                    at -= 1;
                    continue;
                }
                "-j" => return (holds, chance, &rule[at - 1..]),
                "-s" => within(packet.source),
                "-d" => within(packet.destination.ip()),
                "-p" => packet.protocol.to_string().eq_ignore_ascii_case(value),
                "--dport" => packet.destination.port().to_string() == value,
                "--src-type" => is_node(addresses, packet.source),
                "--dst-type" => is_node(addresses, packet.destination.ip()),
                "--ctstate" => value
                    .split(',')
                    .any(|state| state == "NEW" || state == "DNAT" && packet.translated),
                "--mark" => {
                    let (value, mask) = mark(value);
                    packet.mark & mask == value
                }
                // Whoever went somewhere before might have forgotten.
                "--probability" | "--rcheck" => {
                    chance = true;
                    at -= usize::from(option == "--rcheck");
                    true
                }
                "--reap" | "--set" | "--rsource" => {
                    at -= 1;
                    true
                }
                "-m" | "--comment" | "--mode" | "--seconds" | "--name" | "--mask" => true,
                other => panic!("{other} of {rule:?}"),
            };
            holds &= found != negated;
            negated = false;
        }
        panic!("{rule:?} does nothing");
    }
}

impl Rules for Tables {
    fn ask(&self, hook: Hook, packet: Packet) -> Vec<Packet> {
        let tables: &[(&str, &str)] = match hook {
            Hook::Prerouting => &[("nat", "PREROUTING")],
            Hook::Input => &[("filter", "INPUT")],
            Hook::Forward => &[("filter", "FORWARD")],
            Hook::Output => &[("nat", "OUTPUT"), ("filter", "OUTPUT")],
            Hook::Postrouting => &[("nat", "POSTROUTING")],
        };
        let mut ways = vec![packet];
        for (table, chain) in tables {
            let next = ways.into_iter().flat_map(|packet| {
                if packet.stopped.is_some() {
                    return vec![packet];
                }
                let (through, on) = self.walk(table, chain, packet);
                [through, on].concat()
            });
            ways = next.collect();
        }
        ways
    }
}

/// A value and a mask.
fn mark(text: &str) -> (u32, u32) {
    let (value, mask) = text.split_once('/').unwrap();
    let number = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    (number(value), number(mask))
}

/// As a shell takes a line apart.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            c => words.last_mut().unwrap().push(c),
        }
    }
    words
}
