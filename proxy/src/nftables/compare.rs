//! Whether the parts of the table are still what the proxy wrote: rules step by step, chains with
//! their hook and policy, sets with all that they were declared with.
//!
//! What the kernel lists is not byte for byte what it was given: the order is its own, and it adds
//! what was left to it. [`ADDITIONS`] are the only ones that an unchanged rule may have.

use super::{
    attribute::{Attributes, Writer},
    batch::{Chain, Hook, MapData, Rule, Set, SetKind, TABLE, comment_of},
    expression::Verdict,
    uapi::*,
};

/// `NF_ACCEPT`, the policy of every chain that packets enter by themselves.
const ACCEPT: u32 = 1;

/// The table as the kernel lists it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct FoundTable {
    /// Tells the layout.
    pub(super) comment: String,
    /// `dormant`, and who owns it.
    flags: u32,
    /// How many chains, sets and other things there are in it.
    parts: u32,
}

impl FoundTable {
    /// Reads the table's own description; `None` if it is another's.
    pub(super) fn read(attributes: Attributes<'_>) -> Option<Self> {
        if attributes.find_text(NFTA_TABLE_NAME) != Some(TABLE) {
            return None;
        }
        let comment = attributes.find(NFTA_TABLE_USERDATA).and_then(comment_of);
        Some(Self {
            comment: comment.unwrap_or_default().to_owned(),
            flags: attributes.find_u32(NFTA_TABLE_FLAGS).unwrap_or(0),
            parts: attributes.find_u32(NFTA_TABLE_USE).unwrap_or(0),
        })
    }

    /// What is wrong with a table that has so many chains and sets, if anything is.
    pub(super) fn difference(&self, chains_and_sets: usize) -> Option<String> {
        if self.flags & NFT_TABLE_F_DORMANT != 0 {
            Some("the table was made dormant".into())
        } else if self.flags != 0 {
            Some(format!("the table has flags {:#x} that it was not made with", self.flags))
        } else if self.parts as usize > chains_and_sets {
            Some("there is something in the table that isn't ours".into())
        } else {
            None
        }
    }
}

/// All that a set is declared with and that decides what may be in it, and for how long.
#[derive(Debug, PartialEq, Eq)]
struct Declared {
    flags: u32,
    key: (u32, u32),
    data: Option<(u32, u32)>,
    size: u32,
    timeout: bool,
    collected: u32,
    steps: bool,
}

/// A set or map as the kernel lists it.
#[derive(Debug)]
pub(super) struct FoundSet {
    declared: Declared,
    /// How many elements it has, where the kernel tells (since Linux 6.16).
    pub(super) count: Option<u32>,
}

impl FoundSet {
    /// What the kernel lists of a set.
    pub(super) fn read(attributes: Attributes<'_>) -> Self {
        let count = attributes.find_u32(NFTA_SET_COUNT);
        Self { declared: Declared::read(attributes), count }
    }

    /// Whether it was declared like this.
    pub(super) fn is(&self, set: &Set) -> bool {
        self.declared == Declared::of(set)
    }
}

impl Declared {
    fn read(attributes: Attributes<'_>) -> Self {
        let number = |kind| attributes.find_u32(kind).unwrap_or(0);
        let data = attributes.find_u32(NFTA_SET_DATA_TYPE).map(|data_type| {
            // A verdict has a length of the kernel's own.
            let verdict = data_type == NFT_DATA_VERDICT;
            (data_type, if verdict { 0 } else { number(NFTA_SET_DATA_LEN) })
        });
        let description = attributes.find(NFTA_SET_DESC).map(Attributes);
        // Less room for what the proxy writes shows by itself: the kernel refuses what is too much,
        // and that is said of each Service.
        let written_by_packets = number(NFTA_SET_FLAGS) & NFT_SET_EVAL != 0;
        let steps = [NFTA_SET_EXPR, NFTA_SET_EXPRESSIONS, NFTA_SET_OBJ_TYPE];
        Self {
            flags: number(NFTA_SET_FLAGS),
            key: (number(NFTA_SET_KEY_TYPE), number(NFTA_SET_KEY_LEN)),
            data,
            size: description
                .filter(|_| written_by_packets)
                .and_then(|d| d.find_u32(NFTA_SET_DESC_SIZE))
                .unwrap_or(0),
            timeout: attributes.find(NFTA_SET_TIMEOUT).is_some(),
            collected: number(NFTA_SET_GC_INTERVAL),
            steps: steps.iter().any(|kind| attributes.find(*kind).is_some()),
        }
    }

