//! Debian's `nft`: what is in the kernel, and how long it takes for the same.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, bail};
use serde_json::Value;

use super::objects::endpoint_address;
use crate::api::milliseconds;

/// The table that is made for comparison, in a namespace where nothing looks at it.
const TABLE: &str = "ip keelson-bench";

/// Elements as many as the Services need, loaded by `nft`.
#[derive(Debug)]
pub(super) struct Peer {
    netns: String,
    file: PathBuf,
}

impl Peer {
    /// Writes the file that `nft` reads.
    pub(super) fn new(netns: String, file: PathBuf, count: usize) -> anyhow::Result<Self> {
        fs::write(&file, ruleset(count)?)?;
        Ok(Self { netns, file })
    }

    /// Loads all, as long as that takes; then removes it.
    pub(super) fn load(&self) -> anyhow::Result<f64> {
        let started = Instant::now();
        nft(&self.netns, &["-f", &self.file.to_string_lossy()], "")?;
        let took = milliseconds(started, Instant::now());
        self.remove()?;
        Ok(took)
    }

    /// Loads all and leaves it there, for [`Peer::change`].
    pub(super) fn fill(&self) -> anyhow::Result<()> {
        nft(&self.netns, &["-f", &self.file.to_string_lossy()], "").map(drop)
    }

    /// Replaces one endpoint of a Service by another, as long as that takes.
    pub(super) fn change(&self, service: usize, endpoint: usize) -> anyhow::Result<f64> {
        let key = format!("{} . tcp . 80 . 1", service_address(service));
        let text = format!(
            "delete element {TABLE} endpoints {{ {key} }}\n\
             add element {TABLE} endpoints {{ {key} : {} . 8080 }}\n",
            endpoint_address(endpoint)
        );
        let started = Instant::now();
        nft(&self.netns, &["-f", "-"], &text)?;
        Ok(milliseconds(started, Instant::now()))
    }

    /// Removes all.
    pub(super) fn remove(&self) -> anyhow::Result<()> {
        nft(&self.netns, &["delete", "table", "ip", "keelson-bench"], "").map(drop)
    }
}

fn service_address(number: usize) -> std::net::Ipv4Addr {
    let base = u32::from(std::net::Ipv4Addr::new(10, 96, 1, 0));
    (base + u32::try_from(number).unwrap_or_default()).into()
}

/// A verdict for each Service and two addresses for each, as one transaction.
fn ruleset(count: usize) -> anyhow::Result<String> {
    let mut text = format!(
        "table {TABLE} {{\n\
         map services {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{\n"
    );
    for number in 0..count {
        writeln!(text, "{} . tcp . 80 : goto endpoints-2,", service_address(number))?;
    }
    text.push_str(
        "}; }\nmap endpoints { type ipv4_addr . inet_proto . inet_service . mark : \
         ipv4_addr . inet_service; elements = {\n",
    );
    for number in 0..count {
        for index in 0..2 {
            let endpoint = endpoint_address(2 * number + index);
            let service = service_address(number);
            writeln!(text, "{service} . tcp . 80 . {index} : {endpoint} . 8080,")?;
        }
    }
    text.push_str("}; }\nchain endpoints-2 { }\n}\n");
    Ok(text)
}

/// How many elements all maps and sets of a namespace have.
pub(super) fn elements(netns: &str) -> anyhow::Result<usize> {
    let listing: Value = serde_json::from_str(&nft(netns, &["-j", "list", "ruleset"], "")?)?;
    let entries = listing["nftables"].as_array().context("nft -j: no list")?;
    let sets = entries.iter().flat_map(|entry| [&entry["map"], &entry["set"]]);
    Ok(sets.map(|set| set["elem"].as_array().map_or(0, Vec::len)).sum())
}

/// Removes every rule of a namespace.
pub(super) fn flush(netns: &str) -> anyhow::Result<()> {
    nft(netns, &["flush", "ruleset"], "").map(drop)
}

/// Runs `nft` in a namespace, and returns what it printed.
pub(super) fn nft(netns: &str, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    let mut child = Command::new("nsenter")
        .arg(format!("--net=/run/netns/{netns}"))
        .args(["--", "nft"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("nft")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("nft {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
