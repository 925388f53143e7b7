//! Hearing of others who change the tables.
//!
//! The kernel tells of every transaction. A filter on the socket leaves out the proxy's own, so
//! that a large load of its own neither wakes anybody nor overflows the queue. Should others
//! overflow it, that counts as a change too.

use std::{io, os::fd::AsRawFd};

use netlink_sys::{
    AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols::NETLINK_NETFILTER,
};

use super::{attribute::Messages, batch::TABLE, socket::force_buffer, uapi::*};

/// A listener for transactions of others.
pub(crate) struct Monitor {
    socket: TokioSocket,
    families: Vec<u8>,
}

/// What was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Somebody else changed the proxy's table.
    Edited,
    /// The queue overflowed: anything may have happened.
    Overflow,
}

impl Monitor {
    /// Listens in the network namespace of the calling thread, deaf to the sockets with these port
    /// numbers, for changes of the proxy's table in these families.
    ///
    /// # Errors
    /// When there is no such socket to be had.
    pub(crate) fn open(own_ports: &[u32], families: Vec<u8>) -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        ignore_ports(socket.socket_ref(), own_ports)?;
        force_buffer(socket.socket_ref(), libc::SO_RCVBUFFORCE, 1 << 20);
        socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
        socket.socket_mut().add_membership(NFNLGRP_NFTABLES)?;
        Ok(Self { socket, families })
    }

    /// Waits until something was heard that concerns the proxy.
    ///
    /// # Errors
    /// When the socket fails.
    pub(crate) async fn heard(&mut self) -> io::Result<Heard> {
        loop {
            match self.socket.recv_from_full().await {
                Ok((bytes, _)) => {
                    if Messages(&bytes).any(|message| self.concerns_us(&message)) {
                        return Ok(Heard::Edited);
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Ok(Heard::Overflow);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn concerns_us(&self, message: &super::attribute::Message<'_>) -> bool {
        let [subsystem, kind] = message.kind.to_be_bytes();
        if subsystem != NFNL_SUBSYS_NFTABLES || matches!(kind, NFT_MSG_NEWGEN | NFT_MSG_TRACE) {
            return false;
        }
        // The table's name is the first attribute of every kind of message.
        message.family().is_some_and(|family| self.families.contains(&family))
            && message.attributes().find_text(NFTA_TABLE_NAME) == Some(TABLE)
    }
}

/// Lets the kernel drop notifications of what these sockets did. All messages of one datagram are
/// of one transaction, so the first one's header tells.
fn ignore_ports(socket: &netlink_sys::Socket, ports: &[u32]) -> io::Result<()> {
    // BPF: load the port number at offset 12 of `struct nlmsghdr` (classic BPF loads in network
    // order), and for each of ours: if equal, drop; at the end, take all.
    const LOAD_WORD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let mut program = vec![libc::sock_filter { code: LOAD_WORD, jt: 0, jf: 0, k: 12 }];
    for port in ports {
        let k = u32::from_be_bytes(port.to_ne_bytes());
        program.push(libc::sock_filter { code: JUMP_EQUAL, jt: 0, jf: 1, k });
        program.push(libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: 0 });
    }
    program.push(libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: u32::MAX });
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let filter = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: the descriptor is open while `socket` is borrowed; `filter` and the program that it
    // points to live across the call, which copies them.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            std::ptr::from_ref(&filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
