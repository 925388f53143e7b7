//! Telling systemd how it goes: the protocol of `sd_notify(3)`.
//!
//! A message is a datagram to the socket named in `NOTIFY_SOCKET`. Without that variable nothing
//! is said.

use std::{
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    path::Path,
    time::Duration,
};

use tokio_util::sync::CancellationToken;

/// Sends one state (`READY=1`, `STOPPING=1`, `WATCHDOG=1`, `STATUS=…`).
pub(crate) fn notify(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(Path::new(&name), state) {
        tracing::warn!(socket = %name.to_string_lossy(), %error, "can't tell systemd");
    }
}

fn send(socket: &Path, state: &str) -> std::io::Result<()> {
    let name = socket.as_os_str().as_encoded_bytes();
    let address = match name.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

/// How often the watchdog wants to hear from us: half of `WATCHDOG_USEC`, if it is meant for this
/// process.
fn watchdog_interval() -> Option<Duration> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    if number("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None;
    }
    number("WATCHDOG_USEC").filter(|usec| *usec > 0).map(|usec| Duration::from_micros(usec) / 2)
}

/// Says that we are alive as often as systemd wants to hear it, for as long as `is_alive` says so.
pub(crate) async fn watchdog(is_alive: impl AsyncFn() -> bool, shutdown: CancellationToken) {
    let Some(interval) = watchdog_interval() else { return };
    let mut ticks = tokio::time::interval(interval);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return,
        }
        match tokio::time::timeout(interval, is_alive()).await {
            Ok(true) => notify("WATCHDOG=1"),
            Ok(false) | Err(_) => tracing::warn!("not alive: the watchdog is not told"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sends_to_paths_and_abstract_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        send(&path, "READY=1").unwrap();
        let mut buffer = [0; 64];
        assert_eq!(socket.recv(&mut buffer).unwrap(), 7);
        assert_eq!(&buffer[..7], b"READY=1");

        let name = format!("keelson-notify-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        send(Path::new(&format!("@{name}")), "STOPPING=1").unwrap();
        assert_eq!(socket.recv(&mut buffer).unwrap(), 10);
    }
}
