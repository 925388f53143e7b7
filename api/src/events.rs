//! Kubernetes events, recorded without ever holding up the caller.
//!
//! An event that repeats is counted up rather than written again, as client-go's recorder does: the
//! key is the object, type, reason, message and component. What can't be written is logged; what
//! comes faster than it can be written is dropped and counted in the log.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;

/// How many events may wait to be written.
const QUEUE: usize = 1_000;
/// How many past events are remembered to be counted up.
const REMEMBERED: usize = 4_096;
/// The longest message; client-go's recorder cuts there too.
const MESSAGE_BYTES: usize = 1_024;

/// Whether an event is news or trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    /// News.
    Normal,
    /// Trouble.
    Warning,
}

impl EventType {
    /// As it stands in the event's `type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct EventKey {
    kind: String,
    namespace: String,
    name: String,
    uid: String,
    field_path: String,
    event_type: EventType,
    reason: String,
    message: String,
}

struct Occurrence {
    object: ObjectReference,
    event_type: EventType,
    reason: String,
    message: String,
    at: Timestamp,
}

/// Hands events to the task that writes them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EventRecorder {
    queue: Option<mpsc::Sender<Occurrence>>,
    dropped: Arc<AtomicU64>,
}

impl EventRecorder {
    /// A recorder that writes through `client` in the name of `component` (and `host`, a node's
    /// name), and the task that does it, which ends after `shutdown`.
    pub fn spawn(
        client: Client,
        component: &str,
        host: Option<&str>,
        shutdown: CancellationToken,
    ) -> (Self, JoinHandle<()>) {
        let (queue, occurrences) = mpsc::channel(QUEUE);
        let writer = Writer {
            client,
            component: component.to_owned(),
            host: host.map(str::to_owned),
            known: HashMap::new(),
            order: VecDeque::new(),
        };
        let recorder = Self { queue: Some(queue), dropped: Arc::default() };
        (recorder, tokio::spawn(writer.run(occurrences, shutdown)))
    }

    /// A recorder for a process that has no API server: events are logged only.
    pub fn discard() -> Self {
        Self { queue: None, dropped: Arc::default() }
    }

    /// Records that something happened to an object. Never waits.
    pub fn event(
        &self,
        object: &ObjectReference,
        event_type: EventType,
        reason: &str,
        message: impl Into<String>,
    ) {
        let message = shortened(message.into());
        tracing::debug!(
            kind = object.kind.as_deref().unwrap_or_default(),
            namespace = object.namespace.as_deref().unwrap_or_default(),
            name = object.name.as_deref().unwrap_or_default(),
            reason,
            message,
            "event"
        );
        let Some(queue) = &self.queue else { return };
        let occurrence = Occurrence {
            object: object.clone(),
            event_type,
            reason: reason.to_owned(),
            message,
            at: Timestamp::now(),
        };
        if queue.try_send(occurrence).is_err() {
            let dropped = self.dropped.fetch_add(1, Ordering::Relaxed) + 1;
            tracing::warn!(reason, dropped, "event dropped: too many wait to be written");
        }
    }
}

fn shortened(mut message: String) -> String {
    if message.len() > MESSAGE_BYTES {
        let end = (0..=MESSAGE_BYTES).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
        message.truncate(end);
    }
    message
}

/// What was written for a key before.
#[derive(Clone)]
struct Written {
    namespace: String,
    name: String,
    count: i32,
}

struct Writer {
    client: Client,
    component: String,
    host: Option<String>,
    known: HashMap<EventKey, Written>,
    order: VecDeque<EventKey>,
}

impl Writer {
    async fn run(
        mut self,
        mut occurrences: mpsc::Receiver<Occurrence>,
        shutdown: CancellationToken,
    ) {
        loop {
            let occurrence = tokio::select! {
                biased;
                next = occurrences.recv() => match next {
                    Some(occurrence) => occurrence,
                    None => return,
                },
                () = shutdown.cancelled() => return,
            };
            let written = tokio::select! {
                () = self.write_with_retries(&occurrence) => true,
                () = shutdown.cancelled() => false,
            };
            if !written {
                return;
            }
        }
    }

