use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static ROLE: Strategy = Strategy::PLAIN;

/// The kind's rules.
pub(crate) static CLUSTER_ROLE: Strategy = Strategy::PLAIN;

/// The kind's rules.
pub(crate) static BINDING: Strategy = Strategy::PLAIN;
