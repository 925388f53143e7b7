use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::registry::Registry;

fn deployments() -> Arc<Resource> {
    Arc::clone(Registry::builtin().resource("apps", "v1", "deployments").unwrap())
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn applied(spec: &Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "labels": {"app": "web"}},
        "spec": spec,
    })
}

fn run(live: Option<&Value>, spec: &Value, manager: &str, force: bool) -> Result<Value, Status> {
    apply(&deployments(), live, &applied(spec), manager, "", force, at(0))
}

fn containers(list: &Value) -> Value {
    json!({"template": {"spec": {"containers": list}}})
}

#[test]
fn the_first_apply_owns_what_it_sets() {
    let new = run(None, &json!({"replicas": 3}), "kubectl", false).unwrap();
    assert_eq!(
        new["metadata"]["managedFields"],
        json!([{
            "manager": "kubectl", "operation": "Apply", "apiVersion": "apps/v1",
            "time": "2027-01-15T08:00:00Z", "fieldsType": "FieldsV1",
            "fieldsV1": {
                "f:metadata": {"f:labels": {"f:app": {}}},
                "f:spec": {"f:replicas": {}},
            },
        }])
    );
}

#[test]
fn a_changed_field_of_another_is_a_conflict_unless_forced() {
    let live = run(None, &json!({"replicas": 3, "minReadySeconds": 1}), "one", false).unwrap();
    let status = run(Some(&live), &json!({"replicas": 5}), "two", false).unwrap_err();
    assert_eq!(status.code, 409);
    assert_eq!(
        status.message,
        "Apply failed with 1 conflict: conflict with \"one\": .spec.replicas"
    );
    assert_eq!(
        status.to_value()["details"]["causes"],
        json!([{
            "reason": "FieldManagerConflict", "message": "conflict with \"one\"",
            "field": ".spec.replicas",
        }])
    );
    let forced = run(Some(&live), &json!({"replicas": 5}), "two", true).unwrap();
    assert_eq!(forced["spec"], json!({"replicas": 5, "minReadySeconds": 1}));
    let managed = Managed::read(&forced).unwrap();
    let one = &managed.0[&Manager::applier("one", "")];
    assert_eq!(one.fields.paths(), [".metadata.labels.app", ".spec.minReadySeconds"]);
}

#[test]
fn conflicts_with_updates_name_their_version() {
    let mut live = applied(&json!({"replicas": 3, "paused": true}));
    record_update(&deployments(), None, &mut live, "kubectl-create", "", at(0));
    let status =
        run(Some(&live), &json!({"replicas": 5, "paused": false}), "two", false).unwrap_err();
    assert_eq!(
        status.message,
        "Apply failed with 2 conflicts: conflicts with \"kubectl-create\" using apps/v1:\n\
         - .spec.paused\n- .spec.replicas"
    );
}

#[test]
fn the_same_value_is_shared_and_outlives_one_owner() {
    let spec = json!({"replicas": 3});
    let live = run(None, &spec, "one", false).unwrap();
    let live = run(Some(&live), &spec, "two", false).unwrap();
    let live = run(Some(&live), &json!({}), "one", false).unwrap();
    assert_eq!(live["spec"]["replicas"], 3, "two still wants it");
    let live = run(Some(&live), &json!({}), "two", false).unwrap();
    assert_eq!(live["spec"].get("replicas"), None, "nobody wants it");
}

#[test]
fn items_are_removed_with_what_defaults_put_in_them() {
    let both = containers(&json!([{"name": "a", "image": "x"}, {"name": "b", "image": "y"}]));
    let mut live = run(None, &both, "one", false).unwrap();
    live["spec"]["template"]["spec"]["containers"][1]["imagePullPolicy"] = "Always".into();
    let only_a = containers(&json!([{"name": "a", "image": "x"}]));
    let live = run(Some(&live), &only_a, "one", false).unwrap();
    assert_eq!(
        live["spec"]["template"]["spec"]["containers"],
        json!([{"name": "a", "image": "x"}])
    );
}

#[test]
fn items_of_others_keep_their_place() {
    let mut live =
        run(None, &containers(&json!([{"name": "b", "image": "y"}])), "one", false).unwrap();
    let old = live.clone();
    let list = &mut live["spec"]["template"]["spec"]["containers"];
    *list = json!([{"name": "side", "image": "s"}, {"name": "b", "image": "y"}]);
    record_update(&deployments(), Some(&old), &mut live, "injector", "", at(1));
    let more = containers(&json!([{"name": "c", "image": "z"}, {"name": "b", "image": "y"}]));
    let live = run(Some(&live), &more, "one", false).unwrap();
    let names: Vec<&str> = value::list(&live, &["spec", "template", "spec", "containers"])
        .iter()
        .map(|c| value::text(c, &["name"]))
        .collect();
    assert_eq!(names, ["side", "c", "b"]);
}

