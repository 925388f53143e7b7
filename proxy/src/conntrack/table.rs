//! The kernel's connection table, over netlink.
//!
//! The kernel's own filter does the looking (`CTA_FILTER` on delete, Linux 6.8); older kernels list
//! what matches and are told to delete each.

use std::{collections::HashSet, io, net::IpAddr};

use crate::{
    backend::Stale,
    model::{Family, Protocol},
    nftables::{
        attribute::{Attributes, Header, Messages, Writer},
        uapi::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR},
        wire::{Wire, error_of},
    },
};

// `linux/netfilter/nfnetlink_conntrack.h`
const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_NEW: u16 = 0;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_ID: u16 = 12;
const CTA_FILTER: u16 = 25;
const CTA_STATUS_MASK: u16 = 26;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
// `linux/netfilter/nf_conntrack_common.h`
const IPS_SEEN_REPLY: u32 = 1 << 1;
// `net/netfilter/nf_conntrack_netlink.c`, `CTA_FILTER_F_*`
const FILTER_IP_SRC: u32 = 1 << 0;
const FILTER_IP_DST: u32 = 1 << 1;
const FILTER_PROTO_NUM: u32 = 1 << 3;
const FILTER_PROTO_SRC_PORT: u32 = 1 << 4;
const FILTER_PROTO_DST_PORT: u32 = 1 << 5;

/// From so many on, one listing of the whole table is cheaper than a walk of it for each.
const LIST_FROM: usize = 32;
/// Address, protocol and port that clients use, and where they were sent; `None` for any.
type Way = (Option<IpAddr>, u8, u16, Option<(IpAddr, u16)>);

/// A socket to the connection table.
pub(crate) struct ConntrackTable {
    wire: Wire,
    sequence: u32,
    /// Whether the kernel deletes by filter; not known until tried.
    by_filter: bool,
}

impl ConntrackTable {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When there is none to be had.
    pub(crate) fn open() -> io::Result<Self> {
        Wire::open().map(Self::over)
    }

    /// Talks over this wire.
    pub(crate) fn over(wire: Wire) -> Self {
        Self { wire, sequence: 0, by_filter: true }
    }

