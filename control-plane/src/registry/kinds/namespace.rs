use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static NAMESPACE: Strategy = Strategy::PLAIN;
