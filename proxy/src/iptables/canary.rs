//! Notices when another program flushes or edits the rules.
//!
//! The kernel's old tables don't tell, so they are asked now and then; with iptables-nft the kernel
//! tells that somebody wrote, and not what. A chain that nothing goes through is gone
//! when somebody has flushed everything, which is quick to see. Edits are found by reading all
//! rules, which takes longer the more there are, and is done the more seldom the longer it takes.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{
    apply::read,
    base::CANARY,
    chain::Table,
    held::Held,
    program::{OwnPrograms, Programs},
};
use crate::{backend::BackendError, model::Family};

/// Reading all rules may take this part of the time.
const SHARE: u32 = 20;

/// Looks after the rules of one family.
#[derive(Clone, Debug)]
pub(crate) struct Canary {
    programs: Arc<Programs>,
    held: Arc<Mutex<Held>>,
    compare_at: Option<Instant>,
}

impl Canary {
    /// The tables that the rules are in.
    pub(crate) const TABLES: &'static [&'static str] = &["nat", "filter", "mangle"];

    pub(super) fn new(programs: Arc<Programs>, held: Arc<Mutex<Held>>) -> Self {
        Self { programs, held, compare_at: None }
    }

    /// Whether another program has changed the rules since they were written. Runs programs and
    /// waits for them: not for a thread that has other things to do.
    ///
    /// # Errors
    /// When they can't be run.
    pub(crate) fn changed(&mut self) -> Result<bool, BackendError> {
        let Some(version) = self.version() else { return Ok(false) };
        for table in Table::ALL {
            if !self.programs.has_chain(table, CANARY)? {
                return Ok(self.version() == Some(version));
            }
        }
        let begin = Instant::now();
        if self.compare_at.is_some_and(|at| begin < at) {
            return Ok(false);
        }
        let mut digest = read(&self.programs)?.digest();
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.version != version {
            // What was written meanwhile is not an edit of others. While Services change without
            // pause each reading would be overtaken like this: now the next write waits for one.
            digest = read(&self.programs)?.digest();
        }
        let changed = held.present.digest() != digest;
        self.compare_at = Some(begin + (begin.elapsed() * SHARE).max(Duration::from_millis(1)));
        Ok(changed)
    }

    /// Whether the kernel tells when somebody writes where these rules are.
    pub(crate) fn is_told_by_kernel(&self) -> bool {
        !self.programs.legacy
    }

    /// Which family's rules.
    pub(crate) fn family(&self) -> Family {
        self.programs.family
    }

    /// The programs that the proxy itself ran.
    pub(crate) fn own_programs(&self) -> OwnPrograms {
        self.programs.own.clone()
    }

    /// Until when nothing is looked at, since the last look took so long.
    pub(crate) fn not_before(&self) -> Option<Instant> {
        self.compare_at
    }

    /// Which state the rules are in; `None` before the first one.
    fn version(&self) -> Option<u64> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        Some(held.version).filter(|version| *version > 0 && !held.present.is_empty())
    }
}
