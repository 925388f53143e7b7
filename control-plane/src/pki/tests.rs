//! The folder's life, and real handshakes over it.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    sync::Arc,
    time::Duration,
};

use jiff::{Timestamp, ToSpan};
use rustls::{
    ClientConnection, ServerConnection,
    pki_types::{ServerName, UnixTime},
};

use super::{plan::*, *};

fn config() -> PkiConfig {
    PkiConfig {
        node_name: "node-1".into(),
        advertise_addresses: vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()],
        service_ip: "10.96.0.1".parse().unwrap(),
        cluster_domain: "cluster.local".into(),
        extra_sans: vec!["api.example.com".into()],
    }
}

#[test]
fn the_api_server_is_known_by_all_its_documented_names() {
    let wanted = Wanted::of(Leaf::ApiServer, &config()).unwrap();
    let names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
        "node-1",
        "api.example.com",
        "127.0.0.1",
        "::1",
        "10.96.0.1",
        "192.0.2.7",
        "2001:db8::7",
    ];
    assert_eq!(wanted.names, names.map(str::to_owned).into_iter().collect::<BTreeSet<_>>());
}

#[test]
fn a_certificate_is_issued_again_for_these_reasons_only() {
    let wanted = Wanted::of(Leaf::ApiServer, &config()).unwrap();
    let now: Timestamp = "2030-01-01T00:00:00Z".parse().unwrap();
    let good = Seen {
        common_name: "kube-apiserver".into(),
        organizations: vec![],
        names: wanted.names.clone(),
        not_before: now - 24.hours() * 69,
        not_after: now + 24.hours() * 31,
        signed_by_authority: true,
        key_matches: true,
    };
    let table = [
        ("31 of 100 days remain", good.clone(), None),
        (
            "29 of 100 days remain",
            Seen {
                not_before: now - 24.hours() * 71,
                not_after: now + 24.hours() * 29,
                ..good.clone()
            },
            Some(Reason::NearExpiry),
        ),
        (
            "it ran out",
            Seen { not_after: now - 1.hours(), ..good.clone() },
            Some(Reason::NearExpiry),
        ),
        (
            "the clock was set back",
            Seen { not_before: now + 1.hours(), ..good.clone() },
            Some(Reason::NotYetValid),
        ),
        (
            "an address went",
            Seen { names: BTreeSet::new(), ..good.clone() },
            Some(Reason::NamesChanged),
        ),
        ("another key", Seen { key_matches: false, ..good.clone() }, Some(Reason::KeyMismatch)),
        (
            "another authority",
            Seen { signed_by_authority: false, ..good.clone() },
            Some(Reason::OtherAuthority),
        ),
        (
            "another group",
            Seen { organizations: vec!["system:masters".into()], ..good },
            Some(Reason::SubjectChanged),
        ),
    ];
    for (sentence, seen, expected) in table {
        assert_eq!(reissue(Some(&seen), &wanted, now), expected, "{sentence}");
    }
    assert_eq!(reissue(None, &wanted, now), Some(Reason::Missing));
}

#[test]
fn names_that_no_certificate_can_hold_are_refused() {
    for name in ["", "a b", "-a.example", "a..b", "x\n", "é.example"] {
        let config = PkiConfig { extra_sans: vec![name.into()], ..config() };
        assert!(
            matches!(Wanted::of(Leaf::ApiServer, &config), Err(PkiError::BadName(_))),
            "{name:?}"
        );
    }
}

