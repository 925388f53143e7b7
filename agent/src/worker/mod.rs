//! One worker for each pod: it brings the pod to where it should be, and keeps it there.
//!
//! ```text
//!   desired (sources) ─┐
//!   runtime events ────┼─► observe ─► status ─► plan ─► actions, each a task ─┐
//!   probes, hooks ─────┘      ▲                                               │
//!                             └───────────────── outcomes ────────────────────┘
//! ```
//!
//! The loop itself never waits for an action: while an image is pulled or a container stops, the pod
//! can change, be deleted, or turn ready, and its status is written at once. What is under way is in
//! [`knowledge::Knowledge`], so that [`plan::plan`] does not ask for it twice.
//!
//! A worker must never: keep a decision that it could not make anew after a restart; stop a pod
//! because the agent stops; write to another pod's object.

pub(crate) mod apply;
pub(crate) mod backoff;
pub(crate) mod context;
pub(crate) mod desired;
#[cfg(test)]
pub(crate) mod fixture;
pub(crate) mod hooks;
pub(crate) mod knowledge;
pub(crate) mod last_words;
pub(crate) mod observe;
pub(crate) mod plan;
pub(crate) mod probers;
pub(crate) mod start;
mod tasks;
#[cfg(test)]
mod tests;
pub(crate) mod view;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use apply::Outcome;
pub(crate) use context::Context;
use desired::{Desired, Origin, Stop};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use keelson_api::{events::EventType, object::ObjectKey};
use keelson_runtime_shim::runtime::{ContainerId, SandboxId};
use knowledge::{Failure, Knowledge, Starting, Stopping};
use plan::{Action, Policy, Stopped};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use view::Observed;

use crate::{
    probe::{Kind, Verdict},
    status::{
        self, StatusInput, conditions,
        writer::{Target, Wanted, Writer},
    },
};

/// How many notes of probes and hooks may wait.
const NOTES: usize = 64;
/// How often a worker looks again although nothing was heard, in case an event was lost.
const RESYNC: Duration = Duration::from_secs(60);

/// What a task of the pod tells its worker while it runs.
#[derive(Debug)]
pub(crate) enum Note {
    /// A container's process runs, its postStart hook is next.
    PostStart {
        /// Its name.
        container: String,
    },
    /// A probe changed its mind.
    Probe {
        /// Of which container.
        id: ContainerId,
        /// Which probe.
        kind: Kind,
        /// To what.
        verdict: Verdict,
    },
}

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Nothing of the pod is left.
    Done,
    /// The agent stops.
    Shutdown,
}

/// A running worker, as its owner holds it.
pub(crate) struct Handle {
    /// What the worker is to bring about.
    pub(crate) desired: watch::Sender<Desired>,
    /// The runtime said that something of the pod changed.
    pub(crate) changed: Arc<Notify>,
    /// The object that the pod's status goes to.
    pub(crate) target: watch::Sender<Option<Target>>,
}

/// The worker of one pod.
pub(crate) struct Worker {
    context: Arc<Context>,
    uid: String,
    desired: watch::Receiver<Desired>,
    changed: Arc<Notify>,
    observer: observe::Observer,
    observed: Observed,
    knowledge: Knowledge,
    mount_failure: Option<Failure>,
    /// What the volumes were last made from.
    shown: Option<Shown>,
    probers: probers::Probers,
    tasks: JoinSet<Outcome>,
    /// Calls off what is being started.
    starts: CancellationToken,
    notes: (mpsc::Sender<Note>, mpsc::Receiver<Note>),
    status: Option<Arc<PodStatus>>,
    wanted: watch::Sender<Wanted>,
    written: watch::Receiver<u64>,
    writer: Option<tokio::task::JoinHandle<()>>,
    born: Instant,
    ran: bool,
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(writer) = &self.writer {
            writer.abort();
        }
    }
}

