use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static SERVICE: Strategy = Strategy::PLAIN;
