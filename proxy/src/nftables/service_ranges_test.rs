//! The ranges of Services in a kernel: merged, changed in place, left alone until they are known,
//! and mended.

use ipnet::IpNet;

use super::ruleset_test::{FAMILIES, World, layouts, open, table_name};
use crate::{model::Family, netns::Namespace};

/// The elements of the set as nft lists them.
fn listed(host: &Namespace, family: Family) -> Vec<String> {
    let text = host.sh(&format!("nft list set {} service-ranges", table_name(family)));
    let Some((_, rest)) = text.split_once("elements = {") else { return Vec::new() };
    let elements = rest.split_once('}').unwrap().0.split(',');
    elements.map(|element| element.trim().to_owned()).collect()
}

fn ranges(texts: &[&str]) -> Vec<IpNet> {
    let mut ranges: Vec<IpNet> = texts.iter().map(|text| text.parse().unwrap()).collect();
    ranges.sort_unstable();
    ranges
}

#[test]
fn they_change_in_place_and_a_restart_writes_nothing() {
    let host = Namespace::new();
    let steps: [(&[&str], [&[&str]; 2]); 8] = [
        (&["10.96.0.0/16", "fd00:96::/108"], [&["10.96.0.0/16"], &["fd00:96::/108"]]),
        // Larger, around the same middle, and from the same beginning.
        (&["10.96.0.0/15", "fd00:96::/104"], [&["10.96.0.0/15"], &["fd00:96::/104"]]),
        (&["10.64.0.0/10", "fd00:96::/112"], [&["10.64.0.0/10"], &["fd00:96::/112"]]),
        // One in the other, and some that touch: as they are they couldn't stand in one set.
        (
            &["10.96.0.0/16", "10.96.7.0/24", "10.97.0.0/16", "10.99.0.0/16", "fd00:96::/112"],
            [&["10.96.0.0/15", "10.99.0.0/16"], &["fd00:96::/112"]],
        ),
        (&["10.98.0.0/15"], [&["10.98.0.0/15"], &[]]),
        (&[], [&[], &[]]),
        // To the end of all addresses, and from the beginning of each family's.
        (
            &["255.255.255.255/32", "1.0.0.0/8", "ffff::/16", "1::/16"],
            [&["1.0.0.0/8", "255.255.255.255"], &["1::/16", "ffff::/16"]],
        ),
        (&["10.96.0.1/32", "fd00:96::1/128"], [&["10.96.0.1"], &["fd00:96::1"]]),
    ];
    let mut world = World::new();
    let mut tables = FAMILIES.map(|family| open(&host, &layouts(family)[0]));
    for table in &mut tables {
        table.synchronize(&world.desired).unwrap();
    }
    for (texts, expected) in steps {
        let dirty = world.desired.set_service_ranges(ranges(texts)).dirty;
        for (table, (family, expected)) in tables.iter_mut().zip(FAMILIES.into_iter().zip(expected))
        {
            let applied = table.apply(&dirty, &world.desired).unwrap();
            assert!(applied.refused.is_empty() && applied.rebuilt.is_none(), "{applied:?}");
            assert_eq!(listed(&host, family), expected, "{texts:?}");
            let again = open(&host, &layouts(family)[0]).synchronize(&world.desired).unwrap();
            assert_eq!((again.elements, again.rebuilt), (0, None), "{texts:?}");
        }
        let same = world.desired.set_service_ranges(ranges(texts));
        assert_eq!(same.dirty, [], "the same again is no change");
    }
}

#[test]
fn until_they_are_known_what_is_there_stays() {
    let host = Namespace::new();
    let layout = layouts(Family::V4).remove(0);
    let mut world = World::new();
    world.desired.set_service_ranges(ranges(&["10.96.0.0/16"]));
    open(&host, &layout).synchronize(&world.desired).unwrap();
    // A start that has Services before it has ranges.
    let mut world = World::new();
    let mut table = open(&host, &layout);
    let applied = table.synchronize(&world.desired).unwrap();
    assert_eq!((applied.elements, applied.rebuilt), (0, None));
    assert_eq!(listed(&host, Family::V4), ["10.96.0.0/16"]);
    let dirty = world.desired.set_service_ranges(Vec::new()).dirty;
    table.apply(&dirty, &world.desired).unwrap();
    assert_eq!(listed(&host, Family::V4), Vec::<String>::new());
}

#[test]
fn edited_ranges_are_mended() {
    let host = Namespace::new();
    let layout = layouts(Family::V4).remove(0);
    let mut world = World::new();
    world.desired.set_service_ranges(ranges(&["10.96.0.0/16"]));
    let mut table = open(&host, &layout);
    table.synchronize(&world.desired).unwrap();
    for edit in [
        "add element X service-ranges { 10.244.0.0/16 }",
        "add element X service-ranges { 10.97.0.0/16 }",
        "delete element X service-ranges { 10.96.0.0/16 }",
        "flush set X service-ranges",
    ] {
        host.sh(&format!("nft '{}'", edit.replace('X', table_name(Family::V4))));
        assert_ne!(listed(&host, Family::V4), ["10.96.0.0/16"], "{edit}");
        let mended = table.synchronize(&world.desired).unwrap();
        assert!(mended.elements > 0, "{edit}: {mended:?}");
        assert_eq!(listed(&host, Family::V4), ["10.96.0.0/16"], "{edit}");
    }
}