impl Worker {
    /// A worker for `desired`, which already has `sandboxes`, and the handle to it.
    pub(crate) fn new(
        context: Arc<Context>,
        desired: Desired,
        sandboxes: Vec<SandboxId>,
        target: Option<Target>,
    ) -> (Self, Handle) {
        let uid = desired.pod.metadata.uid.clone().unwrap_or_default();
        let key = ObjectKey::of(&desired.pod.metadata);
        let origin = desired.origin;
        let (desired_sender, desired) = watch::channel(desired);
        let (target_sender, target) = watch::channel(target);
        let (wanted, wanted_receiver) = watch::channel(Wanted::default());
        let (written_sender, written) = watch::channel(0);
        let writer = match (&context.client, origin) {
            (Some(client), Origin::Api | Origin::Static) => Some(tokio::spawn(
                Writer {
                    client: client.clone(),
                    key,
                    target,
                    wanted: wanted_receiver,
                    written: written_sender,
                    metrics: context.metrics.clone(),
                }
                .run(),
            )),
            _ => None,
        };
        let changed = Arc::new(Notify::new());
        let worker = Self {
            starts: CancellationToken::new(),
            context,
            uid,
            desired,
            changed: Arc::clone(&changed),
            observer: observe::Observer::new(sandboxes),
            observed: Observed::default(),
            knowledge: Knowledge::default(),
            mount_failure: None,
            shown: None,
            probers: probers::Probers::default(),
            tasks: JoinSet::new(),
            notes: mpsc::channel(NOTES),
            status: None,
            wanted,
            written,
            writer,
            born: Instant::now(),
            ran: false,
        };
        (worker, Handle { desired: desired_sender, changed, target: target_sender })
    }

    /// Tells it of sandboxes that its pod has already.
    pub(crate) fn adopt(&mut self, sandboxes: impl IntoIterator<Item = SandboxId>) {
        for sandbox in sandboxes {
            self.observer.add(sandbox);
        }
    }

