use std::sync::Arc;

use super::*;

fn pod(spec: &serde_json::Value) -> Pod {
    serde_json::from_value(serde_json::json!({
        "metadata": {"name": "web", "namespace": "ns", "uid": "u", "labels": {"a": "1"}},
        "spec": spec,
    }))
    .unwrap()
}

fn volume(source: serde_json::Value) -> Volume {
    let mut source = source;
    source["name"] = "v".into();
    serde_json::from_value(source).unwrap()
}

fn planned(source: serde_json::Value) -> Result<VolumePlan, String> {
    plan(&pod(&serde_json::json!({"containers": []})), &volume(source), &Allocatable::new())
}

fn files(source: serde_json::Value, pod: &Pod) -> Result<Files, String> {
    let VolumePlan::Files(plan) = plan(pod, &volume(source), &Allocatable::new())? else {
        panic!("not files");
    };
    let object = |name: &DataName| match name.name.as_str() {
        "conf" => Watched::Present(Arc::new(Data {
            values: [("a", "1"), ("b", "2")].map(|(k, v)| (k.into(), v.into())).into(),
            binary: [("bin".to_owned(), vec![0xff])].into(),
            immutable: false,
        })),
        _ => Watched::Missing(ObjectError::NotFound(name.clone())),
    };
    plan.files(pod, &Allocatable::new(), object, |_| Some("token".into()))
        .map_err(|error| error.to_string())
}

fn listed(files: &Files) -> Vec<(String, Vec<u8>, u32)> {
    files.iter().map(|(p, f)| (p.display().to_string(), f.bytes.clone(), f.mode)).collect()
}

