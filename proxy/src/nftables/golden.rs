//! The encoder's bytes, against files that were looked at, and against another reader of them.

use netlink_packet_core::{NetlinkBuffer, NetlinkDeserializable, NetlinkHeader};
use netlink_packet_netfilter::NetfilterMessage;

use super::{
    batch::{Batch, Bytes, Data, Element},
    expression::Verdict,
    keys::frontend_key,
    layout::{self, DynamicChain, Layout, PickChain},
};
use crate::{
    config::{DetectLocal, NodePortAddresses},
    model::{Family, Protocol},
    ruleset::{Frontend, Lane, Masquerade},
};

pub(super) fn layout(family: Family) -> Layout {
    Layout {
        family,
        detect_local: DetectLocal::Ranges(vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00:10::/64".parse().unwrap(),
        ]),
        masquerade_all: false,
        masquerade_mark: 0x4000,
        node_port_addresses: NodePortAddresses::Primary,
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for line in bytes.chunks(16) {
        let words: Vec<String> = line
            .chunks(4)
            .map(|word| word.iter().map(|b| format!("{b:02x}")).collect::<String>())
            .collect();
        text.push_str(&words.join(" "));
        text.push('\n');
    }
    text
}

/// Compares with a file beside this one; `KEELSON_GOLDEN=write cargo test -p keelson-proxy golden`
/// writes them anew.
fn check(name: &str, batch: &mut Batch) {
    let bytes = batch.finish();
    let path = format!("{}/src/nftables/golden/{name}.hex", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("KEELSON_GOLDEN").is_some() {
        std::fs::write(&path, hex(bytes)).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        hex(bytes),
        expected,
        "{path} differs; KEELSON_GOLDEN=write cargo test -p keelson-proxy golden writes it anew"
    );
    // A reader that somebody else wrote has to find whole messages in it.
    let mut rest = bytes;
    while !rest.is_empty() {
        let buffer = NetlinkBuffer::new_checked(rest).unwrap();
        let mut header = NetlinkHeader::default();
        header.length = buffer.length();
        header.message_type = buffer.message_type();
        let length = buffer.length() as usize;
        NetfilterMessage::deserialize(&header, &rest[16..length]).unwrap();
        rest = &rest[length..];
    }
}

#[test]
#[cfg(target_endian = "little")]
fn a_picking_chain() {
    for (family, name) in [(Family::V4, "pick-v4"), (Family::V6, "pick-v6")] {
        let mut batch = Batch::new(family);
        for sticky in [false, true] {
            let pick = PickChain {
                lane: Lane::Address,
                masquerade: Masquerade::OffCluster,
                sticky,
                count: 3,
            };
            let chain = layout(family).dynamic_chain(DynamicChain::Pick(pick));
            batch.add_chain(&chain);
            batch.add_rules(&chain);
        }
        check(name, &mut batch);
    }
}

#[test]
#[cfg(target_endian = "little")]
fn the_static_part() {
    let layout = layout(Family::V4);
    let mut batch = Batch::new(Family::V4);
    batch.add_table("comment");
    for set in layout.sets() {
        batch.add_set(&set);
    }
    let remember = layout.dynamic_chain(DynamicChain::Remember(10_800));
    for chain in layout.chains().into_iter().chain([remember]) {
        batch.add_chain(&chain);
        batch.add_rules(&chain);
    }
    check("static-v4", &mut batch);
}

#[test]
#[cfg(target_endian = "little")]
fn elements() {
    let key = frontend_key(&Frontend::at([10, 96, 0, 10], Protocol::Udp, 53));
    let goto = Data::Verdict(Verdict::Goto("endpoints-1".into()));
    let endpoint = Bytes::new().part(&[10, 244, 0, 7]).part(&8053u16.to_be_bytes());
    let index = key.part(&0u32.to_ne_bytes());
    let mut batch = Batch::new(Family::V4);
    batch.elements(layout::SERVICES, false, [Element { key, data: Data::None }]);
    batch.elements(layout::SERVICES, true, [Element { key, data: goto }]);
    batch.elements(layout::ENDPOINTS, true, [Element { key: index, data: Data::Value(endpoint) }]);
    check("elements-v4", &mut batch);
}

#[test]
fn a_large_load_is_many_messages_that_each_fit() {
    let elements = (0..10_000u32).map(|n| Element {
        key: Bytes::new().part(&n.to_be_bytes()).part(&[6]).part(&[0, 80]).part(&[0; 4]),
        data: Data::Value(Bytes::new().part(&[10, 0, 0, 1]).part(&[0, 80])),
    });
    let mut batch = Batch::new(Family::V4);
    batch.elements(layout::ENDPOINTS, true, elements);
    assert!(batch.last_sequence() > 5);
    for message in super::attribute::Messages(batch.finish()) {
        assert!(message.payload.len() < 65_536);
    }
}
