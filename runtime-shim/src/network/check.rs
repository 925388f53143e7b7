//! What on the host stands in the way of the pods' network, and what to do about it.

use std::{fs, process::Command};

/// Something that an operator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is so.
    pub what: String,
    /// What it does to pods.
    pub effect: String,
    /// What can be done about it.
    pub remedy: String,
}

/// Looks at the host's forwarding, reverse path filters and firewall. Blocks for some milliseconds,
/// and changes nothing.
pub fn check() -> Vec<Finding> {
    let mut found = Vec::new();
    if read("ip_forward").as_deref() == Some("0") {
        found.push(Finding {
            what: "net.ipv4.ip_forward is 0".into(),
            effect: "pods reach nothing but their own node".into(),
            remedy:
                "it is set when the first pod range is known; if something sets it back, set it \
                     in /etc/sysctl.d"
                    .into(),
        });
    }
    if read("conf/all/rp_filter").as_deref() == Some("1") {
        found.push(Finding {
            what: "net.ipv4.conf.all.rp_filter is 1 (strict)".into(),
            effect: "answers that come back over another interface than the question left by are \
                     dropped; on hosts with one uplink that is no matter"
                .into(),
            remedy: "with several uplinks set it to 2 (loose)".into(),
        });
    }
    match nft_chains() {
        Ok(chains) => found.extend(dropping(&chains)),
        Err(error) => found.push(Finding {
            what: format!("the packet filter can't be read: {error}"),
            effect: "there is no masquerade and there are no host ports".into(),
            remedy: "install nftables (Debian's package of this name) and a kernel with nf_tables"
                .into(),
        }),
    }
    found
}

fn read(name: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).ok().map(|t| t.trim().to_owned())
}

fn nft_chains() -> Result<serde_json::Value, String> {
    let output = Command::new("nft")
        .args(["-j", "list", "chains"])
        .output()
        .map_err(|e| format!("running nft: {e}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    serde_json::from_slice(&output.stdout).map_err(|e| format!("nft's answer: {e}"))
}

/// Base chains that drop what nothing accepts: an accept in another table does not help against
/// them.
fn dropping(listing: &serde_json::Value) -> Vec<Finding> {
    let chains =
        listing["nftables"].as_array().into_iter().flatten().filter_map(|o| o.get("chain"));
    chains
        .filter(|chain| chain["policy"] == "drop")
        .filter_map(|chain| {
            let word = |key: &str| chain[key].as_str().unwrap_or_default().to_owned();
            let effect = match chain["hook"].as_str()? {
                "forward" => "what pods send to, or get from, others than their node is dropped",
                "input" => "what pods send to their node (the API, DNS, node ports) is dropped",
                _ => return None,
            };
            Some(Finding {
                what: format!(
                    "the chain {} of the table {} {} drops by default ({})",
                    word("name"),
                    word("family"),
                    word("table"),
                    word("hook")
                ),
                effect: format!("{effect}, unless a rule in that chain accepts it"),
                remedy: "add rules to it that accept traffic from and to the pods' range".into(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_that_drop_are_named() {
        let listing = serde_json::json!({"nftables": [
            {"metainfo": {}},
            {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "type": "filter",
                       "hook": "forward", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "ip", "table": "filter", "name": "INPUT", "type": "filter",
                       "hook": "input", "prio": 0, "policy": "accept"}},
            {"chain": {"family": "ip", "table": "filter", "name": "DOCKER"}},
        ]});
        let found = dropping(&listing);
        assert_eq!(found.len(), 1);
        assert!(found[0].what.contains("FORWARD"), "{found:?}");
    }
}