#[test]
fn kinds_are_told_apart_and_the_rest_is_refused() {
    for (source, expected) in [
        (serde_json::json!({"emptyDir": {}}), Ok(VolumePlan::Folder)),
        (
            serde_json::json!({"emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}),
            Ok(VolumePlan::Memory { limit: Some(1 << 20) }),
        ),
        (serde_json::json!({"emptyDir": {"medium": "HugePages-2Mi"}}), Err("HugePages-2Mi")),
        (
            serde_json::json!({"hostPath": {"path": "/srv", "type": "Directory"}}),
            Ok(VolumePlan::Host { path: "/srv".into(), kind: HostPathKind::Directory }),
        ),
        (serde_json::json!({"hostPath": {"path": "/srv/../etc"}}), Err("without ..")),
        (serde_json::json!({"hostPath": {"path": "srv"}}), Err("absolute")),
        (serde_json::json!({"hostPath": {"path": "/srv", "type": "Folder"}}), Err("Folder")),
        (serde_json::json!({"nfs": {"server": "s", "path": "/"}}), Err("kind nfs")),
        (
            serde_json::json!({"persistentVolumeClaim": {"claimName": "c"}}),
            Err("kind persistentVolumeClaim"),
        ),
        (serde_json::json!({"image": {"reference": "x"}}), Err("kind image")),
        (serde_json::json!({"csi": {"driver": "d"}}), Err("kind csi")),
        (serde_json::json!({"ephemeral": {}}), Err("kind ephemeral")),
        (serde_json::json!({}), Err("does not say what it is")),
        (
            serde_json::json!({"projected": {"sources": [{"podCertificate": {
                "signerName": "s", "keyType": "ED25519"}}]}}),
            Err("podCertificate"),
        ),
        (
            serde_json::json!({"projected": {"sources": [{"clusterTrustBundle": {"path": "p"}}]}}),
            Err("clusterTrustBundle"),
        ),
        (serde_json::json!({"configMap": {"name": "c", "defaultMode": 512}}), Err("mode 512")),
    ] {
        match (planned(source), expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected),
            (Err(said), Err(part)) => assert!(said.contains(part), "{said}"),
            (found, expected) => panic!("{found:?}, not {expected:?}"),
        }
    }
}

#[test]
fn memory_is_bounded_by_the_least_of_all_limits() {
    let limited = serde_json::json!({"resources": {"limits": {"memory": "2Mi"}}, "name": "c"});
    let unlimited = serde_json::json!({"name": "d"});
    let node = Allocatable::from([("memory".to_owned(), Quantity::from_bytes(64 << 20))]);
    for (containers, asked, allocatable, limit) in [
        (vec![], None, Allocatable::new(), None),
        (vec![], None, node.clone(), Some(64 << 20)),
        (vec![limited.clone()], None, node.clone(), Some(2 << 20)),
        (vec![limited.clone(), limited.clone()], None, node.clone(), Some(4 << 20)),
        (vec![limited.clone(), unlimited], None, node.clone(), Some(64 << 20)),
        (vec![limited], Some("1Mi"), node, Some(1 << 20)),
    ] {
        let pod = pod(&serde_json::json!({"containers": containers}));
        let asked = asked.map(|text| Quantity::parse(text).unwrap());
        assert_eq!(memory_limit(&pod, asked, &allocatable), limit);
    }
}

#[test]
fn files_are_those_of_the_objects() {
    let pod = pod(&serde_json::json!({"containers": [{"name": "c"}]}));
    let found = files(serde_json::json!({"configMap": {"name": "conf"}}), &pod).unwrap();
    let all = [("a", vec![b'1']), ("b", vec![b'2']), ("bin", vec![0xff])];
    assert_eq!(listed(&found), all.map(|(p, b)| (p.to_owned(), b, 0o644)));

    let some = serde_json::json!({"configMap": {"name": "conf", "defaultMode": 0o400,
        "items": [{"key": "a", "path": "x/y"}, {"key": "b", "path": "z", "mode": 0o755}]}});
    let found = listed(&files(some, &pod).unwrap());
    assert_eq!(found, [("x/y".into(), vec![b'1'], 0o400), ("z".into(), vec![b'2'], 0o755)]);

    let projected = serde_json::json!({"projected": {"sources": [
        {"configMap": {"name": "conf", "items": [{"key": "a", "path": "a"}]}},
        {"secret": {"name": "none", "optional": true}},
        {"downwardAPI": {"items": [
            {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        {"serviceAccountToken": {"path": "token"}},
    ]}});
    let found = files(projected.clone(), &pod).unwrap();
    let names: Vec<_> = found.keys().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(names, ["a", "labels", "token"]);
    assert_eq!(found[Path::new("labels")].bytes, b"a=\"1\"");
    assert_eq!(found[Path::new("token")].mode, 0o644);

    // A token is its user's alone where there is one user.
    let pod = self::pod(&serde_json::json!({"containers": [{"name": "c",
        "securityContext": {"runAsUser": 1000}}]}));
    let token = &files(projected, &pod).unwrap()[Path::new("token")];
    assert_eq!((token.mode, token.owner), (0o600, Some(1000)));
}

#[test]
fn what_is_missing_is_said_in_the_kubelets_words() {
    let pod = pod(&serde_json::json!({"containers": []}));
    let item = |key: &str| serde_json::json!([{"key": key, "path": "p"}]);
    for (source, expected) in [
        (serde_json::json!({"configMap": {"name": "none"}}), "configmap \"none\" not found"),
        (serde_json::json!({"secret": {"secretName": "none"}}), "secret \"none\" not found"),
        (
            serde_json::json!({"configMap": {"name": "conf", "items": item("y")}}),
            "references non-existent config key: y",
        ),
        (
            serde_json::json!({"downwardAPI": {"items": [
                {"path": "p", "fieldRef": {"fieldPath": "spec.nodeName"}}]}}),
            "unsupported fieldPath: spec.nodeName",
        ),
    ] {
        assert_eq!(files(source, &pod).unwrap_err(), expected);
    }
    for optional in [
        serde_json::json!({"secret": {"secretName": "none", "optional": true}}),
        serde_json::json!({"configMap": {"name": "conf", "optional": true, "items": item("y")}}),
    ] {
        assert!(files(optional, &pod).unwrap().is_empty());
    }
    for path in ["../x", "a/../../x", "/x", "", "..x", "..data", &"x".repeat(256)] {
        let source = serde_json::json!({"configMap": {"name": "conf",
            "items": [{"key": "a", "path": path}]}});
        assert!(files(source, &pod).unwrap_err().contains("invalid path"), "{path}");
    }
}

#[test]
fn the_user_counts_only_if_all_containers_share_it() {
    let user = |user: i64| serde_json::json!({"name": "c", "securityContext": {"runAsUser": user}});
    for (spec, owner) in [
        (serde_json::json!({"containers": [{"name": "c"}]}), None),
        (serde_json::json!({"containers": [user(5), user(5)]}), Some(5)),
        (serde_json::json!({"containers": [user(5), user(6)]}), None),
        (serde_json::json!({"containers": [user(5)], "initContainers": [{"name": "i"}]}), None),
        (
            serde_json::json!({"containers": [user(5), {"name": "d"}],
                "securityContext": {"runAsUser": 5}}),
            Some(5),
        ),
    ] {
        assert_eq!(owners(&pod(&spec)).0, owner);
    }
}
