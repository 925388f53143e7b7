//! Startup, liveness and readiness probes.
//!
//! Each probe of a running container has one task, which tries it every period, counts results
//! (`machine`, pure) and tells the pod's worker when its verdict changes. The worker owns the tasks:
//! they end when the container does. What a verdict means for the pod is decided in the worker's
//! plan, never here.

pub(crate) mod grpc;
pub(crate) mod http;
pub(crate) mod machine;
pub(crate) mod target;
pub(crate) mod tcp;

use std::{net::IpAddr, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use keelson_api::events::EventType;
use keelson_runtime_shim::runtime::{ContainerId, RuntimeError};
use machine::{Machine, Timing};
use tokio::sync::mpsc;

use crate::worker::{Context, Note, backoff};

/// The longest output of a probe that is shown in an event.
const OUTPUT_BYTES: usize = 10 * 1024;

/// Which of a container's probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Holds off the other two until it has succeeded.
    Startup,
    /// Its failure restarts the container.
    Liveness,
    /// Its failure takes the pod out of its Services.
    Readiness,
}

impl Kind {
    /// As it begins an event's message.
    fn title(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

/// What a probe says of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing yet.
    #[default]
    Unknown,
    /// It succeeded often enough.
    Success,
    /// It failed often enough.
    Failure,
}

/// What all probes of one container say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ProbeState {
    /// The startup probe.
    pub(crate) startup: Verdict,
    /// The liveness probe.
    pub(crate) liveness: Verdict,
    /// The readiness probe.
    pub(crate) readiness: Verdict,
}

impl ProbeState {
    /// The verdict of one kind.
    pub(crate) fn get_mut(&mut self, kind: Kind) -> &mut Verdict {
        match kind {
            Kind::Startup => &mut self.startup,
            Kind::Liveness => &mut self.liveness,
            Kind::Readiness => &mut self.readiness,
        }
    }
}

/// The result of one try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It succeeded.
    Success,
    /// It succeeded, and there is something to say (a redirect to another host).
    Warning(String),
    /// It failed, and why.
    Failure(String),
}

/// Whether a verdict is the last one: a container has started once, and one that is to be restarted
/// is stopped without being asked any more.
fn is_over(kind: Kind, verdict: Verdict) -> bool {
    match kind {
        Kind::Startup => verdict != Verdict::Unknown,
        Kind::Liveness => verdict == Verdict::Failure,
        Kind::Readiness => false,
    }
}

/// What a probe's task needs.
pub(crate) struct Prober {
    /// The agent's parts.
    pub(crate) context: Arc<Context>,
    /// The pod.
    pub(crate) pod: Arc<Pod>,
    /// The container.
    pub(crate) container: Container,
    /// Its id.
    pub(crate) id: ContainerId,
    /// When it started.
    pub(crate) started_at: Timestamp,
    /// The address that network probes go to, unless they name another.
    pub(crate) address: Option<IpAddr>,
    /// Which probe.
    pub(crate) kind: Kind,
    /// Its definition.
    pub(crate) probe: Probe,
    /// What was known before the agent restarted.
    pub(crate) seed: Option<Verdict>,
    /// Where verdicts go.
    pub(crate) notes: mpsc::Sender<Note>,
}

impl Prober {
    /// Tries until the task is dropped, or until there is nothing left to find out.
    pub(crate) async fn run(self) {
        let timing = Timing::of(&self.probe);
        let mut machine = Machine::new(self.kind, timing, self.seed);
        if self.tell(machine.verdict()).await.is_err() {
            return;
        }
        let first = backoff::after(self.started_at, timing.initial_delay);
        let mut wait = backoff::until(Timestamp::now(), first);
        if self.seed.is_some() {
            // after a restart of the agent, not all probes of the node at the same moment
            wait += timing.period.mul_f64(rand::random::<f64>());
        }
        tokio::time::sleep(wait).await;
        let mut ticks = tokio::time::interval(timing.period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let before = machine.verdict();
            let begun = std::time::Instant::now();
            let Some(outcome) = self.attempt(timing.timeout).await else { continue };
            self.count(&outcome, begun.elapsed());
            self.report(&outcome);
            let verdict = machine.record(!matches!(outcome, Outcome::Failure(_)));
            if verdict != before && self.tell(verdict).await.is_err() {
                return;
            }
            if is_over(self.kind, verdict) {
                return;
            }
        }
    }

