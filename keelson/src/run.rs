//! What every long-running command has in common: signals, readiness, the end.

use std::{
    future::{Future, pending},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    signal::unix::{SignalKind, signal},
    time::sleep_until,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{connection, memory, notify};

/// How long what does not heed the end may hold up the process at its very end.
const REST: Duration = Duration::from_secs(5);
/// After how long a process has done what only its start needs: most, and those of large clusters.
const STARTED: [Duration; 3] =
    [Duration::from_secs(5), Duration::from_secs(15), Duration::from_secs(60)];
/// How long parts may take to end after a signal.
pub(crate) const SHUTDOWN: Duration = Duration::from_secs(20);

/// A token that is cancelled by the first `SIGTERM` or `SIGINT`; a second one ends the process at
/// once. A process that goes on for a while gives back the memory that only its start needed.
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
    // It has to hear a second signal until the very end, so nothing waits for it.
    tokio::spawn(async move {
        let begin = Instant::now();
        let mut started = STARTED.into_iter().map(|after| begin + after).peekable();
        loop {
            let next = async {
                match started.peek() {
                    Some(at) => sleep_until((*at).into()).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                () = next => {
                    memory::give_back();
                    started.next();
                }
            }
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
    connection::client(config).with_context(context)
}

/// Runs a command's whole work; what does not come to rest at its end is left behind.
///
/// # Errors
/// Those of the work, and when the async runtime does not start.
pub(crate) fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = crate::runtime()?;
    let result = runtime.block_on(work);
    runtime.shutdown_timeout(REST);
    result
}

/// What was started; nothing if the end came first, at which a start is given up.
///
/// # Errors
/// Those of the start.
pub(crate) async fn unless_stopped<T>(
    start: impl Future<Output = anyhow::Result<T>>,
    shutdown: &CancellationToken,
) -> anyhow::Result<Option<T>> {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => Ok(None),
        started = start => started.map(Some),
    }
}

/// Waits for the end of all parts, but not for ever.
pub(crate) async fn ended(parts: impl Future<Output = ()>) {
    if tokio::time::timeout(SHUTDOWN, parts).await.is_err() {
        tracing::warn!("not everything ended within {SHUTDOWN:?}");
    }
}

/// Tasks that the process can't do without: one that ends by itself, or panics, ends the process
/// with an error, so that whoever watches over it starts it again.
#[derive(Clone, Debug)]
pub(crate) struct MainTasks {
    tasks: TaskTracker,
    shutdown: CancellationToken,
    failure: Arc<OnceLock<String>>,
}

impl MainTasks {
    /// None yet.
    pub(crate) fn new(shutdown: CancellationToken) -> Self {
        Self { tasks: TaskTracker::new(), shutdown, failure: Arc::default() }
    }

    /// Starts one.
    pub(crate) fn spawn(
        &self,
        name: &'static str,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let task = tokio::spawn(task);
        let (shutdown, failure) = (self.shutdown.clone(), Arc::clone(&self.failure));
        self.tasks.spawn(async move {
            let why = match task.await {
                Ok(Ok(())) if shutdown.is_cancelled() => return,
                Ok(Ok(())) => "ended by itself".to_owned(),
                Ok(Err(error)) => format!("{error:#}"),
                Err(error) => error.to_string(),
            };
            tracing::error!(task = name, why, "stopping, since a part failed");
            // the first failure is the one that is told
            let _ = failure.set(format!("{name}: {why}"));
            shutdown.cancel();
        });
    }

    /// Waits until all have ended.
    pub(crate) async fn stopped(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Whether one of them failed.
    ///
    /// # Errors
    /// The first failure.
    pub(crate) fn result(&self) -> anyhow::Result<()> {
        match self.failure.get() {
            Some(failure) => bail!("{failure}"),
            None => Ok(()),
        }
    }
}

/// Whether `path` at an address of this machine answers that all is well; where there is none,
/// nobody is asked.
pub(crate) fn healthy(address: Option<SocketAddr>, path: &'static str) -> impl AsyncFn() -> bool {
    let address = address.map(|mut address| {
        // listening everywhere is listening on loopback too
        if address.ip().is_unspecified() {
            address.set_ip(match address.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        address
    });
    async move || {
        let Some(address) = address else { return true };
        let asked = async {
            let mut stream = TcpStream::connect(address).await?;
            let request =
                format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).await?;
            Ok::<_, std::io::Error>(answer.ends_with(b" 200"))
        };
        asked.await.unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_panic_ends_the_process_with_an_error() {
        let shutdown = CancellationToken::new();
        let tasks = MainTasks::new(shutdown.clone());
        tasks.spawn("part", async { panic!("oh no") });
        shutdown.cancelled().await;
        tasks.stopped().await;
        let error = tasks.result().unwrap_err().to_string();
        assert!(error.starts_with("part: ") && error.contains("oh no"), "{error}");

        let shutdown = CancellationToken::new();
        let tasks = MainTasks::new(shutdown.clone());
        let end = shutdown.clone();
        tasks.spawn("part", async move {
            end.cancelled().await;
            Ok(())
        });
        shutdown.cancel();
        tasks.stopped().await;
        tasks.result().unwrap();
    }

    #[tokio::test]
    async fn a_start_is_given_up_at_the_end() {
        let shutdown = CancellationToken::new();
        assert_eq!(unless_stopped(async { Ok(1) }, &shutdown).await.unwrap(), Some(1));
        shutdown.cancel();
        let never = std::future::pending::<anyhow::Result<()>>();
        assert_eq!(unless_stopped(never, &shutdown).await.unwrap(), None);
    }

    #[tokio::test]
    async fn health_is_asked_where_it_is_served() {
        let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            for answer in ["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 500 Oh no\r\n\r\n"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 256];
                let _ = stream.read(&mut request).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let healthy = healthy(Some(address), "/healthz");
        assert!(healthy().await);
        assert!(!healthy().await);
        server.await.unwrap();
        assert!(!healthy().await, "nobody listens");
    }
}
