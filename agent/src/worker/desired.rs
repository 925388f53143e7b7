//! What is asked of a pod's worker.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Pod;

use super::view;

/// Where a pod came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// The API server.
    Api,
    /// A manifest on this machine: a static pod.
    Static,
    /// Nobody asks for it any more; only the runtime has it.
    Orphan,
}

/// Why a pod must stop although its object does not say so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Its object or its file is gone.
    Gone,
    /// The node never took it; it stays in the API as `Failed`.
    Rejected {
        /// The status's reason.
        reason: String,
        /// The status's message.
        message: String,
    },
}

/// What a worker is to bring about.
#[derive(Clone, Debug)]
pub(crate) struct Desired {
    /// The pod.
    pub(crate) pod: Arc<Pod>,
    /// Where it is from.
    pub(crate) origin: Origin,
    /// Set when it must stop.
    pub(crate) stop: Option<Stop>,
}

impl Desired {
    /// The pod is to vanish from this node, with all that it left.
    pub(crate) fn leaves(&self) -> bool {
        matches!(self.stop, Some(Stop::Gone)) || self.pod.metadata.deletion_timestamp.is_some()
    }

    /// How long the pod's containers may take to stop.
    pub(crate) fn grace(&self) -> Duration {
        let seconds = self
            .pod
            .metadata
            .deletion_grace_period_seconds
            .or(view::spec(&self.pod).termination_grace_period_seconds)
            .unwrap_or(30);
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    }
}
