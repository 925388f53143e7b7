//! A stand-in for the API server, for tests of whole proxies whose objects don't change.

use std::{convert::Infallible, sync::mpsc::Sender, thread::JoinHandle};

use http::{Method, Request, Response};
use http_body_util::BodyExt;
use kube::{Client, client::Body};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{ProxyConfig, ProxyError, netns::Namespace, run};

/// What the server has and does.
#[derive(Clone)]
pub(crate) struct ApiServer {
    /// The list at a path. A watch of it never ends, and tells nothing.
    pub(crate) lists: fn(&str) -> Value,
    /// Where events go that are posted.
    pub(crate) events: Option<Sender<Value>>,
}

impl ApiServer {
    /// A client for the runtime that this is called on.
    pub(crate) fn client(self) -> Client {
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = self.clone();
            async move {
                if request.uri().query().is_some_and(|query| query.contains("watch=true")) {
                    std::future::pending::<()>().await;
                }
                let body = serde_json::to_vec(&api.answer(request).await).unwrap();
                Ok::<_, Infallible>(Response::new(Body::from(body)))
            }
        });
        Client::new(service, "default")
    }

    async fn answer(&self, request: Request<Body>) -> Value {
        if request.method() != Method::POST {
            return (self.lists)(request.uri().path());
        }
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let event: Value = serde_json::from_slice(&body).unwrap();
        if let Some(events) = &self.events {
            // The test may have heard enough.
            let _ = events.send(event.clone());
        }
        event
    }

    /// Runs a proxy that watches it in a namespace, until the token is cancelled.
    pub(crate) fn run(
        self,
        host: &Namespace,
        config: ProxyConfig,
    ) -> (CancellationToken, JoinHandle<Result<(), ProxyError>>) {
        let shutdown = CancellationToken::new();
        let token = shutdown.clone();
        let running = host.run(move || {
            std::thread::spawn(move || {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async { run(config, self.client(), token).await })
            })
        });
        (shutdown, running)
    }
}
