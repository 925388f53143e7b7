use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static CORE: Strategy = Strategy::PLAIN;

/// The kind's rules.
pub(crate) static EVENTS: Strategy = Strategy::PLAIN;
