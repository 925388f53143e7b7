//! The ruleset as the distribution's `nft list table` prints it, without a kernel.
//!
//! It is made from the same structures that are encoded, so it shows what would be written and not
//! what somebody thinks is written. It is for reading: nft 1.0.6 doesn't take its own listing of
//! these rules back by `nft -f`, as it has no type for a key of which a part is a random number,
//! and none for `ct original proto-dst` in a concatenation.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use super::{
    apply::{Whole, whole},
    batch::{Chain, Data, Element, Hook, MapData, Set, SetKind, TABLE},
    changes::Changes,
    expression::{Comparison, Ct, Expression, Register, Verdict},
    intervals::Intervals,
    layout::Layout,
    rules::types,
    uapi::*,
};
use crate::{
    backend::Goal,
    model::{Family, Protocol},
};

/// All that would be written for a goal where nothing is in force yet.
pub(crate) fn text(layout: &Layout, goal: Goal<'_>) -> String {
    let Whole { needed, plan } = whole(layout, goal.desired);
    let family = family_name(layout.family);
    let mut text = format!("table {family} {TABLE} {{\n\tcomment \"{}\"\n", layout.fingerprint());
    let mut key_words = HashMap::new();
    for set in layout.sets() {
        key_words.insert(set.name.to_string(), set.key_length / 4);
        let changes = [&plan.early, &plan.changes];
        let elements = changes.iter().flat_map(|changes| changes.added(&set.name));
        let elements: Vec<String> = if set.kind == SetKind::Intervals {
            let edges: Vec<Element> = elements.cloned().collect();
            Intervals::read(layout.family, &edges).iter().flat_map(ranges_text).collect()
        } else {
            elements.map(|element| element_text(&set, element)).collect()
        };
        set_text(&mut text, &set, &elements);
    }
    for (id, list) in &needed.lists {
        let set = layout.source_set(*id);
        key_words.insert(set.name.to_string(), set.key_length / 4);
        set_text(&mut text, &set, &ranges_text(list.intervals()));
    }
    let dynamic = needed.chains.iter().map(|chain| layout.dynamic_chain(*chain));
    for chain in layout.chains().into_iter().chain(dynamic) {
        chain_text(&mut text, &chain, layout.family, &key_words);
    }
    text.truncate(text.trim_end().len());
    text.push_str("\n}\n");
    text
}

/// What sets lack and have too much before `changes` are made, a line for each set. `strays` are
/// elements that are there, though nothing should have made them.
pub(crate) fn differences(
    layout: &Layout,
    changes: [&Changes; 2],
    strays: &Changes,
) -> Vec<String> {
    let mut lines = Vec::new();
    for set in layout.sets() {
        let (kind, name) = (kind(&set), &set.name);
        let of_set = |from: &Changes| -> Vec<Element> {
            let removals = from.removals().filter(|(removed, _)| removed == name);
            removals.flat_map(|(_, elements)| elements).cloned().collect()
        };
        let strays = of_set(strays);
        let is_stray = |element: &Element| strays.iter().any(|stray| stray.key == element.key);
        let added = changes.iter().flat_map(|changes| changes.added(name));
        let lacks: Vec<&Element> = added.filter(|element| !is_stray(element)).collect();
        let excess = changes.iter().flat_map(|changes| of_set(changes)).collect::<Vec<_>>();
        if set.kind == SetKind::Intervals {
            if !(lacks.is_empty() && excess.is_empty()) {
                lines.push(format!("{kind} {name} has other ranges"));
            }
            continue;
        }
        let list = |elements: &mut dyn Iterator<Item = &Element>| {
            elements.map(|element| element_text(&set, element)).collect::<Vec<_>>().join(", ")
        };
        let (other, unwanted): (Vec<&Element>, Vec<&Element>) =
            excess.iter().partition(|element| lacks.iter().any(|lack| lack.key == element.key));
        for (what, elements) in [("something else at", other), ("what nobody wants:", unwanted)] {
            if !elements.is_empty() {
                let list = list(&mut elements.into_iter());
                lines.push(format!("{kind} {name} has {what} {{ {list} }}"));
            }
        }
        if !lacks.is_empty() {
            lines.push(format!("{kind} {name} lacks {{ {} }}", list(&mut lacks.into_iter())));
        }
    }
    lines
}

