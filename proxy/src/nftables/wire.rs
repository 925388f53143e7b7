//! The netlink socket itself: bytes to the kernel and back.
//!
//! Netlink is synchronous: the kernel has done all, and queued its answers, when `send` returns, and
//! it goes on with a listing whenever some of it is read. So nothing here waits: an answer that
//! isn't there will not come any more.

use std::{io, os::fd::AsRawFd};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// The kernel's messages fit in one read of this size.
const READ_BYTES: usize = 256 * 1024;
/// How many answers to what was given up are read and thrown away at the most.
const DISCARD_MAX: usize = 100_000;

/// A netlink socket to netfilter.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: Socket,
    port: u32,
    buffer: Vec<u8>,
    /// Answers to what was given up may still come; the next ones must not be taken for them, and
    /// the kernel begins no listing while another one is under way.
    unsettled: bool,
}

impl Wire {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel has no netfilter sockets or the process may not have one.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        let port = socket.bind_auto()?.port_number();
        // Answers without a copy of the question, and with an explanation; both only help.
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_ext_ack(true);
        Ok(Self { port, ..Self::over(socket)? })
    }

    /// Talks over this socket, whoever is at its other end.
    pub(crate) fn over(socket: Socket) -> io::Result<Self> {
        socket.set_non_blocking(true)?;
        Ok(Self { socket, port: 0, buffer: Vec::new(), unsettled: false })
    }

    /// The number by which the kernel names this socket in its notifications.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// The socket, to be set up.
    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Sends messages to the kernel. [`Self::settled`] has to follow when all answers were read.
    ///
    /// # Errors
    /// When the system refuses.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.unsettled {
            self.discard();
        }
        self.unsettled = true;
        self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0).map(drop)
    }

    /// Notes that there are no more answers to what was sent.
    pub(crate) fn settled(&mut self) {
        self.unsettled = false;
    }

    /// What waits to be read, or nothing.
    ///
    /// # Errors
    /// When the system refuses; `ENOBUFS` means that answers were lost.
    pub(crate) fn read(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            self.buffer.clear();
            self.buffer.reserve(READ_BYTES);
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(0) => return Ok(None),
                Ok(_) => return Ok(Some(&self.buffer)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn discard(&mut self) {
        for _ in 0..DISCARD_MAX {
            match self.read() {
                Ok(Some(_)) => {}
                // It tells that something is missing, and that there may be more.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}

/// Sets a buffer's size past the system's limit, and as far as the limit where that isn't allowed.
pub(crate) fn force_buffer(socket: &Socket, option: libc::c_int, bytes: usize) {
    let set = |option: libc::c_int| {
        let size = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
        // SAFETY: the descriptor is open for as long as `socket` is borrowed, and the option's
        // value is an int that lives across the call.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                std::ptr::from_ref(&size).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            ) == 0
        }
    };
    if !set(option) {
        let plain = if option == libc::SO_SNDBUFFORCE { libc::SO_SNDBUF } else { libc::SO_RCVBUF };
        set(plain);
    }
}

/// The system's error for the code of a kernel's answer, which is the negated number.
pub(crate) fn error_of(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code.saturating_neg())
}

/// A kernel of a test: its answers are queued before they are asked for.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fake {
    use std::{
        io,
        os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd},
    };

    use netlink_sys::Socket;
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};

    use super::Wire;

    /// The kernel's end.
    #[derive(Debug)]
    pub(crate) struct FakeKernel(OwnedFd);

    impl FakeKernel {
        /// A kernel, and the wire to it.
        ///
        /// # Errors
        /// When the system has no sockets left.
        pub(crate) fn new() -> io::Result<(Self, Wire)> {
            // Each message is a datagram of its own, and whatever address it is sent to counts for
            // nothing.
            let (ours, theirs) = socketpair(
                AddressFamily::Unix,
                SockType::SeqPacket,
                None,
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            )?;
            // SAFETY: the descriptor is open and nobody else's; the socket closes it.
            let socket = unsafe { Socket::from_raw_fd(theirs.into_raw_fd()) };
            Ok((Self(ours), Wire::over(socket)?))
        }

        /// Queues an answer; false if there is no room for it.
        pub(crate) fn answer(&self, bytes: &[u8]) -> bool {
            !bytes.is_empty() && send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT).is_ok()
        }
    }
}
