//! From requests and limits to cgroup values.

use k8s_openapi::api::core::v1::{Container, Pod};
use keelson_runtime_shim::runtime::LinuxResources;

use crate::{
    config::AgentConfig,
    status::qos::{self, QosClass, amount},
    worker::view::{self, Role},
};

/// The least CPU weight.
const MIN_SHARES: u64 = 2;
/// The largest CPU weight.
const MAX_SHARES: u64 = 262_144;
/// The least CPU time in a period, in microseconds.
const MIN_QUOTA: i64 = 1_000;

/// CPU weight for thousandths of a CPU: 1,024 for a whole one.
pub(crate) fn shares(milli_cpu: i64) -> u64 {
    let shares = u64::try_from(milli_cpu).unwrap_or(0).saturating_mul(1024) / 1000;
    shares.clamp(MIN_SHARES, MAX_SHARES)
}

/// CPU time in each period for thousandths of a CPU; none for no limit.
pub(crate) fn quota(milli_cpu: i64, period_micros: u64) -> Option<i64> {
    if milli_cpu <= 0 {
        return None;
    }
    let period = i64::try_from(period_micros).unwrap_or(100_000);
    Some((milli_cpu.saturating_mul(period) / 1000).max(MIN_QUOTA))
}

fn period(config: &AgentConfig) -> u64 {
    u64::try_from(config.cpu_cfs_quota_period.as_micros()).unwrap_or(100_000)
}

/// The cgroup values of one container.
pub(crate) fn container_resources(
    config: &AgentConfig,
    pod: &Pod,
    container: &Container,
    memory_capacity: i64,
) -> LinuxResources {
    let resources = container.resources.as_ref();
    let limits = resources.and_then(|resources| resources.limits.as_ref());
    let requests = resources.and_then(|resources| resources.requests.as_ref());
    let cpu_limit = amount(limits, "cpu").milli();
    let cpu_request = match requests.is_some_and(|requests| requests.contains_key("cpu")) {
        true => amount(requests, "cpu").milli(),
        false => cpu_limit,
    };
    let memory_limit = amount(limits, "memory").value();
    let quota = config.cpu_cfs_quota.then(|| quota(cpu_limit, period(config))).flatten();
    LinuxResources {
        cpu_shares: Some(shares(cpu_request)),
        cpu_quota: quota,
        cpu_period: quota.map(|_| period(config)),
        memory_limit: (memory_limit > 0).then_some(memory_limit),
        oom_score_adj: Some(oom_score_adj(pod, container, memory_capacity)),
        ..Default::default()
    }
}

/// The documented OOM score: -997 for Guaranteed and node-critical pods, 1000 for BestEffort, and
/// for Burstable the less the more of the machine's memory is requested, 3 to 999.
pub(crate) fn oom_score_adj(pod: &Pod, container: &Container, memory_capacity: i64) -> i32 {
    // system-node-critical
    if view::spec(pod).priority.is_some_and(|priority| priority >= 2_000_001_000) {
        return -997;
    }
    match qos::class(pod) {
        QosClass::Guaranteed => -997,
        QosClass::BestEffort => 1000,
        QosClass::Burstable => {
            let resources = container.resources.as_ref();
            let requests = resources.and_then(|resources| resources.requests.as_ref());
            let limits = resources.and_then(|resources| resources.limits.as_ref());
            let request = amount(requests, "memory").max(amount(limits, "memory")).value();
            let request = match requests.is_some_and(|requests| requests.contains_key("memory")) {
                true => amount(requests, "memory").value(),
                false => request,
            };
            let score = 1000 - 1000 * i128::from(request) / i128::from(memory_capacity.max(1));
            // below 3 are Guaranteed pods and the node's own programs, 1000 is BestEffort
            i32::try_from(score.clamp(3, 999)).unwrap_or(999)
        }
    }
}

/// The values of the pod's own cgroup: the sums of its containers, as the scheduler counts them.
pub(crate) fn pod_resources(config: &AgentConfig, pod: &Pod) -> LinuxResources {
    let request = pod_request(pod, "cpu").milli();
    let cpu_limit = pod_limit(pod, "cpu").map(|limit| limit.milli());
    let memory_limit = pod_limit(pod, "memory").map(|limit| limit.value());
    let quota = config
        .cpu_cfs_quota
        .then(|| cpu_limit.and_then(|limit| quota(limit, period(config))))
        .flatten();
    LinuxResources {
        cpu_shares: Some(shares(request)),
        cpu_quota: quota,
        cpu_period: quota.map(|_| period(config)),
        memory_limit: memory_limit.filter(|limit| *limit > 0),
        pids_limit: config.pod_pids_limit.filter(|limit| *limit > 0),
        ..Default::default()
    }
}

