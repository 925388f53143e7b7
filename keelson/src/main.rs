//! A Kubernetes node in one binary: the command line, config files, wiring and signals.
//!
//! * `cli`: what a user can ask for.
//! * `config`: the documented config files, and what of them is supported.
//! * `paths`, `instance`, `node`: where things are, who holds them, what the machine is called.
//! * `cluster`, `credentials`, `connection`, `serving`, `routes`: what a part alone knows of its cluster and other nodes.
//! * `up`, `agent`, `proxy`, `control_plane`: the parts, wired together.
//! * `down`, `status`, `image`, `kubeconfig`: what works on a running or stopped instance.
//! * `explain`: why something is as it is; `manifests`: objects from files instead of the API.
//! * `demo`, `demo_web`: the example that `up --demo` shows.
//! * `notify`, `detach`: systemd and the background.
//! * `memory`: what of it only the start needs.

mod agent;
mod bounded;
mod cli;
mod cluster;
mod config;
mod connection;
mod control_plane;
mod credentials;
mod demo;
mod demo_web;
mod detach;
mod down;
mod explain;
mod image;
mod instance;
mod kubeconfig;
mod manifests;
mod memory;
mod node;
mod notify;
mod paths;
mod proxy;
mod routes;
mod run;
mod serving;
mod status;
mod up;

use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser};
use cli::{Cli, Command, ExplainCommand};
use config::LogFormat;

fn main() -> ExitCode {
    // The runtime starts this program again for a moment to make a container. That must come before
    // anything else: before a thread, before a log line.
    let arguments: Vec<String> =
        std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    if arguments.get(1).is_some_and(|command| command == "runtime-helper") {
        let code = keelson_runtime_shim::embedded::helper_main(&arguments[2..]);
        return ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX));
    }
    memory::share_heaps();
    match run_command(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keelson: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_command(cli: Cli) -> anyhow::Result<()> {
    let (log_level, log_format) = cli.logging();
    let format = match log_format {
        LogFormat::Text => keelson_api::logging::Format::Text,
        LogFormat::Json => keelson_api::logging::Format::Json,
    };
    keelson_api::logging::init(&log_level, format)?;
    match cli.command {
        Command::Version => {
            println!(
                "keelson {} (Kubernetes {})",
                env!("CARGO_PKG_VERSION"),
                keelson_api::KUBERNETES_VERSION
            );
            Ok(())
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "keelson", &mut std::io::stdout());
            Ok(())
        }
        Command::DemoWeb { port } => demo_web::run(port),
        Command::Kubeconfig(args) => kubeconfig::run(&args),
        Command::Status(args) => runtime()?.block_on(status::run(&args)),
        Command::Image(command) => runtime()?.block_on(image::run(command)),
        Command::Down(args) => runtime()?.block_on(down::run(&args)),
        Command::Up(args) => up::run(&args),
        Command::Agent(args) => agent::run(&args),
        Command::Proxy(args) => proxy::run(&args),
        Command::Explain(ExplainCommand::Packet(args)) => explain::packet(&args),
        Command::ControlPlane(args) => control_plane::run(&args),
    }
}

/// The async runtime of the process.
///
/// # Errors
/// When the kernel gives no threads or no epoll.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the async runtime")
}
