//! Objects from an API server: single ones got or watched as pods need them, Services watched
//! as a whole.
//!
//! The node authorizer lets a node read only those ConfigMaps and Secrets that pods on it refer to,
//! one by one; so each is watched by its name, and only while somebody holds its receiver. A watch
//! ends with its last receiver; one of an immutable object ends with its first sight.

use std::{
    collections::{HashMap, VecDeque},
    fmt::Debug,
    pin::pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt, future::Either};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
        core::v1::{ConfigMap, Secret, Service, ServiceAccount},
    },
};
use kube::{
    Api, Client, Resource,
    api::PostParams,
    runtime::{
        WatchStreamExt, reflector,
        watcher::{self, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::objects::{
    Data, DataKind, DataName, ObjectError, ObjectSource, Token, TokenWish, Watched,
};

/// Objects that are remembered for when the API server can't be reached.
const REMEMBERED: usize = 256;
/// How long a caller waits for the first list of Services.
const SERVICES_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a single request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// Objects of one API server. Cheap to clone.
#[derive(Clone)]
pub struct KubeObjects {
    inner: Arc<Inner>,
}

struct Inner {
    client: Option<Client>,
    shutdown: CancellationToken,
    watches: Mutex<HashMap<DataName, watch::Sender<Watched>>>,
    remembered: Mutex<Remembered>,
    services: OnceLock<reflector::Store<Service>>,
}

#[derive(Default)]
struct Remembered {
    objects: HashMap<DataName, Arc<Data>>,
    order: VecDeque<DataName>,
}

impl Remembered {
    fn put(&mut self, name: &DataName, data: &Arc<Data>) {
        if self.objects.insert(name.clone(), Arc::clone(data)).is_none() {
            self.order.push_back(name.clone());
        }
        while self.order.len() > REMEMBERED {
            if let Some(oldest) = self.order.pop_front() {
                self.objects.remove(&oldest);
            }
        }
    }

    fn forget(&mut self, name: &DataName) {
        if self.objects.remove(name).is_some() {
            self.order.retain(|known| known != name);
        }
    }
}

impl KubeObjects {
    /// Asks through `client`, or answers everything with [`ObjectError::NoApi`] if there is none.
    /// Watches end after `shutdown`.
    pub fn new(client: Option<Client>, shutdown: CancellationToken) -> Self {
        let inner = Inner {
            client,
            shutdown,
            watches: Mutex::default(),
            remembered: Mutex::default(),
            services: OnceLock::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    fn client(&self, what: &dyn ToString) -> Result<Client, ObjectError> {
        self.inner.client.clone().ok_or_else(|| ObjectError::NoApi(what.to_string()))
    }

    async fn get<K>(&self, object: &DataName) -> Result<Arc<Data>, ObjectError>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Into<Data>,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client(object)?, &object.namespace);
        match tokio::time::timeout(REQUEST_TIMEOUT, api.get(&object.name)).await {
            Ok(Ok(found)) => Ok(Arc::new(found.into())),
            Ok(Err(error)) => Err(explain(Some(object), &error)),
            Err(_) => Err(ObjectError::Unreachable(format!(
                "{object}: the API server did not answer within {REQUEST_TIMEOUT:?}"
            ))),
        }
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, Remembered> {
        self.inner.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a watch already knows, so that it need not be asked for.
    fn watched(&self, object: &DataName) -> Option<Watched> {
        let watches = self.inner.watches.lock().unwrap_or_else(PoisonError::into_inner);
        watches.get(object).map(|sender| sender.borrow().clone())
    }

    /// Watches one object until nobody listens.
    async fn follow<K>(self, object: DataName, client: Client, sender: watch::Sender<Watched>)
    where
        K: Resource<Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + Send
            + DeserializeOwned
            + Into<Data>
            + 'static,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(client, &object.namespace);
        let config = watcher::Config::default().fields(&format!("metadata.name={}", object.name));
        let mut events = pin!(watcher(api, config).default_backoff());
        let mut listed = None;
        loop {
            let ended = async {
                tokio::select! {
                    () = sender.closed() => {}
                    () = self.inner.shutdown.cancelled() => {}
                }
            };
            let event = match futures::future::select(events.next(), pin!(ended)).await {
                Either::Left((Some(event), _)) => event,
                Either::Left((None, _)) => return self.unwatch(&object, &sender),
                Either::Right(_) => {
                    let over = self.inner.shutdown.is_cancelled();
                    if over || self.forsaken(&object, &sender) {
                        return;
                    }
                    // Somebody began to listen again just now.
                    continue;
                }
            };
            let state = match event {
                Ok(Event::Init) => {
                    listed = None;
                    continue;
                }
                Ok(Event::InitApply(found)) => {
                    listed = Some(found);
                    continue;
                }
                Ok(Event::InitDone) => match listed.take() {
                    Some(found) => Watched::Present(Arc::new(found.into())),
                    None => Watched::Missing(ObjectError::NotFound(object.clone())),
                },
                Ok(Event::Apply(found)) => Watched::Present(Arc::new(found.into())),
                Ok(Event::Delete(_)) => Watched::Missing(ObjectError::NotFound(object.clone())),
                Err(error) => {
                    tracing::debug!(%object, %error, "watching an object a pod refers to");
                    let reason = ObjectError::Unreachable(format!("{object}: {error}"));
                    // What is known stays known; the watch itself tries again, with back-off.
                    sender.send_if_modified(|state| {
                        let unknown = !matches!(state, Watched::Present(_));
                        if unknown {
                            *state = Watched::Missing(reason);
                        }
                        unknown
                    });
                    continue;
                }
            };
            if let Watched::Present(data) = &state {
                self.remembered().put(&object, data);
            } else {
                self.remembered().forget(&object);
            }
            let final_word = matches!(&state, Watched::Present(data) if data.immutable);
            sender.send_if_modified(|known| {
                let changed = *known != state;
                *known = state;
                changed
            });
            if final_word {
                // It can't change; only its end of life is left to wait for.
                loop {
                    tokio::select! {
                        () = sender.closed() => {}
                        () = self.inner.shutdown.cancelled() => return,
                    }
                    if self.forsaken(&object, &sender) {
                        return;
                    }
                }
            }
        }
    }

    /// Removes a watch that nobody listens to; false if somebody does after all.
    fn forsaken(&self, object: &DataName, sender: &watch::Sender<Watched>) -> bool {
        let mut watches = self.inner.watches.lock().unwrap_or_else(PoisonError::into_inner);
        let forsaken = sender.receiver_count() == 0;
        if forsaken {
            watches.remove(object);
        }
        forsaken
    }

    fn unwatch(&self, object: &DataName, sender: &watch::Sender<Watched>) {
        let mut watches = self.inner.watches.lock().unwrap_or_else(PoisonError::into_inner);
        watches.remove(object);
        sender.send_replace(Watched::Missing(ObjectError::Unreachable(format!(
            "{object}: its watch ended"
        ))));
    }

    fn service_store(&self, client: Client) -> &reflector::Store<Service> {
        self.inner.services.get_or_init(|| {
            let (store, writer) = reflector::store();
            let services = watcher(Api::<Service>::all(client), watcher::Config::default());
            let mut events = Box::pin(services.default_backoff().reflect(writer));
            let shutdown = self.inner.shutdown.clone();
            tokio::spawn(async move {
                while let Some(Some(event)) = shutdown.run_until_cancelled(events.next()).await {
                    if let Err(error) = event {
                        tracing::debug!(%error, "watching services");
                    }
                }
            });
            store
        })
    }
}

#[async_trait]
impl ObjectSource for KubeObjects {
    async fn data(&self, object: &DataName) -> Result<Arc<Data>, ObjectError> {
        if let Some(Watched::Present(data)) = self.watched(object)
            && data.immutable
        {
            return Ok(data);
        }
        let found = match object.kind {
            DataKind::ConfigMap => self.get::<ConfigMap>(object).await,
            DataKind::Secret => self.get::<Secret>(object).await,
        };
        match found {
            Ok(data) => {
                self.remembered().put(object, &data);
                Ok(data)
            }
            // A container that crashes must come up again while the API server is away.
            Err(ObjectError::Unreachable(reason)) => {
                let known = self.remembered().objects.get(object).cloned();
                known.ok_or(ObjectError::Unreachable(reason))
            }
            Err(error) => {
                self.remembered().forget(object);
                Err(error)
            }
        }
    }

    fn watch(&self, object: &DataName) -> watch::Receiver<Watched> {
        let client = match self.client(object) {
            Ok(client) => client,
            Err(error) => return watch::channel(Watched::Missing(error)).1,
        };
        let mut watches = self.inner.watches.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = watches.get(object) {
            return sender.subscribe();
        }
        let (sender, receiver) = watch::channel(Watched::Pending);
        watches.insert(object.clone(), sender.clone());
        let (this, object) = (self.clone(), object.clone());
        match object.kind {
            DataKind::ConfigMap => {
                drop(tokio::spawn(this.follow::<ConfigMap>(object, client, sender)));
            }
            DataKind::Secret => {
                drop(tokio::spawn(this.follow::<Secret>(object, client, sender)));
            }
        }
        receiver
    }

    async fn services(&self) -> Result<Vec<Arc<Service>>, ObjectError> {
        let store = self.service_store(self.client(&"services")?);
        match tokio::time::timeout(SERVICES_TIMEOUT, store.wait_until_ready()).await {
            Ok(Ok(())) => Ok(store.state()),
            Ok(Err(_)) => Err(ObjectError::Unreachable("the watch of services ended".into())),
            Err(_) => Err(ObjectError::Unreachable(format!(
                "the API server did not list them within {SERVICES_TIMEOUT:?}"
            ))),
        }
    }

    async fn token(&self, wish: &TokenWish) -> Result<Token, ObjectError> {
        let what = format!("token of service account {}/{}", wish.namespace, wish.service_account);
        let api: Api<ServiceAccount> = Api::namespaced(self.client(&what)?, &wish.namespace);
        let (name, uid) = wish.pod.clone();
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(
                    Some(wish.audience.clone()).filter(|a| !a.is_empty()).into_iter().collect(),
                ),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: Some(name),
                    uid: Some(uid),
                }),
                expiration_seconds: Some(wish.expiration_seconds),
            }),
            ..TokenRequest::default()
        };
        let parameters = PostParams::default();
        let asked = api.create_token_request(&wish.service_account, &parameters, &request);
        let answer = match tokio::time::timeout(REQUEST_TIMEOUT, asked).await {
            Ok(answer) => answer.map_err(|error| explain(None, &error))?,
            Err(_) => {
                return Err(ObjectError::Unreachable(format!(
                    "{what}: the API server did not answer within {REQUEST_TIMEOUT:?}"
                )));
            }
        };
        let status = answer.status.unwrap_or_default();
        match (status.token, status.expiration_timestamp) {
            (Some(token), Some(expires)) => Ok(Token { token, expires: expires.0 }),
            _ => Err(ObjectError::Refused(format!("{what}: the API server answered without one"))),
        }
    }
}

fn explain(object: Option<&DataName>, error: &kube::Error) -> ObjectError {
    match (error, object) {
        (kube::Error::Api(status), Some(object)) if status.code == 404 => {
            ObjectError::NotFound(object.clone())
        }
        (kube::Error::Api(status), _)
            if (400..500).contains(&status.code) && status.code != 429 =>
        {
            ObjectError::Refused(status.message.clone())
        }
        (kube::Error::Api(status), _) => ObjectError::Unreachable(status.message.clone()),
        (error, Some(object)) => ObjectError::Unreachable(format!("{object}: {error}")),
        (error, None) => ObjectError::Unreachable(error.to_string()),
    }
}

#[cfg(test)]
#[path = "kube_objects_tests.rs"]
mod tests;