    /// Tries a few times: events are worth less than the wait for an API server that is gone.
    async fn write_with_retries(&mut self, occurrence: &Occurrence) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        for attempt in 1.. {
            match self.write(occurrence).await {
                Ok(()) => return,
                // A client error won't get better by trying again (a namespace that is going away).
                Err(kube::Error::Api(status))
                    if (400..500).contains(&status.code) && status.code != 429 =>
                {
                    tracing::debug!(reason = occurrence.reason, error = %status.message, "event refused");
                    return;
                }
                Err(error) if attempt == 5 => {
                    let error = crate::client_error::shown(&error);
                    tracing::warn!(reason = occurrence.reason, error, "event not written");
                    return;
                }
                Err(_) => tokio::time::sleep(backoff.next_wait()).await,
            }
        }
    }

    async fn write(&mut self, occurrence: &Occurrence) -> Result<(), kube::Error> {
        let key = key_of(occurrence);
        if let Some(written) = self.known.get(&key).cloned() {
            let api: Api<Event> = Api::namespaced(self.client.clone(), &written.namespace);
            let count = written.count.saturating_add(1);
            let patch = serde_json::json!({
                "count": count,
                "lastTimestamp": Time(whole_second(occurrence.at)),
            });
            match api.patch(&written.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                Ok(_) => {
                    self.known.insert(key, Written { count, ..written });
                    return Ok(());
                }
                // It lived out its time: write it anew.
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    self.known.remove(&key);
                }
                Err(error) => return Err(error),
            }
        }
        let event = self.new_event(occurrence);
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        let name = event.metadata.name.clone().unwrap_or_default();
        Api::namespaced(self.client.clone(), &namespace)
            .create(&PostParams::default(), &event)
            .await?;
        self.remember(key, Written { namespace, name, count: 1 });
        Ok(())
    }

    fn remember(&mut self, key: EventKey, written: Written) {
        if self.order.len() >= REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.order.push_back(key.clone());
        self.known.insert(key, written);
    }

    fn new_event(&self, occurrence: &Occurrence) -> Event {
        let object = &occurrence.object;
        let at = Time(whole_second(occurrence.at));
        // Events of objects without a namespace live in `default`, as client-go has it.
        let namespace =
            object.namespace.clone().filter(|n| !n.is_empty()).unwrap_or_else(|| "default".into());
        let name = format!(
            "{}.{:x}",
            object.name.as_deref().unwrap_or_default(),
            occurrence.at.as_nanosecond()
        );
        Event {
            metadata: ObjectMeta {
                name: Some(name),
                namespace: Some(namespace),
                ..ObjectMeta::default()
            },
            involved_object: object.clone(),
            reason: Some(occurrence.reason.clone()),
            message: Some(occurrence.message.clone()),
            type_: Some(occurrence.event_type.as_str().to_owned()),
            count: Some(1),
            first_timestamp: Some(at.clone()),
            last_timestamp: Some(at),
            source: Some(EventSource {
                component: Some(self.component.clone()),
                host: self.host.clone(),
            }),
            reporting_component: Some(self.component.clone()),
            reporting_instance: self.host.clone(),
            ..Event::default()
        }
    }
}

fn whole_second(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

fn key_of(occurrence: &Occurrence) -> EventKey {
    let object = &occurrence.object;
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    EventKey {
        kind: text(&object.kind),
        namespace: text(&object.namespace),
        name: text(&object.name),
        uid: text(&object.uid),
        field_path: text(&object.field_path),
        event_type: occurrence.event_type,
        reason: occurrence.reason.clone(),
        message: occurrence.message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use http::{Request, Response};
    use kube::client::Body;

    use super::*;

    #[tokio::test]
    async fn the_same_event_is_counted_up() {
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let (done, mut finished) = mpsc::channel(8);
        let requests = Arc::clone(&seen);
        let service = tower::service_fn(move |request: Request<Body>| {
            let (requests, done) = (Arc::clone(&requests), done.clone());
            async move {
                requests.lock().unwrap().push(request.method().to_string());
                let body = Body::from(serde_json::to_vec(&Event::default()).unwrap());
                done.send(()).await.unwrap();
                Ok::<_, std::convert::Infallible>(Response::new(body))
            }
        });
        let shutdown = CancellationToken::new();
        let client = Client::new(service, "default");
        let (recorder, task) = EventRecorder::spawn(client, "kubelet", Some("n"), shutdown.clone());
        let object = ObjectReference { name: Some("web".into()), ..ObjectReference::default() };
        recorder.event(&object, EventType::Normal, "Started", "Started container");
        recorder.event(&object, EventType::Normal, "Started", "Started container");
        recorder.event(&object, EventType::Warning, "BackOff", "other");
        for _ in 0..3 {
            finished.recv().await.unwrap();
        }
        shutdown.cancel();
        task.await.unwrap();
        assert_eq!(*seen.lock().unwrap(), ["POST", "PATCH", "POST"]);
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let cut = shortened("ä".repeat(1_000));
        assert!(cut.len() <= MESSAGE_BYTES && cut.chars().all(|c| c == 'ä'));
    }
}
