//! What the process may do, so that a lack of it is told before anything fails for it.

use std::fs;

use crate::{ProxyError, config::Mode};

/// The number of CAP_NET_ADMIN.
const NET_ADMIN: u32 = 12;

/// Every mode changes the network: packet filters their rules, relays the routes to them.
///
/// # Errors
/// When this thread may not, with what to do about it.
pub(crate) fn check(mode: Mode) -> Result<(), ProxyError> {
    // Where the kernel doesn't say, it is tried.
    match fs::read_to_string("/proc/thread-self/status") {
        Ok(status) if !has(&status, NET_ADMIN) => Err(ProxyError::NotAllowed {
            mode: mode.as_str(),
            what: match mode {
                Mode::Nftables | Mode::Iptables => "its rules",
                Mode::Userspace => "routes to the Services' addresses",
            },
        }),
        _ => Ok(()),
    }
}

/// Whether a capability is among the effective ones of `/proc/PID/status`.
fn has(status: &str, capability: u32) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    effective.is_none_or(|set| set & (1 << capability) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effective_capabilities_are_read() {
        let status = |effective: &str| format!("Name:\tx\nCapPrm:\t0\nCapEff:\t{effective}\n");
        for (effective, allowed) in [
            ("000001ffffffffff", true),
            ("000001ffffffefff", false),
            ("0000000000001000", true),
            ("0000000000000000", false),
            ("what", true),
        ] {
            assert_eq!(has(&status(effective), NET_ADMIN), allowed, "{effective}");
        }
        assert!(has("", NET_ADMIN), "unknown");
        assert!(check(Mode::Userspace).is_ok(), "these tests are run as root");
    }
}
