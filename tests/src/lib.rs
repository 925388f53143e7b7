//! Black-box tests: the real binary on the real kernel, used as a user uses it.
//!
//! [`Machine`] is a machine of the test's own: a network namespace with an address and a default
//! route, a neighbour in another namespace, a data folder and a cgroup. [`Cluster`] is
//! `keelson up` on it, with kubectl. Whatever a test does, dropping them stops and removes
//! everything; [`Leftovers`] says what was not.

mod cluster;
mod image;
pub mod inside;
mod leftovers;
mod machine;
mod wait;

pub use cluster::{Cluster, DEADLINE, pod_is_ready};
pub use image::write_busybox_archive;
pub use leftovers::Leftovers;
pub use machine::{Machine, NEIGHBOUR_ADDRESS, NODE_ADDRESS, stdout_of};
pub use wait::{wait_for, wait_until};
