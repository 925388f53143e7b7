use clap::Parser;

use super::*;
use crate::cli::{Command, ExplainCommand};

#[test]
fn both_ends_are_of_one_family() {
    let services = serde_json::json!([{"metadata": {"name": "web", "namespace": "d"},
        "spec": {"clusterIPs": ["10.96.0.1", "fd00::1"]}}]);
    let pods = serde_json::json!([{"metadata": {"name": "six", "namespace": "d"},
        "spec": {"nodeName": "n", "containers": []},
        "status": {"podIPs": [{"ip": "fd01::5"}]}}]);
    let objects =
        Objects { services: serde_json::from_value(services).unwrap(), ..Objects::default() };
    let known = Known { objects, pods: serde_json::from_value(pods).unwrap(), ..Known::default() };
    let nodes = ["192.0.2.1", "2001:db8::1"].map(|node| node.parse().unwrap()).to_vec();
    let around = Around { known, here: "n".into(), nodes };
    let (web, six) = (ObjectKey::new("d", "web"), ObjectKey::new("d", "six"));
    let (web, six) = (|| Place::Object(web.clone()), || Place::Object(six.clone()));
    let at = |text: &str| Place::Address(text.parse().unwrap());
    let args = ["keelson", "explain", "packet", "--from=node", "--to=node", "--port=1"];
    let args = crate::cli::Cli::try_parse_from(args).unwrap().command;
    let Command::Explain(ExplainCommand::Packet(args)) = args else { panic!("{args:?}") };
    for (from, to, expected) in [
        (at("203.0.113.7"), web(), ["203.0.113.7", "10.96.0.1"]),
        (at("2001:db8::9"), web(), ["2001:db8::9", "fd00::1"]),
        (Place::Node, web(), ["192.0.2.1", "10.96.0.1"]),
        (Place::Node, at("fd00::1"), ["2001:db8::1", "fd00::1"]),
        (six(), web(), ["fd01::5", "fd00::1"]),
        (at("203.0.113.7"), at("fd00::1"), ["203.0.113.7", "fd00::1"]),
        (at("203.0.113.7"), Place::Node, ["203.0.113.7", "192.0.2.1"]),
    ] {
        let targets = around.targets(&to).unwrap();
        let (client, _) = around.client(&from, &targets).unwrap();
        let packet = around.packet(&from, &to, &args).unwrap();
        assert_eq!([client.to_string(), packet.to.to_string()], expected, "{from:?} {to:?}");
    }
    assert!(around.client(&six(), &[[10, 0, 0, 1].into()]).is_err(), "it has none of IPv4");
    assert!(around.client(&six(), &around.targets(&web()).unwrap()).unwrap().1, "it is here");
}

fn known(pods: serde_json::Value) -> Around {
    let pods = serde_json::from_value(pods).unwrap();
    let known = Known { pods, ..Known::default() };
    Around { known, here: "n".into(), nodes: vec![[192, 0, 2, 1].into()] }
}

#[test]
fn who_asks_for_a_pod_of_another_node_is_told() {
    let pod = |name: &str, node: &str, address: &str, phase: &str| {
        serde_json::json!({"metadata": {"name": name, "namespace": "d"},
            "spec": {"nodeName": node, "containers": []},
            "status": {"phase": phase, "podIPs": [{"ip": address}]}})
    };
    let around = known(serde_json::json!([
        pod("here", "n", "10.244.1.1", "Running"),
        pod("over", "m", "10.244.2.1", "Succeeded"),
        pod("there", "m", "10.244.2.2", "Running"),
    ]));
    let named = |name: &str| Place::Object(ObjectKey::new("d", name));
    let at = |text: &str| Place::Address(text.parse().unwrap());
    for (from, to, expected) in [
        (named("here"), "10.96.0.1", false),
        (named("there"), "10.96.0.1", true),
        (at("10.244.2.2"), "10.96.0.1", true),
        (at("10.244.2.1"), "10.96.0.1", false),
        (at("10.244.1.1"), "10.96.0.1", false),
        (Place::Node, "10.96.0.1", false),
        // The node's own port is decided about where the packet gets to.
        (named("there"), "192.0.2.1", false),
    ] {
        let packet = Packet {
            from: [10, 244, 2, 2].into(),
            from_pod_here: false,
            to: to.parse().unwrap(),
            port: 80,
            protocol: keelson_proxy::Protocol::Tcp,
        };
        let note = around.on_another_node(&from, &packet);
        assert_eq!(note.is_some(), expected, "{from:?} {to} {note:?}");
        if let Some(note) = note {
            assert!(note.starts_with("pod d/there runs on the node m,"), "{note}");
            assert!(note.contains("the proxy of n would"), "{note}");
        }
    }
}

