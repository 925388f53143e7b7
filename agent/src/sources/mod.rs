//! Where pods come from: manifests on this machine, and the API.
//!
//! ```text
//!   manifest folder ─► file (reads, checks) ─► static_pod (defaults, names) ─┐
//!                                                                           ├─► Change ─► agent
//!   API server ──────► api (watches this node's pods) ──────────────────────┘
//! ```
//!
//! Both only say what is wanted now. Which pods are taken is decided by the agent.

pub(crate) mod api;
pub(crate) mod defaults;
pub(crate) mod file;
pub(crate) mod folder_watch;
pub(crate) mod kept;
pub(crate) mod mirror;
pub(crate) mod static_pod;

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

/// What a source says.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// All static pods, in the order of their files.
    Static(Vec<Arc<Pod>>),
    /// All pods that the API has for this node.
    ApiAll(Vec<Arc<Pod>>),
    /// A pod in the API is new or changed.
    ApiPod(Arc<Pod>),
    /// A pod is no longer in the API; its last state.
    ApiGone(Arc<Pod>),
}
