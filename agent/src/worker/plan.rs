//! What a pod needs next: the one function that decides, for every pod from every source.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Container;
use keelson_runtime_shim::runtime::{
    ContainerId, ContainerState, ContainerStatus, SandboxId, SandboxState,
};

use super::{
    backoff::{self, Restart},
    desired::{Desired, Origin, Stop},
    knowledge::{Deletion, Killing, Knowledge, Volumes},
    view::{self, Observed, Role},
};
use crate::{labels, probe::Verdict, status};

/// One thing to do. Each is idempotent, and none is repeated while it is under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make the volumes ready.
    MountVolumes,
    /// Bring the volumes of a running pod up to date.
    RefreshVolumes,
    /// Make a sandbox.
    CreateSandbox {
        /// How many there were before.
        attempt: u32,
    },
    /// Stop a sandbox and all in it.
    StopSandbox(SandboxId),
    /// Remove a sandbox with its containers.
    RemoveSandbox(SandboxId),
    /// Get the image, make the container, let it go, run its postStart hook.
    StartContainer {
        /// Its name.
        name: String,
        /// The restart count it gets.
        attempt: u32,
        /// Where.
        sandbox: SandboxId,
        /// What the restart after this one has to wait.
        back_off: Option<Duration>,
    },
    /// Run the preStop hook, ask it to stop, kill it when the grace is over.
    KillContainer {
        /// Which.
        id: ContainerId,
        /// Its name.
        name: String,
        /// How long it may take, preStop included.
        grace: Duration,
        /// Why, for the event.
        why: KillReason,
    },
    /// Remove an ended container.
    RemoveContainer(ContainerId),
    /// Remove the volumes.
    UnmountVolumes,
    /// Delete the pod's object for good.
    DeletePod,
    /// Nothing of the pod is left: the worker ends.
    Finish,
}

/// Why a container is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KillReason {
    /// The pod stops.
    PodStops,
    /// Its definition changed.
    Changed,
    /// Its liveness probe failed.
    Liveness,
    /// Its startup probe failed.
    Startup,
    /// Its postStart hook failed.
    PostStart,
    /// The pod's sandbox is gone.
    SandboxGone,
}

/// What to do now, and when to look again at the latest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// What to do; all may run at the same time.
    pub(crate) actions: Vec<Action>,
    /// When time alone may change the plan.
    pub(crate) wake: Option<Timestamp>,
}

impl Plan {
    fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn wake_at(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }
}

/// What of the agent's configuration the plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    /// The longest wait of `CrashLoopBackOff`.
    pub(crate) longest_back_off: Duration,
}

/// Whether the pod must stop now, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// It goes on.
    No,
    /// It ended by itself, or ran too long, or was refused; its object stays.
    Ended,
    /// It is being deleted, or nobody asks for it.
    Leaves,
}

/// Whether the pod must stop.
pub(crate) fn stopped(desired: &Desired, observed: &Observed, now: Timestamp) -> Stopped {
    if desired.leaves() {
        Stopped::Leaves
    } else if desired.stop.is_some()
        || view::is_terminal(view::phase(&desired.pod))
        || past_deadline(desired, now)
        || status::phase::has_ended(&desired.pod, observed)
    {
        Stopped::Ended
    } else {
        Stopped::No
    }
}

/// When `activeDeadlineSeconds` is over, counted from `status.startTime`.
pub(crate) fn active_deadline(desired: &Desired) -> Option<Timestamp> {
    let seconds = view::spec(&desired.pod).active_deadline_seconds?;
    let start = desired.pod.status.as_ref()?.start_time.as_ref()?.0;
    Some(backoff::after(start, Duration::from_secs(u64::try_from(seconds).ok()?)))
}

/// Whether the pod ran longer than it may.
pub(crate) fn past_deadline(desired: &Desired, now: Timestamp) -> bool {
    active_deadline(desired).is_some_and(|deadline| deadline <= now)
}

/// Decides what `desired` needs next, given what is there and what is under way.
pub(crate) fn plan(
    desired: &Desired,
    observed: &Observed,
    knowledge: &Knowledge,
    policy: Policy,
    now: Timestamp,
) -> Plan {
    let mut plan = Plan::default();
    match stopped(desired, observed, now) {
        Stopped::No => run(&mut plan, desired, observed, knowledge, policy, now),
        stopped => stop(&mut plan, desired, observed, knowledge, stopped, now),
    }
    plan
}

