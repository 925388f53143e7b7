//! What a backend is: it holds the rules of one family and is told which parts to bring in line.
//!
//! All backends are driven by the same [loop](crate::proxier) over the same [`Goal`]. Each knows
//! what it has put into force (and finds it again after a restart where the kernel keeps it), plans
//! the difference as a pure function, and applies it.

use crate::{
    model::{Endpoint, Family, Protocol, eligible::ENDPOINTS_MAX, table::ServiceTable},
    ruleset::{Frontend, Unit, desired::Desired},
};

/// What should be in force.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Goal<'a> {
    /// By frontend and address, after claims of several Services on one frontend are settled.
    pub(crate) desired: &'a Desired,
    /// By Service and port, for a backend whose rules have a Service's name.
    pub(crate) objects: &'a ServiceTable,
}

/// Puts rules of one family into force.
pub(crate) trait Backend: Send {
    /// Which family.
    fn family(&self) -> Family;

    /// Looks at what is in force and brings all of it in line, with no gap for packets.
    ///
    /// # Errors
    /// When nothing can be read or written; single units that are refused are in what is returned.
    fn synchronize(&mut self, goal: Goal<'_>) -> Result<Applied, BackendError>;

    /// Brings these units in line; those of another family are skipped.
    ///
    /// # Errors
    /// As [`Self::synchronize`].
    fn apply(&mut self, units: &[Unit], goal: Goal<'_>) -> Result<Applied, BackendError>;

    /// Makes sticky clients forget endpoints that are gone.
    ///
    /// # Errors
    /// When they can't be found or removed.
    fn forget(&mut self, forget: &[Forget]) -> Result<(), BackendError>;

    /// A number that is another after each change of the rules by anybody, if there is one.
    fn generation(&mut self) -> Option<u32> {
        None
    }

    /// How many units are in force.
    fn units(&self) -> usize;

    /// The most endpoints of one port that can be put into force without keeping others waiting.
    fn endpoints_max(&self) -> usize {
        ENDPOINTS_MAX
    }

    /// Whether connections live in the kernel's table, which then must forget stale ones.
    fn tracks_connections(&self) -> bool {
        true
    }

    /// Takes all rules away; it is no error if there are none.
    ///
    /// # Errors
    /// When they can't be removed.
    fn remove(&mut self) -> Result<(), BackendError>;
}

/// Why rules could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackendError {
    /// The kernel, asked without a program.
    #[error("{message}")]
    Kernel {
        /// What was refused, and why.
        message: String,
        /// Whether it is not for something that is lacking.
        busy: bool,
    },
    /// A program that was run, or its output.
    #[error("{program}: {message}")]
    Program {
        /// Its name.
        program: String,
        /// What it said.
        message: String,
    },
    /// A program that could not have what others hold (iptables' lock), or was ended by somebody.
    #[error("{program}: {message}")]
    Busy {
        /// Its name.
        program: String,
        /// What it said.
        message: String,
    },
    /// What this backend never does; trying again changes nothing.
    #[error("{0}")]
    Unsupported(String),
    /// The system.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl BackendError {
    /// Whether another try may go better.
    pub(crate) fn may_pass(&self) -> bool {
        !matches!(self, Self::Unsupported(_))
    }

    /// Whether it is not for something that is lacking: another try soon may go better.
    pub(crate) fn is_busy(&self) -> bool {
        match self {
            Self::Kernel { busy, .. } => *busy,
            Self::Busy { .. } => true,
            Self::Io { source, .. } => source.raw_os_error().is_some_and(is_busy),
            Self::Program { .. } | Self::Unsupported(_) => false,
        }
    }
}

/// Errors of the system that say "not now" rather than "never".
pub(crate) fn is_busy(errno: i32) -> bool {
    use libc::{EAGAIN, EBUSY, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, ETXTBSY};
    [EAGAIN, EBUSY, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, ETXTBSY].contains(&errno)
}

/// What came of writing.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// Elements or rules removed or added.
    pub(crate) elements: usize,
    /// Whether everything was made anew, and why.
    pub(crate) rebuilt: Option<String>,
    /// Choices that sticky clients were remembered for and that don't count any more.
    pub(crate) forget: Vec<Forget>,
    /// What was refused; the old state of these stays, all others are written.
    pub(crate) refused: Vec<(Unit, BackendError)>,
    /// Whether it came out that another program had changed the rules, which are mended now.
    pub(crate) drifted: bool,
    /// Where rules are in tables that others have a part in: how many in each.
    pub(crate) tables: Vec<TableRules>,
}

/// The proxy's rules in one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableRules {
    /// Its name.
    pub(crate) table: &'static str,
    /// How many there are now.
    pub(crate) rules: usize,
    /// How many were written.
    pub(crate) written: usize,
}

/// An endpoint that a frontend lost, or all of a frontend's past, for the connection table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stale {
    /// What the client connected to.
    pub(crate) frontend: Frontend,
    /// Where it was sent; `None` if nowhere, as there was no endpoint.
    pub(crate) endpoint: Option<Endpoint>,
}

impl Stale {
    /// Whether it is about connections to the Service's own address that nobody has answered: TCP's
    /// from before there were rules. One that was answered is not the proxy's.
    pub(crate) fn is_unanswered(&self) -> bool {
        let itself = self.frontend.address.map(|address| (address, self.frontend.port));
        self.frontend.protocol == Protocol::Tcp
            && self.endpoint.is_some_and(|e| Some((e.address, e.port)) == itself)
    }
}

/// Remembered choices that don't count any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Forget {
    /// What clients connected to.
    pub(crate) frontend: Frontend,
    /// Those of this endpoint, or all.
    pub(crate) endpoint: Option<Endpoint>,
}

impl Forget {
    /// Whether this is about that choice.
    pub(crate) fn concerns(&self, frontend: &Frontend, endpoint: Endpoint) -> bool {
        self.frontend.protocol == frontend.protocol
            && self.frontend.port == frontend.port
            && self.frontend.address.is_none_or(|address| Some(address) == frontend.address)
            && self.endpoint.is_none_or(|e| e == endpoint)
    }
}