fn kind(set: &Set) -> &'static str {
    if set.data == MapData::None { "set" } else { "map" }
}

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn set_text(text: &mut String, set: &Set, elements: &[String]) {
    let kind = kind(set);
    let data = match set.data {
        MapData::None => String::new(),
        MapData::Verdict => " : verdict".into(),
        MapData::Value { data_type, .. } => format!(" : {}", type_text(data_type)),
    };
    // Writing to a String can't fail.
    let _ = write!(text, "\t{kind} {} {{\n\t\ttype {}{data}\n", set.name, type_text(set.key_type));
    match set.kind {
        SetKind::Plain => {}
        SetKind::Dynamic { size } => {
            let _ = write!(text, "\t\tsize {size}\n\t\tflags dynamic,timeout\n");
        }
        SetKind::Intervals => text.push_str("\t\tflags interval\n"),
    }
    if !elements.is_empty() {
        let _ = writeln!(text, "\t\telements = {{ {} }}", elements.join(",\n\t\t\t     "));
    }
    text.push_str("\t}\n\n");
}

/// The parts of a type, which nft packs six bits each.
fn type_parts(packed: u32) -> Vec<u32> {
    let parts = (0..5).rev().map(|n| packed >> (6 * n) & 0x3f);
    parts.skip_while(|part| *part == 0).collect()
}

fn type_text(packed: u32) -> String {
    let names = type_parts(packed).into_iter().map(|part| match part {
        types::IPV4_ADDR => "ipv4_addr",
        types::IPV6_ADDR => "ipv6_addr",
        types::INET_PROTO => "inet_proto",
        types::INET_SERVICE => "inet_service",
        _ => "mark",
    });
    names.collect::<Vec<_>>().join(" . ")
}

fn element_text(set: &Set, element: &Element) -> String {
    let key = value_text(set.key_type, element.key.as_slice());
    match (&element.data, set.data) {
        (Data::Verdict(verdict), _) => format!("{key} : {}", verdict_text(verdict)),
        (Data::Value(value), MapData::Value { data_type, .. }) => {
            format!("{key} : {}", value_text(data_type, value.as_slice()))
        }
        _ => key,
    }
}

fn value_text(packed: u32, mut bytes: &[u8]) -> String {
    let mut parts = Vec::new();
    for part in type_parts(packed) {
        let length = if part == types::IPV6_ADDR { 16 } else { 4 };
        let Some((value, rest)) = bytes.split_at_checked(length) else { break };
        bytes = rest;
        parts.push(match part {
            types::IPV4_ADDR | types::IPV6_ADDR => address_text(value),
            types::INET_PROTO => protocol_text(value[0]),
            types::INET_SERVICE => u16::from_be_bytes([value[0], value[1]]).to_string(),
            _ => format!("0x{:08x}", native(value)),
        });
    }
    parts.join(" . ")
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.first_chunk::<16>() {
        Some(v6) => Some(Ipv6Addr::from(*v6).into()),
        None => Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
    }
}

fn address_text(bytes: &[u8]) -> String {
    address(bytes).map_or_else(String::new, |address| address.to_string())
}

fn protocol_text(number: u8) -> String {
    Protocol::from_number(number)
        .map_or_else(|| number.to_string(), |protocol| protocol.to_string().to_lowercase())
}

fn native(bytes: &[u8]) -> u32 {
    bytes.first_chunk().copied().map_or(0, u32::from_ne_bytes)
}

/// Ranges as nft shortens them.
fn ranges_text(intervals: &Intervals) -> Vec<String> {
    let shortened = |(first, last): (IpAddr, IpAddr)| {
        let longest = if first.is_ipv4() { 32 } else { 128 };
        let network = (0..=longest).find_map(|length| {
            let net = IpNet::new(first, length).ok()?;
            (net.network() == first && net.broadcast() == last).then_some(net)
        });
        match network {
            Some(net) if net.prefix_len() == longest => first.to_string(),
            Some(net) => net.to_string(),
            None => format!("{first}-{last}"),
        }
    };
    intervals.ranges().map(shortened).collect()
}

fn verdict_text(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Drop => "drop".into(),
        Verdict::Goto(chain) => format!("goto {chain}"),
    }
}

