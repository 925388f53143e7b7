//! Which EndpointSlices a Service needs, and the fewest changes that get there: a pure function.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        core::v1::{Pod, Service},
        discovery::v1::{Endpoint, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use keelson_api::object::controller_reference;

use super::members::{self, Group, Zones};
use crate::controllers::{names, pods};

/// Names the Service that a slice belongs to.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Names who looks after a slice.
pub(crate) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// This controller, in that label.
pub(crate) const MANAGER: &str = "endpointslice-controller.k8s.io";
/// Marks what belongs to a headless Service.
pub(crate) const HEADLESS: &str = "service.kubernetes.io/headless";
/// When what caused the change happened.
pub(crate) const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// How many endpoints a slice holds at most (the documented default).
const SLICE_SIZE: usize = 100;

/// What is to be done.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    /// Slices to make.
    pub(crate) create: Vec<EndpointSlice>,
    /// Slices to change: as they are, and as they are to be.
    pub(crate) update: Vec<(Arc<EndpointSlice>, EndpointSlice)>,
    /// Slices to delete.
    pub(crate) delete: Vec<Arc<EndpointSlice>>,
}

/// Plans for one Service.
pub(crate) fn plan(
    service: &Service,
    selected: &[Arc<Pod>],
    zones: &Zones,
    existing: &[Arc<EndpointSlice>],
) -> Plan {
    let groups = members::groups(service, selected, zones);
    let labels = labels(service);
    let mut work: Vec<Draft> = existing.iter().map(Draft::of).collect();
    for family in members::families(service) {
        for group in groups.iter().filter(|group| group.family == family) {
            fill(&mut work, group, service);
        }
        // A Service without endpoints keeps one empty slice, so that its state is known.
        let kept = |d: &Draft| d.slice.address_type == family && d.keep;
        if !work.iter().any(kept) {
            match work.iter_mut().find(|d| d.slice.address_type == family) {
                Some(draft) => {
                    draft.keep = true;
                    if !draft.endpoints().is_empty() {
                        draft.slice.endpoints = Some(Vec::new());
                    }
                }
                None => work.push(Draft::new(service, &family)),
            }
        }
    }
    let mut plan = Plan::default();
    for mut draft in work {
        draft.slice.metadata.labels = Some(labels.clone());
        draft.slice.metadata.owner_references = Some(owner(service));
        match draft.original {
            Some(original) if !draft.keep => plan.delete.push(original),
            Some(original) => {
                if *original != draft.slice {
                    note_trigger(&mut draft.slice, Some(&original), selected);
                    plan.update.push((original, draft.slice));
                }
            }
            None => {
                note_trigger(&mut draft.slice, None, selected);
                plan.create.push(draft.slice);
            }
        }
    }
    plan
}

/// A slice as it is to be.
struct Draft {
    original: Option<Arc<EndpointSlice>>,
    slice: EndpointSlice,
    keep: bool,
}

impl Draft {
    fn of(slice: &Arc<EndpointSlice>) -> Self {
        Self { original: Some(slice.clone()), slice: (**slice).clone(), keep: false }
    }

    fn new(service: &Service, family: &str) -> Self {
        let prefix = names::prefix(service.metadata.name.as_deref().unwrap_or_default());
        let slice = EndpointSlice {
            metadata: ObjectMeta {
                name: Some(names::random(&prefix)),
                generate_name: Some(prefix),
                namespace: service.metadata.namespace.clone(),
                ..ObjectMeta::default()
            },
            address_type: family.to_owned(),
            endpoints: Some(Vec::new()),
            ports: Some(Vec::new()),
        };
        Self { original: None, slice, keep: true }
    }

    fn endpoints(&self) -> &[Endpoint] {
        self.slice.endpoints.as_deref().unwrap_or_default()
    }
}

/// Who an endpoint is, whatever state it is in.
fn identity(endpoint: &Endpoint) -> (Option<String>, Option<String>) {
    let uid = endpoint.target_ref.as_ref().and_then(|r| r.uid.clone());
    (endpoint.addresses.first().cloned(), uid)
}

