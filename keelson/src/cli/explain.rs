//! `keelson explain`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::DataArgs;

/// What is explained.
#[derive(Debug, Subcommand)]
pub(crate) enum ExplainCommand {
    /// Where a packet to a Service goes, by which rule, and why not elsewhere
    Packet(Box<ExplainPacketArgs>),
}

/// `keelson explain packet`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    keelson explain packet --from pod default/web --to service default/db --port 5432\n  \
    keelson explain packet --from 203.0.113.7 --to node --port 30080\n  \
    keelson explain packet --from 10.244.0.5 --to 10.96.0.10 --port 53 --protocol udp -o json")]
pub(crate) struct ExplainPacketArgs {
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// The client: an address, `pod NAMESPACE/NAME` or `node`
    #[arg(long, value_name = "CLIENT", num_args = 1..=2, required = true)]
    pub(crate) from: Vec<String>,
    /// What it connects to: an address, `service NAMESPACE/NAME` or `node`
    #[arg(long, value_name = "ADDRESS", num_args = 1..=2, required = true)]
    pub(crate) to: Vec<String>,
    /// And at which port
    #[arg(long, value_name = "PORT", value_parser = port)]
    pub(crate) port: u16,
    /// And how: tcp, udp or sctp
    #[arg(long, value_name = "NAME", default_value = "tcp")]
    pub(crate) protocol: keelson_proxy::Protocol,
    /// How to reach the API server; that of `keelson up` on this machine if absent
    #[arg(long, value_name = "FILE", conflicts_with = "services")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Take objects from these files and folders instead of the API
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) services: Vec<PathBuf>,
    /// The proxy's config file; what the running proxy tells of itself if absent
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// On which node; this machine if absent
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// For people or for programs
    #[arg(long, short, value_enum, default_value_t = OutputFormat::Text)]
    pub(crate) output: OutputFormat,
}

/// How an answer looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people
    Text,
    /// One JSON object
    Json,
}

fn port(text: &str) -> Result<u16, &'static str> {
    let number = text.parse().ok().filter(|port| *port > 0);
    number.ok_or("a number from 1 to 65535 is wanted")
}