fn chain_text(text: &mut String, chain: &Chain, family: Family, key_words: &HashMap<String, u32>) {
    let _ = writeln!(text, "\tchain {} {{", chain.name);
    if let Some(hook) = &chain.hook {
        let (name, priority) = hook_text(hook);
        let _ = writeln!(
            text,
            "\t\ttype {} hook {name} priority {priority}; policy accept;",
            hook.kind
        );
    }
    for rule in &chain.rules {
        let mut reader =
            RuleReader { family, key_words, registers: BTreeMap::new(), parts: vec![] };
        rule.expressions.iter().for_each(|expression| reader.step(expression));
        let _ = writeln!(text, "\t\t{} comment \"{}\"", reader.parts.join(" "), rule.comment);
    }
    text.push_str("\t}\n\n");
}

/// The hook's name, and the priority as nft names it there.
fn hook_text(hook: &Hook) -> (&'static str, String) {
    let (name, base) = match hook.hook {
        NF_INET_PRE_ROUTING => ("prerouting", Some(("dstnat", -100))),
        NF_INET_POST_ROUTING => ("postrouting", Some(("srcnat", 100))),
        NF_INET_FORWARD => ("forward", None),
        _ => ("output", None),
    };
    let priority = match (hook.priority, base) {
        (0, _) => "filter".into(),
        (priority, Some((base, at))) => match priority - at {
            0 => base.to_owned(),
            above @ 1..=10 => format!("{base} + {above}"),
            below @ -10..=-1 => format!("{base} - {}", -below),
            _ => priority.to_string(),
        },
        (priority, None) => priority.to_string(),
    };
    (name, priority)
}

/// What a register holds.
#[derive(Clone, Debug)]
struct Loaded {
    /// As nft names it.
    text: String,
    words: u32,
    /// What a bitwise step left of it, and what it then set.
    masked: Option<(Vec<u8>, Vec<u8>)>,
}

/// Follows a rule's steps over the registers, the way nft does when it lists a rule.
struct RuleReader<'a> {
    family: Family,
    key_words: &'a HashMap<String, u32>,
    registers: BTreeMap<u32, Loaded>,
    parts: Vec<String>,
}

