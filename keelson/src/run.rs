//! What every long-running command has in common: signals, readiness, the end.

use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::notify;

/// How long parts may take to end after a signal.
pub(crate) const SHUTDOWN: Duration = Duration::from_secs(20);

/// A token that is cancelled by the first `SIGTERM` or `SIGINT`; a second one ends the process at
/// once.
///
/// # Errors
/// When signals can't be listened to.
pub(crate) fn shutdown_on_signal() -> anyhow::Result<CancellationToken> {
    let token = CancellationToken::new();
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate()).context("listen to SIGTERM")?,
        signal(SignalKind::interrupt()).context("listen to SIGINT")?,
    );
    let cancel = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; pods go on running");
        notify::notify("STOPPING=1");
        cancel.cancel();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::warn!("stopped at once by a second signal");
        std::process::exit(130);
    });
    Ok(token)
}

/// Whether the API server behind a client answers that it is alive.
pub(crate) fn alive(client: kube::Client) -> impl AsyncFn() -> bool {
    async move || {
        let request = http::Request::get("/livez").body(Vec::new());
        match request {
            Ok(request) => client.request_text(request).await.is_ok(),
            Err(_) => false,
        }
    }
}

/// A client as a kubeconfig file describes it.
///
/// # Errors
/// When the file can't be read or understood.
pub(crate) async fn client(path: &std::path::Path) -> anyhow::Result<kube::Client> {
    let context = || format!("kubeconfig {}", path.display());
    let kubeconfig = kube::config::Kubeconfig::read_from(path).with_context(context)?;
    let config = kube::Config::from_custom_kubeconfig(
        kubeconfig,
        &kube::config::KubeConfigOptions::default(),
    )
    .await
    .with_context(context)?;
    kube::Client::try_from(config).with_context(context)
}

/// Whether `/healthz` on a port of this machine answers; a port of 0 is not asked.
pub(crate) fn healthy(port: u16) -> impl AsyncFn() -> bool {
    async move || {
        if port == 0 {
            return true;
        }
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
    }
}
