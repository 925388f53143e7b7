//! The kubelet's work: desired pods in, running pods and their status out.

pub mod environment;
pub mod pods;
pub mod server;
pub mod stats;
pub mod volumes;
