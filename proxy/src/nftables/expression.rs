//! The expressions that the proxy's rules are made of.
//!
//! A rule is a list of small steps over registers: load a header field, look it up in a map,
//! translate. Registers have 4 bytes; what is looked up together stands in consecutive ones.

use std::borrow::Cow;

use super::{
    attribute::{Attributes, Writer},
    uapi::*,
};

/// One 4-byte register (`NFT_REG32_00` is 8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Register(u32);

impl Register {
    /// The `index`th register, from 0 to 15.
    pub(crate) const fn new(index: u32) -> Self {
        assert!(index < 16, "there are 16 registers");
        Self(8 + index)
    }

    /// Which one it is, from 0 to 15.
    pub(crate) const fn index(self) -> u32 {
        self.0 - 8
    }

    /// Sixteen-byte registers have numbers of their own, which nft prefers where one begins: it
    /// names these, and so do we, so that what is listed is what nft itself would have written.
    const fn number(self) -> u32 {
        if (self.0 - 8).is_multiple_of(4) { 1 + (self.0 - 8) / 4 } else { self.0 }
    }
}

/// What happens to the packet next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verdict {
    /// Away with it.
    Drop,
    /// On in this chain for good.
    Goto(String),
}

impl Verdict {
    /// Writes the verdict as the data of an element or of an immediate.
    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.nest(NFTA_DATA_VERDICT, |w| match self {
            Self::Drop => w.u32_attribute(NFTA_VERDICT_CODE, NF_DROP as u32),
            Self::Goto(chain) => {
                w.u32_attribute(NFTA_VERDICT_CODE, NFT_GOTO as u32);
                w.text_attribute(NFTA_VERDICT_CHAIN, chain);
            }
        });
    }

    /// A verdict as the kernel lists it, if it is one that the proxy may write.
    pub(crate) fn read(attributes: Attributes<'_>) -> Option<Self> {
        match attributes.find_u32(NFTA_VERDICT_CODE)? as i32 {
            NF_DROP => Some(Self::Drop),
            NFT_GOTO => Some(Self::Goto(attributes.find_text(NFTA_VERDICT_CHAIN)?.to_owned())),
            _ => None,
        }
    }
}

/// Whether a comparison asks for the same or for another value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    /// The same.
    Equal,
    /// Another.
    NotEqual,
}

/// A part of the packet's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ct {
    /// `ct state`, as bits.
    State,
    /// `ct status`, as bits.
    Status,
    /// `ct original ip saddr`.
    OriginalSource {
        /// Of an IPv6 connection.
        v6: bool,
    },
    /// `ct original ip daddr`.
    OriginalDestination {
        /// Of an IPv6 connection.
        v6: bool,
    },
    /// `ct original proto-dst`.
    OriginalPort,
}

