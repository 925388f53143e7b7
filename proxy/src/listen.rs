//! Listening on all addresses of a machine, whichever families it has.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket};

/// How many connections may wait.
const BACKLOG: u32 = 1024;

/// Listens at an address. All addresses are those of both families, whichever family they are
/// written in, as Go's programs have it: `0.0.0.0` is what a node with IPv6 alone is given too.
///
/// # Errors
/// When the address can't be had.
pub(crate) async fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    if at.ip().is_unspecified() { everywhere(at.port()).await } else { TcpListener::bind(at).await }
}

/// Listens on all addresses of both families; of IPv4 where the kernel has no IPv6.
///
/// # Errors
/// When the port can't be had.
pub(crate) async fn everywhere(port: u16) -> io::Result<TcpListener> {
    match both_families(port) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
        }
        result => result,
    }
}

fn both_families(port: u16) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    // Whatever net.ipv6.bindv6only says.
    SockRef::from(&socket).set_only_v6(false)?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv6Addr::UNSPECIFIED, port).into())?;
    socket.listen(BACKLOG)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, TcpStream};

    use super::*;
    use crate::netns::Namespace;

    /// Which of these addresses take a connection to what listens at `at`.
    fn reached(host: &Namespace, at: &'static str, addresses: [&'static str; 3]) -> Vec<bool> {
        host.run(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let _inside = runtime.enter();
            let listener = runtime.block_on(listen(at.parse().unwrap())).unwrap();
            let port = listener.local_addr().unwrap().port();
            let reached = |address: &str| {
                let address: IpAddr = address.parse().unwrap();
                TcpStream::connect((address, port)).is_ok()
            };
            addresses.map(reached).to_vec()
        })
    }

    #[test]
    fn all_addresses_are_those_of_both_families() {
        let host = Namespace::new();
        host.sh("ip addr add 192.0.2.7/32 dev lo");
        let addresses = ["127.0.0.1", "192.0.2.7", "::1"];
        for bindv6only in [0, 1] {
            host.sh(&format!("sysctl -qw net.ipv6.bindv6only={bindv6only}"));
            for at in ["0.0.0.0:0", "[::]:0"] {
                assert_eq!(reached(&host, at, addresses), [true; 3], "{at} {bindv6only}");
            }
        }
        assert_eq!(reached(&host, "192.0.2.7:0", addresses), [false, true, false]);
        assert_eq!(reached(&host, "[::1]:0", addresses), [false, false, true]);
    }
}
