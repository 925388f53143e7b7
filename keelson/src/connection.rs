//! Connections to the API server that are noticed when they are dead.
//!
//! A watch only listens. When the way to the server breaks without a word (a firewall that forgets, a
//! server that loses power), TCP alone would wait for as long as the watch may last: minutes in which
//! rules and pods go by what was. As client-go does, a silent connection is asked after half a minute
//! whether it is still there, and given up soon after; there by TCP's own probes.

use std::{error::Error, time::Duration};

use http::Request;
use hyper_util::{
    client::legacy::{Client as Sender, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder, ConfigExt},
};
use tower::{BoxError, Layer, ServiceExt, util::option_layer};

/// How long a connection may be silent before it is asked.
const SILENT: Duration = Duration::from_secs(30);
/// How long it has to answer, and how often it is asked meanwhile.
const ANSWER: Duration = Duration::from_secs(15);
const PROBES: u32 = 3;

/// An error and its causes; those that the one before tells of already aren't repeated.
fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = error.source();
    }
    text
}

/// A client as a kubeconfig describes it.
///
/// # Errors
/// When its certificates or its way to log in can't be used.
pub(crate) fn client(config: Config) -> anyhow::Result<Client> {
    if config.proxy_url.is_some() {
        // Says what it can't do.
        return Ok(Client::try_from(config)?);
    }
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_keepalive(Some(SILENT));
    connector.set_keepalive_interval(Some(ANSWER / PROBES));
    connector.set_keepalive_retries(Some(PROBES));
    // What was sent and isn't acknowledged hides the silence from the probes.
    connector.set_tcp_user_timeout(Some(SILENT + ANSWER));
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let sender: Sender<_, Body> = Sender::builder(TokioExecutor::new()).build(connector);
    let server = config.cluster_url.authority().map(ToString::to_string).unwrap_or_default();
    let service = ServiceExt::<Request<Body>>::map_err(sender, move |error| -> BoxError {
        // The outermost message leaves out why, and where it went.
        format!("{server}: {}", causes(&error)).into()
    });
    let service = config.extra_headers_layer()?.layer(service);
    let service = option_layer(config.auth_layer()?).layer(service);
    let service = config.base_uri_layer().layer(service);
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}

#[cfg(test)]
mod tests {
    use std::{fs, net::SocketAddr};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// The column `tr` of `/proc/net/tcp` for connections to a port: 02 is the timer of probes.
    fn timer(to: SocketAddr) -> Option<String> {
        let table = fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
        let port = format!(":{:04X}", to.port());
        let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = rows.find(|row| row[2].ends_with(&port) && row[3] == "01")?;
        Some(row[5].split(':').next()?.to_owned())
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named_with_the_cause() {
        // Taken, and not listened on.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        let client = client(Config::new(format!("http://{address}").parse().unwrap())).unwrap();
        let error = client.apiserver_version().await.unwrap_err().to_string();
        for part in [&address.to_string(), "onnect", "Connection refused"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert_eq!(error.matches("Connection refused").count(), 1, "{error}");
    }

    #[tokio::test]
    async fn a_silent_connection_is_probed() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = Config::new(format!("http://{address}").parse().unwrap());
        let client = client(config).unwrap();
        let asked = tokio::spawn(async move {
            let request = Request::get("/livez").body(Vec::new()).unwrap();
            client.request_text(request).await
        });
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = [0; 1024];
        let read = stream.read(&mut request).await.unwrap();
        assert!(request[..read].starts_with(b"GET /livez"));
        // The request is acknowledged, and nothing comes back.
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while timer(address).as_deref() != Some("02") {
            assert!(std::time::Instant::now() < deadline, "{:?}", timer(address));
            tokio::task::yield_now().await;
        }
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        stream.write_all(answer).await.unwrap();
        assert_eq!(asked.await.unwrap().unwrap(), "ok");
    }
}
