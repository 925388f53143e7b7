//! Large maps in a kernel, read back by key or as a listing, whichever tells what is there.

use std::{net::IpAddr, sync::Arc};

use keelson_api::object::ObjectKey;

use super::{
    elements::{list_elements, read_endpoints},
    layout::{ENDPOINTS, SERVICES},
    reading::Reading,
    ruleset_test::{FAMILIES, layouts, open, table_name},
    socket::NftSocket,
};
use crate::{
    model::{Endpoint, Family, Protocol},
    netns::Namespace,
    ruleset::{
        Action, Frontend, Lane, Masquerade,
        desired::{Desired, ServiceRules},
    },
};

/// Services of so many endpoints each.
fn desired(family: Family, services: u16, endpoints: u16) -> Desired {
    let address = |net: u8, n: u16, e: u16| -> IpAddr {
        let ([a, b], [c, d]) = (n.to_be_bytes(), e.to_be_bytes());
        match family {
            Family::V4 => [net, a & 0x0f | c << 4, b, d].into(),
            Family::V6 => [0xfd, 0, net, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 1].into(),
        }
    };
    let mut desired = Desired::default();
    for n in 0..services {
        let frontend = Frontend::at(address(20, n, 0), Protocol::Tcp, 80);
        let mut all: Vec<Endpoint> =
            (0..endpoints).map(|e| Endpoint { address: address(10, n, e), port: 8080 }).collect();
        all.sort();
        let action = Action::Forward {
            endpoints: all.into(),
            masquerade: Masquerade::OffCluster,
            affinity: None,
            sources: None,
        };
        let rules = ServiceRules { frontends: vec![(frontend, action)], ..ServiceRules::default() };
        desired.replace(&ObjectKey::new("d", format!("s{n}")), Some(rules));
    }
    desired
}

/// Reads the map of endpoints and says whether that was done by key. `count` and `generation` are
/// what is told of the map and of the tables.
fn read(host: &Namespace, family: Family, count: u32, generations_ago: u32) -> (bool, usize) {
    host.run(move || {
        let mut socket = NftSocket::open().unwrap();
        let generation = socket.generation().unwrap() - generations_ago;
        let mut reading = Reading::new(family);
        list_elements(&mut socket, family, SERVICES, |e| reading.element(SERVICES, &e)).unwrap();
        let by_key = read_endpoints(
            &mut socket,
            &mut reading,
            ENDPOINTS,
            Lane::Address,
            (count > 0).then_some(count),
            generation,
        );
        let (held, strays) = reading.finish();
        assert!(strays.is_empty(), "{strays:?}");
        (by_key.unwrap(), held.frontends.values().map(|f| f.slots.len()).sum())
    })
}

#[test]
fn a_large_map_is_read_by_key_unless_it_may_hold_something_else() {
    for family in FAMILIES {
        let host = Namespace::new();
        let layout = layouts(family).remove(0);
        let desired = Arc::new(desired(family, 1_020, 50));
        open(&host, &layout).synchronize(&desired).unwrap();
        // told count, generations since then, by key
        let table = [(51_000, 0, true), (51_001, 0, false), (51_000, 1, false), (0, 0, false)];
        for (count, ago, by_key) in table {
            assert_eq!(read(&host, family, count, ago), (by_key, 51_000), "{count}, {ago} ago");
        }
    }
}

#[test]
fn edits_of_a_large_map_are_found() {
    let host = Namespace::new();
    let family = Family::V4;
    let layout = layouts(family).remove(0);
    let desired = desired(family, 1_020, 50);
    open(&host, &layout).synchronize(&desired).unwrap();
    let map = format!("{} {ENDPOINTS}", table_name(family));
    let (first, foreign) = ("20.0.0.0 . tcp . 80", "192.0.2.1 . 8080");
    let missing = format!("delete element {map} {{ {first} . 3 }}");
    let stray = format!("add element {map} {{ {first} . 77 : {foreign} }}");
    let other = format!("{missing}; add element {map} {{ {first} . 3 : {foreign} }}");
    let table = [
        ("one too many", stray.clone()),
        ("one too few", missing.clone()),
        ("one instead of another", format!("{missing}; {stray}")),
        ("another endpoint", other),
    ];
    for (what, edit) in table {
        host.sh(&format!("nft '{edit}'"));
        let mended = open(&host, &layout).synchronize(&desired).unwrap();
        assert!(mended.elements > 0 && mended.rebuilt.is_none(), "{what}: {mended:?}");
        let again = open(&host, &layout).synchronize(&desired).unwrap();
        assert_eq!((again.elements, again.rebuilt), (0, None), "{what}");
        let listed = host.sh(&format!("nft get element {map} '{{ {first} . 3 }}'"));
        assert!(!listed.contains(foreign), "{what}: {listed}");
    }
}