/// The way down: containers, sandbox, volumes, object.
fn stop(
    plan: &mut Plan,
    desired: &Desired,
    observed: &Observed,
    knowledge: &Knowledge,
    stopped: Stopped,
    now: Timestamp,
) {
    // starts that are under way are called off by the worker and end soon
    if !knowledge.starting.is_empty() || knowledge.creating_sandbox {
        return;
    }
    let deadline = knowledge
        .stopping
        .map_or_else(|| backoff::after(now, desired.grace()), |stopping| stopping.deadline);
    if kill_all(plan, desired, observed, knowledge, deadline, now) {
        return;
    }
    if !knowledge.sandbox_work.is_empty() || !knowledge.removing.is_empty() {
        return;
    }
    let unstopped: Vec<_> = observed
        .sandboxes
        .iter()
        .filter(|sandbox| !knowledge.stopped_sandboxes.contains(&sandbox.id))
        .collect();
    if !unstopped.is_empty() {
        for sandbox in unstopped {
            plan.act(Action::StopSandbox(sandbox.id.clone()));
        }
        return;
    }
    match &knowledge.volumes {
        Volumes::Mounting | Volumes::Unmounting => return,
        Volumes::UnmountFailed(failure) if failure.retry_at > now => {
            plan.wake_at(failure.retry_at);
            return;
        }
        Volumes::Unmounted => {}
        Volumes::NotMounted
        | Volumes::Mounted(_)
        | Volumes::Failed(_)
        | Volumes::UnmountFailed(_) => {
            plan.act(Action::UnmountVolumes);
            return;
        }
    }
    if stopped != Stopped::Leaves || !knowledge.final_status_written {
        return;
    }
    if !observed.sandboxes.is_empty() {
        for sandbox in &observed.sandboxes {
            plan.act(Action::RemoveSandbox(sandbox.id.clone()));
        }
        return;
    }
    let object_left = desired.origin == Origin::Api && desired.stop != Some(Stop::Gone);
    match knowledge.deletion {
        Deletion::NotYet if object_left => plan.act(Action::DeletePod),
        Deletion::UnderWay => {}
        Deletion::NotYet | Deletion::Done => plan.act(Action::Finish),
    }
}

/// Stops what still runs, sidecars last and in reverse (KEP-753). Whether something still runs.
fn kill_all(
    plan: &mut Plan,
    desired: &Desired,
    observed: &Observed,
    knowledge: &Knowledge,
    deadline: Timestamp,
    now: Timestamp,
) -> bool {
    let order = |status: &ContainerStatus| {
        view::init_containers(&desired.pod)
            .iter()
            .position(|init| init.name == status.name && view::is_sidecar(init))
            .map_or(usize::MAX, |position| position)
    };
    let alive: Vec<_> = observed
        .containers
        .iter()
        .filter(|status| status.state == ContainerState::Running)
        .collect();
    let turn = alive.iter().map(|status| order(status)).max().unwrap_or(usize::MAX);
    for status in &alive {
        if order(status) == turn || deadline <= now {
            kill(plan, knowledge, status, deadline, now, KillReason::PodStops);
        } else {
            plan.wake_at(deadline);
        }
    }
    // a container that was made and never let go has nothing to stop
    !alive.is_empty() || !knowledge.killing.is_empty()
}

fn kill(
    plan: &mut Plan,
    knowledge: &Knowledge,
    status: &ContainerStatus,
    deadline: Timestamp,
    now: Timestamp,
    why: KillReason,
) {
    let soon_enough = |killing: &Killing| {
        killing.deadline <= backoff::after(deadline, Duration::from_millis(500))
    };
    if knowledge.killing.get(&status.id).is_some_and(soon_enough) {
        return;
    }
    plan.act(Action::KillContainer {
        id: status.id.clone(),
        name: status.name.clone(),
        grace: backoff::until(now, deadline),
        why,
    });
}

