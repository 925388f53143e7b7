//! The `tcpSocket` probe: does something accept connections?

use std::{net::IpAddr, time::Duration};

use tokio::net::TcpStream;

use super::Outcome;

/// Connects to `host`, or to the pod's `address` if there is none, and hangs up again.
pub(crate) async fn connect(
    host: Option<&str>,
    address: IpAddr,
    port: u16,
    timeout: Duration,
) -> Outcome {
    let host =
        host.filter(|host| !host.is_empty()).map_or_else(|| address.to_string(), str::to_owned);
    match tokio::time::timeout(timeout, TcpStream::connect((host.as_str(), port))).await {
        Ok(Ok(_)) => Outcome::Success,
        Ok(Err(error)) => Outcome::Failure(dial_error(&host, port, &error)),
        Err(_) => Outcome::Failure(format!("dial tcp {host}:{port}: i/o timeout")),
    }
}

/// A failed connection in the words that operators know.
pub(crate) fn dial_error(host: &str, port: u16, error: &std::io::Error) -> String {
    let reason = match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        std::io::ErrorKind::HostUnreachable => "no route to host".to_owned(),
        _ => error.to_string(),
    };
    format!("dial tcp {host}:{port}: connect: {reason}")
}
