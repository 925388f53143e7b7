//! Pods as `kubectl get pods` shows them.

use jiff::Timestamp;
use serde_json::Value;

use super::{AGE, Columns, NAME, NONE, age, name, or_none, since, text, wide};
use crate::registry::value;

pub(crate) static POD: Columns = Columns {
    columns: &[
        NAME,
        text("Ready"),
        text("Status"),
        text("Restarts"),
        AGE,
        wide("IP"),
        wide("Node"),
        wide("Nominated Node"),
        wide("Readiness Gates"),
    ],
    cells,
};

fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let summary = Summary::of(pod);
    vec![
        name(pod),
        format!("{}/{}", summary.ready, summary.total).into(),
        summary.status.clone().into(),
        summary.restarts_text(now).into(),
        age(pod, now),
        or_none(value::text(pod, &["status", "podIP"])),
        or_none(value::text(pod, &["spec", "nodeName"])),
        or_none(value::text(pod, &["status", "nominatedNodeName"])),
        readiness_gates(pod),
    ]
}

/// A pod in a few words.
#[derive(Debug, Default)]
struct Summary<'a> {
    status: String,
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: &'a str,
}

impl<'a> Summary<'a> {
    fn of(pod: &'a Value) -> Self {
        let reason = value::text(pod, &["status", "reason"]);
        let phase = value::text(pod, &["status", "phase"]);
        let mut out = Self {
            status: if reason.is_empty() { phase } else { reason }.to_owned(),
            total: value::list(pod, &["spec", "containers"]).len() + sidecars(pod).count(),
            ..Self::default()
        };
        let gated = condition(pod, "PodScheduled")
            .is_some_and(|c| value::text(c, &["reason"]) == "SchedulingGated");
        if gated {
            out.status = "SchedulingGated".to_owned();
        }
        let initializing = out.init_containers(pod);
        if !initializing || is_true(pod, "Initialized") {
            out.main_containers(pod);
        }
        if value::at(pod, &["metadata", "deletionTimestamp"]).is_some() {
            if reason == "NodeLost" {
                out.status = "Unknown".to_owned();
            } else if !matches!(phase, "Succeeded" | "Failed") {
                out.status = "Terminating".to_owned();
            }
        }
        out
    }

    fn restarted(&mut self, status: &'a Value) {
        self.restarts += value::int(status, &["restartCount"]).unwrap_or(0);
        let at = value::text(status, &["lastState", "terminated", "finishedAt"]);
        // Times in one form compare as text.
        self.last_restart = self.last_restart.max(at);
    }

    /// Whether an init container is what the pod waits for.
    fn init_containers(&mut self, pod: &'a Value) -> bool {
        let total = value::list(pod, &["spec", "initContainers"]).len();
        let statuses = value::list(pod, &["status", "initContainerStatuses"]);
        for (index, status) in statuses.iter().enumerate() {
            self.restarted(status);
            let is_sidecar = sidecars(pod).any(|name| name == value::text(status, &["name"]));
            let terminated = value::at(status, &["state", "terminated"]);
            if let Some(ended) = terminated {
                if value::int(ended, &["exitCode"]) == Some(0) {
                    continue;
                }
            } else if is_sidecar && value::flag(status, &["started"]) {
                self.ready += usize::from(value::flag(status, &["ready"]));
                continue;
            }
            let waiting = value::text(status, &["state", "waiting", "reason"]);
            self.status = match terminated {
                Some(ended) => format!("Init:{}", ended_as(ended)),
                None if !matches!(waiting, "" | "PodInitializing") => format!("Init:{waiting}"),
                None => format!("Init:{index}/{total}"),
            };
            return true;
        }
        false
    }

    fn main_containers(&mut self, pod: &'a Value) {
        // Restarts of init containers that are done no longer count; sidecars' do.
        self.restarts = 0;
        self.last_restart = "";
        for status in value::list(pod, &["status", "initContainerStatuses"]) {
            if sidecars(pod).any(|name| name == value::text(status, &["name"])) {
                self.restarted(status);
            }
        }
        let mut any_running = false;
        for status in value::list(pod, &["status", "containerStatuses"]).iter().rev() {
            self.restarted(status);
            let waiting = value::text(status, &["state", "waiting", "reason"]);
            if !waiting.is_empty() {
                waiting.clone_into(&mut self.status);
            } else if let Some(ended) = value::at(status, &["state", "terminated"]) {
                self.status = ended_as(ended);
            } else if value::flag(status, &["ready"])
                && value::at(status, &["state", "running"]).is_some()
            {
                any_running = true;
                self.ready += 1;
            }
        }
        if self.status == "Completed" && any_running {
            let ready = is_true(pod, "Ready");
            self.status = if ready { "Running" } else { "NotReady" }.to_owned();
        }
    }