/// One step of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expression {
    /// Bytes of the network header.
    NetworkHeader { to: Register, offset: u32, length: u32 },
    /// Bytes of the transport header.
    TransportHeader { to: Register, offset: u32, length: u32 },
    /// The transport protocol.
    TransportProtocol { to: Register },
    /// The packet's mark.
    Mark { to: Register },
    /// Sets the packet's mark.
    SetMark { from: Register },
    /// A part of the connection.
    Connection { to: Register, key: Ct },
    /// A random number below `modulus`.
    Random { to: Register, modulus: u32 },
    /// Whose address the destination is, as the routing table has it (`fib daddr type`).
    DestinationType { to: Register },
    /// The name of the interface that the packet came in by; all zeroes if it came in by none.
    InputInterface { to: Register },
    /// Goes on if the key is in the set.
    InSet { set: &'static str, key: Register },
    /// Goes on if the key is not in the set.
    NotInSet { set: Cow<'static, str>, key: Register },
    /// Loads what the map has for the key; ends the rule if it has nothing.
    MapLookup { map: &'static str, key: Register, to: Register },
    /// Does what the verdict map says for the key; goes on to the next rule if it says nothing.
    VerdictLookup { map: &'static str, key: Register },
    /// Remembers key and data in a map, or renews the time-out (in milliseconds).
    UpdateMap { map: &'static str, key: Register, data: Register, timeout: u64 },
    /// Ends the rule unless the comparison holds.
    Compare { register: Register, comparison: Comparison, value: Vec<u8> },
    /// `to = (from & mask) ^ xor`.
    Bitwise { from: Register, to: Register, mask: Vec<u8>, xor: Vec<u8> },
    /// Translates the destination to the address and port in these registers.
    DestinationNat { family: u8, address: Register, port: Register },
    /// Translates the source to the address of the interface it leaves by.
    Masquerade,
    /// Answers with a TCP reset.
    RejectWithReset,
    /// Answers with ICMP (or ICMPv6) port unreachable; the code depends on the family.
    RejectWithUnreachable { code: u8 },
    /// A verdict.
    Verdict(Verdict),
}

impl Expression {
    /// The kernel's name of it, for which a module may be missing.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::NetworkHeader { .. } | Self::TransportHeader { .. } => "payload",
            Self::TransportProtocol { .. }
            | Self::InputInterface { .. }
            | Self::Mark { .. }
            | Self::SetMark { .. } => "meta",
            Self::Connection { .. } => "ct",
            Self::Random { .. } => "numgen",
            Self::DestinationType { .. } => "fib",
            Self::InSet { .. }
            | Self::NotInSet { .. }
            | Self::MapLookup { .. }
            | Self::VerdictLookup { .. } => "lookup",
            Self::UpdateMap { .. } => "dynset",
            Self::Compare { .. } => "cmp",
            Self::Bitwise { .. } => "bitwise",
            Self::DestinationNat { .. } => "nat",
            Self::Masquerade => "masq",
            Self::RejectWithReset | Self::RejectWithUnreachable { .. } => "reject",
            Self::Verdict(_) => "immediate",
        }
    }

    /// Writes it as one element of a rule's list of expressions.
    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.nest(NFTA_LIST_ELEM, |w| {
            w.text_attribute(NFTA_EXPR_NAME, self.name());
            w.nest(NFTA_EXPR_DATA, |w| self.write_data(w));
        });
    }

    fn write_data(&self, w: &mut Writer) {
        match self {
            Self::NetworkHeader { to, offset, length } => {
                write_payload(w, NFT_PAYLOAD_NETWORK_HEADER, *to, *offset, *length);
            }
            Self::TransportHeader { to, offset, length } => {
                write_payload(w, NFT_PAYLOAD_TRANSPORT_HEADER, *to, *offset, *length);
            }
            Self::TransportProtocol { to } => {
                w.u32_attribute(NFTA_META_KEY, NFT_META_L4PROTO);
                w.u32_attribute(NFTA_META_DREG, to.number());
            }
            Self::Mark { to } => {
                w.u32_attribute(NFTA_META_KEY, NFT_META_MARK);
                w.u32_attribute(NFTA_META_DREG, to.number());
            }
            Self::InputInterface { to } => {
                w.u32_attribute(NFTA_META_KEY, NFT_META_IIFNAME);
                w.u32_attribute(NFTA_META_DREG, to.number());
            }
            Self::SetMark { from } => {
                w.u32_attribute(NFTA_META_KEY, NFT_META_MARK);
                w.u32_attribute(NFTA_META_SREG, from.number());
            }
            Self::Connection { to, key } => {
                let (key, original) = match key {
                    Ct::State => (NFT_CT_STATE, false),
                    Ct::Status => (NFT_CT_STATUS, false),
                    Ct::OriginalSource { v6: false } => (NFT_CT_SRC_IP, true),
                    Ct::OriginalSource { v6: true } => (NFT_CT_SRC_IP6, true),
                    Ct::OriginalDestination { v6: false } => (NFT_CT_DST_IP, true),
                    Ct::OriginalDestination { v6: true } => (NFT_CT_DST_IP6, true),
                    Ct::OriginalPort => (NFT_CT_PROTO_DST, true),
                };
                w.u32_attribute(NFTA_CT_KEY, key);
                w.u32_attribute(NFTA_CT_DREG, to.number());
                if original {
                    w.bytes_attribute(NFTA_CT_DIRECTION, &[0]);
                }
            }
            Self::Random { to, modulus } => {
                w.u32_attribute(NFTA_NG_DREG, to.number());
                w.u32_attribute(NFTA_NG_MODULUS, *modulus);
                w.u32_attribute(NFTA_NG_TYPE, NFT_NG_RANDOM);
            }
            Self::DestinationType { to } => {
                w.u32_attribute(NFTA_FIB_DREG, to.number());
                w.u32_attribute(NFTA_FIB_RESULT, NFT_FIB_RESULT_ADDRTYPE);
                w.u32_attribute(NFTA_FIB_FLAGS, NFTA_FIB_F_DADDR);
            }
            Self::InSet { set, key } => {
                w.text_attribute(NFTA_LOOKUP_SET, set);
                w.u32_attribute(NFTA_LOOKUP_SREG, key.number());
            }
            Self::NotInSet { set, key } => {
                w.text_attribute(NFTA_LOOKUP_SET, set);
                w.u32_attribute(NFTA_LOOKUP_SREG, key.number());
                w.u32_attribute(NFTA_LOOKUP_FLAGS, NFT_LOOKUP_F_INV);
            }
            Self::MapLookup { map, key, to } => {
                w.text_attribute(NFTA_LOOKUP_SET, map);
                w.u32_attribute(NFTA_LOOKUP_SREG, key.number());
                w.u32_attribute(NFTA_LOOKUP_DREG, to.number());
            }
            Self::VerdictLookup { map, key } => {
                w.text_attribute(NFTA_LOOKUP_SET, map);
                w.u32_attribute(NFTA_LOOKUP_SREG, key.number());
                w.u32_attribute(NFTA_LOOKUP_DREG, NFT_REG_VERDICT);
            }
            Self::UpdateMap { map, key, data, timeout } => {
                w.text_attribute(NFTA_DYNSET_SET_NAME, map);
                w.u32_attribute(NFTA_DYNSET_OP, NFT_DYNSET_OP_UPDATE);
                w.u32_attribute(NFTA_DYNSET_SREG_KEY, key.number());
                w.u32_attribute(NFTA_DYNSET_SREG_DATA, data.number());
                w.bytes_attribute(NFTA_DYNSET_TIMEOUT, &timeout.to_be_bytes());
            }
            Self::Compare { register, comparison, value } => {
                w.u32_attribute(NFTA_CMP_SREG, register.number());
                let op = match comparison {
                    Comparison::Equal => NFT_CMP_EQ,
                    Comparison::NotEqual => NFT_CMP_NEQ,
                };
                w.u32_attribute(NFTA_CMP_OP, op);
                w.nest(NFTA_CMP_DATA, |w| w.bytes_attribute(NFTA_DATA_VALUE, value));
            }
            Self::Bitwise { from, to, mask, xor } => {
                w.u32_attribute(NFTA_BITWISE_SREG, from.number());
                w.u32_attribute(NFTA_BITWISE_DREG, to.number());
                w.u32_attribute(NFTA_BITWISE_LEN, mask.len() as u32);
                w.nest(NFTA_BITWISE_MASK, |w| w.bytes_attribute(NFTA_DATA_VALUE, mask));
                w.nest(NFTA_BITWISE_XOR, |w| w.bytes_attribute(NFTA_DATA_VALUE, xor));
            }
            Self::DestinationNat { family, address, port } => {
                w.u32_attribute(NFTA_NAT_TYPE, NFT_NAT_DNAT);
                w.u32_attribute(NFTA_NAT_FAMILY, u32::from(*family));
                w.u32_attribute(NFTA_NAT_REG_ADDR_MIN, address.number());
                w.u32_attribute(NFTA_NAT_REG_PROTO_MIN, port.number());
            }
            Self::Masquerade => {
                w.u32_attribute(NFTA_MASQ_FLAGS, NF_NAT_RANGE_PROTO_RANDOM_FULLY);
            }
            Self::RejectWithReset => w.u32_attribute(NFTA_REJECT_TYPE, NFT_REJECT_TCP_RST),
            Self::RejectWithUnreachable { code } => {
                w.u32_attribute(NFTA_REJECT_TYPE, NFT_REJECT_ICMP_UNREACH);
                w.bytes_attribute(NFTA_REJECT_ICMP_CODE, &[*code]);
            }
            Self::Verdict(verdict) => {
                w.u32_attribute(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
                w.nest(NFTA_IMMEDIATE_DATA, |w| verdict.write(w));
            }
        }
    }
}

fn write_payload(w: &mut Writer, base: u32, to: Register, offset: u32, length: u32) {
    w.u32_attribute(NFTA_PAYLOAD_DREG, to.number());
    w.u32_attribute(NFTA_PAYLOAD_BASE, base);
    w.u32_attribute(NFTA_PAYLOAD_OFFSET, offset);
    w.u32_attribute(NFTA_PAYLOAD_LEN, length);
}
