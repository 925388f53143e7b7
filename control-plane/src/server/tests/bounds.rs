//! What no client can do to others: keep places, break connections, send too much.

use std::{sync::Arc, time::Duration};

use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::fixture::{World, world, world_with};
use crate::{pki::Leaf, server::Limits};

const WAIT: Duration = Duration::from_secs(20);

async fn connect(world: &World, protocol: &[u8]) -> TlsStream<TcpStream> {
    let mut tls = (*world.pki.client_config(Some(Leaf::Admin)).unwrap()).clone();
    tls.alpn_protocols = if protocol.is_empty() { Vec::new() } else { vec![protocol.to_vec()] };
    let stream = TcpStream::connect(world.server.address()).await.unwrap();
    let name = "127.0.0.1".try_into().unwrap();
    TlsConnector::from(Arc::new(tls)).connect(name, stream).await.unwrap()
}

/// Closes what is idle at once, and gives this long for the beginning.
fn impatient(header_timeout: Duration) -> Limits {
    Limits { header_timeout, idle_timeout: Duration::from_millis(200), ..Limits::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_nothing_loses_the_place() {
    let world = world_with(impatient(Duration::from_millis(100))).await;
    for protocol in [&b""[..], b"http/1.1", b"h2"] {
        let mut silent = connect(&world, protocol).await;
        let mut told = Vec::new();
        let ends = tokio::time::timeout(WAIT, silent.read_to_end(&mut told)).await;
        assert!(ends.is_ok(), "{protocol:?} is still open");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_more_to_ask_loses_the_place() {
    let world = world_with(impatient(WAIT)).await;
    let mut quiet = connect(&world, b"http/1.1").await;
    quiet.write_all(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut told = String::new();
    tokio::time::timeout(WAIT, quiet.read_to_string(&mut told)).await.unwrap().ok();
    assert!(told.starts_with("HTTP/1.1 200"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_is_not_idle() {
    let world = world_with(impatient(WAIT)).await;
    let mut watch = connect(&world, b"http/1.1").await;
    watch
        .write_all(
            b"GET /api/v1/namespaces?watch=true&timeoutSeconds=1 HTTP/1.1\r\nHost: x\r\n\r\n",
        )
        .await
        .unwrap();
    let mut told = String::new();
    tokio::time::timeout(WAIT, watch.read_to_string(&mut told)).await.unwrap().ok();
    assert!(told.trim_end().ends_with("\r\n0"), "the watch broke off: {told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_peer_has_its_share_of_connections() {
    let limits = Limits { max_connections_per_peer: 1, ..Limits::default() };
    let world = world_with(limits).await;
    // Three times as many from this machine.
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(connect(&world, b"h2").await);
    }
    let mut refused = TcpStream::connect(world.server.address()).await.unwrap();
    let mut told = Vec::new();
    let ends = tokio::time::timeout(WAIT, refused.read_to_end(&mut told)).await;
    assert!(ends.is_ok() && told.is_empty(), "{told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_large_a_body_is_answered() {
    let world = world().await;
    let stream = connect(&world, b"h2").await;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"},
        "data": {"k": "x".repeat(4 << 20)}});
    let url = format!("https://{}/api/v1/namespaces/default/configmaps", world.server.address());
    let request = Request::post(url).body(Full::new(bytes::Bytes::from(map.to_string()))).unwrap();
    let answer = sender.send_request(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    let status: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(status["reason"], "RequestEntityTooLarge");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_longest_times_are_taken() {
    let world = world().await;
    let begin = "/api/v1/namespaces?watch=true&timeoutSeconds=9223372036854775807";
    let request = Request::get(begin).body(kube::client::Body::empty()).unwrap();
    assert_eq!(world.client.send(request).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_long_a_field_manager_is_refused() {
    let world = world().await;
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}});
    let maps = "/api/v1/namespaces/default/configmaps";
    let long = format!("{maps}?fieldManager={}", "m".repeat(129));
    let (code, status) = world.ask("POST", &long, Some(map)).await;
    assert_eq!(code, 422, "{status}");
    let message = "CreateOptions.meta.k8s.io \"\" is invalid: fieldManager: Too long: may not be \
                   more than 128 bytes";
    assert_eq!(status["message"], message);
}
