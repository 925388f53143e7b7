use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static CONFIG_MAP: Strategy = Strategy::PLAIN;

/// The kind's rules.
pub(crate) static SECRET: Strategy = Strategy::PLAIN;