#[test]
fn a_second_start_changes_no_file_and_all_are_private() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pki");
    ClusterPki::load_or_create(&path, &config()).unwrap();
    let read = || {
        let mut files: Vec<_> = fs::read_dir(&path)
            .unwrap()
            .map(|e| {
                let e = e.unwrap();
                assert_eq!(e.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{e:?}");
                (e.file_name(), fs::read(e.path()).unwrap())
            })
            .collect();
        files.sort();
        files
    };
    let first = read();
    assert_eq!(first.len(), 2 + 2 + 2 * Leaf::ALL.len() + 1);
    ClusterPki::load_or_create(&path, &config()).unwrap();
    assert_eq!(first, read());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn whatever_a_kill_left_is_completed_and_the_authority_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let first = ClusterPki::load_or_create(&path, &config()).unwrap();
    for leaf in Leaf::ALL {
        for ending in ["crt", "key"] {
            fs::remove_file(path.join(format!("{}.{ending}", leaf.file()))).unwrap();
            let again = ClusterPki::load_or_create(&path, &config()).unwrap();
            assert_eq!(again.ca_pem(), first.ca_pem());
        }
    }
    // A key newer than its certificate: what a kill between the two writes leaves.
    fs::copy(path.join("admin.key"), path.join("apiserver.key")).unwrap();
    fs::write(path.join("apiserver.crt.new"), "half").unwrap();
    let again = ClusterPki::load_or_create(&path, &config()).unwrap();
    handshake(
        &again.api_server_tls().unwrap().config,
        &again.client_config(None).unwrap(),
        "kubernetes",
    )
    .unwrap();
    // The authority's key alone is a first start that was cut off.
    let dir = tempfile::tempdir().unwrap();
    fs::copy(path.join("ca.key"), dir.path().join("ca.key")).unwrap();
    ClusterPki::load_or_create(dir.path(), &config()).unwrap();
}

#[test]
fn broken_files_are_named() {
    let damaged = |damage: &dyn Fn(&std::path::Path)| {
        let dir = tempfile::tempdir().unwrap();
        ClusterPki::load_or_create(dir.path(), &config()).unwrap();
        damage(dir.path());
        match ClusterPki::load_or_create(dir.path(), &config()) {
            Ok(_) => panic!("accepted"),
            Err(error) => error.to_string(),
        }
    };
    let message = damaged(&|dir| fs::remove_file(dir.join("ca.key")).unwrap());
    assert!(message.contains("/ca.key is missing while"), "{message}");
    let message = damaged(&|dir| fs::write(dir.join("ca.crt"), "x").unwrap());
    assert!(message.contains("/ca.crt cannot be used: it holds no PEM"), "{message}");
    let message = damaged(&|dir| {
        fs::copy(dir.join("sa.key"), dir.join("ca.key")).unwrap();
    });
    assert!(message.contains("ca.key beside it is not its key"), "{message}");
    let message = damaged(&|dir| fs::write(dir.join("scheduler.key"), "x").unwrap());
    assert!(message.contains("/scheduler.key cannot be used"), "{message}");
    let message = damaged(&|dir| fs::write(dir.join("sa.key"), "x").unwrap());
    assert!(message.contains("/sa.key cannot be used"), "{message}");

    let dir = tempfile::tempdir().unwrap();
    let eleven_years_ago = Timestamp::now() - (11 * 365 * 24).hours();
    ClusterPki::load_or_create_at(dir.path().into(), &config(), eleven_years_ago).unwrap();
    let message = ClusterPki::load_or_create(dir.path(), &config()).err().unwrap().to_string();
    assert!(message.contains("/ca.crt ran out at 20"), "{message}");
}

