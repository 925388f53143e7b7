//! A Kubernetes node in one binary: the command line, config files, wiring and signals.

mod cli;
mod config;
mod notify;
mod paths;

fn main() {}