/// What a pod requests of a resource: the larger of what its main containers and sidecars need
/// together and what each init container needs beside the sidecars before it, and its overhead.
pub(crate) fn pod_request(pod: &Pod, resource: &str) -> keelson_api::quantity::Quantity {
    use keelson_api::quantity::Quantity;
    let overhead = amount(view::spec(pod).overhead.as_ref(), resource);
    let pod_level = view::spec(pod).resources.as_ref();
    if let Some(requests) = pod_level.and_then(|resources| resources.requests.as_ref())
        && requests.contains_key(resource)
    {
        return amount(Some(requests), resource) + overhead;
    }
    let of = |container: &Container| {
        let resources = container.resources.as_ref();
        let requests = resources.and_then(|resources| resources.requests.as_ref());
        match requests.is_some_and(|requests| requests.contains_key(resource)) {
            true => amount(requests, resource),
            false => amount(resources.and_then(|r| r.limits.as_ref()), resource),
        }
    };
    combined(pod, of).unwrap_or(Quantity::ZERO) + overhead
}

/// The sum of a pod's limits; none if a container has no limit.
pub(crate) fn pod_limit(pod: &Pod, resource: &str) -> Option<keelson_api::quantity::Quantity> {
    let pod_level = view::spec(pod).resources.as_ref();
    if let Some(limits) = pod_level.and_then(|resources| resources.limits.as_ref())
        && limits.contains_key(resource)
    {
        return Some(amount(Some(limits), resource));
    }
    let of = |container: &Container| {
        amount(container.resources.as_ref().and_then(|r| r.limits.as_ref()), resource)
    };
    if view::containers(pod).any(|(_, container)| of(container).is_zero()) {
        return None;
    }
    combined(pod, of).map(|sum| sum + amount(view::spec(pod).overhead.as_ref(), resource))
}

fn combined(
    pod: &Pod,
    of: impl Fn(&Container) -> keelson_api::quantity::Quantity,
) -> Option<keelson_api::quantity::Quantity> {
    use keelson_api::quantity::Quantity;
    let mut sidecars = Quantity::ZERO;
    let mut largest_init = Quantity::ZERO;
    let mut mains = Quantity::ZERO;
    for (role, container) in view::containers(pod) {
        match role {
            Role::Sidecar => {
                sidecars += of(container);
                largest_init = largest_init.max(sidecars);
            }
            Role::Init => largest_init = largest_init.max(sidecars + of(container)),
            Role::Main => mains += of(container),
        }
    }
    Some((mains + sidecars).max(largest_init))
}

/// The pod's cgroup below the hierarchy's root.
pub(crate) fn cgroup_parent(pod: &Pod) -> String {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    match qos::class(pod) {
        QosClass::Guaranteed => format!("kubepods/pod{uid}"),
        QosClass::Burstable => format!("kubepods/burstable/pod{uid}"),
        QosClass::BestEffort => format!("kubepods/besteffort/pod{uid}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::fixture;

    type List = &'static [(&'static str, &'static str)];

    #[test]
    fn cpu_becomes_weight_and_quota() {
        assert_eq!(shares(0), 2);
        assert_eq!(shares(1000), 1024);
        assert_eq!(shares(250), 256);
        assert_eq!(quota(500, 100_000), Some(50_000));
        assert_eq!(quota(1, 100_000), Some(1_000));
        assert_eq!(quota(0, 100_000), None);
    }

    #[test]
    fn the_oom_score_follows_the_class() {
        const GIB: i64 = 1 << 30;
        let rows: [(List, List, i32); 4] = [
            (&[], &[], 1000),
            (&[], &[("cpu", "1"), ("memory", "1Gi")], -997),
            (&[("memory", "1Gi")], &[], 750),
            (&[("cpu", "1")], &[], 999),
        ];
        for (requests, limits, expected) in rows {
            let mut pod = fixture::pod(&["a"]);
            pod.spec.as_mut().unwrap().containers[0].resources =
                Some(fixture::resources(requests, limits));
            let container = pod.spec.as_ref().unwrap().containers[0].clone();
            assert_eq!(
                oom_score_adj(&pod, &container, 4 * GIB),
                expected,
                "{requests:?} {limits:?}"
            );
        }
    }

    #[test]
    fn a_pod_requests_what_its_largest_moment_needs() {
        let mut pod = fixture::pod(&["a", "b"]);
        let spec = pod.spec.as_mut().unwrap();
        for container in &mut spec.containers {
            container.resources = Some(fixture::resources(&[("cpu", "100m")], &[]));
        }
        let mut init = fixture::container("init");
        init.resources = Some(fixture::resources(&[("cpu", "150m")], &[]));
        let mut sidecar = fixture::container("sidecar");
        sidecar.restart_policy = Some("Always".to_owned());
        sidecar.resources = Some(fixture::resources(&[("cpu", "100m")], &[]));
        spec.init_containers = Some(vec![sidecar, init]);
        assert_eq!(pod_request(&pod, "cpu").milli(), 300);
    }
}