/// Shakes hands in memory. Returns the server's certificate as the client saw it, and the
/// client's as the server did.
fn handshake(
    server: &Arc<rustls::ServerConfig>,
    client: &Arc<rustls::ClientConfig>,
    name: &str,
) -> Result<(Vec<u8>, Option<Vec<u8>>), String> {
    let mut client =
        ClientConnection::new(Arc::clone(client), ServerName::try_from(name.to_owned()).unwrap())
            .unwrap();
    let mut server = ServerConnection::new(Arc::clone(server)).unwrap();
    client.writer().write_all(b"hello").unwrap();
    for _ in 0..10 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut wire = wire.as_slice();
        while !wire.is_empty() {
            server.read_tls(&mut wire).unwrap();
            server.process_new_packets().map_err(|e| format!("server: {e}"))?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut wire = wire.as_slice();
        while !wire.is_empty() {
            client.read_tls(&mut wire).unwrap();
            client.process_new_packets().map_err(|e| format!("client: {e}"))?;
        }
    }
    let mut said = [0; 5];
    server.reader().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hello");
    let first = |c: Option<&[rustls::pki_types::CertificateDer<'_>]>| c.map(|c| c[0].to_vec());
    Ok((first(client.peer_certificates()).unwrap(), first(server.peer_certificates())))
}

#[test]
fn handshakes() {
    let dir = tempfile::tempdir().unwrap();
    let pki = ClusterPki::load_or_create(dir.path(), &config()).unwrap();
    let tls = pki.api_server_tls().unwrap();
    let server = tls.config;
    let judge = |client: &Arc<rustls::ClientConfig>| {
        let (_, seen) = handshake(&server, client, "localhost").unwrap();
        tls.clients.judge(&[seen.unwrap().into()], UnixTime::now())
    };
    let kubelet = pki.kubelet_server_config().unwrap();
    let nobody = pki.client_config(None).unwrap();
    let admin = pki.client_config(Some(Leaf::Admin)).unwrap();

    for name in ["kubernetes.default.svc", "localhost", "10.96.0.1", "192.0.2.7", "2001:db8::7"] {
        let (_, seen) = handshake(&server, &nobody, name).unwrap();
        assert!(seen.is_none(), "client certificates are optional");
    }
    assert!(handshake(&server, &nobody, "elsewhere.example").unwrap_err().starts_with("client:"));
    let (_, seen) = handshake(&server, &admin, "localhost").unwrap();
    let user = crate::auth::x509::user(&seen.unwrap()).unwrap();
    assert_eq!(
        (user.username.as_str(), user.groups),
        ("kubernetes-admin", vec!["system:masters".to_owned()])
    );

    let certificate = judge(&admin).unwrap();
    let in_time = UnixTime::now();
    assert!(certificate.der_at(in_time).is_ok());
    let late = UnixTime::since_unix_epoch(Duration::from_secs(in_time.as_secs()) + LEAF_LIFE * 2);
    assert!(certificate.der_at(late).is_err(), "a connection does not prolong it");

    // The API server judges after the handshake, kubelets in it.
    let refused = |client: Arc<rustls::ClientConfig>| {
        assert!(handshake(&kubelet, &client, "localhost").unwrap_err().starts_with("server:"));
        judge(&client).unwrap_err()
    };
    // A client of another cluster.
    let other = tempfile::tempdir().unwrap();
    let other = ClusterPki::load_or_create(other.path(), &config()).unwrap();
    let stranger = tls::client_config(pki.ca_pem(), Some(other.key(Leaf::Admin))).unwrap();
    assert!(refused(stranger).contains("the client certificate: "));
    // A server's certificate is no client's.
    refused(pki.client_config(Some(Leaf::ApiServer)).unwrap());
    // One that has run out.
    let old = pki.authority.issue(
        &Wanted::client("late", None),
        Duration::from_secs(60),
        Timestamp::now() - 1.hours(),
    );
    let old = tls::ReloadingKey::new(tls::certified_key(&old.unwrap(), "late".into()).unwrap());
    assert!(
        refused(tls::client_config(pki.ca_pem(), Some(Arc::new(old))).unwrap()).contains("xpired")
    );
    // One whose key the client does not hold.
    let (stolen, own) = (pki.certificate(Leaf::Admin), other.certificate(Leaf::Admin));
    let files = CertificateAndKey { key_pem: own.key_pem, ..stolen };
    assert!(tls::certified_key(&files, "stolen".into()).is_err());
    // The kubelet.
    let api_server = pki.client_config(Some(Leaf::ApiServerKubeletClient)).unwrap();
    handshake(&kubelet, &api_server, "192.0.2.7").unwrap();
}

#[test]
fn a_renewal_reaches_the_next_handshake_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let long_ago = Timestamp::now() - (300 * 24).hours();
    let pki = ClusterPki::load_or_create_at(dir.path().into(), &config(), long_ago).unwrap();
    let server = pki.api_server_tls().unwrap().config;
    let client = pki.client_config(Some(Leaf::Scheduler)).unwrap();
    let before = handshake(&server, &client, "localhost").unwrap();
    assert_eq!(pki.renew().unwrap(), Leaf::ALL);
    let after = handshake(&server, &client, "localhost").unwrap();
    assert_ne!(before.0, after.0);
    assert_ne!(before.1, after.1);
    assert_eq!(pki.renew().unwrap(), []);
}