/// Puts a group's endpoints where they are already, and new ones where there is room: into slices
/// that change anyway if possible.
fn fill(work: &mut Vec<Draft>, group: &Group, service: &Service) {
    let mut missing: BTreeMap<_, &Endpoint> =
        group.endpoints.iter().map(|e| (identity(e), e)).collect();
    let mut own: Vec<usize> = Vec::new();
    for (i, draft) in work.iter_mut().enumerate() {
        let same_ports = draft.slice.ports.as_deref().unwrap_or_default() == group.ports;
        if draft.keep || draft.slice.address_type != group.family || !same_ports {
            continue;
        }
        let Some(before) = draft.slice.endpoints.take() else {
            own.push(i);
            continue;
        };
        let kept: Vec<Endpoint> =
            before.iter().filter_map(|old| missing.remove(&identity(old)).cloned()).collect();
        draft.keep = !kept.is_empty();
        draft.slice.endpoints = Some(kept);
        own.push(i);
    }
    let mut missing: Vec<Endpoint> =
        group.endpoints.iter().filter(|e| missing.contains_key(&identity(e))).cloned().collect();
    // Changed ones first, then the fullest.
    own.sort_by_key(|i| {
        let draft = &work[*i];
        let untouched = draft.original.as_ref().is_some_and(|o| **o == draft.slice);
        (untouched, usize::MAX - draft.endpoints().len())
    });
    let emptied: Vec<usize> = (0..work.len())
        .filter(|i| {
            let draft = &work[*i];
            !own.contains(i)
                && !draft.keep
                && draft.slice.address_type == group.family
                && draft.endpoints().is_empty()
        })
        .collect();
    for i in own.into_iter().chain(emptied) {
        if missing.is_empty() {
            return;
        }
        let draft = &mut work[i];
        let endpoints = draft.slice.endpoints.get_or_insert_default();
        let room = SLICE_SIZE.saturating_sub(endpoints.len()).min(missing.len());
        if room > 0 {
            endpoints.extend(missing.drain(..room));
            draft.slice.ports = Some(group.ports.clone());
            draft.keep = true;
        }
    }
    while !missing.is_empty() {
        let mut draft = Draft::new(service, &group.family);
        let count = SLICE_SIZE.min(missing.len());
        draft.slice.endpoints = Some(missing.drain(..count).collect());
        draft.slice.ports = Some(group.ports.clone());
        work.push(draft);
    }
}

fn owner(service: &Service) -> Vec<OwnerReference> {
    vec![controller_reference::<Service>(&service.metadata)]
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    let name = service.metadata.name.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.to_owned(), name);
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    labels.remove(HEADLESS);
    if members::is_headless(service) {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    labels
}

