use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static SERVICE_ACCOUNT: Strategy = Strategy::PLAIN;