impl RuleReader<'_> {
    fn load(&mut self, to: Register, text: impl Into<String>, words: u32) {
        self.registers.insert(to.index(), Loaded { text: text.into(), words, masked: None });
    }

    /// What stands from a register on, as a concatenation of so many words.
    fn concatenation(&self, from: Register, words: u32) -> String {
        let mut parts = Vec::new();
        let mut next = from.index();
        while next < from.index() + words
            && let Some(held) = self.registers.get(&next)
        {
            parts.push(held.text.as_str());
            next += held.words;
        }
        parts.join(" . ")
    }

    fn key(&self, set: &str, from: Register) -> String {
        self.concatenation(from, self.key_words.get(set).copied().unwrap_or(1))
    }

    fn step(&mut self, expression: &Expression) {
        let ip = family_name(self.family);
        match expression {
            Expression::NetworkHeader { to, offset, length } => {
                let source = if self.family == Family::V4 { 12 } else { 8 };
                let field = if *offset == source { "saddr" } else { "daddr" };
                self.load(*to, format!("{ip} {field}"), length / 4);
            }
            Expression::TransportHeader { to, .. } => self.load(*to, "th dport", 1),
            Expression::TransportProtocol { to } => self.load(*to, "meta l4proto", 1),
            Expression::Mark { to } => self.load(*to, "meta mark", 1),
            Expression::InputInterface { to } => self.load(*to, "iifname", 4),
            Expression::DestinationType { to } => self.load(*to, "fib daddr type", 1),
            Expression::Random { to, modulus } => {
                self.load(*to, format!("numgen random mod {modulus}"), 1);
            }
            Expression::Connection { to, key } => {
                let address_words = if self.family == Family::V4 { 1 } else { 4 };
                match key {
                    Ct::State => self.load(*to, "ct state", 1),
                    Ct::Status => self.load(*to, "ct status", 1),
                    Ct::OriginalPort => self.load(*to, "ct original proto-dst", 1),
                    Ct::OriginalSource { .. } => {
                        self.load(*to, format!("ct original {ip} saddr"), address_words);
                    }
                    Ct::OriginalDestination { .. } => {
                        self.load(*to, format!("ct original {ip} daddr"), address_words);
                    }
                }
            }
            Expression::Bitwise { from, to, mask, xor } => {
                if let Some(mut held) = self.registers.get(&from.index()).cloned() {
                    held.masked = Some((mask.clone(), xor.clone()));
                    self.registers.insert(to.index(), held);
                }
            }
            Expression::Compare { register, comparison, value } => {
                if let Some(held) = self.registers.get(&register.index()) {
                    self.parts.push(comparison_text(held, *comparison, value));
                }
            }
            Expression::SetMark { from } => {
                let masked = self.registers.get(&from.index()).and_then(|h| h.masked.as_ref());
                let value = match masked.map(|(mask, xor)| (native(mask), native(xor))) {
                    Some((mask, 0)) => format!("meta mark & 0x{mask:08x}"),
                    Some((_, xor)) => format!("meta mark | 0x{xor:08x}"),
                    None => self.concatenation(*from, 1),
                };
                self.parts.push(format!("meta mark set {value}"));
            }
            Expression::InSet { set, key } => {
                self.parts.push(format!("{} @{set}", self.key(set, *key)));
            }
            Expression::NotInSet { set, key } => {
                self.parts.push(format!("{} != @{set}", self.key(set, *key)));
            }
            Expression::VerdictLookup { map, key } => {
                self.parts.push(format!("{} vmap @{map}", self.key(map, *key)));
            }
            Expression::MapLookup { map, key, to } => {
                let text = format!("{} map @{map}", self.key(map, *key));
                self.load(*to, text, 1);
            }
            Expression::UpdateMap { map, key, data, timeout } => {
                let key = self.key(map, *key);
                let data = self.concatenation(*data, u32::MAX >> 8);
                let timeout = timeout_text(timeout / 1_000);
                self.parts.push(format!("update @{map} {{ {key} timeout {timeout} : {data} }}"));
            }
            Expression::DestinationNat { address, .. } => {
                self.parts.push(format!("dnat {ip} to {}", self.concatenation(*address, 1)));
            }
            Expression::Masquerade => self.parts.push("masquerade fully-random".into()),
            Expression::RejectWithReset => {
                // nft takes the protocol as said.
                self.parts.pop_if(|part| part == "meta l4proto tcp");
                self.parts.push("reject with tcp reset".into());
            }
            // Port unreachable is what it means when it says no more.
            Expression::RejectWithUnreachable { .. } => self.parts.push("reject".into()),
            Expression::Verdict(verdict) => self.parts.push(verdict_text(verdict)),
        }
    }
}

fn comparison_text(held: &Loaded, comparison: Comparison, value: &[u8]) -> String {
    let not = if comparison == Comparison::NotEqual { "!= " } else { "" };
    let name = held.text.as_str();
    match (name, &held.masked) {
        // Bits that are asked for are not none.
        ("ct state", Some(_)) => "ct state new".into(),
        ("ct status", Some(_)) => "ct status dnat".into(),
        ("meta mark", Some((mask, _))) => {
            format!("meta mark & 0x{:08x} {not}0x{:08x}", native(mask), native(value))
        }
        ("meta l4proto", _) => format!("{name} {not}{}", protocol_text(value[0])),
        ("fib daddr type", _) => format!("{name} {not}local"),
        ("iifname", _) => {
            let text = String::from_utf8_lossy(value);
            match text.split_once('\0') {
                Some((name, _)) => format!("iifname {not}\"{name}\""),
                None => format!("iifname {not}\"{text}*\""),
            }
        }
        (_, Some((mask, _))) => {
            let length: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
            format!("{name} {not}{}/{length}", address_text(value))
        }
        (_, None) => format!("{name} {not}{}", address_text(value)),
    }
}

/// As nft prints it: days, hours, minutes and seconds, without what is none.
fn timeout_text(seconds: u64) -> String {
    let parts = [
        (seconds / 86_400, "d"),
        (seconds / 3_600 % 24, "h"),
        (seconds / 60 % 60, "m"),
        (seconds % 60, "s"),
    ];
    parts.iter().filter(|(n, _)| *n > 0).map(|(n, unit)| format!("{n}{unit}")).collect()
}
