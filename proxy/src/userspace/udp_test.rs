//! UDP through relays: clients that come, stay and go.

use std::time::{Duration, Instant};

use super::fixture::{FAMILIES, Flow, Net, everywhere};
use crate::{model::Family, until::until};

fn clients(host: &super::fixture::Host, family: Family, count: usize) -> bool {
    let family = family.as_str();
    host.metric(&format!(
        "keelson_proxy_relayed_connections{{ip_family=\"{family}\",protocol=\"UDP\"}} {count}"
    ))
}

#[test]
fn a_flow_stays_with_its_endpoint_until_that_is_gone() {
    for family in FAMILIES {
        let net = Net::new(3);
        let mut host = net.relays(family, everywhere);
        for n in 1..=3 {
            net.serve(family, n);
        }
        host.set(1, &[1, 2, 3]);
        let flow = Flow::new(&net.client, host.service(1));
        let first = flow.ask().unwrap();
        for _ in 0..20 {
            assert_eq!(flow.ask(), Some(first));
        }
        let others: Vec<u8> = (1..=3).filter(|n| *n != first).collect();
        host.set(1, &others);
        until("it goes to another one", || flow.ask().is_some_and(|n| n != first));
        until("the old way is closed", || clients(&host, family, 1));
        host.set(1, &[]);
        until("it is refused", || {
            let _ = flow.0.send(b"?");
            flow.0.recv(&mut [0]).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
        });
        until("nobody is left", || clients(&host, family, 0));
    }
}

#[test]
fn large_and_empty_datagrams_go_through() {
    let net = Net::new(1);
    let mut host = net.relays(Family::V4, everywhere);
    net.pods[0].run(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:8080").unwrap();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 65_535];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], peer);
            }
        });
    });
    host.set(1, &[1]);
    let flow = Flow::new(&net.client, host.service(1));
    let mut buffer = vec![0; 65_535];
    for length in [0, 1, 1_400, 9_000, 65_507] {
        flow.0.send(&vec![7; length]).unwrap();
        assert_eq!(flow.0.recv(&mut buffer).unwrap(), length);
    }
}

#[test]
fn idle_clients_are_forgotten_sooner_if_there_was_no_conversation() {
    let net = Net::new(2);
    let mut host = net.relays(Family::V4, |settings| {
        settings.udp.single = Duration::from_millis(300);
        settings.udp.stream = Duration::from_millis(900);
        settings.udp.stream_after = Duration::ZERO;
    });
    net.serve(Family::V4, 1);
    // The second pod takes datagrams and says nothing.
    net.pods[1].run(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:8080").unwrap();
        std::thread::spawn(move || while socket.recv(&mut [0]).is_ok() {});
    });
    host.set(1, &[1]);
    host.set(2, &[2]);
    let (answered, silent) =
        (Flow::new(&net.client, host.service(1)), Flow::new(&net.client, host.service(2)));
    assert_eq!(answered.ask(), Some(1));
    let begin = Instant::now();
    silent.0.send(b"?").unwrap();
    until("both are known", || clients(&host, Family::V4, 2));
    until("the silent one is forgotten", || clients(&host, Family::V4, 1));
    assert!(begin.elapsed() < Duration::from_millis(900), "{:?}", begin.elapsed());
    until("the other one too", || clients(&host, Family::V4, 0));
    assert!(begin.elapsed() >= Duration::from_millis(800), "{:?}", begin.elapsed());
    assert_eq!(answered.ask(), Some(1), "and is a new one");
}

#[test]
fn the_client_that_was_silent_longest_makes_room() {
    let net = Net::new(1);
    let mut host = net.relays(Family::V4, |settings| settings.limits.udp_clients = 2);
    net.serve(Family::V4, 1);
    host.set(1, &[1]);
    let flows: Vec<Flow> = (0..5).map(|_| Flow::new(&net.client, host.service(1))).collect();
    for flow in &flows {
        assert_eq!(flow.ask(), Some(1));
        until("no more than two", || {
            clients(&host, Family::V4, 1) || clients(&host, Family::V4, 2)
        });
    }
    assert_eq!(flows[0].ask(), Some(1), "it may come again");
}

#[test]
fn an_endpoint_that_refuses_is_left() {
    let net = Net::new(2);
    let mut host = net.relays(Family::V4, everywhere);
    net.serve(Family::V4, 2);
    host.set(1, &[1, 2]);
    // Who comes to the pod where nobody listens tries again.
    for _ in 0..10 {
        let flow = Flow::new(&net.client, host.service(1));
        until("it is answered", || flow.ask() == Some(2));
    }
}
