//! How many packets met the rules that kube-proxy's users watch.
//!
//! kube-proxy counts them in objects of `nfacct`, which need a module of their own. Every rule counts
//! by itself what it meets.

use std::sync::Arc;

use super::{
    base::{FORWARD, POSTROUTING, counts_localhost, drops_invalid},
    chain::Table,
    program::Programs,
};
use crate::backend::BackendError;

/// How many packets met rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Packets {
    /// Dropped, since the connection table can't place them.
    pub(crate) invalid_dropped: u64,
    /// The first ones of connections to node ports on loopback.
    pub(crate) localhost_accepted: u64,
}

impl Packets {
    /// What came since an earlier reading; a rule that was made anew began at zero.
    pub(crate) fn since(self, before: Self) -> Self {
        let more = |now: u64, before: u64| if now >= before { now - before } else { now };
        Self {
            invalid_dropped: more(self.invalid_dropped, before.invalid_dropped),
            localhost_accepted: more(self.localhost_accepted, before.localhost_accepted),
        }
    }
}

/// Reads the counts of one family.
#[derive(Debug)]
pub(crate) struct Counters {
    programs: Arc<Programs>,
}

impl Counters {
    pub(super) fn new(programs: Arc<Programs>) -> Self {
        Self { programs }
    }

    /// Packets since the rules were made. Runs a program twice and waits for it.
    ///
    /// # Errors
    /// When it can't be run.
    pub(crate) fn read(&self) -> Result<Packets, BackendError> {
        let count = |table, chain, rule: &str| {
            Ok::<_, BackendError>(packets(&self.programs.counted(table, chain)?, chain, rule))
        };
        Ok(Packets {
            invalid_dropped: count(Table::Filter, FORWARD, &drops_invalid())?,
            localhost_accepted: count(Table::Nat, POSTROUTING, &counts_localhost())?,
        })
    }
}

/// What `iptables -v -S` says of one rule of a chain; 0 if it isn't there.
fn packets(listed: &str, chain: &str, rule: &str) -> u64 {
    listed.lines().find_map(|line| of_line(line, chain, rule)).unwrap_or(0)
}

/// The counts stand between the matches and the target: `-A CHAIN … -c PACKETS BYTES -j TARGET`.
fn of_line(line: &str, chain: &str, rule: &str) -> Option<u64> {
    let line = line.strip_prefix("-A ")?.strip_prefix(chain)?.strip_prefix(' ')?;
    let (matches, rest) = line.rsplit_once("-c ")?;
    let (packets, rest) = rest.split_once(' ')?;
    let target = rest.split_once(' ').map_or("", |(_, target)| target);
    let found = format!("{matches}{target}");
    (found.trim_end() == rule).then(|| packets.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_that_was_made_anew_counts_on() {
        let at = |n| Packets { invalid_dropped: n, localhost_accepted: 0 };
        assert_eq!(at(5).since(at(3)), at(2));
        assert_eq!(at(2).since(at(5)), at(2));
        assert_eq!(at(5).since(at(5)), at(0));
    }

    #[test]
    fn counts_are_read_from_the_rule_that_is_meant() {
        let listed = "-N KUBE-FORWARD\n-A KUBE-FORWARD -m conntrack --ctstate INVALID -c 7 420 -j DROP\n\
            -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -c 9 1 -j ACCEPT\n\
            -A KUBE-POSTROUTING -m comment --comment \"connections to node ports on loopback\" \
            -m conntrack --ctorigdst 127.0.0.0/8 -c 3 180\n";
        assert_eq!(packets(listed, FORWARD, &drops_invalid()), 7);
        assert_eq!(packets(listed, POSTROUTING, &counts_localhost()), 3);
        assert_eq!(packets(listed, POSTROUTING, &drops_invalid()), 0);
        assert_eq!(packets("-A KUBE-FORWARD -c\n-A KUBE-FORWARD -c x\n", FORWARD, ""), 0);
    }
}
