use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static DEPLOYMENT: Strategy = Strategy::PLAIN;

/// The kind's rules.
pub(crate) static REPLICA_SET: Strategy = Strategy::PLAIN;
