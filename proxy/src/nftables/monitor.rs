//! Hearing of others who change the tables.
//!
//! The kernel tells of every transaction. A filter on the socket leaves out the proxy's own, so
//! that a large load of its own neither wakes anybody nor overflows the queue. Should others
//! overflow it, that counts as a change too. Each transaction ends with a message that names the
//! program that made it.
//!
//! What is left out is made all the same: the kernel writes a message for every element before it
//! looks who wants it. That is a third to a half of a large load (250,000 elements by `nft` on a busy
//! machine: 2.6 s in the kernel without a listener, 3.7 to 5.2 s with one). So whoever loads
//! everything covers the monitor's ears meanwhile ([`Ears`]), and looks at the tables' generation to
//! know whether something was missed. A listener in any other network namespace costs as much: the kernel
//! asks whether anybody listens at all (`netlink_has_listeners`).

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use netlink_sys::{
    AsyncSocket, AsyncSocketExt, Socket, SocketAddr, TokioSocket, protocols::NETLINK_NETFILTER,
};
use tokio::sync::Notify;

use super::{
    attribute::{Message, Messages},
    batch::TABLE,
    contention::{Patience, Program},
    uapi::*,
    wire::force_buffer,
};

/// So long the end of a transaction is waited for whose beginning was heard.
const END: Duration = Duration::from_millis(100);
/// What is heard within this time is looked at together.
const TOGETHER: Duration = Duration::from_millis(50);

/// A listener for transactions of others.
pub(crate) struct Monitor {
    socket: TokioSocket,
    families: Vec<u8>,
    tables: &'static [&'static str],
    patience: Patience,
    /// The beginning of a transaction that concerns us was heard.
    begun: bool,
    /// Who made the last one that was heard.
    by: Option<Program>,
    /// Nothing will be heard any more.
    lost: Arc<Notify>,
}

/// Who writes to the tables: the number of its socket, and the ears that it may cover.
#[derive(Clone, Debug)]
pub(crate) struct Writing {
    pub(crate) port: u32,
    pub(crate) ears: Ears,
}

/// The ears of a monitor, for those who write so much that the telling takes as long as the
/// writing. They are nobody's until there is a monitor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ears(Arc<Mutex<Option<Hearing>>>);

/// What a monitor hears with.
#[derive(Debug)]
struct Hearing {
    socket: Socket,
    /// Tells the monitor that it hears nothing any more.
    lost: Arc<Notify>,
}

impl Ears {
    fn belong_to(&self, monitor: &Socket, lost: Arc<Notify>) -> io::Result<()> {
        let same = monitor.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is open, and nobody else's from here on.
        let socket = unsafe { Socket::from_raw_fd(same.into_raw_fd()) };
        let hearing = Some(Hearing { socket, lost });
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = hearing;
        Ok(())
    }