    /// What the kernel lists of this set where nobody has changed it.
    fn of(set: &Set) -> Self {
        Self {
            flags: set.flags(),
            key: (set.key_type, set.key_length),
            data: match set.data {
                MapData::None => None,
                MapData::Verdict => Some((NFT_DATA_VERDICT, 0)),
                MapData::Value { data_type, length } => Some((data_type, length)),
            },
            size: match set.kind {
                SetKind::Dynamic { size } => size,
                SetKind::Plain | SetKind::Intervals => 0,
            },
            timeout: false,
            collected: 0,
            steps: false,
        }
    }
}

/// A chain as the kernel lists it.
#[derive(Debug, Default)]
pub(super) struct FoundChain {
    base: Option<FoundBase>,
    /// In order.
    pub(super) rules: Vec<FoundRule>,
}

/// How packets enter a chain by themselves, and what becomes of those that no rule decides about.
#[derive(Debug, PartialEq, Eq)]
struct FoundBase {
    kind: String,
    hook: u32,
    priority: i32,
    policy: u32,
}

impl FoundChain {
    /// What the kernel lists of a chain; its rules are listed by themselves.
    pub(super) fn read(attributes: Attributes<'_>) -> Self {
        let base = attributes.find(NFTA_CHAIN_HOOK).map(Attributes).map(|hook| FoundBase {
            kind: attributes.find_text(NFTA_CHAIN_TYPE).unwrap_or_default().to_owned(),
            hook: hook.find_u32(NFTA_HOOK_HOOKNUM).unwrap_or(u32::MAX),
            priority: hook.find_u32(NFTA_HOOK_PRIORITY).unwrap_or(0) as i32,
            policy: attributes.find_u32(NFTA_CHAIN_POLICY).unwrap_or(ACCEPT),
        });
        Self { base, rules: Vec::new() }
    }

    /// What differs from a chain as it was written, if anything does.
    pub(super) fn difference(&self, chain: &Chain) -> Option<String> {
        let name = &chain.name;
        let hooked = |hook: Hook| FoundBase {
            kind: hook.kind.to_owned(),
            hook: hook.hook,
            priority: hook.priority,
            policy: ACCEPT,
        };
        let expected = chain.hook.map(hooked);
        if self.base != expected {
            let policy = |base: &Option<FoundBase>| base.as_ref().map(|base| base.policy);
            return Some(if policy(&self.base) == policy(&expected) {
                format!("the chain {name} is of another type or at another hook or priority")
            } else {
                format!("the policy of the chain {name} was changed")
            });
        }
        if self.rules.len() != chain.rules.len() {
            return Some(format!(
                "the chain {name} has {} rules instead of {}",
                self.rules.len(),
                chain.rules.len()
            ));
        }
        let edited = chain.rules.iter().zip(&self.rules).find(|(ours, found)| !found.is(ours));
        edited.map(|(rule, _)| {
            format!("the rule \"{}\" of the chain {name} was edited", rule.comment)
        })
    }
}

/// A rule as the kernel lists it.
#[derive(Debug)]
pub(super) struct FoundRule {
    comment: String,
    expressions: Vec<u8>,
}

impl FoundRule {
    /// What the kernel lists of a rule.
    pub(super) fn read(attributes: Attributes<'_>) -> Self {
        let comment = attributes.find(NFTA_RULE_USERDATA).and_then(comment_of);
        Self {
            comment: comment.unwrap_or_default().to_owned(),
            expressions: attributes.find(NFTA_RULE_EXPRESSIONS).unwrap_or_default().to_vec(),
        }
    }

    /// Whether it is this rule.
    fn is(&self, rule: &Rule) -> bool {
        let mut writer = Writer::default();
        rule.expressions.iter().for_each(|expression| expression.write(&mut writer));
        let mut found = Attributes(&self.expressions);
        self.comment == rule.comment
            && Attributes(writer.bytes()).all(|(_, ours)| {
                found
                    .next()
                    .is_some_and(|(_, found)| same_step(Attributes(ours), Attributes(found)))
            })
            && found.next().is_none()
    }
}

