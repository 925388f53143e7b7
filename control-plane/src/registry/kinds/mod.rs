//! The rules of each kind: defaults, what the server resets, what is refused, field selectors.

pub(super) mod config;
pub(super) mod endpoints;
pub(super) mod event;
pub(super) mod lease;
pub(super) mod metadata;
pub(super) mod namespace;
pub(super) mod node;
pub(super) mod pod;
pub(super) mod priority_class;
pub(super) mod rbac;
mod rules;
pub(super) mod service;
pub(super) mod service_account;
pub(super) mod workload;