#[test]
fn ports_are_known_by_port_and_protocol_with_its_default() {
    let ports = |list: Value| containers(&json!([{"name": "a", "image": "x", "ports": list}]));
    let mut live = run(None, &ports(json!([{"containerPort": 80}])), "one", false).unwrap();
    live["spec"]["template"]["spec"]["containers"][0]["ports"][0]["protocol"] = "TCP".into();
    let again = run(Some(&live), &ports(json!([{"containerPort": 80}])), "one", false).unwrap();
    let list = &again["spec"]["template"]["spec"]["containers"][0]["ports"];
    assert_eq!(*list, json!([{"containerPort": 80, "protocol": "TCP"}]));
    let twice = ports(json!([{"containerPort": 80}, {"containerPort": 80, "protocol": "TCP"}]));
    assert_eq!(run(None, &twice, "one", false).unwrap_err().code, 400);
}

#[test]
fn updates_are_followed() {
    let resource = deployments();
    let mut first = applied(&json!({"replicas": 1, "paused": true}));
    record_update(&resource, None, &mut first, "a", "", at(0));
    let mut second = first.clone();
    second["spec"]["replicas"] = 2.into();
    second["spec"].as_object_mut().unwrap().remove("paused");
    record_update(&resource, Some(&first), &mut second, "b", "", at(5));
    let managed = Managed::read(&second).unwrap();
    let paths = |name| managed.0[&Manager::updater(name, "", "apps/v1")].fields.paths();
    assert_eq!(paths("a"), [".metadata.labels", ".metadata.labels.app"][1..].to_vec());
    assert_eq!(paths("b"), [".spec.replicas"]);

    let mut same = second.clone();
    record_update(&resource, Some(&second), &mut same, "b", "", at(9));
    assert_eq!(same, second, "a write without a change leaves no trace");
}

#[test]
fn status_writes_are_entries_of_their_own() {
    let resource = deployments();
    let mut first = applied(&json!({"replicas": 1}));
    record_update(&resource, None, &mut first, "a", "", at(0));
    let mut second = first.clone();
    second["status"] =
        json!({"replicas": 1, "conditions": [{"type": "Available", "status": "True"}]});
    record_update(&resource, Some(&first), &mut second, "ctl", "status", at(1));
    let entries = second["metadata"]["managedFields"].as_array().unwrap();
    let status = entries.iter().find(|e| e["subresource"] == "status").unwrap();
    assert_eq!(
        status["fieldsV1"],
        json!({"f:status": {"f:replicas": {}, "f:conditions": {
            "k:{\"type\":\"Available\"}": {".": {}, "f:type": {}, "f:status": {}},
        }}})
    );
}

#[test]
fn managed_fields_can_be_reset_and_are_not_lost_by_omission() {
    let resource = deployments();
    let mut first = applied(&json!({"replicas": 1}));
    record_update(&resource, None, &mut first, "a", "", at(0));
    let mut omitted = first.clone();
    omitted["metadata"].as_object_mut().unwrap().remove("managedFields");
    record_update(&resource, Some(&first), &mut omitted, "b", "", at(1));
    assert_eq!(omitted, first);
    let mut reset = first.clone();
    reset["metadata"]["managedFields"] = json!([{}]);
    record_update(&resource, Some(&first), &mut reset, "b", "", at(1));
    assert_eq!(reset["metadata"].get("managedFields"), None);
}

#[test]
fn an_object_nobody_was_followed_on_has_an_owner() {
    let live = applied(&json!({"replicas": 1}));
    let status = run(Some(&live), &json!({"replicas": 2}), "one", false).unwrap_err();
    assert!(status.message.contains("\"before-first-apply\" using apps/v1: .spec.replicas"));
}

#[test]
fn kubectl_takes_over_what_its_old_apply_set() {
    let mut live = applied(&json!({"replicas": 1}));
    let last = serde_json::to_string(&applied(&json!({"replicas": 1}))).unwrap();
    live["metadata"]["annotations"] = json!({ LAST_APPLIED: last });
    record_update(&deployments(), None, &mut live, "kubectl-client-side-apply", "", at(0));
    assert_eq!(run(Some(&live), &json!({"replicas": 2}), "other", false).unwrap_err().code, 409);
    let new = run(Some(&live), &json!({"replicas": 2}), "kubectl", false).unwrap();
    assert_eq!(new["spec"]["replicas"], 2);
    let annotation = value::text(&new, &["metadata", "annotations", LAST_APPLIED]);
    assert!(annotation.contains("\"replicas\":2"), "{annotation}");
}

