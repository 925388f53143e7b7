use crate::registry::Strategy;

/// The kind's rules.
pub(crate) static ENDPOINTS: Strategy = Strategy::PLAIN;

/// The kind's rules.
pub(crate) static ENDPOINT_SLICE: Strategy = Strategy::PLAIN;
