//! Who has an address and port that can't be listened on.

use std::{
    collections::HashMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::plan::Listen;
use crate::model::Protocol;

/// `TCP_LISTEN`, and what an unconnected UDP socket has (`TCP_CLOSE`), as `/proc/net` prints them.
const STATES: [&str; 2] = ["0A", "07"];

/// Finds programs that listen; it reads each process once, and only when it is first asked.
#[derive(Debug, Default)]
pub(super) struct Holders {
    programs: Option<HashMap<u64, String>>,
}

impl Holders {
    /// The program that listens there or on all addresses, if it can be found.
    pub(super) fn of(&mut self, listen: Listen) -> Option<String> {
        let protocol = match listen.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => return None,
        };
        let inodes: Vec<u64> = ["", "6"]
            .iter()
            // That of this thread's network namespace.
            .filter_map(|family| {
                fs::read_to_string(format!("/proc/thread-self/net/{protocol}{family}")).ok()
            })
            .flat_map(|table| sockets(&table, listen))
            .collect();
        let programs = self.programs.get_or_insert_with(programs);
        inodes.iter().find_map(|inode| programs.get(inode).cloned())
    }
}

/// The inodes of sockets that listen there, in a table of `/proc/net`.
fn sockets(table: &str, listen: Listen) -> Vec<u64> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace().skip(1);
            let (address, port) = parse_address(fields.next()?)?;
            let state = fields.nth(1)?;
            let takes = address.is_unspecified() || address == listen.address;
            (takes && port == listen.port && STATES.contains(&state))
                .then(|| fields.nth(5)?.parse().ok())?
        })
        .collect()
}

/// `0100007F:0050`: words of the address in the machine's order, then the port.
fn parse_address(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let words: Vec<[u8; 4]> = (0..address.len() / 8)
        .filter_map(|n| u32::from_str_radix(address.get(n * 8..n * 8 + 8)?, 16).ok())
        .map(u32::to_ne_bytes)
        .collect();
    let address = match <[[u8; 4]; 4]>::try_from(words.as_slice()) {
        Ok(words) => {
            let mut octets = [0; 16];
            for (to, from) in octets.iter_mut().zip(words.as_flattened()) {
                *to = *from;
            }
            Ipv6Addr::from(octets).to_canonical()
        }
        Err(_) => Ipv4Addr::from(*words.first()?).into(),
    };
    Some((address, u16::from_str_radix(port, 16).ok()?))
}

/// The program behind each socket.
fn programs() -> HashMap<u64, String> {
    let mut found = HashMap::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let mut program = None;
        for file in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let Ok(target) = fs::read_link(file.path()) else { continue };
            let inode = target
                .to_str()
                .and_then(|t| t.strip_prefix("socket:["))
                .and_then(|t| t.strip_suffix(']'))
                .and_then(|inode| inode.parse().ok());
            if let Some(inode) = inode {
                let program = program.get_or_insert_with(|| {
                    let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                    format!("process {pid} ({})", name.trim())
                });
                found.insert(inode, program.clone());
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_found_by_address_or_wildcard() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100600A:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 101 1 0\n\
            1: 00000000:0051 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 102 1 0\n\
            2: 0100600A:0052 0200600A:1234 01 00000000:00000000 00:00000000 00000000     0        0 103 1 0\n";
        let listen =
            |port| Listen { address: [10, 96, 0, 1].into(), protocol: Protocol::Tcp, port };
        assert_eq!(sockets(table, listen(80)), [101]);
        assert_eq!(sockets(table, listen(81)), [102]);
        assert!(sockets(table, listen(82)).is_empty(), "a connection is no listener");
        let v6 = parse_address("00000000000000000000000001000000:0035");
        assert_eq!(v6, Some((Ipv6Addr::LOCALHOST.into(), 53)));
    }

    #[test]
    fn the_program_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let listen =
            Listen { address: address.ip(), protocol: Protocol::Tcp, port: address.port() };
        let found = Holders::default().of(listen).unwrap();
        assert!(found.starts_with(&format!("process {} (", std::process::id())), "{found}");
    }
}
