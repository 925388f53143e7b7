//! The iptables backend, for kernels and clusters where nftables can't be used.
//!
//! ```text
//!   objects ─► service: chains and lines of each ─┐
//!                                                 ├─► held.plan ─► restore's input ─► kernel
//!   settings ─► base: chains that all share ──────┘      ▲                              │
//!                                                        └── held: what is there ◄── observe
//! ```
//!
//! [`chain`] derives the names, which are kube-proxy's, since other tools look for them; [`rule`]
//! writes a rule just as `iptables-save` prints it, so that what is there can be compared with what
//! should be; [`service`] and [`base`] are pure; [`held`] plans the difference; [`observe`] reads
//! what is there; [`apply`] writes, with [`program`], and in [`parts`] what is refused as a whole;
//! [`cleanup`](mod@cleanup) takes away what is left of a proxy, and [`loopback`] keeps the setting
//! that node ports on loopback need; [`canary`] notices when others write, by [`digest`];
//! [`counters`] reads how many packets met a rule; [`text`] shows all rules without a kernel.
//!
//! ```text
//!  nat     PREROUTING, OUTPUT ─► KUBE-SERVICES ─┬─► KUBE-SVC-… ─► KUBE-SEP-…: DNAT
//!                                               ├─► KUBE-FW-… ─► KUBE-EXT-… ─┬─► KUBE-SVC-…
//!                                               └─► KUBE-NODEPORTS ─────┘    └─► KUBE-SVL-…
//!          POSTROUTING ─► KUBE-POSTROUTING: MASQUERADE what KUBE-MARK-MASQ has marked
//!  filter  INPUT, FORWARD, OUTPUT ─► KUBE-SERVICES, KUBE-EXTERNAL-SERVICES: REJECT, DROP
//!                                    KUBE-PROXY-FIREWALL: DROP what KUBE-FW-… has not accepted
//!          FORWARD ─► KUBE-FORWARD: ACCEPT
//! ```
//!
//! The rules of the filter table match what was not translated. So a change first adds to it, then
//! changes the nat table, and takes away from the filter table last: no packet gets through in
//! between.

pub(crate) mod apply;
pub(crate) mod base;
pub(crate) mod canary;
pub(crate) mod chain;
mod cleanup;
mod compare;
pub(crate) mod counters;
mod digest;
pub(crate) mod held;
mod loopback;
pub(crate) mod observe;
mod parts;
pub(crate) mod program;
pub(crate) mod restore;
pub(crate) mod rule;
pub(crate) mod service;
pub(crate) mod text;

#[cfg(test)]
mod cleanup_test;
#[cfg(test)]
mod drift_test;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod kernel_test;
#[cfg(test)]
mod refusal_test;

pub(crate) use self::{
    apply::Rules,
    cleanup::{cleanup, cleanup_other_variant},
    text::text,
};
pub(crate) use compare::differences;

use crate::{
    config::{DetectLocal, NodePortAddresses},
    model::Family,
};

/// The most endpoints of one port. iptables-nft takes 4 s for so many chains and a minute and a half
/// for 65,536, during which no other Service's change goes in.
pub(crate) const ENDPOINTS_MAX: usize = 10_000;

/// Which of the two programs that are called iptables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Variant {
    /// What the host calls `iptables`.
    #[default]
    Host,
    /// `iptables-nft`: the kernel's nftables behind iptables' face.
    Nft,
    /// `iptables-legacy`: the kernel's old tables.
    Legacy,
}

/// What the rules depend on besides Services.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Which family.
    pub(crate) family: Family,
    /// Which programs.
    pub(crate) variant: Variant,
    /// What comes from pods.
    pub(crate) detect_local: DetectLocal,
    /// Masquerade everything that is sent to a cluster address.
    pub(crate) masquerade_all: bool,
    /// The mark of what is to be masqueraded.
    pub(crate) masquerade_mark: u32,
    /// Which of the node's addresses answer on node ports.
    pub(crate) node_port_addresses: NodePortAddresses,
    /// Whether node ports answer on 127.0.0.0/8 too, where the addresses above include it.
    pub(crate) localhost_node_ports: bool,
    /// Let packets pass that the connection table can't place.
    pub(crate) tcp_be_liberal: bool,
}
