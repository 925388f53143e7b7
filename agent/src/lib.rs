//! The kubelet's work: desired pods in, running pods and their status out.
//!
//! [`Agent::run`] is the whole of it. Pods come from `sources` (a folder of manifests, the API); each
//! has a `worker`, whose decisions are one pure function; `container_config` turns a specification
//! into what the runtime is asked for; `probe` tries the containers; `status` is computed anew each
//! time and written to the API; `node` keeps the Node object and its lease; `logs` rotates.

pub(crate) mod admission;
mod agent;
mod classes;
mod config;
pub(crate) mod container_config;
pub(crate) mod directory;
pub(crate) mod dispatcher;
pub mod environment;
pub(crate) mod images;
pub(crate) mod labels;
pub(crate) mod leftover;
pub(crate) mod logs;
pub(crate) mod main_tasks;
pub(crate) mod metrics;
pub(crate) mod node;
pub mod pods;
pub(crate) mod probe;
pub(crate) mod pull_secrets;
pub(crate) mod pulse;
pub mod server;
pub(crate) mod sources;
pub mod stats;
pub(crate) mod status;
pub mod volumes;
pub(crate) mod worker;

pub use agent::{Agent, AgentError, AgentParts, allocatable};
pub use config::{AgentConfig, NodeConfig};
pub use pulse::Pulse;
