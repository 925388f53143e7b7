//! Carries a pod's status to the API server: at once, only what changed, until it is there.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use keelson_api::{backoff::Backoff, client_error, object::ObjectKey};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::PartialObjectMeta,
};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use crate::metrics::Metrics;

/// The object that a status is written to: the pod itself, or a static pod's mirror.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Target {
    /// Its UID, so that nothing is written to a namesake.
    pub(crate) uid: String,
    /// What it says now.
    pub(crate) status: PodStatus,
}

/// A status to write; numbered, so that its writer can say which one is there.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// Grows with each status.
    pub(crate) number: u64,
    /// The status; none before the first.
    pub(crate) status: Option<Arc<PodStatus>>,
}

/// One pod's writer.
pub(crate) struct Writer {
    /// The API.
    pub(crate) client: Client,
    /// The pod's namespace and name.
    pub(crate) key: ObjectKey,
    /// The object, as soon as there is one.
    pub(crate) target: watch::Receiver<Option<Target>>,
    /// What is to be written.
    pub(crate) wanted: watch::Receiver<Wanted>,
    /// The number of the last status that is there, or that has nowhere to go.
    pub(crate) written: watch::Sender<u64>,
    /// Times the writes.
    pub(crate) metrics: Metrics,
}

enum Written {
    Yes,
    /// The object is gone, or another one took its name.
    NoSuchObject,
}

impl Writer {
    /// Writes until the worker drops its ends.
    pub(crate) async fn run(mut self) {
        // what this writer knows to be in the object, by the object's UID
        let mut known: Option<(String, PodStatus)> = None;
        let mut gone: Option<String> = None;
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let target = self.target.borrow_and_update().clone();
            if let (Some(status), Some(target)) = (&wanted.status, target)
                && gone.as_ref() != Some(&target.uid)
            {
                let base = match &known {
                    Some((uid, status)) if *uid == target.uid => status,
                    _ => &target.status,
                };
                let written = match patch(base, status) {
                    None => Some(Written::Yes),
                    Some(patch) => self.write(&target.uid, patch).await,
                };
                match written {
                    Some(Written::Yes) => known = Some((target.uid, PodStatus::clone(status))),
                    Some(Written::NoSuchObject) => gone = Some(target.uid),
                    // something newer is wanted, or the worker is gone
                    None => {}
                }
                if written.is_some() {
                    let _ = self.written.send(wanted.number);
                }
            } else if gone.is_some() {
                let _ = self.written.send(wanted.number);
            }
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() { return },
                changed = self.target.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Writes one patch, again and again, until it is there or something else is wanted.
    async fn write(&mut self, uid: &str, status: Map<String, Value>) -> Option<Written> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), self.key.namespace());
        let body = json!({ "metadata": { "uid": uid }, "status": status });
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let begun = Instant::now();
            let patch = Patch::Strategic(&body);
            match pods.patch_status(self.key.name(), &PatchParams::default(), &patch).await {
                Ok(_) => {
                    self.metrics.status_written(begun.elapsed());
                    return Some(Written::Yes);
                }
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    return Some(Written::NoSuchObject);
                }
                // another object has the name now, or somebody else wrote at the same moment
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    let found = pods.get_metadata_opt(self.key.name()).await;
                    let same = |found: Option<PartialObjectMeta<Pod>>| {
                        found.is_some_and(|found| found.metadata.uid.as_deref() == Some(uid))
                    };
                    if found.is_ok_and(|found| !same(found)) {
                        return Some(Written::NoSuchObject);
                    }
                }
                Err(error) => {
                    let error = client_error::shown(&error);
                    tracing::warn!(pod = %self.key, error, "status not written, trying again");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next_wait()) => {}
                _ = self.wanted.changed() => { self.wanted.mark_changed(); return None }
                _ = self.target.changed() => { self.target.mark_changed(); return None }
            }
        }
    }
}

/// The strategic merge patch of the status from `old` to `new`; none if nothing changed.
///
/// Conditions are merged by type, so those of others are left alone; container statuses are replaced
/// whole; addresses are a list merged by `ip`, so old ones are taken out by name.
pub(crate) fn patch(old: &PodStatus, new: &PodStatus) -> Option<Map<String, Value>> {
    let (Ok(Value::Object(old)), Ok(Value::Object(new))) =
        (serde_json::to_value(old), serde_json::to_value(new))
    else {
        return None;
    };
    let mut patch = Map::new();
    for (key, value) in &new {
        let before = old.get(key);
        if before == Some(value) {
            continue;
        }
        let value = match key.as_str() {
            "conditions" => changed_conditions(before, value),
            "podIPs" | "hostIPs" => replaced_addresses(before, value),
            _ => value.clone(),
        };
        patch.insert(key.clone(), value);
    }
    for key in old.keys() {
        if !new.contains_key(key) {
            patch.insert(key.clone(), Value::Null);
        }
    }
    if patch.get("conditions").and_then(Value::as_array).is_some_and(Vec::is_empty) {
        patch.remove("conditions");
    }
    (!patch.is_empty()).then_some(patch)
}

fn items(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn changed_conditions(old: Option<&Value>, new: &Value) -> Value {
    let changed = items(Some(new))
        .iter()
        .filter(|condition| !items(old).iter().any(|before| before == *condition));
    let changed = changed.map(|condition| {
        let mut condition = condition.clone();
        let before = items(old).iter().find(|before| before.get("type") == condition.get("type"));
        if let (Some(Value::Object(before)), Value::Object(now)) = (before, &mut condition) {
            for key in before.keys() {
                now.entry(key.clone()).or_insert(Value::Null);
            }
        }
        condition
    });
    changed.collect()
}

fn replaced_addresses(old: Option<&Value>, new: &Value) -> Value {
    let gone = items(old)
        .iter()
        .filter(|before| !items(Some(new)).contains(before))
        .map(|before| json!({ "$patch": "delete", "ip": before.get("ip") }));
    items(Some(new)).iter().cloned().chain(gone).collect()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodCondition, PodIP};

    use super::*;

    fn status(phase: &str, ip: &str, ready: &str) -> PodStatus {
        PodStatus {
            phase: Some(phase.to_owned()),
            pod_ips: Some(vec![PodIP { ip: ip.to_owned() }]),
            conditions: Some(vec![
                PodCondition {
                    type_: "Mine".to_owned(),
                    status: "True".to_owned(),
                    ..Default::default()
                },
                PodCondition {
                    type_: "Ready".to_owned(),
                    status: ready.to_owned(),
                    reason: (ready == "False").then(|| "ContainersNotReady".to_owned()),
                    ..Default::default()
                },
            ]),
            ..Default::default()
        }
    }

    #[test]
    fn only_what_changed_is_written() {
        let old = status("Pending", "10.0.0.1", "False");
        assert_eq!(patch(&old, &old), None);
        let mut new = status("Running", "10.0.0.2", "True");
        new.reason = Some("x".to_owned());
        let patch = Value::Object(patch(&old, &new).unwrap());
        assert_eq!(
            patch,
            json!({
                "phase": "Running",
                "reason": "x",
                "podIPs": [{"ip": "10.0.0.2"}, {"$patch": "delete", "ip": "10.0.0.1"}],
                "conditions": [{"type": "Ready", "status": "True", "reason": null}],
            })
        );
    }

    #[test]
    fn what_is_no_longer_there_is_taken_out() {
        let mut old = status("Pending", "10.0.0.1", "True");
        let new = old.clone();
        old.message = Some("m".to_owned());
        assert_eq!(Value::Object(patch(&old, &new).unwrap()), json!({"message": null}));
    }
}