#[test]
fn pods_that_cant_be_read_are_told_of() {
    let mut around = known(serde_json::json!([]));
    assert_eq!((around.unknown(true), around.unknown(false)), (None, None));
    let refused = kube::error::Status {
        code: 403,
        message: "pods is forbidden".into(),
        ..Default::default()
    };
    around.known.pods_unread = Some(reason(&kube::Error::Api(Box::new(refused))));
    let note = around.unknown(true).unwrap();
    assert!(note.starts_with("pods can't be read (403: pods is forbidden)"), "{note}");
    assert!(note.contains("it counts as from outside"), "{note}");
    assert!(!around.unknown(false).unwrap().contains("from outside"));
}

#[test]
fn services_without_an_address_say_what_they_are() {
    let services = serde_json::json!([
        {"metadata": {"name": "alias", "namespace": "d"},
         "spec": {"type": "ExternalName", "externalName": "example.org"}},
        {"metadata": {"name": "headless", "namespace": "d"}, "spec": {"clusterIP": "None"}},
        {"metadata": {"name": "new", "namespace": "d"}, "spec": {"ports": [{"port": 1}]}}]);
    let mut around = known(serde_json::json!([]));
    around.known.objects.services = serde_json::from_value(services).unwrap();
    for (name, expected) in [
        ("alias", "an alias (CNAME) of \"example.org\""),
        ("headless", "its name leads to its endpoints themselves"),
        ("new", "Service d/new has no cluster address"),
    ] {
        let error = around.cluster_addresses(&ObjectKey::new("d", name)).unwrap_err();
        assert!(error.to_string().ends_with(expected), "{error}");
    }
}

fn args(more: &[&str]) -> Result<Box<ExplainPacketArgs>, String> {
    let all = ["keelson", "explain", "packet", "--from=203.0.113.5", "--to=10.96.0.1"];
    let parsed = crate::cli::Cli::try_parse_from(all.iter().chain(more));
    match parsed.map_err(|error| error.to_string())?.command {
        Command::Explain(ExplainCommand::Packet(args)) => Ok(args),
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_has_no_cluster_is_told_how_to_name_one() {
    let folder = tempfile::tempdir().unwrap();
    let at = format!("--data-dir={}", folder.path().display());
    let error = own_kubeconfig(&args(&["--port=80", &at]).unwrap()).unwrap_err().to_string();
    assert!(error.contains("--kubeconfig FILE") && error.contains("--services"), "{error}");
    assert_eq!(error.matches("No such file").count(), 1, "{error}");
}

#[test]
fn files_that_cant_be_read_fail_the_command_after_its_answer() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("services.yaml");
    let service = "kind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.0.1}\n";
    let flags = ["--port=80", "--node=n", "--services", file.to_str().unwrap()];
    let ask = || packet(&args(&flags).unwrap());
    std::fs::write(&file, service).unwrap();
    ask().unwrap();
    std::fs::write(&file, format!("{service}---\nkind: Service\nspec: 7\n")).unwrap();
    let error = ask().unwrap_err().to_string();
    assert!(error.starts_with("the answer lacks what could not be read (1,"), "{error}");
}

#[test]
fn a_port_is_a_number() {
    for port in ["http", "0", "65536", "-1", ""] {
        let error = args(&[&format!("--port={port}")]).unwrap_err();
        assert!(error.contains("a number from 1 to 65535 is wanted"), "{error}");
    }
    assert_eq!(args(&["--port=65535"]).unwrap().port, 65535);
}

#[test]
fn places_are_addresses_objects_or_the_node() {
    let parse = |flag, words: &[&str]| {
        let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        Place::parse(flag, &words)
    };
    assert_eq!(parse("--from", &["node"]).unwrap(), Place::Node);
    let pod = Place::Object(ObjectKey::new("a", "b"));
    assert_eq!(parse("--from", &["pod", "a/b"]).unwrap(), pod);
    let service = Place::Object(ObjectKey::new("default", "b"));
    assert_eq!(parse("--to", &["service", "b"]).unwrap(), service);
    assert!(matches!(parse("--to", &["10.0.0.1"]), Ok(Place::Address(_))));
    for words in [&["x"][..], &["service", "a/b"], &["pod", "a", "b"]] {
        assert!(parse("--from", words).is_err(), "{words:?}");
    }
}
