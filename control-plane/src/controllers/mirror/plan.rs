//! Which slices mirror an Endpoints object: a pure function.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{EndpointAddress, EndpointSubset, Endpoints, Service},
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use keelson_api::object::controller_reference;

use crate::controllers::{
    endpointslice::plan::{MANAGED_BY, Plan, SERVICE_NAME, TRIGGER_TIME},
    names,
};

/// This controller, as the manager of slices.
pub(super) const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
/// Says that the object's author makes the slices too.
const SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Such an object is a lock of old leader elections.
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// How many endpoints a subset may have (the documented default).
const MOST: usize = 1_000;

/// Endpoints with the same ports, of one family.
#[derive(Debug, PartialEq)]
struct Group {
    family: &'static str,
    ports: Vec<EndpointPort>,
    endpoints: Vec<Endpoint>,
}

/// Plans for one Service.
pub(super) fn plan(
    endpoints: Option<&Endpoints>,
    service: Option<&Service>,
    existing: &[Arc<EndpointSlice>],
) -> Plan {
    let mut left = existing.to_vec();
    let mut plan = Plan::default();
    let mirrored = endpoints.filter(|endpoints| is_mirrored(endpoints, service));
    for (endpoints, group) in
        mirrored.iter().flat_map(|e| groups(e).into_iter().map(move |g| (e, g)))
    {
        // One that has the ports already, or any of the family: that can't change.
        let known = left
            .iter()
            .position(|s| s.address_type == group.family && s.ports.as_ref() == Some(&group.ports))
            .or_else(|| left.iter().position(|s| s.address_type == group.family));
        match known.map(|index| left.swap_remove(index)) {
            Some(known) => {
                let wanted = slice(endpoints, group, (*known).clone());
                if wanted != *known {
                    plan.update.push((known, wanted));
                }
            }
            None => {
                let prefix = names::prefix(endpoints.metadata.name.as_deref().unwrap_or_default());
                let metadata = ObjectMeta {
                    name: Some(names::random(&prefix)),
                    generate_name: Some(prefix),
                    namespace: endpoints.metadata.namespace.clone(),
                    ..ObjectMeta::default()
                };
                let new = EndpointSlice { metadata, ..EndpointSlice::default() };
                plan.create.push(slice(endpoints, group, new));
            }
        }
    }
    plan.delete = left;
    plan
}

fn is_mirrored(endpoints: &Endpoints, service: Option<&Service>) -> bool {
    let metadata = &endpoints.metadata;
    let skipped = metadata.labels.as_ref().and_then(|labels| labels.get(SKIP_MIRROR));
    let leads = metadata.annotations.as_ref().is_some_and(|all| all.contains_key(LEADER));
    let Some(spec) = service.and_then(|service| service.spec.as_ref()) else { return false };
    let selects = spec.selector.as_ref().is_some_and(|selector| !selector.is_empty());
    metadata.deletion_timestamp.is_none()
        && skipped.map(String::as_str) != Some("true")
        && !leads
        && !selects
}

fn slice(endpoints: &Endpoints, group: Group, base: EndpointSlice) -> EndpointSlice {
    let mut metadata = base.metadata;
    let mut labels = endpoints.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.into(), endpoints.metadata.name.clone().unwrap_or_default());
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    metadata.labels = Some(labels);
    let mut annotations = endpoints.metadata.annotations.clone().unwrap_or_default();
    annotations.retain(|key, _| key != LAST_APPLIED && key != TRIGGER_TIME);
    metadata.annotations = (!annotations.is_empty()).then_some(annotations);
    metadata.owner_references = Some(vec![controller_reference::<Endpoints>(&endpoints.metadata)]);
    EndpointSlice {
        metadata,
        address_type: group.family.to_owned(),
        endpoints: Some(group.endpoints),
        ports: Some(group.ports),
    }
}

