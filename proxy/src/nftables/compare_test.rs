//! What the kernel lists of a table that nobody has edited is what was written, whatever it adds;
//! and every edit is found and mended, by name.

use super::{
    apply::{Needed, static_part},
    batch::{Batch, Set, SetKind},
    layout::{AFFINITY, DynamicChain, Layout, NODEPORTS},
    observe::{Found, observe},
    ruleset_test::{FAMILIES, everything, layouts, normalized, open, table_name},
    socket::NftSocket,
    sources::Sources,
};
use crate::{model::Family, netns::Namespace};

/// One chain of each kind, and a list of sources.
fn needed(family: Family) -> Needed {
    let range = if family == Family::V4 { "192.0.2.0/24" } else { "2001:db8::/64" };
    let list = Sources::new(family, &[range.parse().unwrap()]);
    let mut needed = Needed::default();
    needed.chains.extend(Layout::common_chains());
    needed.chains.extend(Layout::one_of_each().filter(|c| !matches!(c, DynamicChain::Sources(_))));
    needed.chains.insert(DynamicChain::Sources(list.id()));
    needed.lists.insert(list.id(), list);
    needed
}

/// Writes something and looks at it: why it is different, if it is.
fn difference(host: &Namespace, layout: &Layout, mut batch: Batch) -> Option<String> {
    let layout = layout.clone();
    host.run(move || {
        let mut socket = NftSocket::open().unwrap();
        socket.commit(&mut batch).unwrap();
        match observe(&mut socket, &layout).unwrap() {
            Found::Intact { .. } => None,
            Found::Different(why) => Some(why),
        }
    })
}

#[test]
fn what_was_written_is_found_as_it_was_written() {
    let host = Namespace::new();
    for family in FAMILIES {
        for layout in layouts(family) {
            let batch = static_part(&layout, &needed(family));
            assert_eq!(difference(&host, &layout, batch), None, "{layout:?}");
        }
    }
}

#[test]
fn sets_that_were_declared_otherwise_are_found() {
    type Edit = fn(&mut Set);
    let edits: [(&str, Edit); 4] = [
        (AFFINITY, |set| set.kind = SetKind::Dynamic { size: 10 }),
        (AFFINITY, |set| set.kind = SetKind::Plain),
        (NODEPORTS, |set| set.key_type = 0),
        (NODEPORTS, |set| set.key_length = 12),
    ];
    let host = Namespace::new();
    for family in FAMILIES {
        let layout = layouts(family).swap_remove(0);
        for (name, edit) in edits {
            let mut batch = Batch::new(family);
            batch.add_table("");
            batch.delete_table();
            batch.add_table(&layout.fingerprint());
            for mut set in layout.sets() {
                if set.name == name {
                    edit(&mut set);
                }
                batch.add_set(&set);
            }
            let why = difference(&host, &layout, batch);
            assert_eq!(why, Some(format!("the set {name} was declared otherwise")));
        }
    }
}

/// What another program does, and what is found.
fn edits() -> Vec<(String, String)> {
    let replaced = |chain: &str, comment: &str, rule: &str| {
        let edit = format!(
            "h=$(nft -a list chain X {chain} | sed -n 's/.*comment \"{comment}\" # handle //p'); \
             nft \"replace rule X {chain} handle $h {rule} comment \\\"{comment}\\\"\""
        );
        (edit, format!("the rule \"{comment}\" of the chain {chain} was edited"))
    };
    let nft = |edit: &str, found: &str| (format!("nft '{edit}'"), found.to_owned());
    let foreign = "there is something in the table that isn't ours";
    vec![
        replaced("nat-prerouting", "services", "tcp dport 7 counter"),
        replaced("nat-output", "services", "meta mark 7 drop"),
        replaced("endpoints-2", "one of 2", "drop"),
        replaced("endpoints-3", "or the first", "return"),
        replaced("nat-postrouting", "marked connections", "masquerade"),
        replaced("reject-at-once", "all else", "counter drop"),
        replaced("check-endpoints", "who may come", "ct state invalid accept"),
        replaced("remember-10800", "where the client was sent", "counter"),
        nft(
            "chain X filter-forward { policy drop; }",
            "the policy of the chain filter-forward was changed",
        ),
        nft(
            "delete chain X filter-forward; add chain X filter-forward { type filter hook forward priority 7; }",
            "the chain filter-forward is of another type or at another hook or priority",
        ),
        nft("add rule X filter-output accept", "the chain filter-output has 2 rules instead of 1"),
        nft("add table X { flags dormant; }", "the table was made dormant"),
        nft("add set X mine { type inet_service; }", "there is a set mine that isn't ours"),
        nft("add map X mine { type mark : mark; }", "there is a set mine that isn't ours"),
        nft("add counter X mine", foreign),
        nft("add chain X mine", "there is a chain mine that isn't ours"),
        nft("delete rule X nat-output handle H", "the chain nat-output has 2 rules instead of 3"),
    ]
}

