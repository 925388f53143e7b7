//! Bodies as clients send them.

use proptest::prelude::*;

use super::*;

/// A length-delimited field.
fn message(number: u8, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    assert!(body.len() < 128 && number < 16);
    [&[number << 3 | 2, body.len() as u8], body.as_slice()].concat()
}

fn body(api_version: &str, kind: &str, object: &[&[u8]]) -> Vec<u8> {
    let type_meta =
        [message(1, &[api_version.as_bytes()]), message(2, &[kind.as_bytes()])].concat();
    [MAGIC, &message(1, &[&type_meta]), &message(2, object)].concat()
}

#[test]
fn a_config_map_as_kubectl_sends_it() {
    // `kubectl create configmap a --from-literal=k=1`, with its empty fields.
    let sent =
        b"k8s\0\n\x0f\n\x02v1\x12\tConfigMap\x12\x1b\n\x11\n\x01a\x12\0\x1a\0\"\0*\x002\08\0B\0\
                 \x12\x06\n\x01k\x12\x011\x1a\0\"\0";
    assert_eq!(
        decode(sent).unwrap(),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"},
            "data": {"k": "1"}})
    );
}

#[test]
fn zero_says_something_where_go_has_a_pointer() {
    let spec = [
        &[1 << 3, 0][..], // replicas: 0, a pointer
        &[5 << 3, 0],     // minReadySeconds: 0, none
    ]
    .concat();
    let sent = body("apps/v1", "Deployment", &[&message(2, &[&spec])]);
    assert_eq!(decode(&sent).unwrap()["spec"], json!({"replicas": 0}));
}

#[test]
fn the_special_types_are_as_in_json() {
    let int = message(4, &[&[1 << 3, 0, 2 << 3, 80]]);
    let named = message(4, &[&[1 << 3, 1], &message(3, &[b"http"])]);
    let port = message(1, &[&[3 << 3, 80], &int]);
    let other = message(1, &[&[3 << 3, 81], &named]);
    let created = message(8, &[&[1 << 3, 60]]);
    let metadata = message(1, &[&created]);
    let spec = message(2, &[&port, &other]);
    let sent = body("v1", "Service", &[&metadata, &spec]);
    assert_eq!(
        decode(&sent).unwrap(),
        json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"creationTimestamp": "1970-01-01T00:01:00Z"},
            "spec": {"ports": [{"port": 80, "targetPort": 80}, {"port": 81, "targetPort": "http"}]}})
    );
}

#[test]
fn embedded_messages_have_no_name_of_their_own() {
    let empty_dir = message(2, &[]);
    let source = message(2, &[&empty_dir]);
    let volume = message(1, &[&message(1, &[b"scratch"]), &source]);
    let sent = body("v1", "Pod", &[&message(2, &[&volume])]);
    assert_eq!(
        decode(&sent).unwrap()["spec"]["volumes"],
        json!([{"name": "scratch", "emptyDir": {}}])
    );
}

#[test]
fn what_is_wrong_is_said() {
    assert_eq!(decode(b"{}"), Err(ProtobufError::NoMagic));
    assert_eq!(decode(b"k8s\0\x0a\xff"), Err(ProtobufError::Malformed));
    let unknown = decode(&body("example.com/v1", "Thing", &[])).unwrap_err();
    assert_eq!(
        unknown.to_string(),
        "Thing of example.com/v1 is not known here in this form: send it as JSON"
    );
    let wrong = body("v1", "Pod", &[&[1 << 3, 7]]);
    assert_eq!(decode(&wrong), Err(ProtobufError::WrongType("metadata".to_owned())));
}

#[test]
fn every_message_of_the_table_is_there() {
    let simple = [
        "string", "bytes", "int", "int?", "bool", "bool?", "double", "time", "quantity", "intstr",
        "strings", "raw",
    ];
    for (message, fields) in &TABLE.messages {
        for field in fields {
            assert!(
                simple.contains(&field.kind) || TABLE.messages.contains_key(field.kind),
                "{message}.{}: {}",
                field.name,
                field.kind
            );
        }
    }
    assert!(TABLE.kinds.iter().all(|(.., message)| TABLE.messages.contains_key(message)));
}

proptest! {
    #[test]
    fn no_bytes_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&bytes);
        let _ = decode(&[MAGIC, &message(1, &[b"\x0a\x02v1\x12\x03Pod"]), &[0x12, bytes.len().min(127) as u8], &bytes].concat());
    }
}
