use std::convert::Infallible;

use bytes::Bytes;
use futures::stream;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use kube::client::Body;
use tokio::sync::mpsc;

use super::*;

type Answer = UnsyncBoxBody<Bytes, Infallible>;

/// An API server of one ConfigMap and one Secret, which says what it was asked.
struct Server {
    asked: Mutex<Vec<String>>,
    /// The lines of the watch that is open, if one is.
    watch: Mutex<Option<mpsc::UnboundedSender<String>>>,
    away: Mutex<bool>,
    immutable: bool,
}

impl Server {
    fn start(immutable: bool) -> (Arc<Self>, Client) {
        let server = Arc::new(Self {
            asked: Mutex::default(),
            watch: Mutex::default(),
            away: Mutex::default(),
            immutable,
        });
        let answering = Arc::clone(&server);
        let service = tower::service_fn(move |request: Request<Body>| {
            let answer = answering.answer(&request);
            async move { Ok::<_, Infallible>(answer) }
        });
        (server, Client::new(service, "default"))
    }

    fn config_map(&self, version: u32, value: &str) -> serde_json::Value {
        serde_json::json!({
            "apiVersion": "v1", "kind": "ConfigMap", "immutable": self.immutable,
            "metadata": {"name": "conf", "namespace": "ns", "resourceVersion": version.to_string()},
            "data": {"key": value},
        })
    }

    fn answer(&self, request: &Request<Body>) -> Response<Answer> {
        let uri = request.uri();
        self.asked.lock().unwrap().push(uri.to_string());
        let json = |code: u16, body: serde_json::Value| {
            let body = Full::new(Bytes::from(body.to_string())).boxed_unsync();
            let status = StatusCode::from_u16(code).unwrap();
            Response::builder().status(status).body(body).unwrap()
        };
        let failure = |code: u16, reason: &str| {
            json(
                code,
                serde_json::json!({"apiVersion": "v1", "kind": "Status", "code": code,
                "status": "Failure", "reason": reason, "message": reason, "metadata": {}}),
            )
        };
        if *self.away.lock().unwrap() {
            return failure(503, "ServiceUnavailable");
        }
        let query = uri.query().unwrap_or_default();
        match uri.path() {
            "/api/v1/namespaces/ns/configmaps/conf" => json(200, self.config_map(1, "one")),
            "/api/v1/namespaces/ns/secrets/hidden" => failure(403, "Forbidden"),
            "/api/v1/namespaces/ns/configmaps" if query.contains("watch=true") => {
                let (sender, receiver) = mpsc::unbounded_channel::<String>();
                *self.watch.lock().unwrap() = Some(sender);
                let lines = stream::unfold(receiver, |mut receiver| async {
                    let line = receiver.recv().await?;
                    Some((Ok::<_, Infallible>(Frame::data(Bytes::from(line))), receiver))
                });
                Response::new(StreamBody::new(lines).boxed_unsync())
            }
            "/api/v1/namespaces/ns/configmaps" => {
                assert!(query.contains("fieldSelector=metadata.name%3Dconf"), "{query}");
                json(
                    200,
                    serde_json::json!({"apiVersion": "v1", "kind": "ConfigMapList",
                    "metadata": {"resourceVersion": "1"}, "items": [self.config_map(1, "one")]}),
                )
            }
            "/api/v1/namespaces/ns/serviceaccounts/sa/token" => json(
                201,
                serde_json::json!({"apiVersion": "authentication.k8s.io/v1",
                    "kind": "TokenRequest", "metadata": {}, "spec": {"audiences": []},
                    "status": {"token": "t", "expirationTimestamp": "2030-01-01T00:00:00Z"}}),
            ),
            _ => failure(404, "NotFound"),
        }
    }

    fn tell(&self, kind: &str, object: &serde_json::Value) {
        let event = serde_json::json!({"type": kind, "object": object});
        let watch = self.watch.lock().unwrap();
        watch.as_ref().unwrap().send(format!("{event}\n")).unwrap();
    }