#[test]
fn every_edit_is_found_and_mended() {
    let host = Namespace::new();
    let world = everything();
    for family in FAMILIES {
        let name = table_name(family);
        let layout = layouts(family).swap_remove(0);
        let mut table = open(&host, &layout);
        table.synchronize(&world.desired).unwrap();
        let listing = || normalized(&host.sh(&format!("nft list table {name}")));
        let before = listing();
        let last =
            format!("nft -a list chain {name} nat-output | sed -n 's/.*node ports.*# handle //p'");
        for (edit, found) in edits() {
            let handle = host.sh(&last);
            host.sh(&edit.replace('X', name).replace('H', handle.trim()));
            let mended = table.synchronize(&world.desired).unwrap();
            assert_eq!(mended.rebuilt.as_deref(), Some(&*found), "{edit}");
            assert_eq!(listing(), before, "{edit}");
            let again = table.synchronize(&world.desired).unwrap();
            assert_eq!((again.elements, again.rebuilt), (0, None), "{edit}");
        }
    }
}

/// In a map of verdicts, whatever they are, and whether a Service has the key.
#[test]
fn verdicts_that_the_proxy_never_writes_are_mended() {
    let host = Namespace::new();
    let world = everything();
    let layout = layouts(Family::V4).swap_remove(0);
    let mut table = open(&host, &layout);
    table.synchronize(&world.desired).unwrap();
    let listing = || normalized(&host.sh("nft list table ip keelson-proxy"));
    let before = listing();
    for (map, key) in [
        ("services", "10.96.0.1 . tcp . 80"),
        ("services", "10.0.0.1 . tcp . 80"),
        ("nodeports", "tcp . 30085"),
        ("firewall", "198.51.100.1 . tcp . 80"),
        ("no-endpoints", "10.96.0.4 . tcp . 80"),
        ("sticky", "10.96.0.2 . tcp . 80"),
    ] {
        let map = format!("ip keelson-proxy {map}");
        for verdict in ["accept", "return", "continue", "jump reject-at-once", "drop"] {
            host.try_sh(&format!("nft 'delete element {map} {{ {key} }}'"));
            host.sh(&format!("nft 'add element {map} {{ {key} : {verdict} }}'"));
            let mended = table.synchronize(&world.desired).unwrap();
            assert!(mended.elements > 0 && mended.rebuilt.is_none(), "{map} {key} : {verdict}");
            assert!(mended.refused.is_empty(), "{map} {key} : {verdict}: {mended:?}");
            assert_eq!(listing(), before, "{map} {key} : {verdict}");
        }
    }
}

#[test]
fn remembered_choices_of_others_are_forgotten() {
    let host = Namespace::new();
    let world = everything();
    let layout = layouts(Family::V4).swap_remove(0);
    let mut table = open(&host, &layout);
    table.synchronize(&world.desired).unwrap();
    // A client of the sticky Service's cluster address, and one of its node port.
    let kept = [
        "192.0.2.9 . 10.96.0.2 . tcp . 80 : 10.244.0.5 . 8080",
        "192.0.2.9 . 192.0.2.1 . tcp . 30080 : 10.244.0.4 . 8080",
    ];
    let strangers = [
        // No endpoint at all, one of another Service, another port, a Service that isn't there.
        "192.0.2.8 . 10.96.0.2 . tcp . 80 : 10.244.0.66 . 8080",
        "192.0.2.7 . 10.96.0.2 . tcp . 80 : 10.244.0.1 . 8080",
        "192.0.2.6 . 10.96.0.2 . tcp . 80 : 10.244.0.4 . 22",
        "192.0.2.6 . 10.96.0.99 . tcp . 80 : 10.244.0.4 . 8080",
    ];
    for choice in kept.iter().chain(&strangers) {
        host.sh(&format!("nft add element ip keelson-proxy affinity '{{ {choice} }}'"));
    }
    assert_eq!(table.synchronize(&world.desired).unwrap().elements, strangers.len());
    let listed = host.sh("nft list map ip keelson-proxy affinity");
    for (choice, stays) in
        kept.iter().map(|c| (c, true)).chain(strangers.iter().map(|c| (c, false)))
    {
        assert_eq!(listed.contains(choice), stays, "{choice}: {listed}");
    }
    assert_eq!(table.synchronize(&world.desired).unwrap().elements, 0);
}