#[test]
fn a_kubeconfig_is_yaml_whatever_the_names() {
    let dir = tempfile::tempdir().unwrap();
    let pki = ClusterPki::load_or_create(dir.path(), &config()).unwrap();
    let text = kubeconfig(&Kubeconfig {
        server_url: "https://[::1]:6443",
        ca_pem: pki.ca_pem(),
        client: &pki.certificate(Leaf::Admin),
        cluster: "a: \"b\"\n- c",
        user: "kubernetes-admin",
        context: "kubernetes-admin@keelson",
        extension: Some(("keelson", &serde_json::json!({ "podCIDR": "10.244.0.0/16" }))),
    });
    let parsed = kube::config::Kubeconfig::from_yaml(&text).unwrap();
    assert_eq!(parsed.clusters[0].name, "a: \"b\"\n- c");
    assert_eq!(
        parsed.clusters[0].cluster.as_ref().unwrap().server.as_deref(),
        Some("https://[::1]:6443")
    );
    let extensions = parsed.clusters[0].cluster.as_ref().unwrap().extensions.as_ref().unwrap();
    assert_eq!(extensions[0].extension["podCIDR"], "10.244.0.0/16");
    assert_eq!(parsed.current_context.as_deref(), Some("kubernetes-admin@keelson"));
    let user = parsed.auth_infos[0].auth_info.as_ref().unwrap();
    assert!(user.client_certificate_data.is_some() && user.client_key_data.is_some());
}

#[test]
fn others_get_certificates_of_an_authority_that_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pki");
    assert!(Signer::open(&path).unwrap().is_none());
    assert!(!path.exists(), "nothing is made");
    let pki = ClusterPki::load_or_create(&path, &config()).unwrap();
    let signer = Signer::open(&path).unwrap().unwrap();
    assert_eq!(signer.ca_pem(), pki.ca_pem());

    let key = |files: &CertificateAndKey| {
        let key = tls::certified_key(files, "test".into()).unwrap();
        Some(Arc::new(tls::ReloadingKey::new(key)))
    };
    let client = signer.client("system:node:n2", Some("system:nodes"), None).unwrap();
    let client = tls::client_config(pki.ca_pem(), key(&client)).unwrap();
    let tls = pki.api_server_tls().unwrap();
    let (_, seen) = handshake(&tls.config, &client, "localhost").unwrap();
    let seen = tls.clients.judge(&[seen.unwrap().into()], UnixTime::now()).unwrap();
    let user = crate::auth::x509::user(&seen.der_at(UnixTime::now()).unwrap()).unwrap();
    assert_eq!(crate::auth::node::node_name(&user), Some("n2"));

    let serving = signer.kubelet_server("n2", &["192.0.2.9".parse().unwrap()], None).unwrap();
    let kubelet = tls::server_config(pki.ca_pem(), key(&serving).unwrap()).unwrap();
    let api_server = pki.client_config(Some(Leaf::ApiServerKubeletClient)).unwrap();
    for name in ["n2", "192.0.2.9"] {
        handshake(&kubelet, &api_server, name).unwrap();
    }
    assert!(handshake(&kubelet, &api_server, "192.0.2.7").is_err());
}
