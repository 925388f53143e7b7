//! One transaction: tables, chains, rules, maps and their elements in a batch that the kernel
//! takes whole or not at all.

use std::{borrow::Cow, fmt};

use super::{
    attribute::{Attributes, Header, Writer, text},
    expression::{Expression, Verdict},
    uapi::*,
};
use crate::model::Family;

/// The table that is the proxy's own, in each address family.
pub(crate) const TABLE: &str = "keelson-proxy";
/// The largest list of elements in one message. A nested attribute holds 64 KiB.
const ELEMENTS_MAX: usize = 60_000;

/// Hook, priority and type of a chain that packets enter by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hook {
    /// `nat` or `filter`.
    pub(crate) kind: &'static str,
    /// `NF_INET_*`.
    pub(crate) hook: u32,
    /// Lower is earlier.
    pub(crate) priority: i32,
}

/// One rule and what it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Stands beside the rule in `nft list ruleset`, and tells whether it is still ours.
    pub(crate) comment: String,
    /// What it does.
    pub(crate) expressions: Vec<Expression>,
}

/// A chain with all its rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Unique in the table.
    pub(crate) name: String,
    /// Where packets enter by themselves, if they do.
    pub(crate) hook: Option<Hook>,
    /// In order.
    pub(crate) rules: Vec<Rule>,
}

/// What a map has for each key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapData {
    /// Nothing: it is a set.
    None,
    /// A verdict.
    Verdict,
    /// A value of this type and length.
    Value { data_type: u32, length: u32 },
}

/// A set or a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Set {
    /// Unique in the table.
    pub(crate) name: Cow<'static, str>,
    /// nft's number of the key's type, so that nft can print it.
    pub(crate) key_type: u32,
    /// In bytes; each part of a concatenation is padded to four.
    pub(crate) key_length: u32,
    /// What it maps to.
    pub(crate) data: MapData,
    /// What its elements are.
    pub(crate) kind: SetKind,
}

impl Set {
    /// The kernel's flags of it.
    pub(super) fn flags(&self) -> u32 {
        let map = if self.data == MapData::None { 0 } else { NFT_SET_MAP };
        let kind = match self.kind {
            SetKind::Plain => 0,
            SetKind::Dynamic { .. } => NFT_SET_TIMEOUT | NFT_SET_EVAL,
            SetKind::Intervals => NFT_SET_INTERVAL,
        };
        map | kind
    }
}

/// What a set's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SetKind {
    /// Single keys, written by the proxy.
    Plain,
    /// Single keys, written by packets: each has a time-out, and there are at most this many.
    Dynamic { size: u32 },
    /// Where intervals begin and end.
    Intervals,
}

/// What a message of a batch is about, for errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// The table.
    Table,
    /// Another program's table.
    OtherTable(String),
    /// A chain.
    Chain(String),
    /// A rule, with the kernel's names of its expressions.
    Rule { chain: String, comment: String, expressions: Vec<&'static str> },
    /// A set or map.
    Set(Cow<'static, str>),
    /// Elements of a set or map.
    Elements { set: Cow<'static, str>, added: bool },
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table => write!(f, "table {TABLE}"),
            Self::OtherTable(name) => write!(f, "table {name}"),
            Self::Chain(name) => write!(f, "chain {name}"),
            Self::Rule { chain, comment, expressions } => {
                write!(f, "rule \"{comment}\" of chain {chain} ({})", expressions.join(", "))
            }
            Self::Set(name) => write!(f, "map {name}"),
            Self::Elements { set, added: true } => write!(f, "new elements of {set}"),
            Self::Elements { set, added: false } => write!(f, "removed elements of {set}"),
        }
    }
}

/// A transaction in the making.
#[derive(Debug)]
pub(crate) struct Batch {
    family: Family,
    writer: Writer,
    /// One for each message after the opening one; a message's number is its place here plus one.
    subjects: Vec<Subject>,
    last: usize,
    set_ids: u32,
    finished: bool,
}

impl Batch {
    /// An empty transaction on the table of this family.
    pub(crate) fn new(family: Family) -> Self {
        let mut writer = Writer::default();
        writer.message(frame(NFNL_MSG_BATCH_BEGIN, 0), |_| {});
        Self { family, writer, subjects: Vec::new(), last: 0, set_ids: 0, finished: false }
    }

