//! Lists of sources in a kernel: made before they are used, shared, and gone after their use.

use keelson_api::object::ObjectKey;
use serde_json::{Value, json};

use super::ruleset_test::{World, layouts, open, service, slices, table_name};
use crate::{
    model::Family,
    netns::Namespace,
    ruleset::{AddressSet, Unit, desired::ServiceRules},
};

/// The chains of lists, as nft names them.
fn lists(host: &Namespace) -> Vec<String> {
    let listed = host.sh(&format!("nft list table {}", table_name(Family::V4)));
    let chains = listed.lines().filter_map(|line| line.trim().strip_prefix("chain sources-"));
    chains.map(str::to_owned).collect()
}

fn balanced(n: u8, ranges: &[String]) -> Vec<Value> {
    let spec = json!({"type": "LoadBalancer", "ports": [{"port": 80}],
        "loadBalancerSourceRanges": ranges, "ingress": [{"ip": format!("198.51.100.{n}")}]});
    let mut objects = vec![service(n, spec)];
    objects.extend(slices(n, &json!([{"port": 8080}]), &[(n, true, false)]));
    objects
}

#[test]
fn services_with_the_same_ranges_share_a_list_that_goes_with_the_last() {
    let host = Namespace::new();
    let layout = layouts(Family::V4).remove(0);
    let mut world = World::new();
    let mut table = open(&host, &layout);
    table.synchronize(&world.desired).unwrap();
    // Every other network, so that none of them touch: two edges for each.
    let many: Vec<String> =
        (0..2_000).map(|n| format!("10.{}.{}.0/24", n / 128, n % 128 * 2)).collect();
    let few = vec!["192.0.2.0/24".to_owned()];
    let mut apply = |objects: Vec<Value>| {
        let dirty = world.take_in(&objects);
        let applied = table.apply(&dirty, &world.desired).unwrap();
        assert!(applied.refused.is_empty() && applied.rebuilt.is_none(), "{applied:?}");
    };
    apply(balanced(1, &many));
    apply(balanced(2, &many));
    assert_eq!(lists(&host).len(), 1);
    apply(balanced(1, &few));
    apply(balanced(3, &[]));
    assert_eq!(lists(&host).len(), 2, "one still uses the long list");
    apply(balanced(2, &few));
    apply(balanced(3, &few));
    assert_eq!(lists(&host).len(), 1, "a list goes with the change after its last use");
    // A restart looks no further than a change does.
    apply(balanced(1, &[]));
    apply(balanced(2, &[]));
    apply(balanced(3, &[]));
    let restarted = open(&host, &layout).synchronize(&world.desired).unwrap();
    assert_eq!((restarted.elements, restarted.rebuilt), (0, None));
    assert_eq!(lists(&host), Vec::<String>::new());
}

#[test]
fn an_edited_list_is_made_anew() {
    let host = Namespace::new();
    let layout = layouts(Family::V4).remove(0);
    let mut world = World::new();
    world.take_in(&balanced(1, &["192.0.2.0/24".to_owned()]));
    let mut table = open(&host, &layout);
    table.synchronize(&world.desired).unwrap();
    let name = format!("sources-{}", lists(&host)[0].trim_end_matches(" {"));
    host.sh(&format!("nft add element {} {name} '{{ 203.0.113.0/24 }}'", table_name(Family::V4)));
    let mended = table.synchronize(&world.desired).unwrap();
    assert_eq!(mended.rebuilt, Some(format!("the set {name} was edited")));
    let listed = host.sh(&format!("nft list set {} {name}", table_name(Family::V4)));
    assert!(!listed.contains("203.0.113"), "{listed}");
}

#[test]
fn where_a_list_has_the_node_it_may_come_from_the_load_balancers_address() {
    let host = Namespace::new();
    let layout = layouts(Family::V4).remove(0);
    let mut world = World::new();
    let mut table = open(&host, &layout);
    table.synchronize(&world.desired).unwrap();
    let own = || {
        let listed = host.sh(&format!("nft list set {} own-balancers", table_name(Family::V4)));
        listed.matches("198.51.100.1 . 198.51.100.1 . tcp . 80").count()
    };
    let mut apply = |world: &World, dirty: &[Unit]| {
        let applied = table.apply(dirty, &world.desired).unwrap();
        assert!(applied.refused.is_empty() && applied.rebuilt.is_none(), "{applied:?}");
        let again = open(&host, &layout).synchronize(&world.desired).unwrap();
        assert_eq!((again.elements, again.rebuilt), (0, None));
    };
    let node = |address: &str| ServiceRules {
        addresses: vec![(AddressSet::NodeAddresses, address.parse().unwrap())],
        ..ServiceRules::default()
    };
    // The node's address is 192.0.2.1.
    for (ranges, expected) in [
        (&["192.0.2.0/24"][..], 1),
        (&["192.0.2.128/25", "203.0.113.0/24"], 0),
        (&["10.0.0.0/8", "192.0.2.1/32"], 1),
        (&[], 0),
        (&["203.0.113.0/24"], 0),
    ] {
        let ranges: Vec<String> = ranges.iter().map(|range| (*range).to_owned()).collect();
        let dirty = world.take_in(&balanced(1, &ranges));
        apply(&world, &dirty);
        assert_eq!(own(), expected, "{ranges:?}");
    }
    for (address, expected) in [("203.0.113.7", 1), ("192.0.2.1", 0)] {
        let dirty = world.desired.replace(&ObjectKey::default(), Some(node(address))).dirty;
        apply(&world, &dirty);
        assert_eq!(own(), expected, "a node that is {address}");
    }
}
