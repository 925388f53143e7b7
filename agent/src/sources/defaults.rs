//! The documented defaults of a pod, for pods that never saw an API server.

use k8s_openapi::api::core::v1::{Container, Pod, PodSecurityContext, Probe};

use crate::images;

/// Fills in what a manifest leaves out.
pub(crate) fn apply(pod: &mut Pod) {
    let Some(spec) = &mut pod.spec else { return };
    set(&mut spec.restart_policy, "Always");
    set(&mut spec.dns_policy, "ClusterFirst");
    set(&mut spec.scheduler_name, "default-scheduler");
    spec.termination_grace_period_seconds.get_or_insert(30);
    spec.enable_service_links.get_or_insert(true);
    spec.security_context.get_or_insert_with(PodSecurityContext::default);
    let host_network = spec.host_network == Some(true);
    let init = spec.init_containers.iter_mut().flatten();
    for container in init.chain(&mut spec.containers) {
        apply_container(container, host_network);
    }
    for volume in spec.volumes.iter_mut().flatten() {
        if let Some(host_path) = &mut volume.host_path {
            set(&mut host_path.type_, "");
        }
        if let Some(projected) = &mut volume.projected {
            projected.default_mode.get_or_insert(0o644);
        }
        if let Some(downward) = &mut volume.downward_api {
            downward.default_mode.get_or_insert(0o644);
        }
    }
}

fn set(field: &mut Option<String>, default: &str) {
    field.get_or_insert_with(|| default.to_owned());
}

fn apply_container(container: &mut Container, host_network: bool) {
    let policy = images::default_policy(container.image.as_deref().unwrap_or_default());
    set(&mut container.image_pull_policy, policy);
    set(&mut container.termination_message_path, "/dev/termination-log");
    set(&mut container.termination_message_policy, "File");
    for port in container.ports.iter_mut().flatten() {
        set(&mut port.protocol, "TCP");
        if host_network && port.host_port.is_none() {
            port.host_port = Some(port.container_port);
        }
    }
    // a limit without a request is a request too
    if let Some(resources) = &mut container.resources
        && let Some(limits) = resources.limits.clone()
    {
        let requests = resources.requests.get_or_insert_default();
        for (name, limit) in limits {
            requests.entry(name).or_insert(limit);
        }
    }
    let probes = [
        &mut container.startup_probe,
        &mut container.liveness_probe,
        &mut container.readiness_probe,
    ];
    for probe in probes.into_iter().flatten() {
        apply_probe(probe);
    }
}

fn apply_probe(probe: &mut Probe) {
    probe.timeout_seconds.get_or_insert(1);
    probe.period_seconds.get_or_insert(10);
    probe.success_threshold.get_or_insert(1);
    probe.failure_threshold.get_or_insert(3);
    if let Some(get) = &mut probe.http_get {
        set(&mut get.path, "/");
        set(&mut get.scheme, "HTTP");
    }
}
