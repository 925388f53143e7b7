use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static PRIORITY_CLASS: Strategy = Strategy::PLAIN;