fn groups(endpoints: &Endpoints) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for subset in endpoints.subsets.iter().flatten() {
        let ports = ports(subset);
        let ready = subset.addresses.iter().flatten().map(|address| (address, true));
        let not_ready = subset.not_ready_addresses.iter().flatten().map(|address| (address, false));
        let mut seen = BTreeSet::new();
        for (address, ready) in ready.chain(not_ready) {
            let Ok(ip) = address.ip.parse::<IpAddr>() else { continue };
            if seen.len() == MOST || !seen.insert(ip) {
                continue;
            }
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            let endpoint = endpoint(address, ready);
            match groups.iter_mut().find(|g| g.family == family && g.ports == ports) {
                Some(group) => group.endpoints.push(endpoint),
                None => {
                    groups.push(Group { family, ports: ports.clone(), endpoints: vec![endpoint] });
                }
            }
        }
    }
    groups
}

fn ports(subset: &EndpointSubset) -> Vec<EndpointPort> {
    let ports = subset.ports.iter().flatten().map(|port| EndpointPort {
        name: Some(port.name.clone().unwrap_or_default()),
        protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".to_owned())),
        port: Some(port.port),
        app_protocol: port.app_protocol.clone(),
    });
    ports.collect()
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..Default::default() }),
        hostname: address.hostname.clone(),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn endpoints(change: Value) -> Endpoints {
        let mut object = json!({"metadata": {"name": "db", "namespace": "d", "uid": "e",
                "labels": {"team": "x"}, "annotations": {LAST_APPLIED: "{}", "a": "b"}},
            "subsets": [{"addresses": [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}],
                "notReadyAddresses": [{"ip": "192.0.2.2"}], "ports": [{"port": 5432}]}]});
        crate::patch::merge_patch(&object, &change).map(|merged| object = merged).unwrap();
        serde_json::from_value(object).unwrap()
    }

    fn service(spec: Value) -> Service {
        serde_json::from_value(json!({"metadata": {"name": "db"}, "spec": spec})).unwrap()
    }

    #[test]
    fn endpoints_without_a_selector_are_mirrored() {
        let (object, service) = (endpoints(json!({})), service(json!({})));
        let plan_of =
            |existing: &[Arc<EndpointSlice>]| plan(Some(&object), Some(&service), existing);
        let made = plan_of(&[]).create;
        let families: Vec<&str> = made.iter().map(|slice| &*slice.address_type).collect();
        assert_eq!(families, ["IPv4", "IPv6"]);
        let metadata = &made[0].metadata;
        let labels = json!({"team": "x", SERVICE_NAME: "db", MANAGED_BY: MANAGER});
        assert_eq!(json!(metadata.labels), labels);
        assert_eq!(json!(metadata.annotations), json!({"a": "b"}));
        assert_eq!(metadata.owner_references.as_ref().unwrap()[0].kind, "Endpoints");
        let ready: Vec<_> = made[0]
            .endpoints
            .iter()
            .flatten()
            .map(|e| (e.addresses[0].as_str(), e.conditions.as_ref().unwrap().ready.unwrap()))
            .collect();
        assert_eq!(ready, [("192.0.2.1", true), ("192.0.2.2", false)]);
        assert_eq!(made[0].ports.as_ref().unwrap()[0].port, Some(5432));

        let existing: Vec<_> = made.into_iter().map(Arc::new).collect();
        assert_eq!(plan_of(&existing), Plan::default());
        let fewer = endpoints(json!({"subsets": [{"addresses": [{"ip": "192.0.2.9"}],
            "ports": [{"port": 1}]}]}));
        let change = plan(Some(&fewer), Some(&service), &existing);
        assert_eq!((change.create.len(), change.update.len(), change.delete.len()), (0, 1, 1));
    }

    #[test]
    fn what_others_look_after_is_left_alone() {
        let plain = endpoints(json!({}));
        let slices = plan(Some(&plain), Some(&service(json!({}))), &[]).create;
        let existing: Vec<_> = slices.into_iter().map(Arc::new).collect();
        let rows = [
            (json!({"metadata": {"labels": {SKIP_MIRROR: "true"}}}), Some(json!({}))),
            (json!({"metadata": {"annotations": {LEADER: "{}"}}}), Some(json!({}))),
            (json!({}), Some(json!({"selector": {"app": "db"}}))),
            (json!({}), None),
        ];
        for (change, spec) in rows {
            let service = spec.map(service);
            let plan = plan(Some(&endpoints(change)), service.as_ref(), &existing);
            assert!(plan.create.is_empty() && plan.delete.len() == existing.len());
        }
        assert_eq!(plan(None, None, &existing).delete.len(), existing.len());
    }
}
