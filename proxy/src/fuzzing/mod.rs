//! What the fuzz targets in the folder `fuzz/` run: one function for each, from bytes.
//!
//! | target | what the bytes become | what must hold |
//! |---|---|---|
//! | [`objects_to_rules`] | Services, EndpointSlices and the node as they come, change and go, and the proxy's configuration | nothing impossible is planned; the order doesn't matter; kernel and `iptables-restore` take every ruleset, at once and change by change; `nft` lists it; a restart writes nothing |
//! | [`netlink_answers`] | the kernel's answers to everything that the proxy asks | nothing panics, nothing waits or goes on for ever, and no more is kept than was sent |
//!
//! The tests run the same functions over the committed seeds in `fuzz/seeds/` and over random bytes.

mod generate;
mod netlink;
mod objects;
mod reached;
#[cfg(test)]
mod seeded_test;
mod source;

use std::io;

pub use self::{netlink::netlink_answers, objects::objects_to_rules};

/// Takes the calling thread, and what it starts, into a network namespace of its own: targets write
/// rules. Needs root.
///
/// # Errors
/// When the system refuses.
pub fn enter_network_of_its_own() -> io::Result<()> {
    Ok(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?)
}
