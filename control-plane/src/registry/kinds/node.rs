use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static NODE: Strategy = Strategy::PLAIN;
