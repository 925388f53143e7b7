//! What a program writes into the kernel's tables, as the kernel tells everybody.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::Context;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv,
        setsockopt, socket, sockopt::RcvBufForce,
    },
};

use crate::inside::inside;

/// `NFNLGRP_NFTABLES` as a bit of an address.
const GROUP: u32 = 1 << 6;
/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u8 = 10;
/// `NFT_MSG_NEWGEN`: a commit's end, and who made it.
const NEW_GENERATION: u8 = 15;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// An ear at the tables of a network namespace.
#[derive(Debug)]
pub(super) struct Ear(OwnedFd);

impl Ear {
    /// Hears of everything that is written from now on.
    pub(super) fn open(netns: &str) -> anyhow::Result<Self> {
        inside(netns, || {
            let (family, kind) = (AddressFamily::Netlink, SockType::Raw);
            let flags = SockFlag::SOCK_CLOEXEC;
            let fd = socket(family, kind, flags, SockProtocol::NetlinkNetFilter)?;
            setsockopt(&fd, RcvBufForce, &(16 << 20))?;
            bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUP))?;
            Ok(Self(fd))
        })
    }

    /// How many changes were heard of. A commit tells before it returns, so what is written by now
    /// was heard.
    pub(super) fn changes(&self) -> anyhow::Result<usize> {
        let mut buffer = vec![0; 1 << 18];
        let mut changes = 0;
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => changes += changes_in(&buffer[..length]),
                Err(Errno::EAGAIN) => return Ok(changes),
                Err(error) => return Err(error).context("hear of changes of the tables"),
            }
        }
    }
}

/// How many of these messages tell of a change.
fn changes_in(mut bytes: &[u8]) -> usize {
    let mut changes = 0;
    while let Some(header) = bytes.first_chunk::<HEADER>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let [subsystem, message] = u16::from_ne_bytes([header[4], header[5]]).to_be_bytes();
        changes += usize::from(subsystem == SUBSYSTEM && message != NEW_GENERATION);
        bytes = bytes.get(length.next_multiple_of(4).max(HEADER)..).unwrap_or_default();
    }
    changes
}

#[cfg(test)]
mod tests {
    use keelson_tests::Machine;

    use super::*;
    use crate::services::nft::nft;

    #[test]
    fn each_change_is_heard_once() {
        let machine = Machine::new();
        let netns = machine.netns();
        nft(&netns, &["add table ip t { set s { type ipv4_addr; }; }"], "").unwrap();
        let ear = Ear::open(&netns).unwrap();
        nft(&netns, &["list", "ruleset"], "").unwrap();
        assert_eq!(ear.changes().unwrap(), 0);
        nft(&netns, &["add element ip t s { 10.0.0.1 }; add chain ip t c"], "").unwrap();
        assert_eq!(ear.changes().unwrap(), 2);
        assert_eq!(ear.changes().unwrap(), 0);
    }
}
