//! A thin control plane that speaks the Kubernetes API.

pub mod admission;
pub mod cache;
pub mod auth;
pub mod controllers;
pub mod informers;
pub mod lookup;
pub mod pki;
pub mod registry;
pub mod scheduler;
pub mod status;
pub mod store;
pub mod table;