    async fn tell(&self, verdict: Verdict) -> Result<(), mpsc::error::SendError<Note>> {
        self.notes.send(Note::Probe { id: self.id.clone(), kind: self.kind, verdict }).await
    }

    /// One try; nothing if it can't be told whether it failed (the runtime does not answer).
    async fn attempt(&self, timeout: Duration) -> Option<Outcome> {
        let probe = &self.probe;
        if let Some(exec) = &probe.exec {
            let command = exec.command.clone().unwrap_or_default();
            return self.exec(&command, timeout).await;
        }
        let Some(address) = self.address else {
            return Some(Outcome::Failure("the pod has no address".to_owned()));
        };
        if let Some(get) = &probe.http_get {
            return Some(match target::http_target(get, &self.container, address) {
                Ok(target) => http::get(&target, timeout, "kube-probe/1.36").await,
                Err(reason) => Outcome::Failure(reason),
            });
        }
        if let Some(socket) = &probe.tcp_socket {
            let port = target::port(&socket.port, &self.container);
            return Some(match port {
                Ok(port) => tcp::connect(socket.host.as_deref(), address, port, timeout).await,
                Err(reason) => Outcome::Failure(reason),
            });
        }
        if let Some(check) = &probe.grpc {
            return Some(match u16::try_from(check.port) {
                Ok(port) => {
                    let service = check.service.as_deref().unwrap_or_default();
                    grpc::check((address, port).into(), service, timeout).await
                }
                Err(_) => Outcome::Failure(format!("port {} is not a port", check.port)),
            });
        }
        Some(Outcome::Failure("missing probe handler".to_owned()))
    }

    async fn exec(&self, command: &[String], timeout: Duration) -> Option<Outcome> {
        match self.context.runtime.exec_sync(&self.id, command, Some(timeout)).await {
            Ok(output) if output.exit_code == 0 => Some(Outcome::Success),
            Ok(output) => {
                let mut text = output.stdout;
                text.extend(output.stderr);
                Some(Outcome::Failure(String::from_utf8_lossy(&text).into_owned()))
            }
            Err(RuntimeError::Timeout { .. }) => Some(Outcome::Failure(format!(
                "command timed out: {:?} timed out after {}",
                command.join(" "),
                backoff::go_duration(timeout)
            ))),
            // the container is gone: its end is seen elsewhere
            Err(RuntimeError::NotFound(_)) => None,
            // a command that can't be started counts as one that fails
            Err(error @ (RuntimeError::Container(_) | RuntimeError::Invalid(_))) => {
                Some(Outcome::Failure(error.to_string()))
            }
            Err(error) => {
                tracing::warn!(container = %self.id, %error, "probe could not be run");
                None
            }
        }
    }

    fn report(&self, outcome: &Outcome) {
        let (reason, verb, output) = match outcome {
            Outcome::Success => return,
            Outcome::Warning(output) => ("ProbeWarning", "warning", output),
            Outcome::Failure(output) => ("Unhealthy", "failed", output),
        };
        let mut end = output.len().min(OUTPUT_BYTES);
        while !output.is_char_boundary(end) {
            end -= 1;
        }
        let message = format!("{} probe {verb}: {}", self.kind.title(), &output[..end]);
        self.context.container_event(
            &self.pod,
            &self.container.name,
            EventType::Warning,
            reason,
            message,
        );
    }

    fn count(&self, outcome: &Outcome, took: Duration) {
        let result = if matches!(outcome, Outcome::Failure(_)) { "failed" } else { "successful" };
        self.context.metrics.probed(
            &self.pod,
            &self.container.name,
            self.kind.title(),
            result,
            took,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_that_is_to_be_restarted_is_probed_no_more() {
        assert!(is_over(Kind::Liveness, Verdict::Failure));
        assert!(is_over(Kind::Startup, Verdict::Failure));
        assert!(is_over(Kind::Startup, Verdict::Success));
        assert!(!is_over(Kind::Liveness, Verdict::Success));
        assert!(!is_over(Kind::Readiness, Verdict::Failure), "it may come back");
    }
}
