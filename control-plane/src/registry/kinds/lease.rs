use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static LEASE: Strategy = Strategy::PLAIN;
