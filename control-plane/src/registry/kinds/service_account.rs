//! Service accounts.

use crate::registry::Strategy;

/// Service accounts: nothing of their own.
pub(in crate::registry) static SERVICE_ACCOUNT: Strategy =
    Strategy { columns: &crate::table::SERVICE_ACCOUNT, ..Strategy::PLAIN };
