//! What kubelets answer: a small HTTPS server stands where a kubelet would.

use std::{convert::Infallible, sync::Arc};

use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::fixture::{World, world};
use crate::pki::Leaf;

type Reply = Response<Full<bytes::Bytes>>;

/// Answers with what it was asked; upgrades are echoed.
async fn answer(mut request: Request<Incoming>) -> Result<Reply, Infallible> {
    let mut reply = Response::new(Full::new(request.uri().to_string().into()));
    if request.headers().contains_key(header::UPGRADE) {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgrade.await.unwrap());
            let mut word = [0; 5];
            stream.read_exact(&mut word).await.unwrap();
            stream.write_all(&word).await.unwrap();
        });
        *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        reply.headers_mut().insert(header::UPGRADE, "SPDY/3.1".parse().unwrap());
        reply.headers_mut().insert(header::CONNECTION, "Upgrade".parse().unwrap());
    }
    Ok(reply)
}

async fn kubelet(world: &World) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = TlsAcceptor::from(world.pki.kubelet_server_config().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let stream = acceptor.accept(stream).await.unwrap();
                // Only the API server may ask a kubelet.
                assert!(stream.get_ref().1.peer_certificates().is_some());
                let connection = hyper::server::conn::http1::Builder::new();
                let served = connection.serve_connection(TokioIo::new(stream), service_fn(answer));
                served.with_upgrades().await.ok();
            });
        }
    });
    port
}

async fn pod_on_node(world: &World) {
    let port = kubelet(world).await;
    world.service_account().await;
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}});
    world.must("POST", "/api/v1/nodes", Some(node)).await;
    let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}});
    world.must("PATCH", "/api/v1/nodes/node-1/status", Some(status)).await;
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": {
        "nodeName": "node-1", "containers": [{"name": "c", "image": "local/app:1"}]}});
    world.must("POST", "/api/v1/namespaces/default/pods", Some(pod)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_come_from_the_pods_kubelet() {
    let world = world().await;
    pod_on_node(&world).await;
    let pod = "/api/v1/namespaces/default/pods/web";
    let log = world.must("GET", &format!("{pod}/log?follow=true&tailLines=5"), None).await;
    assert_eq!(log, "/containerLogs/default/web/c?follow=true&tailLines=5");
    let (code, _) = world.ask("GET", &format!("{pod}/log?container=x"), None).await;
    assert_eq!(code, 400);
    assert_eq!(world.ask("GET", &format!("{pod}/log?tailLines=-1"), None).await.0, 422);
    let proxied = world.must("GET", "/api/v1/nodes/node-1/proxy/stats/summary?a=b", None).await;
    assert_eq!(proxied, "/stats/summary?a=b");
    let (success, text) = world.kubectl(&["logs", "web"], "").await;
    assert!(success && text.starts_with("/containerLogs/default/web/c"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgraded_stream_is_spliced_both_ways() {
    let world = world().await;
    pod_on_node(&world).await;
    let mut tls = (*world.pki.client_config(Some(Leaf::Admin)).unwrap()).clone();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let stream = TcpStream::connect(world.server.address()).await.unwrap();
    let name = "127.0.0.1".try_into().unwrap();
    let mut stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await.unwrap();
    stream
        .write_all(
            b"POST /api/v1/namespaces/default/pods/web/exec?command=sh&command=-c&stdin=1&stdout=true \
              HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n",
        )
        .await
        .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    stream.write_all(b"hello").await.unwrap();
    let mut echo = [0; 5];
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"hello");
}