    /// Removes the connections of one family that went the stale ways. How many are known to have gone: the
    /// kernel doesn't count what its own filter removed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn forget(&mut self, stale: &[Stale]) -> io::Result<u64> {
        let Some(family) = stale.first().map(|one| one.frontend.family) else { return Ok(0) };
        let few = stale.len() < LIST_FROM;
        let mut listed: Vec<&Stale> = Vec::new();
        for one in stale {
            if !(few && self.by_filter && is_filtered_well(one)) {
                listed.push(one);
                continue;
            }
            match self.delete_by_filter(one) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => {
                    tracing::debug!(%error, "the kernel doesn't delete connections by filter");
                    self.by_filter = false;
                    listed.push(one);
                }
            }
        }
        if listed.is_empty() { Ok(0) } else { self.delete_listed(family, &listed) }
    }

    fn delete_by_filter(&mut self, stale: &Stale) -> io::Result<()> {
        let family = stale.frontend.family.protocol_family();
        let sequence = self.send(IPCTNL_MSG_CT_DELETE, NLM_F_ACK, family, |w| {
            let mut original = FILTER_PROTO_NUM | FILTER_PROTO_DST_PORT;
            w.nest(CTA_TUPLE_ORIG, |w| {
                if let Some(address) = stale.frontend.address {
                    original |= FILTER_IP_DST;
                    w.nest(CTA_TUPLE_IP, |w| write_address(w, address, false));
                }
                w.nest(CTA_TUPLE_PROTO, |w| {
                    w.bytes_attribute(CTA_PROTO_NUM, &[stale.frontend.protocol.number()]);
                    w.bytes_attribute(CTA_PROTO_DST_PORT, &stale.frontend.port.to_be_bytes());
                });
            });
            let mut reply = 0;
            if let Some(endpoint) = stale.endpoint {
                reply = FILTER_IP_SRC | FILTER_PROTO_NUM | FILTER_PROTO_SRC_PORT;
                w.nest(CTA_TUPLE_REPLY, |w| {
                    w.nest(CTA_TUPLE_IP, |w| write_address(w, endpoint.address, true));
                    w.nest(CTA_TUPLE_PROTO, |w| {
                        w.bytes_attribute(CTA_PROTO_NUM, &[stale.frontend.protocol.number()]);
                        w.bytes_attribute(CTA_PROTO_SRC_PORT, &endpoint.port.to_be_bytes());
                    });
                });
            }
            if stale.is_unanswered() {
                w.bytes_attribute(CTA_STATUS, &0u32.to_be_bytes());
                w.bytes_attribute(CTA_STATUS_MASK, &IPS_SEEN_REPLY.to_be_bytes());
            }
            // Unlike most of netfilter's numbers these are in the machine's own order.
            w.nest(CTA_FILTER, |w| {
                w.bytes_attribute(CTA_FILTER_ORIG_FLAGS, &original.to_ne_bytes());
                w.bytes_attribute(CTA_FILTER_REPLY_FLAGS, &reply.to_ne_bytes());
            });
        })?;
        self.read_until(sequence, |_| {})
    }

    fn delete_listed(&mut self, family: Family, stale: &[&Stale]) -> io::Result<u64> {
        let ways = |unanswered: bool| -> HashSet<Way> {
            let some = stale.iter().filter(|s| s.is_unanswered() == unanswered);
            some.map(|s| {
                let endpoint = s.endpoint.map(|e| (e.address, e.port));
                (s.frontend.address, s.frontend.protocol.number(), s.frontend.port, endpoint)
            })
            .collect()
        };
        let (unanswered, wanted) = (ways(true), ways(false));
        self.delete_where(family, |original, reply| {
            let endpoint = Some((reply.source, reply.source_port));
            let (protocol, port) = (original.protocol, original.destination_port);
            let itself = (Some(original.destination), protocol, port, endpoint);
            (!reply.seen && unanswered.contains(&itself))
                || [Some(original.destination), None].into_iter().any(|address| {
                    let mut ways = [endpoint, None].into_iter();
                    ways.any(|e| wanted.contains(&(address, protocol, port, e)))
                })
        })
    }

    /// Lists the connections of a family and removes those that fit, by what the client sent and
    /// how answers come. How many there were.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn delete_where(
        &mut self,
        family: Family,
        fits: impl Fn(&Tuple, &Tuple) -> bool,
    ) -> io::Result<u64> {
        let family = family.protocol_family();
        let sequence = self.send(IPCTNL_MSG_CT_GET, NLM_F_DUMP, family, |_| {})?;
        let mut found: Vec<(Vec<u8>, Option<Vec<u8>>)> = Vec::new();
        self.read_until(sequence, |attributes| {
            let Some(tuple) = attributes.find(CTA_TUPLE_ORIG) else { return };
            let (Some(original), Some(mut reply)) =
                (read_tuple(tuple), attributes.find(CTA_TUPLE_REPLY).and_then(read_tuple))
            else {
                return;
            };
            let status = attributes.find(CTA_STATUS).and_then(|status| status.first_chunk());
            reply.seen = status.is_none_or(|s| u32::from_be_bytes(*s) & IPS_SEEN_REPLY != 0);
            if fits(&original, &reply) {
                found.push((tuple.to_vec(), attributes.find(CTA_ID).map(<[u8]>::to_vec)));
            }
        })?;
        let mut deleted = 0;
        for (tuple, id) in found {
            let sequence = self.send(IPCTNL_MSG_CT_DELETE, NLM_F_ACK, family, |w| {
                w.bytes_attribute(CTA_TUPLE_ORIG | crate::nftables::uapi::NLA_F_NESTED, &tuple);
                if let Some(id) = &id {
                    w.bytes_attribute(CTA_ID, id);
                }
            })?;
            match self.read_until(sequence, |_| {}) {
                Ok(()) => deleted += 1,
                // It ended by itself.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(deleted)
    }

    fn send(
        &mut self,
        message: u16,
        flags: u16,
        family: u8,
        body: impl FnOnce(&mut Writer),
    ) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut writer = Writer::default();
        let header = Header {
            kind: NFNL_SUBSYS_CTNETLINK << 8 | message,
            flags: NLM_F_REQUEST | flags,
            sequence: self.sequence,
            family,
            resource: 0,
        };
        writer.message(header, body);
        self.wire.send(writer.bytes())?;
        Ok(self.sequence)
    }

    fn read_until(
        &mut self,
        sequence: u32,
        mut each: impl FnMut(Attributes<'_>),
    ) -> io::Result<()> {
        while let Some(messages) = self.wire.read()? {
            for message in Messages(messages).filter(|m| m.sequence == sequence) {
                let ended = match message.kind {
                    NLMSG_DONE => Ok(()),
                    NLMSG_ERROR => {
                        match message.payload.first_chunk().copied().map(i32::from_ne_bytes) {
                            Some(0) => Ok(()),
                            Some(code) => Err(error_of(code)),
                            None => Err(io::ErrorKind::InvalidData.into()),
                        }
                    }
                    kind => {
                        if kind == NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW {
                            each(message.attributes());
                        }
                        continue;
                    }
                };
                self.wire.settled();
                return ended;
            }
        }
        Err(io::Error::other("the kernel's answers were lost"))
    }
}

/// Whether the kernel's filter does what it is asked for (seen in 6.18). It compares IPv6 addresses
/// the wrong way round: it spares what it should take and would take the others. And it looks at the
/// ports of TCP and UDP only, so that it would take another Service's connections of SCTP.
fn is_filtered_well(stale: &Stale) -> bool {
    stale.frontend.family == Family::V4 && stale.frontend.protocol != Protocol::Sctp
}

fn write_address(w: &mut Writer, address: IpAddr, source: bool) {
    match address {
        IpAddr::V4(v4) => {
            w.bytes_attribute(if source { CTA_IP_V4_SRC } else { CTA_IP_V4_DST }, &v4.octets());
        }
        IpAddr::V6(v6) => {
            w.bytes_attribute(if source { CTA_IP_V6_SRC } else { CTA_IP_V6_DST }, &v6.octets());
        }
    }
}

/// One direction of a connection.
#[derive(Debug)]
pub(crate) struct Tuple {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
    /// Whether packets went that way.
    pub(crate) seen: bool,
}

fn read_tuple(bytes: &[u8]) -> Option<Tuple> {
    let tuple = Attributes(bytes);
    let ip = Attributes(tuple.find(CTA_TUPLE_IP)?);
    let proto = Attributes(tuple.find(CTA_TUPLE_PROTO)?);
    let address = |v4: u16, v6: u16| -> Option<IpAddr> {
        match ip.find(v4) {
            Some(bytes) => Some(<[u8; 4]>::try_from(bytes).ok()?.into()),
            None => Some(<[u8; 16]>::try_from(ip.find(v6)?).ok()?.into()),
        }
    };
    let port = |kind| Some(u16::from_be_bytes(*proto.find(kind)?.first_chunk()?));
    Some(Tuple {
        source: address(CTA_IP_V4_SRC, CTA_IP_V6_SRC)?,
        destination: address(CTA_IP_V4_DST, CTA_IP_V6_DST)?,
        protocol: *proto.find(CTA_PROTO_NUM)?.first()?,
        source_port: port(CTA_PROTO_SRC_PORT)?,
        destination_port: port(CTA_PROTO_DST_PORT)?,
        seen: true,
    })
}
