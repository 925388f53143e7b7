//! A pod's quality of service, from its requests and limits.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::api::resource::Quantity as ApiQuantity};
use keelson_api::quantity::Quantity;

use crate::worker::view;

/// `status.qosClass`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QosClass {
    /// Every container has CPU and memory limits, and requests equal to them.
    Guaranteed,
    /// Some container requests something.
    Burstable,
    /// Nothing is requested.
    BestEffort,
}

impl QosClass {
    /// As it stands in the status.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// The amount of `resource` in a list, zero if it is not there or not a quantity.
pub(crate) fn amount(list: Option<&BTreeMap<String, ApiQuantity>>, resource: &str) -> Quantity {
    list.and_then(|list| list.get(resource))
        .and_then(|quantity| Quantity::try_from(quantity).ok())
        .unwrap_or(Quantity::ZERO)
}

/// The pod's class, by the documented rules.
pub(crate) fn class(pod: &Pod) -> QosClass {
    let pod_level = view::spec(pod).resources.as_ref();
    let mut anything = false;
    let mut guaranteed = true;
    let lists: Vec<_> = match pod_level {
        Some(resources) => vec![Some(resources)],
        None => view::containers(pod).map(|(_, container)| container.resources.as_ref()).collect(),
    };
    for resources in lists {
        let requests = resources.and_then(|resources| resources.requests.as_ref());
        let limits = resources.and_then(|resources| resources.limits.as_ref());
        for resource in ["cpu", "memory"] {
            let limit = amount(limits, resource);
            let request = match requests.and_then(|requests| requests.get(resource)) {
                Some(_) => amount(requests, resource),
                None => limit,
            };
            anything |= !limit.is_zero() || !request.is_zero();
            guaranteed &= !limit.is_zero() && request == limit;
        }
    }
    match (anything, guaranteed) {
        (false, _) => QosClass::BestEffort,
        (true, true) => QosClass::Guaranteed,
        (true, false) => QosClass::Burstable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::fixture;

    type List = &'static [(&'static str, &'static str)];

    #[test]
    fn the_class_follows_requests_and_limits() {
        let rows: [(List, List, QosClass); 5] = [
            (&[], &[], QosClass::BestEffort),
            (&[("cpu", "100m")], &[], QosClass::Burstable),
            (&[], &[("cpu", "1"), ("memory", "1Gi")], QosClass::Guaranteed),
            (&[("cpu", "1000m")], &[("cpu", "1"), ("memory", "1Gi")], QosClass::Guaranteed),
            (&[("cpu", "500m")], &[("cpu", "1"), ("memory", "1Gi")], QosClass::Burstable),
        ];
        for (requests, limits, expected) in rows {
            let mut pod = fixture::pod(&["a"]);
            let spec = pod.spec.as_mut().unwrap();
            spec.containers[0].resources = Some(fixture::resources(requests, limits));
            assert_eq!(class(&pod), expected, "requests {requests:?}, limits {limits:?}");
        }
    }
}