    fn restarts_text(&self, now: Timestamp) -> String {
        if self.restarts == 0 || self.last_restart.is_empty() {
            self.restarts.to_string()
        } else {
            format!("{} ({} ago)", self.restarts, since(self.last_restart, now))
        }
    }
}

fn ended_as(terminated: &Value) -> String {
    let reason = value::text(terminated, &["reason"]);
    if !reason.is_empty() {
        return reason.to_owned();
    }
    match value::int(terminated, &["signal"]).unwrap_or(0) {
        0 => format!("ExitCode:{}", value::int(terminated, &["exitCode"]).unwrap_or(0)),
        signal => format!("Signal:{signal}"),
    }
}

fn sidecars(pod: &Value) -> impl Iterator<Item = &str> {
    value::list(pod, &["spec", "initContainers"])
        .iter()
        .filter(|container| value::text(container, &["restartPolicy"]) == "Always")
        .map(|container| value::text(container, &["name"]))
}

fn condition<'a>(pod: &'a Value, kind: &str) -> Option<&'a Value> {
    value::list(pod, &["status", "conditions"])
        .iter()
        .find(|condition| value::text(condition, &["type"]) == kind)
}

fn is_true(pod: &Value, kind: &str) -> bool {
    condition(pod, kind).is_some_and(|c| value::text(c, &["status"]) == "True")
}

fn readiness_gates(pod: &Value) -> Value {
    let gates = value::list(pod, &["spec", "readinessGates"]);
    if gates.is_empty() {
        return NONE.into();
    }
    let open =
        gates.iter().filter(|gate| is_true(pod, value::text(gate, &["conditionType"]))).count();
    format!("{open}/{}", gates.len()).into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown(pod: &Value) -> String {
        let now = "2026-01-01T01:00:00Z".parse().unwrap();
        let cells = cells(pod, now);
        let texts: Vec<&str> = cells[1..4].iter().filter_map(Value::as_str).collect();
        texts.join(" ")
    }

    fn pod(phase: &str, statuses: &Value) -> Value {
        json!({"spec": {"containers": [{"name": "a"}]},
               "status": {"phase": phase, "containerStatuses": statuses}})
    }

    #[test]
    fn statuses_read_as_in_kubectl() {
        let running = json!([{"name": "a", "ready": true, "restartCount": 0,
                              "state": {"running": {}}}]);
        let crashing = json!([{"name": "a", "restartCount": 3,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"finishedAt": "2026-01-01T00:58:00Z"}}}]);
        let ended = |reason: &str, code: i64| json!([{"name": "a", "state": {"terminated": {"reason": reason, "exitCode": code}}}]);
        let mut terminating = pod("Running", &running);
        terminating["metadata"] = json!({"deletionTimestamp": "2026-01-01T00:59:00Z"});
        let mut lost = terminating.clone();
        lost["status"]["reason"] = "NodeLost".into();
        let init = |status: Value| {
            json!({"spec": {"containers": [{"name": "a"}],
                            "initContainers": [{"name": "i"}, {"name": "j"}]},
                   "status": {"phase": "Pending", "initContainerStatuses": [status]}})
        };
        let rows = [
            (pod("Pending", &json!([])), "0/1 Pending 0"),
            (pod("Running", &running), "1/1 Running 0"),
            (pod("Running", &crashing), "0/1 CrashLoopBackOff 3 (2m ago)"),
            (pod("Succeeded", &ended("Completed", 0)), "0/1 Completed 0"),
            (pod("Failed", &ended("Error", 1)), "0/1 Error 0"),
            (pod("Running", &ended("OOMKilled", 137)), "0/1 OOMKilled 0"),
            (pod("Failed", &ended("", 3)), "0/1 ExitCode:3 0"),
            (terminating, "1/1 Terminating 0"),
            (lost, "1/1 Unknown 0"),
            (init(json!({"name": "i", "state": {"running": {}}})), "0/1 Init:0/2 0"),
            (
                init(json!({"name": "i", "state": {"waiting": {"reason": "CrashLoopBackOff"}}})),
                "0/1 Init:CrashLoopBackOff 0",
            ),
            (
                init(
                    json!({"name": "i", "state": {"terminated": {"reason": "Error", "exitCode": 1}}}),
                ),
                "0/1 Init:Error 0",
            ),
        ];
        for (pod, expected) in rows {
            assert_eq!(shown(&pod), expected, "{pod}");
        }
    }

    #[test]
    fn sidecars_count_as_containers() {
        let pod = json!({
            "spec": {"containers": [{"name": "a"}],
                     "initContainers": [{"name": "s", "restartPolicy": "Always"}]},
            "status": {"phase": "Running",
                "conditions": [{"type": "Initialized", "status": "True"}],
                "initContainerStatuses": [{"name": "s", "started": true, "ready": true,
                    "restartCount": 1, "state": {"running": {}}}],
                "containerStatuses": [{"name": "a", "ready": true, "state": {"running": {}}}]},
        });
        assert_eq!(shown(&pod), "2/2 Running 1");
    }
}