    /// Works until the pod is gone or the agent stops.
    pub(crate) async fn run(mut self) -> Ended {
        let mut look = true;
        loop {
            let begun = Instant::now();
            if look {
                look = !self.look().await;
            }
            let wake = if look {
                // nothing is decided on what could not be seen
                backoff::after(Timestamp::now(), Duration::from_secs(1))
            } else {
                match self.step().await {
                    Step::Finished => return Ended::Done,
                    Step::Wait(wake) => wake,
                }
            };
            self.context.metrics.worker_step("sync", begun.elapsed());
            let sleep = backoff::until(Timestamp::now(), wake).min(RESYNC);
            let shutdown = self.context.shutdown.clone();
            tokio::select! {
                () = shutdown.cancelled() => return Ended::Shutdown,
                Some(outcome) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    match outcome {
                        Ok(outcome) => self.take(outcome),
                        // a task's panic is the worker's: its owner starts a new one, which looks
                        // at what is there
                        Err(error) => std::panic::resume_unwind(error.into_panic()),
                    }
                    look = true;
                }
                changed = self.desired.changed() => if changed.is_err() { return Ended::Shutdown },
                () = self.changed.notified() => look = true,
                Some(note) = self.notes.1.recv() => self.hear(note),
                written = self.written.changed(), if self.writer.is_some() => {
                    if written.is_err() { self.writer = None }
                }
                () = tokio::time::sleep(sleep) => look |= sleep == RESYNC,
            }
        }
    }

    /// Looks at what the runtime has; whether that could be done.
    async fn look(&mut self) -> bool {
        match self.observer.observe(&self.context).await {
            Ok(observed) => {
                self.observed = observed;
                true
            }
            Err(error) => {
                tracing::warn!(uid = self.uid, %error, "runtime not observed, trying again");
                false
            }
        }
    }

    fn hear(&mut self, note: Note) {
        match note {
            Note::PostStart { container } => {
                // the hook may have ended before this was heard
                if let Some(starting) = self.knowledge.starting.get_mut(&container) {
                    *starting = Starting::PostStart;
                }
            }
            Note::Probe { id, kind, verdict } => {
                *self.knowledge.probes.entry(id).or_default().get_mut(kind) = verdict;
            }
        }
    }

    /// What is asked for, with the status as this worker knows it.
    fn effective(&self) -> Desired {
        let mut desired = self.desired.borrow().clone();
        if let Some(status) = &self.status {
            let mut pod = Pod::clone(&desired.pod);
            let foreign = pod.status.take().and_then(|status| status.conditions);
            let mut status = PodStatus::clone(status);
            status.conditions = Some(conditions::with_foreign(
                status.conditions.unwrap_or_default(),
                foreign.unwrap_or_default(),
                desired.origin == Origin::Static,
            ));
            pod.status = Some(status);
            desired.pod = Arc::new(pod);
        }
        desired
    }

    async fn step(&mut self) -> Step {
        self.desired.mark_unchanged();
        let now = Timestamp::now();
        let desired = self.effective();
        self.knowledge.volumes_outdated =
            self.shown.as_ref().is_some_and(|before| *before != shown(&desired.pod));
        let stopped = plan::stopped(&desired, &self.observed, now);
        if stopped != Stopped::No {
            let grace = desired.grace();
            self.knowledge.stopping = Some(Stopping::asked(self.knowledge.stopping, grace, now));
            self.starts.cancel();
        }
        self.probers.sync(
            &probers::Surroundings {
                context: &self.context,
                pod: &desired.pod,
                notes: &self.notes.0,
                stopping: stopped != Stopped::No,
            },
            &self.observed,
            &mut self.knowledge,
        );
        let desired = self.publish(desired, stopped, now);
        let policy = Policy { longest_back_off: self.context.config.max_container_restart_period };
        let plan = plan::plan(&desired, &self.observed, &self.knowledge, policy, now);
        for action in plan.actions {
            if action == Action::Finish {
                self.finish(&desired).await;
                return Step::Finished;
            }
            self.begin(&desired, action);
        }
        Step::Wait(plan.wake.unwrap_or_else(|| backoff::after(now, RESYNC)))
    }

    /// Computes the status, writes it if it changed, and gives back what is asked for with it.
    fn publish(&mut self, mut desired: Desired, stopped: Stopped, now: Timestamp) -> Desired {
        let removing = stopped == Stopped::Leaves && self.knowledge.final_status_written;
        if !removing {
            let status = status::pod_status(&StatusInput {
                pod: &desired.pod,
                observed: &self.observed,
                knowledge: &self.knowledge,
                stopping: stopped != Stopped::No,
                stop: desired.stop.as_ref(),
                past_deadline: plan::past_deadline(&desired, now),
                is_static: desired.origin == Origin::Static,
                host_ips: &self.context.config.node_ips,
                runtime_name: &self.context.runtime_name,
                longest_back_off: self.context.config.max_container_restart_period,
                now,
            });
            let before = desired.pod.status.as_ref();
            if self.status.is_none() || before != Some(&status) {
                self.announce(&desired.pod, before, &status);
                let status = Arc::new(status);
                self.status = Some(Arc::clone(&status));
                self.wanted.send_modify(|wanted| {
                    wanted.number += 1;
                    wanted.status = Some(Arc::clone(&status));
                });
                let mut pod = Pod::clone(&desired.pod);
                pod.status = Some(PodStatus::clone(&status));
                desired.pod = Arc::new(pod);
            }
        }
        self.context.directory.put(
            &self.uid,
            Arc::clone(&desired.pod),
            desired.origin,
            self.observed.to_runtime_pod(),
        );
        let running =
            self.observed.containers.iter().any(|status| {
                status.state == keelson_runtime_shim::runtime::ContainerState::Running
            });
        let nobody_reads = desired.origin != Origin::Api
            || desired.stop == Some(Stop::Gone)
            || self.writer.is_none();
        let quiet = !running && self.knowledge.starting.is_empty();
        let written = *self.written.borrow() == self.wanted.borrow().number;
        self.knowledge.final_status_written |=
            stopped == Stopped::Leaves && quiet && (nobody_reads || written);
        desired
    }

    /// Events and metrics that go with a change of the status.
    fn announce(&mut self, pod: &Pod, before: Option<&PodStatus>, now: &PodStatus) {
        let context = &self.context;
        let phase = now.phase.as_deref();
        if !self.ran && phase == Some("Running") {
            self.ran = true;
            let was_running = before.is_some_and(|old| old.phase.as_deref() == Some("Running"));
            if !was_running {
                context.metrics.pod_ran(self.born.elapsed());
            }
        }
        let deadline = |status: &PodStatus| status.reason.as_deref() == Some("DeadlineExceeded");
        if deadline(now) && !before.is_some_and(deadline) {
            let message = now.message.clone().unwrap_or_default();
            context.pod_event(pod, EventType::Normal, "DeadlineExceeded", message);
        }
        for (container, reason) in status::newly_waiting(before, now) {
            let event = |kind, reason: &str, message: String| {
                context.container_event(pod, container, kind, reason, message);
            };
            match reason {
                "CrashLoopBackOff" => event(
                    EventType::Warning,
                    "BackOff",
                    format!(
                        "Back-off restarting failed container {container} in pod {}",
                        view::format_pod(pod)
                    ),
                ),
                "ImagePullBackOff" => {
                    let image = view::container(pod, container)
                        .and_then(|(_, container)| container.image.clone())
                        .unwrap_or_default();
                    event(
                        EventType::Normal,
                        "BackOff",
                        format!("Back-off pulling image \"{image}\""),
                    );
                    event(EventType::Warning, "Failed", "Error: ImagePullBackOff".to_owned());
                }
                _ => {}
            }
        }
    }
}

/// A pod's labels and annotations, which its volumes can show.
type Shown = (Option<BTreeMap<String, String>>, Option<BTreeMap<String, String>>);

fn shown(pod: &Pod) -> Shown {
    (pod.metadata.labels.clone(), pod.metadata.annotations.clone())
}

enum Step {
    Finished,
    Wait(Timestamp),
}