fn same_step(ours: Attributes<'_>, found: Attributes<'_>) -> bool {
    let Some(name) = ours.find_text(NFTA_EXPR_NAME) else { return false };
    if found.find_text(NFTA_EXPR_NAME) != Some(name) {
        return false;
    }
    let (ours, found) = (nested(ours, NFTA_EXPR_DATA), nested(found, NFTA_EXPR_DATA));
    let same = |kind, ours: &[u8], found: &[u8]| {
        if holds_data(name, kind) { same_data(ours, found) } else { ours == found }
    };
    let (mut asked, mut listed) = (ours, found);
    asked.all(|(kind, value)| found.find(kind).is_some_and(|found| same(kind, value, found)))
        && listed
            .all(|(kind, value)| ours.find(kind).is_some() || is_addition(name, kind, value, found))
}

fn nested(attributes: Attributes<'_>, kind: u16) -> Attributes<'_> {
    Attributes(attributes.find(kind).unwrap_or_default())
}

/// Whether an attribute of an expression holds a value or a verdict.
fn holds_data(name: &str, kind: u16) -> bool {
    matches!(
        (name, kind),
        ("cmp", NFTA_CMP_DATA)
            | ("bitwise", NFTA_BITWISE_MASK | NFTA_BITWISE_XOR)
            | ("immediate", NFTA_IMMEDIATE_DATA)
    )
}

fn same_data(ours: &[u8], found: &[u8]) -> bool {
    let (ours, found) = (Attributes(ours), Attributes(found));
    match (ours.find(NFTA_DATA_VALUE), found.find(NFTA_DATA_VALUE)) {
        (Some(ours), Some(found)) => ours == found,
        (None, None) => {
            let verdict = |data| Verdict::read(nested(data, NFTA_DATA_VERDICT));
            verdict(ours).is_some() && verdict(ours) == verdict(found)
        }
        _ => false,
    }
}

/// What an attribute that the kernel added may say.
#[derive(Clone, Copy)]
enum Addition {
    /// This, in network order.
    Number(u32),
    /// The same as this other one.
    Same(u16),
}

/// What the kernel lists of an expression although it was not told.
const ADDITIONS: [(&str, u16, Addition); 7] = [
    // NFT_BITWISE_MASK_XOR
    ("bitwise", NFTA_BITWISE_OP, Addition::Number(0)),
    ("numgen", NFTA_NG_OFFSET, Addition::Number(0)),
    ("lookup", NFTA_LOOKUP_FLAGS, Addition::Number(0)),
    ("dynset", NFTA_DYNSET_FLAGS, Addition::Number(0)),
    // A single address and port are ranges of one.
    ("nat", NFTA_NAT_REG_ADDR_MAX, Addition::Same(NFTA_NAT_REG_ADDR_MIN)),
    ("nat", NFTA_NAT_REG_PROTO_MAX, Addition::Same(NFTA_NAT_REG_PROTO_MIN)),
    // NF_NAT_RANGE_MAP_IPS and NF_NAT_RANGE_PROTO_SPECIFIED: that there is an address and a port.
    ("nat", NFTA_NAT_FLAGS, Addition::Number(3)),
];

/// The newest attribute of each expression that is known here.
const NEWEST: [(&str, u16); 13] = [
    ("payload", 8),
    ("meta", 3),
    ("ct", 4),
    ("numgen", 6),
    ("fib", 3),
    ("lookup", 5),
    ("dynset", 10),
    ("cmp", 3),
    ("bitwise", 8),
    ("nat", 7),
    ("masq", 3),
    ("reject", 2),
    ("immediate", 2),
];

fn is_addition(name: &str, kind: u16, value: &[u8], found: Attributes<'_>) -> bool {
    let known = ADDITIONS.iter().find(|(n, k, _)| (*n, *k) == (name, kind));
    match known {
        Some((_, _, Addition::Number(number))) => value == number.to_be_bytes(),
        Some((_, _, Addition::Same(other))) => found.find(*other) == Some(value),
        // What only aligns the next one is empty. What is newer than this program is something that
        // the kernel says on its own: nobody can have asked it to do anything that we don't.
        None => value.is_empty() || NEWEST.iter().any(|(n, newest)| *n == name && kind > *newest),
    }
}