    /// Does something unheard. What others do meanwhile is unheard too: compare the tables'
    /// generation.
    pub(crate) fn covered<T>(&self, work: impl FnOnce() -> T) -> T {
        let hearing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Hearing { socket, lost }) = hearing.as_ref() else { return work() };
        let covered = socket.drop_membership(NFNLGRP_NFTABLES).is_ok();
        let result = work();
        if covered && let Err(error) = socket.add_membership(NFNLGRP_NFTABLES) {
            tracing::warn!(%error, "the kernel doesn't tell of changes of the rules by others again");
            lost.notify_one();
        }
        result
    }
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
    /// Listens in the network namespace of the calling thread, deaf to these writers, for changes
    /// of the proxy's table in these families.
    ///
    /// # Errors
    /// When there is no such socket to be had.
    pub(crate) fn open(own: &[Writing], families: Vec<u8>) -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        let ports: Vec<u32> = own.iter().map(|writing| writing.port).collect();
        ignore_ports(socket.socket_ref(), &ports)?;
        force_buffer(socket.socket_ref(), libc::SO_RCVBUFFORCE, 1 << 20);
        socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
        socket.socket_mut().add_membership(NFNLGRP_NFTABLES)?;
        let lost = Arc::new(Notify::new());
        for writing in own {
            writing.ears.belong_to(socket.socket_ref(), Arc::clone(&lost))?;
        }
        Ok(Self {
            socket,
            families,
            tables: &[TABLE],
            patience: Patience::new(Duration::ZERO),
            begun: false,
            by: None,
            lost,
        })
    }

    /// Puts off, by this time at most, what [`Self::heard`] hears over and over again.
    pub(crate) fn patient(self, longest: Duration) -> Self {
        Self { patience: Patience::new(longest), ..self }
    }

    /// Listens for changes of these tables instead of the proxy's own.
    pub(crate) fn of_tables(self, tables: &'static [&'static str]) -> Self {
        Self { tables, ..self }
    }

    /// Waits until something was heard that concerns the proxy. Where that never stops it takes
    /// longer each time, and who doesn't stop is logged.
    ///
    /// # Errors
    /// When the socket fails.
    pub(crate) async fn heard(&mut self) -> io::Result<Heard> {
        let mut heard = self.next().await?;
        let (wait, first) = self.patience.after_edit(Instant::now());
        if first {
            let by = self.by.clone().map(Program::process);
            let (program, pid) = by.map_or((String::new(), 0), |by| (by.name, by.pid));
            tracing::warn!(
                program,
                pid,
                "another program, maybe another keelson or a script, keeps changing the proxy's \
                 table; it is mended more and more seldom until that ends"
            );
        }
        let until = Instant::now() + wait;
        while !wait.is_zero()
            && let Ok(more) = tokio::time::timeout_at(until.into(), self.next()).await
        {
            if more? == Heard::Edited {
                heard = Heard::Edited;
            }
        }
        Ok(heard)
    }

    /// Who made the last change that was heard of, if the kernel said so.
    #[cfg(test)]
    pub(super) fn last(&self) -> Option<&Program> {
        self.by.as_ref()
    }

    /// Waits until a program that is none of `own` changed the tables, and a moment for what else
    /// it may write.
    ///
    /// # Errors
    /// When the socket fails.
    pub(crate) async fn others(&mut self, own: impl Fn(u32) -> bool) -> io::Result<()> {
        loop {
            let mut programs = vec![(self.next().await?, self.by.take())];
            let until = Instant::now() + TOGETHER;
            while let Ok(more) = tokio::time::timeout_at(until.into(), self.next()).await {
                programs.push((more?, self.by.take()));
            }
            let is_own = |by: &Option<Program>| by.as_ref().is_some_and(|by| own(by.pid));
            if programs.iter().any(|(heard, by)| *heard == Heard::Overflow || !is_own(by)) {
                return Ok(());
            }
        }
    }

    /// The next transaction that concerns us. Dropped before it is over, it loses nothing.
    async fn next(&mut self) -> io::Result<Heard> {
        loop {
            let lost = Arc::clone(&self.lost);
            let received = async {
                tokio::select! {
                    received = self.socket.recv_from_full() => received,
                    () = lost.notified() => Err(io::Error::other("it has no part in it any more")),
                }
            };
            let received = if self.begun {
                match tokio::time::timeout(END, received).await {
                    Ok(received) => received,
                    Err(_) => {
                        // Nobody says who it was.
                        self.begun = false;
                        self.by = None;
                        return Ok(Heard::Edited);
                    }
                }
            } else {
                received.await
            };
            match received {
                Ok((bytes, _)) => {
                    let mut ended = false;
                    for message in Messages(&bytes) {
                        let [subsystem, kind] = message.kind.to_be_bytes();
                        let end = subsystem == NFNL_SUBSYS_NFTABLES && kind == NFT_MSG_NEWGEN;
                        if end && self.begun {
                            self.begun = false;
                            self.by = Program::read(&message);
                            ended = true;
                        }
                        self.begun |= concerns_us(&message, &self.families, self.tables);
                    }
                    if ended {
                        return Ok(Heard::Edited);
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.begun = false;
                    self.by = None;
                    return Ok(Heard::Overflow);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether a notification is about one of these tables in one of these families.
pub(crate) fn concerns_us(message: &Message<'_>, families: &[u8], tables: &[&str]) -> bool {
    let [subsystem, kind] = message.kind.to_be_bytes();
    if subsystem != NFNL_SUBSYS_NFTABLES || matches!(kind, NFT_MSG_NEWGEN | NFT_MSG_TRACE) {
        return false;
    }
    // The table's name is the first attribute of every kind of message.
    message.family().is_some_and(|family| families.contains(&family))
        && message
            .attributes()
            .find_text(NFTA_TABLE_NAME)
            .is_some_and(|table| tables.contains(&table))
}

/// Lets the kernel drop notifications of what these sockets did. All messages of one datagram are
/// of one transaction, so the first one's header tells.
fn ignore_ports(socket: &Socket, ports: &[u32]) -> io::Result<()> {
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
