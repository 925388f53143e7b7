//! kube-proxy's work: Services and EndpointSlices in, kernel rules out.
//!
//! ```text
//!   watches ─► model: ServiceTable ─► ruleset: Desired ─► nftables: one transaction ─► kernel
//!   (API)          (pure)                 (pure)              only the difference
//!                                                                  │
//!                                            conntrack ◄── stale ──┘
//! ```
//!
//! | task or thread | what it owns | what it sends where |
//! |---|---|---|
//! | [`watches`], a task for each kind | nothing | changes to the loop's queue |
//! | [`drift`], a task, or one for each family | what hears others, by mode | "drift" to the same queue |
//! | `run.rs`, a task | nothing; it has the rules of other modes removed once a family's own are in force | nothing |
//! | [`proxier`], a thread | the whole state, a [`backend`] per family | rules to the kernel; Services to [`health_check`] |
//! | [`conntrack`], a thread | a netlink socket | deletions to the kernel |
//! | [`health`], a task per port | listeners | pages |
//! | [`health_check`], a task, and one per port | listeners | how many endpoints are here |
//!
//! `run.rs` starts all of it and ends when any part does; [`start`] chooses the backend; [`leftovers`]
//! removes what others left.
//!
//! The rules stay when the proxy stops, so that Services answer while it is restarted or upgraded;
//! [`cleanup`] removes them. `README.md` in this crate draws the packet's path.

mod addresses;
mod backend;
mod condition;
mod config;
mod conntrack;
mod drift;
mod explain;
mod health;
mod health_check;
#[cfg(test)]
mod input_test;
mod iptables;
mod ipvs;
mod leftovers;
mod listen;
#[cfg(test)]
mod loop_test;
mod memory;
mod metrics;
mod model;
#[cfg(test)]
mod netns;
mod nftables;
#[cfg(test)]
mod packets;
mod patience;
mod proxier;
mod rights;
mod rtnl;
mod ruleset;
mod run;
#[cfg(test)]
mod run_test;
mod snapshot;
#[cfg(test)]
mod stand_in;
mod start;
mod sysctl;
#[cfg(test)]
mod until;
mod userspace;
mod watches;

#[doc(hidden)]
pub mod bench;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;

use std::{io, net::SocketAddr};

pub use config::{
    ConntrackConfig, DetectLocal, Mode, NodePortAddresses, ProxyConfig, REMOVE_STALE_TCP,
};
pub use explain::{Candidate, Explanation, Origin, Packet, Verdict};
pub use model::{Family, Protocol};
pub use run::{run, run_with_registry};
pub use snapshot::{Objects, Refusal, Snapshot};

use crate::start::KERNEL_MIN;

/// Why the proxy can't start, or could not clean up.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The process lacks a right that every mode needs.
    #[error(
        "the {mode} mode can't be used: this process lacks CAP_NET_ADMIN, without which it can't write \
         {what}; run it as root, or give it that capability (AmbientCapabilities=CAP_NET_ADMIN in a \
         systemd unit, securityContext.capabilities.add: [NET_ADMIN] in a container)"
    )]
    NotAllowed {
        /// The mode that was asked for.
        mode: &'static str,
        /// What it would write.
        what: &'static str,
    },
    /// The kernel is too old.
    #[error(
        "kernel {found} is too old for the nftables proxy: {}.{} or newer is needed",
        KERNEL_MIN.0, KERNEL_MIN.1
    )]
    KernelTooOld {
        /// The kernel's release.
        found: String,
    },
    /// The kernel refuses a part of the rules that every cluster needs.
    #[error(
        "the kernel refuses a rule of the proxy: {0}; check that nf_tables, nft_nat, nft_masq, \
         nft_numgen, nft_reject and nft_ct can be loaded and that the process has CAP_NET_ADMIN"
    )]
    Kernel(String),
    /// The relays of the userspace mode can't start, or their routes can't be removed.
    #[error("relays of the userspace mode: {0}")]
    Relays(String),
    /// What is in force can't be read.
    #[error("the rules in force can't be read: {0}")]
    Unreadable(String),
    /// The kernel has no IPv6.
    #[error("the kernel has no IPv6")]
    NoIpv6,
    /// iptables is missing, or it or the kernel refuses a rule that every cluster needs.
    #[error("the iptables mode can't be used: {0}")]
    Iptables(String),
    /// A port for health or metrics can't be had.
    #[error("can't listen on {address}: {source}")]
    Listen {
        /// The address as configured.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// A metric's name is taken: two proxies share one registry.
    #[error("can't register metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A thread or socket can't be had.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A task ended that never should.
    #[error("a part of the proxy ended by itself")]
    Ended,
}

impl ProxyError {
    /// The kernel's nftables don't do as told.
    fn kernel(error: impl std::fmt::Display) -> Self {
        Self::Kernel(error.to_string())
    }
}

/// Does what needs more than CAP_NET_ADMIN: the kernel's settings. A proxy that is started after it
/// finds them as it wants them.
///
/// # Errors
/// When the mode doesn't work here.
pub fn initialize(config: &ProxyConfig) -> Result<(), ProxyError> {
    start::initialize(config)?;
    sysctl::apply(&config.conntrack);
    Ok(())
}

/// Removes all rules of the proxy, in every mode and family, and those of kube-proxy; nothing
/// happens if there are none.
///
/// # Errors
/// When the kernel refuses.
pub fn cleanup() -> Result<(), ProxyError> {
    leftovers::remove_all()
}
