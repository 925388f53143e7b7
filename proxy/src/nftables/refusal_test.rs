//! What the kernel refuses: the old rules stay whole, the rest goes in, and it is tried again. And
//! answers that never come, or that make no sense.

use std::io;

use keelson_api::object::ObjectKey;

use super::{
    apply::{Needed, Table},
    attribute::{Header, Writer},
    batch::{Batch, TABLE},
    golden::layout,
    layout::{Layout, SERVICES},
    socket::{NftError, NftSocket},
    uapi::*,
    wire::{error_of, fake::FakeKernel},
};
use crate::{
    backend::Applied,
    model::{Endpoint, Family, Protocol},
    netns::Namespace,
    ruleset::{
        Action, Frontend, Masquerade, Unit,
        desired::{Desired, ServiceRules},
    },
};

/// The Services `n`, each with this many endpoints.
fn want(desired: &mut Desired, services: &[(u8, u8)]) -> Vec<Unit> {
    let mut dirty = Vec::new();
    for (n, endpoints) in services {
        let rules = (*endpoints > 0).then(|| ServiceRules {
            created: 1,
            frontends: vec![(frontend(*n), forward(*n, *endpoints))],
            ..ServiceRules::default()
        });
        dirty.extend(desired.replace(&ObjectKey::new("d", n.to_string()), rules).dirty);
    }
    dirty
}

fn frontend(n: u8) -> Frontend {
    Frontend::at([10, 96, 0, n], Protocol::Tcp, 80)
}

fn forward(n: u8, endpoints: u8) -> Action {
    let endpoint = |e: u8| Endpoint { address: [10, 244, n, e].into(), port: 8080 };
    Action::Forward {
        endpoints: (1..=endpoints).map(endpoint).collect(),
        masquerade: Masquerade::OffCluster,
        affinity: None,
        sources: None,
    }
}

/// The proxy's table, with room for only so many Services: another program made that map.
fn table_with_room_for(host: &Namespace, size: u8) -> Table {
    let layout = layout(Family::V4);
    host.sh(&format!(
        "nft 'add table ip {TABLE} {{ comment \"{}\"; }}'; \
         nft 'add map ip {TABLE} {SERVICES} {{ type ipv4_addr . inet_proto . inet_service : verdict; \
              size {size}; }}'",
        layout.fingerprint()
    ));
    host.run(move || {
        let mut batch = Batch::new(Family::V4);
        for set in layout.sets().iter().filter(|set| set.name != SERVICES) {
            batch.add_set(set);
        }
        let mut needed = Needed::default();
        needed.chains.extend(Layout::common_chains());
        needed.write(&layout, layout.chains(), &mut batch);
        NftSocket::open().unwrap().commit(&mut batch).unwrap();
        Table::open(layout).unwrap()
    })
}

fn listed(host: &Namespace) -> String {
    host.sh("nft list table ip keelson-proxy")
}

fn refused(applied: &Applied) -> Vec<(Unit, String)> {
    applied.refused.iter().map(|(unit, error)| (*unit, error.to_string())).collect()
}

#[test]
fn a_map_that_is_full_keeps_out_what_is_too_much_and_nothing_else() {
    let host = Namespace::new();
    let mut table = table_with_room_for(&host, 2);
    let mut desired = Desired::default();
    want(&mut desired, &[(1, 1), (2, 1), (3, 1)]);
    let applied = table.synchronize(&desired).unwrap();
    assert_eq!(applied.rebuilt, None, "the table stays");
    let [(unit, error)] = &refused(&applied)[..] else { panic!("{applied:?}") };
    assert!(
        error.starts_with("new elements of services: ") && error.contains("os error 23"),
        "{error}"
    );
    let there =
        |n: u8| listed(&host).contains(&format!("10.96.0.{n} . tcp . 80 : goto endpoints-"));
    assert_eq!([1, 2, 3].map(there).iter().filter(|there| **there).count(), 2);

    // What is there is served on, and changes.
    let Unit::Frontend(late) = unit else { panic!("{unit:?}") };
    let late = (1..=3).find(|n| frontend(*n) == *late).unwrap();
    let (one, other) = if late == 3 { (1, 2) } else { (3, 3 - late) };
    let dirty = want(&mut desired, &[(one, 2)]);
    assert_eq!(refused(&table.apply(&dirty, &desired).unwrap()), []);
    assert!(listed(&host).contains(&format!("10.96.0.{one} . tcp . 80 : goto endpoints-2")));
    // The next try changes nothing but what it can.
    let before = listed(&host);
    let again = table.apply(&[*unit], &desired).unwrap();
    assert_eq!(refused(&again).len(), 1);
    assert_eq!(listed(&host), before);
    let dirty = want(&mut desired, &[(other, 0)]);
    assert_eq!(refused(&table.apply(&dirty, &desired).unwrap()), []);
    assert_eq!(refused(&table.apply(&[*unit], &desired).unwrap()), []);
    assert!(there(late) && there(one) && !there(other));
}

/// Takes `CAP_NET_ADMIN` from what the calling thread does, or gives it back.
pub(super) fn set_net_admin(allowed: bool) {
    const NET_ADMIN: u32 = 1 << 12;
    const VERSION_3: u32 = 0x2008_0522;
    let header: [u32; 2] = [VERSION_3, 0];
    // Effective, permitted and inheritable, for capabilities up to 31 and from 32 on.
    let mut data = [[0u32; 3]; 2];
    // SAFETY: both arrays have the layout and size of the kernel's structures of this version, and
    // live across the calls.
    let results = unsafe {
        let got = libc::syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr());
        if allowed {
            data[0][0] |= NET_ADMIN;
        } else {
            data[0][0] &= !NET_ADMIN;
        }
        (got, libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()))
    };
    assert_eq!(results, (0, 0), "{}", io::Error::last_os_error());
}