    fn asks(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

fn conf() -> DataName {
    DataName { kind: DataKind::ConfigMap, namespace: "ns".into(), name: "conf".into() }
}

fn value(watched: &Watched) -> Option<String> {
    match watched {
        Watched::Present(data) => Some(String::from_utf8(data.values["key"].clone()).unwrap()),
        _ => None,
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_object_is_watched_as_long_as_somebody_listens() {
    let (server, client) = Server::start(false);
    let objects = KubeObjects::new(Some(client), CancellationToken::new());
    let (mut first, second) = (objects.watch(&conf()), objects.watch(&conf()));
    first.wait_for(|state| value(state).as_deref() == Some("one")).await.unwrap();
    until("the watch", || server.watch.lock().unwrap().is_some()).await;
    assert_eq!(server.asks(), 2, "one list and one watch for both");

    server.tell("MODIFIED", &server.config_map(2, "two"));
    first.wait_for(|state| value(state).as_deref() == Some("two")).await.unwrap();
    server.tell("DELETED", &server.config_map(3, "two"));
    first.wait_for(|state| matches!(state, Watched::Missing(_))).await.unwrap();
    assert_eq!(
        *second.borrow(),
        Watched::Missing(ObjectError::NotFound(conf())),
        "{:?}",
        server.asked.lock().unwrap()
    );
    drop((first, second));
    until("the watch's end", || objects.inner.watches.lock().unwrap().is_empty()).await;
}

#[tokio::test]
async fn an_immutable_object_is_seen_once() {
    let (server, client) = Server::start(true);
    let objects = KubeObjects::new(Some(client), CancellationToken::new());
    let mut watched = objects.watch(&conf());
    watched.wait_for(|state| value(state).is_some()).await.unwrap();
    let asks = server.asks();
    assert_eq!(value(&Watched::Present(objects.data(&conf()).await.unwrap())).unwrap(), "one");
    assert_eq!(server.asks(), asks, "what can't change is not asked for again");
    drop(watched);
    until("the end", || objects.inner.watches.lock().unwrap().is_empty()).await;
}

#[tokio::test]
async fn what_was_known_does_while_the_server_is_away() {
    let (server, client) = Server::start(false);
    let objects = KubeObjects::new(Some(client), CancellationToken::new());
    *server.away.lock().unwrap() = true;
    assert!(matches!(objects.data(&conf()).await, Err(ObjectError::Unreachable(_))));
    *server.away.lock().unwrap() = false;
    let known = objects.data(&conf()).await.unwrap();
    *server.away.lock().unwrap() = true;
    assert_eq!(objects.data(&conf()).await.unwrap(), known);
    *server.away.lock().unwrap() = false;

    let none = DataName { name: "none".into(), ..conf() };
    let error = objects.data(&none).await.unwrap_err();
    assert_eq!(error.to_string(), "configmap \"none\" not found");
    let hidden = DataName { kind: DataKind::Secret, name: "hidden".into(), ..conf() };
    assert!(matches!(objects.data(&hidden).await, Err(ObjectError::Refused(_))));
    let token = objects
        .token(&TokenWish {
            namespace: "ns".into(),
            service_account: "sa".into(),
            pod: ("web".into(), "uid".into()),
            audience: String::new(),
            expiration_seconds: 3600,
        })
        .await
        .unwrap();
    assert_eq!((token.token.as_str(), token.expires.as_second()), ("t", 1_893_456_000));
}

#[tokio::test]
async fn without_a_server_everything_says_so() {
    let objects = KubeObjects::new(None, CancellationToken::new());
    let said = objects.data(&conf()).await.unwrap_err().to_string();
    assert!(said.starts_with("ConfigMap ns/conf: this node runs without an API server"), "{said}");
    assert!(matches!(objects.services().await, Err(ObjectError::NoApi(_))));
    let watched = objects.watch(&conf());
    assert!(matches!(*watched.borrow(), Watched::Missing(ObjectError::NoApi(_))));
}
