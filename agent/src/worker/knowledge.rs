//! What a pod's worker knows beside what the runtime can be asked: the work that is under way, what
//! failed last, and what the probes say.
//!
//! All of it may be lost: a new worker starts with nothing and finds its way again.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;
use keelson_runtime_shim::runtime::{ContainerId, SandboxId};

use super::backoff;
use crate::{probe::ProbeState, volumes::MountedVolumes};

/// Something that failed and is tried again later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// What a person should know.
    pub(crate) message: String,
    /// When it failed.
    pub(crate) at: Timestamp,
    /// How often in a row.
    pub(crate) times: u32,
    /// When it may be tried again.
    pub(crate) retry_at: Timestamp,
}

impl Failure {
    /// The failure after `previous`, to be tried again after the setup's wait.
    pub(crate) fn after(previous: Option<&Failure>, message: String, now: Timestamp) -> Self {
        let times = previous.map_or(1, |previous| previous.times.saturating_add(1));
        Self { message, at: now, times, retry_at: backoff::after(now, backoff::setup_wait(times)) }
    }
}

/// How far a pod's volumes are.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) enum Volumes {
    /// Not asked for yet by this worker.
    #[default]
    NotMounted,
    /// Being made ready.
    Mounting,
    /// The last try failed.
    Failed(Failure),
    /// All there.
    Mounted(MountedVolumes),
    /// Being removed.
    Unmounting,
    /// The last try to remove them failed.
    UnmountFailed(Failure),
    /// Removed for good.
    Unmounted,
}

/// Why a container could not be started, in the words of its waiting state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StartFailure {
    /// `ErrImagePull`, `CreateContainerError`, …
    pub(crate) reason: &'static str,
    /// When and how often, and its message.
    pub(crate) failure: Failure,
    /// The hash of the container's definition that it happened to.
    pub(crate) hash: String,
}

impl StartFailure {
    /// Whether the registry's answer is what is waited for.
    pub(crate) fn is_pull(&self) -> bool {
        matches!(self.reason, "ErrImagePull" | "RegistryUnavailable")
    }
}

/// A container that is being stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Killing {
    /// When it will be killed at the latest.
    pub(crate) deadline: Timestamp,
}

/// How far a container's start is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Starting {
    /// The image is looked for or pulled, the container is made.
    Preparing,
    /// Its process runs, its postStart hook has not ended.
    PostStart,
}

/// All that a worker knows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Knowledge {
    /// The pod's volumes.
    pub(crate) volumes: Volumes,
    /// What the volumes show of the pod (its labels and annotations) has changed.
    pub(crate) volumes_outdated: bool,
    /// The volumes are being brought up to date.
    pub(crate) refreshing_volumes: bool,
    /// A sandbox is being made.
    pub(crate) creating_sandbox: bool,
    /// Why the last sandbox could not be made.
    pub(crate) sandbox_failure: Option<Failure>,
    /// Sandboxes that are being stopped or removed.
    pub(crate) sandbox_work: BTreeSet<SandboxId>,
    /// Sandboxes that were stopped, so that a sandbox that lost its shim is stopped once.
    pub(crate) stopped_sandboxes: BTreeSet<SandboxId>,
    /// Containers being started, by name.
    pub(crate) starting: BTreeMap<String, Starting>,
    /// Why containers could not be started, by name.
    pub(crate) start_failures: BTreeMap<String, StartFailure>,
    /// Containers being stopped.
    pub(crate) killing: BTreeMap<ContainerId, Killing>,
    /// Containers being removed.
    pub(crate) removing: BTreeSet<ContainerId>,
    /// What the probes of running containers say.
    pub(crate) probes: BTreeMap<ContainerId, ProbeState>,
    /// Since when the pod is being stopped, and how long it was given.
    pub(crate) stopping: Option<Stopping>,
    /// The pod's final status is known and written; what is left may be removed.
    pub(crate) final_status_written: bool,
    /// How far the deletion of the pod's object is.
    pub(crate) deletion: Deletion,
}

/// How far the deletion of a pod's object is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Deletion {
    /// Not asked for.
    #[default]
    NotYet,
    /// Asked for.
    UnderWay,
    /// The API server has taken the object away, or had it no more.
    Done,
}

/// How long a pod that stops still has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stopping {
    /// The grace period asked for last.
    pub(crate) grace: Duration,
    /// When all that still runs is killed.
    pub(crate) deadline: Timestamp,
}

impl Stopping {
    /// The state after the pod was asked, perhaps again, to stop within `grace`: a shorter grace
    /// counts from now, a longer one changes nothing.
    pub(crate) fn asked(before: Option<Self>, grace: Duration, now: Timestamp) -> Self {
        let asked = Self { grace, deadline: backoff::after(now, grace) };
        match before {
            Some(before) if grace >= before.grace => before,
            Some(before) => Self { grace, deadline: asked.deadline.min(before.deadline) },
            None => asked,
        }
    }
}
