//! Whatever the kernel answers: a conversation with one that says what the bytes say.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use keelson_api::object::ObjectKey;

use super::source::Source;
use crate::{
    ProxyConfig,
    backend::{Forget, Stale},
    conntrack::{ConntrackTable, stale::Expected},
    model::{Endpoint, Family, Protocol, table::ServiceTable},
    nftables::{
        apply::Table,
        attribute::{Attributes, Messages},
        batch::{Batch, Element, TABLE, comment_of},
        monitor::concerns_us,
        observe::observe,
        reading::Reading,
        socket::NftSocket,
        sources::Sources,
        uapi::{NLMSG_DONE, NLMSG_ERROR},
        wire::fake::FakeKernel,
    },
    ruleset::{
        Action, AddressSet, Frontend, Lane, Masquerade,
        desired::{Desired, ServiceRules},
    },
    start,
};

/// No conversation may take longer; an endless one never ends.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most that one answer has.
const ANSWER_MAX: usize = 16 * 1024;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// Reads whatever the kernel may answer, in every conversation that the proxy has with it.
///
/// # Panics
/// When something doesn't hold that must.
pub fn netlink_answers(data: &[u8]) {
    let begin = Instant::now();
    let mut source = Source::new(data);
    let family = source.pick(&[Family::V4, Family::V6]);
    let conversation = source.below(7);
    let mut answers = Vec::new();
    let mut expected = 1;
    while !source.is_empty() {
        let length = usize::from(source.number()) % ANSWER_MAX;
        let mut answer = source.bytes(length).to_vec();
        address(&mut answer, &mut expected);
        answers.push(answer);
    }
    answers.iter().for_each(|answer| read_alone(answer, family));
    if let Ok((kernel, wire)) = FakeKernel::new() {
        // What finds no room is as good as lost.
        for answer in &answers {
            let _ = kernel.answer(answer);
        }
        converse(conversation, family, wire, data.len());
    }
    assert!(begin.elapsed() < PATIENCE, "the kernel's answers took {:?}", begin.elapsed());
}

/// Numbers messages as answers to what is asked, or most would be passed over as somebody else's.
fn address(answer: &mut [u8], expected: &mut u32) {
    let mut at = 0;
    while let Some(head) = answer.get(at..at + HEADER) {
        let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let kind = u16::from_ne_bytes([head[4], head[5]]);
        // Bytes can say that they want to keep a number.
        if head[8] != 0xff {
            answer[at + 8..at + 12].copy_from_slice(&expected.to_ne_bytes());
        }
        if matches!(kind, NLMSG_DONE | NLMSG_ERROR) {
            *expected += 1;
        }
        if length < HEADER {
            return;
        }
        at = at.saturating_add(length.next_multiple_of(4));
    }
}

/// Every reader by itself, also those that a conversation comes to only after another.
fn read_alone(answer: &[u8], family: Family) {
    let config = ProxyConfig::new("here");
    let layout = start::layout(&config, family);
    let mut reading = Reading::new(family);
    let mut elements = Vec::new();
    let mut count = 0;
    for message in Messages(answer) {
        count += 1;
        concerns_us(&message, &[family.protocol_family()], &[TABLE]);
        for (_, value) in message.attributes() {
            let _ = comment_of(value);
            elements.extend(Attributes(value).filter_map(|(_, e)| Element::parse(Attributes(e))));
        }
    }
    for set in layout.sets() {
        let std::borrow::Cow::Borrowed(name) = set.name else { continue };
        elements.iter().for_each(|element| reading.element(name, element));
    }
    let most = elements.len() * layout.sets().len();
    reading.rows();
    let (held, strays) = reading.finish();
    assert!(held.units().count() + strays.len() <= 2 * most, "more is kept than was sent");
    assert!(count <= answer.len() / HEADER && elements.len() <= answer.len() / 4);
    elements.sort_by_key(|element| element.key);
    elements.dedup();
    if let Some(list) = Sources::read(family, &elements) {
        assert!(list.intervals().ranges().all(|(first, last)| first <= last));
        assert_eq!(Sources::read(family, &list.elements()), Some(list));
    }
}

fn converse(conversation: usize, family: Family, wire: crate::nftables::wire::Wire, sent: usize) {
    let layout = start::layout(&ProxyConfig::new("here"), family);
    let desired = desired(family);
    let frontend = frontend(family, Lane::Address);
    let endpoint = endpoint(family);
    // Whether it comes to an answer is the bytes' matter; that it ends is ours.
    match conversation {
        0 => drop(observe(&mut NftSocket::over(wire), &layout)),
        1 => drop(NftSocket::over(wire).generation()),
        2 => {
            let mut batch = Batch::new(family);
            batch.add_table("");
            batch.delete_table();
            drop(NftSocket::over(wire).commit(&mut batch));
        }
        3 => {
            let mut table = Table::over(NftSocket::over(wire), layout);
            if let Ok(applied) = table.synchronize(&desired) {
                assert!(applied.elements <= 100 + sent, "{applied:?}");
            }
        }
        4 => {
            let mut table = Table::over(NftSocket::over(wire), layout);
            drop(table.apply(&desired.units().collect::<Vec<_>>(), &desired));
            drop(table.forget(&[Forget { frontend, endpoint: Some(endpoint) }]));
        }
        5 => {
            let stale =
                [Stale { frontend, endpoint: Some(endpoint) }, Stale { frontend, endpoint: None }];
            drop(ConntrackTable::over(wire).forget(&stale));
        }
        _ => {
            let expected = Expected::of(&desired, &ServiceTable::default(), &[family], true);
            let mut table = ConntrackTable::over(wire);
            let mut seen = HashSet::new();
            let seen = std::cell::RefCell::new(&mut seen);
            drop(table.delete_where(family, |original, reply| {
                seen.borrow_mut().insert((original.source, reply.source));
                expected.is_stale(original, reply)
            }));
            assert!(seen.borrow().len() <= sent);
        }
    }
}

fn frontend(family: Family, lane: Lane) -> Frontend {
    let address = match family {
        Family::V4 => [10, 96, 0, 1].into(),
        Family::V6 => std::net::Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 1).into(),
    };
    let address = lane.with_address().then_some(address);
    Frontend { family, lane, address, protocol: Protocol::Udp, port: 53 }
}

fn endpoint(family: Family) -> Endpoint {
    let address = match family {
        Family::V4 => [10, 244, 0, 5].into(),
        Family::V6 => std::net::Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 5).into(),
    };
    Endpoint { address, port: 53 }
}

/// A sticky Service with one endpoint, and a node port without any.
fn desired(family: Family) -> Desired {
    let action = Action::Forward {
        endpoints: [endpoint(family)].into(),
        masquerade: Masquerade::OffCluster,
        affinity: Some(Duration::from_secs(60)),
        sources: None,
    };
    let rules = ServiceRules {
        created: 1,
        frontends: vec![
            (frontend(family, Lane::Address), action),
            (frontend(family, Lane::NodePort), Action::Reject),
        ],
        addresses: vec![(AddressSet::Hairpin, endpoint(family).address)],
        ..ServiceRules::default()
    };
    let mut desired = Desired::default();
    desired.replace(&ObjectKey::new("d", "dns"), Some(rules));
    desired
}