/// The way up and the life: volumes, sandbox, init containers in order, containers.
fn run(
    plan: &mut Plan,
    desired: &Desired,
    observed: &Observed,
    knowledge: &Knowledge,
    policy: Policy,
    now: Timestamp,
) {
    if let Some(deadline) = active_deadline(desired) {
        plan.wake_at(deadline);
    }
    collect_garbage(plan, observed, knowledge);
    let volumes_ready = match &knowledge.volumes {
        Volumes::Mounted(_) => {
            if knowledge.volumes_outdated && !knowledge.refreshing_volumes {
                plan.act(Action::RefreshVolumes);
            }
            true
        }
        Volumes::NotMounted => {
            plan.act(Action::MountVolumes);
            false
        }
        Volumes::Failed(failure) if failure.retry_at <= now => {
            plan.act(Action::MountVolumes);
            false
        }
        Volumes::Failed(failure) => {
            plan.wake_at(failure.retry_at);
            false
        }
        Volumes::Mounting
        | Volumes::Unmounting
        | Volumes::UnmountFailed(_)
        | Volumes::Unmounted => false,
    };
    let Some(sandbox) = observed.ready() else {
        if volumes_ready {
            make_sandbox(plan, observed, knowledge, now);
        }
        return;
    };
    let mut starts = Starts {
        plan,
        desired,
        observed,
        knowledge,
        policy,
        sandbox: &sandbox.id,
        may_start: volumes_ready,
        now,
    };
    if starts.init() {
        for container in &view::spec(&desired.pod).containers {
            starts.main(container);
        }
    }
}

/// Makes a new sandbox after the old one is stopped.
fn make_sandbox(plan: &mut Plan, observed: &Observed, knowledge: &Knowledge, now: Timestamp) {
    if knowledge.creating_sandbox {
        return;
    }
    let mut waiting = !knowledge.sandbox_work.is_empty();
    for sandbox in &observed.sandboxes {
        if !knowledge.stopped_sandboxes.contains(&sandbox.id) {
            waiting = true;
            if !knowledge.sandbox_work.contains(&sandbox.id) {
                plan.act(Action::StopSandbox(sandbox.id.clone()));
            }
        }
    }
    if waiting {
        return;
    }
    match &knowledge.sandbox_failure {
        Some(failure) if failure.retry_at > now => plan.wake_at(failure.retry_at),
        _ => {
            let attempt = observed.current().map_or(0, |sandbox| sandbox.config.attempt + 1);
            plan.act(Action::CreateSandbox { attempt });
        }
    }
}

/// Keeps the newest attempt of each container and one ended one before it, as the kubelet does, so
/// that `lastState` and `logs --previous` have what they show; removes what is older, and old
/// sandboxes with nothing left in them.
fn collect_garbage(plan: &mut Plan, observed: &Observed, knowledge: &Knowledge) {
    let mut names: Vec<&str> =
        observed.containers.iter().map(|status| status.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let mut kept: Vec<&ContainerStatus> = Vec::new();
    for name in names {
        let mut ended_kept = false;
        for (position, status) in observed.attempts(name).into_iter().enumerate() {
            let ended = view::ended(status);
            if position == 0 || (ended && !ended_kept) {
                kept.push(status);
                ended_kept |= position > 0;
            } else if ended && !knowledge.removing.contains(&status.id) {
                plan.act(Action::RemoveContainer(status.id.clone()));
            }
        }
    }
    for sandbox in observed.sandboxes.iter().skip(1) {
        let empty = !kept.iter().any(|status| status.sandbox == sandbox.id);
        if empty
            && sandbox.state == SandboxState::NotReady
            && !knowledge.sandbox_work.contains(&sandbox.id)
        {
            plan.act(Action::RemoveSandbox(sandbox.id.clone()));
        }
    }
}

/// Decides for one container after the other whether it is started, stopped or left alone.
struct Starts<'a> {
    plan: &'a mut Plan,
    desired: &'a Desired,
    observed: &'a Observed,
    knowledge: &'a Knowledge,
    policy: Policy,
    sandbox: &'a SandboxId,
    may_start: bool,
    now: Timestamp,
}