    /// Whether it would change nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.subjects.is_empty()
    }

    /// What the message with this number is about.
    pub(crate) fn subject(&self, sequence: u32) -> Option<&Subject> {
        self.subjects.get((sequence as usize).checked_sub(1)?)
    }

    /// The number of the last message, which is the one that the kernel answers if all is well.
    pub(crate) fn last_sequence(&self) -> u32 {
        self.subjects.len() as u32
    }

    /// Closes the transaction: the bytes to send. The last message asks for an answer, which comes
    /// when all was done.
    pub(crate) fn finish(&mut self) -> &[u8] {
        if !self.finished {
            self.finished = true;
            self.writer.add_flags(self.last, NLM_F_ACK);
            self.writer.message(frame(NFNL_MSG_BATCH_END, self.last_sequence() + 1), |_| {});
        }
        self.writer.bytes()
    }

    /// Whether it must not be sent, as an attribute is too long.
    pub(crate) fn is_overlong(&self) -> bool {
        self.writer.is_overlong()
    }

    /// What was written so far.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.writer.bytes()
    }

    /// The bytes without the frame that closes the transaction: the kernel checks all of it and
    /// then does nothing.
    pub(crate) fn finish_unclosed(&mut self) -> &[u8] {
        self.writer.add_flags(self.last, NLM_F_ACK);
        self.writer.bytes()
    }

    fn begin(&mut self, message: u8, flags: u16, subject: Subject) -> usize {
        self.subjects.push(subject);
        let header = Header {
            kind: u16::from(NFNL_SUBSYS_NFTABLES) << 8 | u16::from(message),
            flags: NLM_F_REQUEST | flags,
            sequence: self.subjects.len() as u32,
            family: self.family.protocol_family(),
            resource: 0,
        };
        self.last = self.writer.begin_message(header);
        self.last
    }

    fn message(
        &mut self,
        message: u8,
        flags: u16,
        subject: Subject,
        body: impl FnOnce(&mut Writer),
    ) {
        let start = self.begin(message, flags, subject);
        body(&mut self.writer);
        self.writer.end_message(start);
    }

    /// Makes the table if it isn't there. The comment is what tells one layout from another.
    pub(crate) fn add_table(&mut self, comment: &str) {
        self.message(NFT_MSG_NEWTABLE, NLM_F_CREATE, Subject::Table, |w| {
            w.text_attribute(NFTA_TABLE_NAME, TABLE);
            w.u32_attribute(NFTA_TABLE_FLAGS, 0);
            w.bytes_attribute(NFTA_TABLE_USERDATA, &comment_data(comment));
        });
    }

    /// Removes the table with all that is in it. It must be there (see [`Self::add_table`]).
    pub(crate) fn delete_table(&mut self) {
        self.message(NFT_MSG_DELTABLE, 0, Subject::Table, |w| {
            w.text_attribute(NFTA_TABLE_NAME, TABLE);
        });
    }

    /// Removes another program's table of this family. It must be there.
    pub(crate) fn delete_other_table(&mut self, name: &str) {
        self.message(NFT_MSG_DELTABLE, 0, Subject::OtherTable(name.to_owned()), |w| {
            w.text_attribute(NFTA_TABLE_NAME, name);
        });
    }

    /// Makes a chain without its rules, so that chains may point at each other in any order.
    pub(crate) fn add_chain(&mut self, chain: &Chain) {
        let subject = Subject::Chain(chain.name.clone());
        self.message(NFT_MSG_NEWCHAIN, NLM_F_CREATE, subject, |w| {
            w.text_attribute(NFTA_CHAIN_TABLE, TABLE);
            w.text_attribute(NFTA_CHAIN_NAME, &chain.name);
            if let Some(hook) = chain.hook {
                w.nest(NFTA_CHAIN_HOOK, |w| {
                    w.u32_attribute(NFTA_HOOK_HOOKNUM, hook.hook);
                    w.u32_attribute(NFTA_HOOK_PRIORITY, hook.priority as u32);
                });
                // NF_ACCEPT
                w.u32_attribute(NFTA_CHAIN_POLICY, 1);
                w.text_attribute(NFTA_CHAIN_TYPE, hook.kind);
            }
        });
    }

    /// Removes a chain with its rules. Nothing may point to it any more.
    pub(crate) fn delete_chain(&mut self, name: &str) {
        self.message(NFT_MSG_DELCHAIN, 0, Subject::Chain(name.to_owned()), |w| {
            w.text_attribute(NFTA_CHAIN_TABLE, TABLE);
            w.text_attribute(NFTA_CHAIN_NAME, name);
        });
    }

    /// Removes a set with its elements. No rule may look at it any more.
    pub(crate) fn delete_set(&mut self, name: impl Into<Cow<'static, str>>) {
        let name = name.into();
        self.message(NFT_MSG_DELSET, 0, Subject::Set(name.clone()), |w| {
            w.text_attribute(NFTA_SET_TABLE, TABLE);
            w.text_attribute(NFTA_SET_NAME, &name);
        });
    }

    /// Appends a chain's rules to it.
    pub(crate) fn add_rules(&mut self, chain: &Chain) {
        for rule in &chain.rules {
            let subject = Subject::Rule {
                chain: chain.name.clone(),
                comment: rule.comment.clone(),
                expressions: rule.expressions.iter().map(Expression::name).collect(),
            };
            self.message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, subject, |w| {
                w.text_attribute(NFTA_RULE_TABLE, TABLE);
                w.text_attribute(NFTA_RULE_CHAIN, &chain.name);
                w.nest(NFTA_RULE_EXPRESSIONS, |w| {
                    for expression in &rule.expressions {
                        expression.write(w);
                    }
                });
                w.bytes_attribute(NFTA_RULE_USERDATA, &comment_data(&rule.comment));
            });
        }
    }

    /// Makes a set or map.
    pub(crate) fn add_set(&mut self, set: &Set) {
        self.set_ids += 1;
        let id = self.set_ids;
        self.message(NFT_MSG_NEWSET, NLM_F_CREATE, Subject::Set(set.name.clone()), |w| {
            w.text_attribute(NFTA_SET_TABLE, TABLE);
            w.text_attribute(NFTA_SET_NAME, &set.name);
            w.u32_attribute(NFTA_SET_FLAGS, set.flags());
            w.u32_attribute(NFTA_SET_KEY_TYPE, set.key_type);
            w.u32_attribute(NFTA_SET_KEY_LEN, set.key_length);
            match set.data {
                MapData::None => {}
                MapData::Verdict => {
                    w.u32_attribute(NFTA_SET_DATA_TYPE, NFT_DATA_VERDICT);
                    // The kernel wants a length though the type has its own.
                    w.u32_attribute(NFTA_SET_DATA_LEN, 0);
                }
                MapData::Value { data_type, length } => {
                    w.u32_attribute(NFTA_SET_DATA_TYPE, data_type);
                    w.u32_attribute(NFTA_SET_DATA_LEN, length);
                }
            }
            if let SetKind::Dynamic { size } = set.kind {
                w.nest(NFTA_SET_DESC, |w| w.u32_attribute(NFTA_SET_DESC_SIZE, size));
            }
            w.u32_attribute(NFTA_SET_ID, id);
        });
    }

    /// Writes elements, spread over as many messages as they need.
    pub(crate) fn elements<I>(
        &mut self,
        set: impl Into<Cow<'static, str>>,
        added: bool,
        elements: I,
    ) where
        I: IntoIterator<Item = Element>,
    {
        let set = set.into();
        let mut elements = elements.into_iter().peekable();
        while elements.peek().is_some() {
            let (message, flags) =
                if added { (NFT_MSG_NEWSETELEM, NLM_F_CREATE) } else { (NFT_MSG_DELSETELEM, 0) };
            let start = self.begin(message, flags, Subject::Elements { set: set.clone(), added });
            let w = &mut self.writer;
            w.text_attribute(NFTA_SET_ELEM_LIST_TABLE, TABLE);
            w.text_attribute(NFTA_SET_ELEM_LIST_SET, &set);
            let list = w.begin_nest(NFTA_SET_ELEM_LIST_ELEMENTS);
            while w.len() - list < ELEMENTS_MAX
                && let Some(element) = elements.next()
            {
                element.write(w, added);
            }
            w.end_nest(list);
            w.end_message(start);
        }
    }
}