#[test]
fn without_permission_nothing_changes_and_no_service_is_blamed() {
    let host = Namespace::new();
    let mut desired = Desired::default();
    want(&mut desired, &[(1, 2), (2, 2)]);
    let first = desired;
    let mut table = host.run(move || {
        let mut table = Table::open(layout(Family::V4)).unwrap();
        table.synchronize(&first).unwrap();
        (table, first)
    });
    let before = listed(&host);
    want(&mut table.1, &[(2, 3), (3, 1)]);
    let (table, desired) = host.run(move || {
        let (mut table, desired) = table;
        let units: Vec<Unit> = [1, 2, 3].map(|n| Unit::Frontend(frontend(n))).to_vec();
        set_net_admin(false);
        let change = table.apply(&units, &desired).map(|applied| refused(&applied));
        let all = table.synchronize(&desired).map(|applied| refused(&applied));
        set_net_admin(true);
        for result in [change, all] {
            assert_eq!(result.unwrap_err().errno(), Some(libc::EPERM));
        }
        (table, desired)
    });
    assert_eq!(listed(&host), before);
    host.run(move || {
        let mut table = table;
        assert_eq!(refused(&table.synchronize(&desired).unwrap()), []);
    });
    assert!(listed(&host).contains("10.96.0.3 . tcp . 80 : goto endpoints-1"));
}

/// A transaction of one message, whose number is 1, and the kernel that answers it.
fn transaction() -> (FakeKernel, NftSocket, Batch) {
    let (kernel, wire) = FakeKernel::new().unwrap();
    let mut batch = Batch::new(Family::V4);
    batch.add_table("");
    (kernel, NftSocket::over(wire), batch)
}

/// The kernel's answer to the message with this number.
fn answer(sequence: u32, code: i32) -> Vec<u8> {
    let mut writer = Writer::default();
    writer
        .message(Header { kind: NLMSG_ERROR, flags: 0, sequence, family: 0, resource: 0 }, |_| {});
    // The code stands where other messages have netfilter's header.
    let mut bytes = writer.bytes().to_vec();
    bytes[16..20].copy_from_slice(&code.to_ne_bytes());
    // Of the message that it answers, the header.
    bytes.extend_from_slice(&[0; 16]);
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

#[test]
fn refusals_say_what_was_refused_and_why() {
    for errno in [libc::EBUSY, libc::ENOBUFS, libc::EINTR, libc::ENOMEM, libc::EPERM, libc::ENFILE]
    {
        let (kernel, mut socket, mut batch) = transaction();
        kernel.answer(&answer(1, -errno));
        let error = socket.commit(&mut batch).unwrap_err();
        assert_eq!(error.errno(), Some(errno), "{error}");
        assert_eq!(error.to_string(), format!("table keelson-proxy: {}", error_of(-errno)));
    }
    // A number that has no positive one.
    let (kernel, mut socket, mut batch) = transaction();
    kernel.answer(&answer(1, i32::MIN));
    assert_eq!(socket.commit(&mut batch).unwrap_err().errno(), Some(i32::MAX));
}

#[test]
fn an_answer_that_is_cut_off_is_as_good_as_lost() {
    let whole = answer(1, 0);
    for length in 0..whole.len() {
        let (kernel, mut socket, mut batch) = transaction();
        kernel.answer(&whole[..length]);
        let error = socket.commit(&mut batch).unwrap_err();
        assert!(matches!(error, NftError::AnswersLost), "{length}: {error}");
    }
    let (kernel, mut socket, mut batch) = transaction();
    kernel.answer(&whole);
    socket.commit(&mut batch).unwrap();
}

#[test]
fn late_answers_are_not_taken_for_those_of_the_next_transaction() {
    let (kernel, mut socket, mut batch) = transaction();
    kernel.answer(&answer(7, 0));
    assert!(matches!(socket.commit(&mut batch), Err(NftError::AnswersLost)));
    // It comes when nobody waits any more.
    kernel.answer(&answer(1, 0));
    let mut next = Batch::new(Family::V4);
    next.add_table("");
    assert!(matches!(socket.commit(&mut next), Err(NftError::AnswersLost)));
}

#[test]
fn a_listing_that_is_interrupted_is_begun_again_and_not_for_ever() {
    let list = |socket: &mut NftSocket| {
        let mut messages = 0;
        let result = socket.list(Family::V4, NFT_MSG_GETTABLE, |_| {}, |_| messages += 1, || {});
        (result, messages)
    };
    let (kernel, wire) = FakeKernel::new().unwrap();
    let mut socket = NftSocket::over(wire);
    for sequence in 1..=3 {
        kernel.answer(&answer(sequence, -libc::EINTR));
    }
    let mut done = answer(4, 0);
    done[4..6].copy_from_slice(&NLMSG_DONE.to_ne_bytes());
    kernel.answer(&done);
    assert!(matches!(list(&mut socket), (Ok(()), 0)));

    for sequence in 5..100 {
        kernel.answer(&answer(sequence, -libc::EINTR));
    }
    assert!(matches!(list(&mut socket), (Err(NftError::Restless), 0)));
    // A table that is busy is nobody's to wait for.
    let (kernel, wire) = FakeKernel::new().unwrap();
    let mut socket = NftSocket::over(wire);
    kernel.answer(&answer(1, -libc::EBUSY));
    assert_eq!(list(&mut socket).0.unwrap_err().errno(), Some(libc::EBUSY));
}