impl Starts<'_> {
    /// Whether all init containers are done and all sidecars started.
    fn init(&mut self) -> bool {
        let init = view::init_containers(&self.desired.pod);
        let mains_made = view::spec(&self.desired.pod)
            .containers
            .iter()
            .any(|main| self.observed.latest_in(self.sandbox, &main.name).is_some());
        for (position, container) in init.iter().enumerate() {
            let latest = self.observed.latest_in(self.sandbox, &container.name);
            if view::is_sidecar(container) {
                let started = self.sidecar(container, latest);
                if !started && !mains_made {
                    return false;
                }
                continue;
            }
            // one that was made later proves that this one was done, even if nothing of it is left
            let later_made = init[position + 1..]
                .iter()
                .any(|later| self.observed.latest_in(self.sandbox, &later.name).is_some());
            if mains_made || later_made {
                continue;
            }
            match latest {
                Some(status) if view::ended(status) && view::exit_code(status) == 0 => {}
                Some(status) if status.state == ContainerState::Running => return false,
                _ => {
                    self.start(Role::Init, container);
                    return false;
                }
            }
        }
        true
    }

    /// Whether the sidecar has started, so that what follows it may start.
    fn sidecar(&mut self, container: &Container, latest: Option<&ContainerStatus>) -> bool {
        match latest {
            Some(status) if status.state == ContainerState::Running => {
                self.keep_alive(Role::Sidecar, container, status);
                status::container::is_started(container, status, self.knowledge)
            }
            _ => {
                self.start(Role::Sidecar, container);
                false
            }
        }
    }

    fn main(&mut self, container: &Container) {
        match self.observed.latest(&container.name) {
            Some(status) if status.state == ContainerState::Running => {
                self.keep_alive(Role::Main, container, status);
            }
            Some(status)
                if view::ended(status)
                    && !view::restarts(
                        &self.desired.pod,
                        Role::Main,
                        container,
                        view::exit_code(status),
                    ) => {}
            _ => self.start(Role::Main, container),
        }
    }

    /// Stops a running container that is outdated or that its probes gave up.
    fn keep_alive(&mut self, role: Role, container: &Container, status: &ContainerStatus) {
        if status.sandbox != *self.sandbox {
            kill(self.plan, self.knowledge, status, self.now, self.now, KillReason::SandboxGone);
            return;
        }
        let probes = self.knowledge.probes.get(&status.id);
        let failed = |verdict: Option<Verdict>| verdict == Some(Verdict::Failure);
        let (why, probe) = if !labels::is_current(status, container) {
            (KillReason::Changed, None)
        } else if failed(probes.map(|probes| probes.liveness)) {
            (KillReason::Liveness, container.liveness_probe.as_ref())
        } else if failed(probes.map(|probes| probes.startup)) {
            (KillReason::Startup, container.startup_probe.as_ref())
        } else {
            return;
        };
        if role == Role::Init || self.knowledge.killing.contains_key(&status.id) {
            return;
        }
        let grace = probe
            .and_then(|probe| probe.termination_grace_period_seconds)
            .or(view::spec(&self.desired.pod).termination_grace_period_seconds)
            .unwrap_or(30);
        let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        kill(self.plan, self.knowledge, status, backoff::after(self.now, grace), self.now, why);
    }

    /// Starts a container that is not there or has ended, when its time has come.
    fn start(&mut self, role: Role, container: &Container) {
        if self.knowledge.starting.contains_key(&container.name) {
            return;
        }
        let last = self.observed.latest(&container.name);
        if let Some(status) = last
            && !view::ended(status)
        {
            // made, and never let go: its maker was killed in between; a fresh one takes its place
            if status.state == ContainerState::Created
                && !self.knowledge.removing.contains(&status.id)
            {
                self.plan.act(Action::RemoveContainer(status.id.clone()));
            }
            return;
        }
        let failure = self
            .knowledge
            .start_failures
            .get(&container.name)
            .filter(|failure| failure.hash == labels::container_hash(container));
        if let Some(failure) = failure
            && failure.failure.retry_at > self.now
        {
            self.plan.wake_at(failure.failure.retry_at);
            let shown = status::container::pull_failure_shown_until(failure);
            if shown > self.now {
                self.plan.wake_at(shown);
            }
            return;
        }
        // an init container that runs anew in a new sandbox has not crashed
        let again = last.filter(|status| role != Role::Init || status.sandbox == *self.sandbox);
        let back_off = match again {
            None => None,
            Some(status) => {
                match backoff::restart(status, container, self.policy.longest_back_off, self.now) {
                    Restart::Now(back_off) => back_off,
                    Restart::Later { at, .. } => {
                        self.plan.wake_at(at);
                        return;
                    }
                }
            }
        };
        if self.may_start {
            let attempt = status::container::next_attempt(&self.desired.pod, last, &container.name);
            self.plan.act(Action::StartContainer {
                name: container.name.clone(),
                attempt,
                sandbox: self.sandbox.clone(),
                back_off,
            });
        }
    }
}