fn frame(kind: u16, sequence: u32) -> Header {
    Header {
        kind,
        flags: NLM_F_REQUEST,
        sequence,
        family: 0,
        resource: u16::from(NFNL_SUBSYS_NFTABLES),
    }
}

/// nft's own form of a comment: type, length, text with its zero byte.
fn comment_data(comment: &str) -> Vec<u8> {
    let text = &comment.as_bytes()[..comment.len().min(250)];
    let mut data = vec![UDATA_COMMENT, text.len() as u8 + 1];
    data.extend_from_slice(text);
    data.push(0);
    data
}

/// The comment in user data, if there is one.
pub(crate) fn comment_of(mut data: &[u8]) -> Option<&str> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == UDATA_COMMENT {
            return text(value);
        }
        data = &rest[usize::from(*length)..];
    }
    None
}

/// A key or its data, without an allocation.
///
/// The longest is the key of sticky services: two IPv6 addresses, protocol and port, 40 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Bytes {
    length: u8,
    bytes: [u8; 40],
}

impl Bytes {
    /// Nothing yet.
    pub(crate) const fn new() -> Self {
        Self { length: 0, bytes: [0; 40] }
    }

    /// These bytes; what is too long for any key is cut, and so matches no key.
    pub(crate) fn from_slice(slice: &[u8]) -> Self {
        Self::new().part(&slice[..slice.len().min(40)])
    }