/// Says when the earliest of the pods that changed did so; without one the time is unknown.
fn note_trigger(slice: &mut EndpointSlice, before: Option<&EndpointSlice>, selected: &[Arc<Pod>]) {
    let known = before.and_then(|b| b.endpoints.as_deref()).unwrap_or_default();
    let changed = slice.endpoints.iter().flatten().filter(|e| !known.contains(e));
    let time: Option<Timestamp> = changed
        .filter_map(|endpoint| {
            let uid = endpoint.target_ref.as_ref()?.uid.as_ref();
            let pod = selected.iter().find(|pod| pod.metadata.uid.as_ref() == uid)?;
            let ready = pods::condition(pod, "Ready")?;
            ready.last_transition_time.as_ref().map(|time| time.0)
        })
        .min();
    let annotations = &mut slice.metadata.annotations;
    match time {
        Some(time) => {
            annotations.get_or_insert_default().insert(TRIGGER_TIME.to_owned(), time.to_string());
        }
        None => {
            if let Some(known) = annotations {
                known.remove(TRIGGER_TIME);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(extra: Value) -> Service {
        let mut value = json!({
            "metadata": {"name": "web", "namespace": "d", "uid": "s", "labels": {"team": "x"}},
            "spec": {"clusterIP": "10.96.0.9", "ipFamilies": ["IPv4"],
                "selector": {"app": "web"},
                "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        });
        for (key, new) in extra.as_object().unwrap() {
            value["spec"][key] = new.clone();
        }
        serde_json::from_value(value).unwrap()
    }

    fn pod(number: usize, port: i32, ready: bool) -> Arc<Pod> {
        let status = if ready { "True" } else { "False" };
        let pod = json!({
            "metadata": {"name": format!("p{number}"), "namespace": "d",
                "uid": format!("u{number}"), "labels": {"app": "web"}},
            "spec": {"nodeName": "n1", "hostname": format!("p{number}"), "subdomain": "web",
                "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": port}]}]},
            "status": {"phase": "Running",
                "podIPs": [{"ip": format!("10.244.{}.{}", number / 250, number % 250 + 1)}],
                "conditions": [{"type": "Ready", "status": status,
                    "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
        });
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn zones() -> Zones {
        BTreeMap::from([("n1".to_owned(), "z1".to_owned())])
    }

    fn run(service: &Service, pods: &[Arc<Pod>], existing: &[Arc<EndpointSlice>]) -> Plan {
        plan(service, pods, &zones(), existing)
    }

    /// The slices after the plan was carried out.
    fn after(plan: Plan, existing: Vec<Arc<EndpointSlice>>) -> Vec<Arc<EndpointSlice>> {
        let mut slices: Vec<_> = existing
            .into_iter()
            .filter(|slice| !plan.delete.contains(slice))
            .map(|slice| match plan.update.iter().find(|(old, _)| *old == slice) {
                Some((_, new)) => Arc::new(new.clone()),
                None => slice,
            })
            .collect();
        slices.extend(plan.create.into_iter().map(Arc::new));
        slices
    }

    #[test]
    fn a_slice_says_what_is_documented() {
        let slice = &run(&service(json!({})), &[pod(1, 8080, true)], &[]).create[0];
        let labels = slice.metadata.labels.as_ref().unwrap();
        assert_eq!(labels[SERVICE_NAME], "web");
        assert_eq!(labels[MANAGED_BY], MANAGER);
        assert_eq!(labels["team"], "x");
        assert_eq!(
            slice.metadata.annotations.as_ref().unwrap()[TRIGGER_TIME],
            "2026-01-01T00:00:00Z"
        );
        assert_eq!(slice.ports.as_ref().unwrap()[0].port, Some(8080));
        let endpoint = &slice.endpoints.as_ref().unwrap()[0];
        assert_eq!(endpoint.addresses, ["10.244.0.2"]);
        assert_eq!(endpoint.zone.as_deref(), Some("z1"));
        assert_eq!(endpoint.node_name.as_deref(), Some("n1"));
        assert_eq!(endpoint.hostname.as_deref(), Some("p1"));
        assert_eq!(endpoint.target_ref.as_ref().unwrap().name.as_deref(), Some("p1"));
    }

    #[test]
    fn conditions_follow_the_pod() {
        let mut going = (*pod(1, 80, true)).clone();
        going.metadata.deletion_timestamp =
            Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        let publish = json!({"publishNotReadyAddresses": true});
        let table = [
            (json!({}), pod(1, 80, true), (true, true, false)),
            (json!({}), pod(1, 80, false), (false, false, false)),
            (json!({}), Arc::new(going.clone()), (false, true, true)),
            (publish.clone(), pod(1, 80, false), (true, false, false)),
            (publish, Arc::new(going), (true, true, true)),
        ];
        for (spec, pod, (ready, serving, terminating)) in table {
            let slice = &run(&service(spec), &[pod], &[]).create[0];
            let conditions = slice.endpoints.as_ref().unwrap()[0].conditions.clone().unwrap();
            assert_eq!(conditions.ready, Some(ready));
            assert_eq!(conditions.serving, Some(serving));
            assert_eq!(conditions.terminating, Some(terminating));
        }
    }

    #[test]
    fn a_change_of_one_pod_is_a_change_of_one_slice() {
        let service = service(json!({}));
        let mut pods: Vec<_> = (0..250).map(|i| pod(i, 80, true)).collect();
        let slices = after(run(&service, &pods, &[]), vec![]);
        let mut sizes: Vec<_> =
            slices.iter().map(|s| s.endpoints.as_ref().unwrap().len()).collect();
        sizes.sort_unstable();
        assert_eq!(sizes, [50, 100, 100]);
        assert_eq!(run(&service, &pods, &slices), Plan::default());

        pods[120] = pod(120, 80, false);
        let change = run(&service, &pods, &slices);
        assert_eq!((change.create.len(), change.update.len(), change.delete.len()), (0, 1, 0));

        pods.remove(7);
        pods.push(pod(300, 80, true));
        let change = run(&service, &pods, &slices);
        assert_eq!((change.create.len(), change.delete.len()), (0, 0));
        assert!(change.update.len() <= 2);
    }

    #[test]
    fn pods_with_other_ports_have_slices_of_their_own() {
        let service = service(json!({}));
        let slices = after(run(&service, &[pod(1, 80, true), pod(2, 81, true)], &[]), vec![]);
        assert_eq!(slices.len(), 2);
        let plan = run(&service, &[pod(1, 80, true)], &slices);
        assert_eq!((plan.update.len(), plan.delete.len()), (0, 1));
    }

    #[test]
    fn without_endpoints_an_empty_slice_stays_and_is_used_again() {
        let service = service(json!({}));
        let empty = after(run(&service, &[], &[]), vec![]);
        assert_eq!(empty.len(), 1);
        assert_eq!(run(&service, &[], &empty), Plan::default());
        let first = run(&service, &[pod(1, 80, true)], &empty);
        assert_eq!((first.create.len(), first.update.len(), first.delete.len()), (0, 1, 0));
        let filled = after(first, empty);
        let none = run(&service, &[], &filled);
        assert_eq!((none.create.len(), none.update.len(), none.delete.len()), (0, 1, 0));
        assert_eq!(run(&service, &[], &after(none, filled)), Plan::default());
    }
}
