//! A thin control plane that speaks the Kubernetes API.

mod metrics;
mod schema;

pub mod admission;
pub mod auth;
pub mod cache;
pub mod controllers;
pub mod discovery;
pub mod dns;
pub mod informers;
pub mod lookup;
pub mod openapi;
pub mod patch;
pub mod pki;
pub mod registry;
pub mod scheduler;
pub mod server;
pub mod status;
pub mod store;
pub mod table;
