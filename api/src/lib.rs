//! What all parts of Keelson share, and nothing that only one of them needs.
//!
//! * [`quantity`]: amounts of CPU, memory and the like, as Kubernetes writes them.
//! * [`selector`]: label and field selectors.
//! * [`object`]: keys, owner references and object references.
//! * [`yaml`]: manifests from outside, read within bounds.
//! * [`events`]: Kubernetes events, recorded without ever holding up the caller.
//! * [`backoff`]: how long to wait before the next try.
//! * [`hash`]: a hash that is the same in every release.
//! * [`client_error`]: what to say of an error of the client.
//! * [`metrics`] and [`logging`]: how each part shows what it does.
//!
//! The Kubernetes types themselves come from `k8s-openapi`, the client from `kube`. This crate
//! knows nothing of its siblings.

#![forbid(unsafe_code)]

pub mod backoff;
pub mod client_error;
pub mod events;
pub mod hash;
pub mod logging;
pub mod metrics;
pub mod object;
pub mod quantity;
pub mod selector;
pub mod yaml;

/// The Kubernetes version whose API this is, as `/version` and a node's status show it.
pub const KUBERNETES_VERSION: &str = "v1.36.0";
