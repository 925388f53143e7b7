//! The nftables backend: the proxy's table in the kernel, written over netlink.
//!
//! ```text
//!   desired units ─► held.plan ─► elements ─► batch ─► socket ─► kernel, all or nothing
//!                      ▲                                 │
//!                      └──── held: what it has taken ◄───┘
//! ```
//!
//! [`layout`] has the names; [`rules`] the chains and rules that don't depend on Services at all and
//! [`picks`] those that are made when they are needed, both put together from [`steps`]; [`held`]
//! turns units into [`changes`] of elements ([`keys`], [`sources`]), and [`reading`] turns elements
//! back; [`batch`], [`expression`] and [`attribute`] are the encoder; [`socket`] talks to the
//! kernel over a [`wire`]; [`observe`] reads back, with [`elements`], and [`compare`]s; [`apply`]
//! writes; [`affinity`] cleans what packets write; [`monitor`] hears of others who write, and
//! [`contention`] puts off mending what they keep changing; [`look`] only looks; [`text`] prints all of it
//! without a kernel. The packet's path is drawn in the crate's `README.md`.
//!
//! The number of chains and rules doesn't grow with Services, and the cost of a change doesn't
//! either. What another program may see is never half a change.

pub(crate) mod affinity;
pub(crate) mod apply;
pub(crate) mod attribute;
pub(crate) mod batch;
pub(crate) mod changes;
pub(crate) mod compare;
pub(crate) mod contention;
pub(crate) mod elements;
pub(crate) mod expression;
pub(crate) mod held;
pub(crate) mod intervals;
pub(crate) mod keys;
pub(crate) mod layout;
pub(crate) mod look;
pub(crate) mod monitor;
pub(crate) mod observe;
pub(crate) mod picks;
pub(crate) mod reading;
pub(crate) mod rules;
pub(crate) mod socket;
pub(crate) mod sources;
pub(crate) mod steps;
pub(crate) mod text;
pub(crate) mod uapi;
pub(crate) mod wire;

#[cfg(test)]
mod chains_test;
#[cfg(test)]
mod compare_test;
#[cfg(test)]
mod elements_test;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod kernel_test;
#[cfg(test)]
mod monitor_test;
#[cfg(test)]
mod refusal_test;
#[cfg(test)]
mod ruleset_test;
#[cfg(test)]
mod service_ranges_test;
#[cfg(test)]
mod sources_test;