    /// With one more part of a concatenation, padded to four bytes.
    pub(crate) fn part(mut self, part: &[u8]) -> Self {
        let start = usize::from(self.length);
        self.bytes[start..start + part.len()].copy_from_slice(part);
        self.length = (start + part.len().next_multiple_of(4)).min(40) as u8;
        self
    }

    /// The bytes.
    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x?}", self.as_slice())
    }
}

/// What an element has for its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    /// Nothing: an element of a set.
    None,
    /// A value.
    Value(Bytes),
    /// A verdict.
    Verdict(Verdict),
    /// A verdict that the proxy never writes.
    Foreign,
    /// Nothing: the first key that an interval doesn't reach any more.
    IntervalEnd,
}

/// One element of a set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    /// The key.
    pub(crate) key: Bytes,
    /// The data; when an element is removed, it is only told whether an interval ends there.
    pub(crate) data: Data,
}

impl Element {
    fn write(&self, w: &mut Writer, with_data: bool) {
        let element = w.begin_nest(NFTA_LIST_ELEM);
        w.nest(NFTA_SET_ELEM_KEY, |w| w.bytes_attribute(NFTA_DATA_VALUE, self.key.as_slice()));
        // Where one interval ends another one may begin: the flag tells them apart.
        if self.data == Data::IntervalEnd {
            w.u32_attribute(NFTA_SET_ELEM_FLAGS, NFT_SET_ELEM_INTERVAL_END);
        }
        if with_data {
            match &self.data {
                Data::None | Data::Foreign | Data::IntervalEnd => {}
                Data::Value(value) => w.nest(NFTA_SET_ELEM_DATA, |w| {
                    w.bytes_attribute(NFTA_DATA_VALUE, value.as_slice());
                }),
                Data::Verdict(verdict) => w.nest(NFTA_SET_ELEM_DATA, |w| verdict.write(w)),
            }
        }
        w.end_nest(element);
    }

    /// Reads an element as the kernel lists it.
    pub(crate) fn parse(attributes: Attributes<'_>) -> Option<Self> {
        let key = Attributes(attributes.find(NFTA_SET_ELEM_KEY)?).find(NFTA_DATA_VALUE)?;
        let flags = attributes.find_u32(NFTA_SET_ELEM_FLAGS).unwrap_or(0);
        let data = match attributes.find(NFTA_SET_ELEM_DATA).map(Attributes) {
            None if flags & NFT_SET_ELEM_INTERVAL_END != 0 => Data::IntervalEnd,
            None => Data::None,
            Some(data) => match (data.find(NFTA_DATA_VALUE), data.find(NFTA_DATA_VERDICT)) {
                (Some(value), _) => Data::Value(Bytes::from_slice(value)),
                (None, Some(verdict)) => {
                    Verdict::read(Attributes(verdict)).map_or(Data::Foreign, Data::Verdict)
                }
                (None, None) => Data::None,
            },
        };
        Some(Self { key: Bytes::from_slice(key), data })
    }
}
