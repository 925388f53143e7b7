//! How pods become processes.
//!
//! The agent decides *what* a pod needs; this crate makes it so. Its face is one trait,
//! [`PodRuntime`], with the grain of the Kubernetes container runtime interface and types of its
//! own, and one backend:
//!
//! * `embedded`: nothing to install. Images come from a registry or a file into a
//!   content-addressed store (`images`), a root file system is an overlay of unpacked layers, the
//!   pod's network is a routed veth pair (`network`), and a small static program, the shim, holds
//!   each pod's containers so that they outlive the agent.
//!
//! ```text
//!   agent ──PodRuntime──► embedded ──unix socket──► shim (one a pod) ──► libcontainer helper
//!                            │                        owns stdio, log files, exit codes
//!                            ├── images   (layers, overlay)
//!                            └── network  (netns, veth, routes, masquerade)
//! ```
//!
//! The crate knows nothing of the agent, and of Kubernetes only what `keelson-api` says.

mod cgroup;
pub mod embedded;
pub mod images;
pub mod network;
pub mod runtime;
mod spec;

pub use embedded::{EmbeddedConfig, EmbeddedRuntime};
pub use runtime::PodRuntime;