#[test]
fn applying_again_changes_nothing_not_even_the_time() {
    let spec = containers(&json!([{"name": "a", "image": "x"}]));
    let first = run(None, &spec, "one", false).unwrap();
    let again =
        apply(&deployments(), Some(&first), &applied(&spec), "one", "", false, at(99)).unwrap();
    assert_eq!(again, first);
}

#[test]
fn the_oldest_of_many_updaters_become_one() {
    let resource = deployments();
    let mut object = applied(&json!({"replicas": 0}));
    record_update(&resource, None, &mut object, "m", "", at(0));
    for i in 1..30_i64 {
        let old = object.clone();
        object["metadata"]["labels"][format!("l{i}")] = "x".into();
        record_update(&resource, Some(&old), &mut object, &format!("m{i}"), "", at(i));
    }
    let entries = object["metadata"]["managedFields"].as_array().unwrap();
    assert_eq!(entries.len(), 10);
    assert!(entries.iter().any(|e| e["manager"] == "ancient-changes"));
}

#[test]
fn names_of_managers_come_from_the_request() {
    assert_eq!(manager_name(Some("mine"), "kubectl/v1"), "mine");
    assert_eq!(manager_name(None, "kubectl/v1.36 (linux)"), "kubectl");
    assert_eq!(manager_name(Some(""), ""), "unknown");
}

fn spec() -> impl Strategy<Value = Value> {
    let env = prop::collection::btree_map("[A-C]", "[x-z]", 0..3).prop_map(|env| {
        env.into_iter()
            .map(|(name, value)| json!({"name": name, "value": value}))
            .collect::<Vec<_>>()
    });
    let container = ("[a-c]", "[x-z]", env);
    let containers = prop::collection::vec(container, 0..4).prop_map(|list| {
        let mut seen = std::collections::BTreeSet::new();
        list.into_iter()
            .filter(|(name, ..)| seen.insert(name.clone()))
            .map(|(name, image, env)| json!({"name": name, "image": image, "env": env}))
            .collect::<Vec<_>>()
    });
    (prop::option::of(0..3_i64), containers, prop::collection::btree_map("[a-c]", "[x-z]", 0..3))
        .prop_map(|(replicas, containers, labels)| {
            let mut spec = json!({"template": {
                "metadata": {"labels": labels}, "spec": {"containers": containers},
            }});
            if let Some(replicas) = replicas {
                spec["replicas"] = replicas.into();
            }
            spec
        })
}

proptest! {
    #[test]
    fn applying_twice_is_applying_once(one in spec(), two in spec()) {
        let live = run(None, &one, "one", false).unwrap();
        let once = run(Some(&live), &two, "two", true).unwrap();
        prop_assert_eq!(&run(Some(&once), &two, "two", false).unwrap(), &once);
    }

    #[test]
    fn a_lone_applier_gets_what_it_applies(one in spec(), two in spec()) {
        let live = run(None, &one, "me", false).unwrap();
        let mut live = run(Some(&live), &two, "me", false).unwrap();
        let mut fresh = run(None, &two, "me", false).unwrap();
        let set = |o: &Value| Managed::read(o).unwrap();
        prop_assert_eq!(set(&live), set(&fresh));
        for object in [&mut live, &mut fresh] {
            object["metadata"].as_object_mut().unwrap().remove("managedFields");
        }
        // Lists that became empty may be left out.
        prop_assert!(
            typed::compare(&shape_of(&deployments()), &live, &fresh)
                .without(&FieldSet::default()).modified.is_empty()
        );
        let images = |o: &Value| -> Vec<Value> {
            value::list(o, &["spec", "template", "spec", "containers"])
                .iter().map(|c| json!([c["name"], c["image"]])).collect()
        };
        prop_assert_eq!(images(&live), images(&fresh));
    }

    #[test]
    fn what_a_client_writes_as_managed_fields_never_panics(fields in crate::patch::testing::json()) {
        let mut object = applied(&json!({"replicas": 1}));
        object["metadata"]["managedFields"] = json!([
            {"manager": "m", "operation": "Update", "apiVersion": "apps/v1",
             "fieldsType": "FieldsV1", "fieldsV1": fields},
        ]);
        record_update(&deployments(), None, &mut object, "m", "", at(0));
        let _outcome = run(Some(&object), &json!({"replicas": 2}), "k", true);
    }
}
