//! SCTP associations, for kernels that have them.
//!
//! A one-to-one socket of SCTP is used like one of TCP, so the standard library's types serve. Where
//! a kernel has no SCTP, tests that need it say so and do nothing else; where [`DEMANDED`] is set, as
//! in the virtual machine that `tests/vm/proxy` makes for them, they fail.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use crate::{model::Protocol, netns::Namespace, until::until};

/// The environment variable by which a kernel without SCTP is a failure.
const DEMANDED: &str = "KEELSON_TEST_SCTP";

/// How long a client waits for an answer to its first packet, until it sends it again: 3 s unless
/// set. An ICMP error counts only from then on: the first one comes while the client is still
/// calling `connect`, as with TCP.
const AGAIN: Duration = Duration::from_millis(300);

/// After so long without an answer there is none; a refusal comes after the second try.
pub(super) const SILENCE: Duration = Duration::from_secs(1);

fn socket(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::STREAM, Some(i32::from(Protocol::Sctp.number()).into()))
}

/// Whether the kernel has SCTP: to be found by trying, as it may be a module.
pub(super) fn available() -> bool {
    match socket(Domain::IPV4) {
        Ok(_) => true,
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => false,
        Err(error) => panic!("no socket for SCTP: {error}"),
    }
}

/// The same for a test that is about nothing else; says so if it isn't run.
///
/// # Panics
/// When there must be SCTP and isn't.
pub(super) fn can_be_tested() -> bool {
    let available = available();
    assert!(available || std::env::var_os(DEMANDED).is_none(), "{DEMANDED} is set: no SCTP here");
    if !available {
        println!("NOT RUN: this kernel has no SCTP; tests/vm/proxy runs this in a virtual machine");
    }
    available
}

/// Shortens the times of SCTP in a namespace.
pub(super) fn hasten(namespace: &Namespace) {
    namespace.run(|| {
        for (setting, time) in [("rto_min", 100), ("rto_initial", AGAIN.as_millis())] {
            std::fs::write(format!("/proc/sys/net/sctp/{setting}"), time.to_string()).unwrap();
        }
    });
}

/// Answers each association as the servers of other protocols do, until the process ends.
pub(super) fn serve(n: u8, address: IpAddr, port: u16) {
    let at = SocketAddr::new(address, port);
    let socket = socket(Domain::for_address(at)).unwrap();
    socket.bind(&at.into()).unwrap();
    socket.listen(128).unwrap();
    let listener = TcpListener::from(socket);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            if let Ok(peer) = stream.peer_addr() {
                // In one piece: each write is a message.
                let _ = stream.write_all(format!("{n} {port} {}", peer.ip()).as_bytes());
            }
        }
    });
}

/// The address that a packet would have anyway. From a socket without one the server learns of all
/// that the client has, tries them, untranslated as they are, and is answered with an ABORT.
fn one_address(source: SocketAddr, to: SocketAddr) -> io::Result<SocketAddr> {
    let socket = UdpSocket::bind(SocketAddr::new(source.ip(), 0))?;
    socket.connect(to)?;
    Ok(SocketAddr::new(socket.local_addr()?.ip(), source.port()))
}

/// One association and the message that comes by it. It is cut off then, so that its port is free.
pub(super) fn ask(source: SocketAddr, to: SocketAddr, patience: Duration) -> io::Result<String> {
    let socket = socket(Domain::for_address(to))?;
    // Without this SCTP takes an ICMP error for a passing one.
    if to.is_ipv4() {
        setsockopt(&socket.as_fd(), sockopt::Ipv4RecvErr, &true)?;
    } else {
        setsockopt(&socket.as_fd(), sockopt::Ipv6RecvErr, &true)?;
    }
    socket.set_linger(Some(Duration::ZERO))?;
    let (at, mut bound) = (one_address(source, to)?.into(), Ok(()));
    // The kernel gives a port back a moment after its socket was closed.
    until("the client's port is free again", || {
        bound = socket.bind(&at);
        !bound.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
    });
    bound?;
    socket.connect_timeout(&to.into(), patience)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(patience))?;
    let mut message = [0; 100];
    let length = stream.read(&mut message)?;
    Ok(String::from_utf8_lossy(&message[..length]).into_owned())
}
