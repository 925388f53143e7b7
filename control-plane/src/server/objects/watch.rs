//! The stream of changes.
//!
//! A watch has no task and no queue of its own: the connection asks for the next line when it can
//! take one, and the line is then made from the watcher's place in the ring. So a client that does
//! not read costs nothing, and falls out of the ring in time.

use std::{
    collections::VecDeque,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{FutureExt as _, stream};
use http::StatusCode;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{read::version, selection::Selection};
use crate::{
    cache::{self, Event, EventKind, TooOld, Watcher},
    metrics::{LongRunning, WatchMetrics},
    registry::Resource,
    server::{
        core::{Call, Core},
        negotiate::{Accepted, Encoding, Shape},
        request::Query,
        respond::{self, Answer, BoxError},
    },
    status::{FieldError, Status},
    store::Revision,
    table::{self, IncludeObject},
};

/// What marks the end of the objects that were there when the watch began (KEP-3157).
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// No watch lasts longer.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Where a watch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// With all objects there are, as of this revision or later.
    Present(Option<Revision>),
    /// With what changes from now on.
    Now,
    /// With what changed after this.
    After(Revision),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WatchOptions {
    start: Start,
    /// A bookmark after the initial objects.
    mark_initial_end: bool,
    bookmarks: bool,
    timeout: Option<Duration>,
}

fn invalid(field: &str, why: &str) -> Status {
    let error = FieldError::forbidden(field, why);
    Status::invalid("meta.k8s.io", "ListOptions", "", &[error])
}

impl WatchOptions {
    /// The rules of "Efficient detection of changes" and "Streaming lists" in the API concepts.
    fn parse(query: &Query) -> Result<Self, Status> {
        let revision = version(query)?;
        let matching = query.get("resourceVersionMatch");
        let bookmarks = query.flag("allowWatchBookmarks");
        let timeout = query
            .number("timeoutSeconds")?
            .filter(|seconds| *seconds > 0)
            .map(|seconds| Duration::from_secs(seconds.unsigned_abs()));
        let (start, mark_initial_end) = if query.has("sendInitialEvents") {
            if matching != Some("NotOlderThan") {
                let why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
                return Err(invalid("resourceVersionMatch", why));
            }
            if query.flag("sendInitialEvents") {
                (Start::Present(revision), bookmarks)
            } else {
                let start = match revision {
                    None | Some(Revision(0)) => Start::Now,
                    Some(revision) => Start::After(revision),
                };
                (start, false)
            }
        } else {
            if matching.is_some() {
                let why = "resourceVersionMatch is forbidden for watch unless sendInitialEvents \
                           is provided";
                return Err(invalid("resourceVersionMatch", why));
            }
            let start = match revision {
                None => Start::Present(None),
                Some(Revision(0)) => Start::Present(Some(Revision(0))),
                Some(revision) => Start::After(revision),
            };
            (start, false)
        };
        Ok(Self { start, mark_initial_end, bookmarks, timeout })
    }
}

/// Answers a watch.
pub(crate) async fn watch(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
) -> Result<Answer, Status> {
    let accepted = call.accept(&[Shape::Table, Shape::Partial])?;
    if accepted.encoding != Encoding::Json {
        return Err(Status::not_acceptable(&["application/json", "application/json;stream=watch"]));
    }
    let options = WatchOptions::parse(&call.info.query)?;
    let selection = Selection::parse(resource, &call.info)?;
    let cache = core.cache_of(resource)?;
    let metrics = core.metrics.watch(resource);
    let mut encoder = Encoder {
        resource: Arc::clone(resource),
        accepted,
        include: call.include()?,
        header_sent: false,
        metrics,
    };
    let mut lines = VecDeque::new();
    let namespace = call.info.namespace.clone();
    let begin = match options.start {
        Start::Present(at_least) => {
            match at_least {
                Some(revision) => core.wait_for(revision).await?,
                None => core.catch_up().await?,
            }
            let scope = resource.namespaced.then_some(&*namespace);
            let (snapshot, _) = cache.page(scope, None, usize::MAX, |o| selection.matches(o));
            for (_, object) in &snapshot.items {
                lines.push_back(encoder.object(EventKind::Added, object));
            }
            core.metrics.initial_events(resource, snapshot.items.len());
            if options.mark_initial_end {
                lines.push_back(encoder.bookmark(snapshot.revision, true));
            }
            snapshot.revision
        }
        Start::Now => {
            core.catch_up().await?;
            core.cache.applied()
        }
        Start::After(revision) => revision,
    };
    let watcher = match cache.watch(begin) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            lines.push_back(encoder.error(&too_old(error)));
            None
        }
    };
    let timeout = options.timeout.unwrap_or_else(|| {
        let least = core.limits.min_watch_timeout;
        least + least.mul_f64(rand::random_range(0.0..1.0))
    });
    let mut bookmarks = tokio::time::interval(core.limits.bookmark_interval);
    bookmarks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    bookmarks.reset();
    let stream = Stream {
        watcher,
        lines,
        selection,
        namespace: if resource.namespaced { namespace } else { String::new() },
        encoder,
        bookmarks: options.bookmarks.then_some(bookmarks),
        deadline: after(Instant::now(), timeout),
        shutdown: core.shutdown.clone(),
        _open: core.metrics.long_running(&call.info),
    };
    let body = StreamBody::new(stream::unfold(Box::new(stream), |mut stream| async move {
        // What went wrong in one watch must not take the connection's other streams down with it.
        let next = AssertUnwindSafe(stream.next()).catch_unwind().await;
        let line = next.unwrap_or_else(|_| {
            tracing::error!("a watch ended because the server panicked");
            None
        })?;
        Some((Ok::<_, BoxError>(Frame::data(line)), stream))
    }));
    let content_type = match accepted.shape {
        Shape::Table => "application/json;as=Table;v=v1;g=meta.k8s.io",
        Shape::Partial => "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io",
        _ => "application/json",
    };
    Ok(respond::respond(StatusCode::OK, content_type, body.boxed_unsync()))
}

/// A time from now, or one that nobody lives to see where that can't be counted.
fn after(now: Instant, timeout: Duration) -> Instant {
    now.checked_add(timeout.min(FOREVER)).unwrap_or(now)
}

fn too_old(error: TooOld) -> Status {
    Status::too_old(error.requested.0, error.oldest.0)
}

/// One watch.
struct Stream {
    /// `None` once it is over.
    watcher: Option<Watcher>,
    /// Made and not sent.
    lines: VecDeque<Bytes>,
    selection: Selection,
    namespace: String,
    encoder: Encoder,
    bookmarks: Option<Interval>,
    deadline: Instant,
    shutdown: CancellationToken,
    _open: LongRunning,
}

/// Why a watch woke up.
enum Woken {
    Events(Result<Vec<Arc<Event>>, TooOld>),
    Bookmark,
    TimedOut,
}

impl Stream {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Some(line);
            }
            let watcher = self.watcher.as_mut()?;
            let woken = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return None,
                events = watcher.next() => Woken::Events(events),
                () = tick(self.bookmarks.as_mut()) => Woken::Bookmark,
                () = tokio::time::sleep_until(self.deadline.into()) => Woken::TimedOut,
            };
            match woken {
                Woken::Events(Ok(events)) => self.push(&events),
                Woken::Events(Err(error)) => self.fail(error),
                Woken::Bookmark => self.push_bookmark(),
                Woken::TimedOut => {
                    // So that the client goes on from here, and not from its last event.
                    if self.bookmarks.is_some() {
                        self.push_bookmark();
                    }
                    self.watcher = None;
                }
            }
        }
    }

    fn push(&mut self, events: &[Arc<Event>]) {
        for event in events {
            let in_scope = self.namespace.is_empty()
                || event.key().split_once('/').is_some_and(|(ns, _)| ns == self.namespace);
            if !in_scope {
                continue;
            }
            if let Some(selected) = event.select(|object| self.selection.matches(object)) {
                let line = if selected.shared && self.encoder.is_plain(&selected.object) {
                    self.encoder.count(event.encoded(selected.kind))
                } else {
                    self.encoder.object(selected.kind, &selected.object)
                };
                self.lines.push_back(line);
            }
        }
    }

    fn push_bookmark(&mut self) {
        let Some(watcher) = self.watcher.as_mut() else { return };
        match watcher.bookmark() {
            Ok(Ok(revision)) => self.lines.push_back(self.encoder.bookmark(revision, false)),
            Ok(Err(events)) => self.push(&events),
            Err(error) => self.fail(error),
        }
    }

    fn fail(&mut self, error: TooOld) {
        self.encoder.metrics.terminated();
        self.lines.push_back(self.encoder.error(&too_old(error)));
        self.watcher = None;
    }
}

async fn tick(interval: Option<&mut Interval>) {
    match interval {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}

/// Makes lines of what happens.
struct Encoder {
    resource: Arc<Resource>,
    accepted: Accepted,
    include: IncludeObject,
    /// A table's columns come with its first line only.
    header_sent: bool,
    metrics: WatchMetrics,
}

impl Encoder {
    /// Whether the client gets objects just as they are stored.
    fn is_plain(&self, object: &Arc<Value>) -> bool {
        self.accepted.shape == Shape::Whole && Arc::ptr_eq(object, &self.resource.convert(object))
    }

    fn count(&self, line: Bytes) -> Bytes {
        self.metrics.sent(line.len());
        line
    }

    fn object(&mut self, kind: EventKind, stored: &Arc<Value>) -> Bytes {
        let object = self.resource.convert(stored);
        let line = match self.accepted.shape {
            Shape::Table => cache::encode(kind, &self.table(&object)),
            Shape::Partial => cache::encode(kind, &respond::partial(&object)),
            _ => cache::encode(kind, &object),
        };
        self.count(line)
    }

    fn table(&mut self, object: &Arc<Value>) -> Value {
        let version = object.pointer("/metadata/resourceVersion").cloned().unwrap_or_default();
        let metadata = json!({ "resourceVersion": version });
        let items = std::slice::from_ref(object);
        let mut table =
            table::render(&self.resource, items, self.include, Timestamp::now(), metadata);
        self.without_repeated_columns(&mut table);
        table
    }

    fn without_repeated_columns(&mut self, table: &mut Value) {
        if std::mem::replace(&mut self.header_sent, true) {
            table["columnDefinitions"] = Value::Null;
        }
    }

    fn bookmark(&mut self, revision: Revision, initial_end: bool) -> Bytes {
        let mut metadata =
            json!({ "resourceVersion": revision.to_string(), "creationTimestamp": null });
        if initial_end {
            metadata["annotations"] = json!({ INITIAL_EVENTS_END: "true" });
        }
        let object = match self.accepted.shape {
            Shape::Table => {
                let mut table =
                    table::render(&self.resource, &[], self.include, Timestamp::now(), metadata);
                self.without_repeated_columns(&mut table);
                table
            }
            Shape::Partial => json!({
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": metadata,
            }),
            _ => json!({
                "kind": self.resource.kind,
                "apiVersion": self.resource.api_version(),
                "metadata": metadata,
            }),
        };
        line(&json!({ "type": "BOOKMARK", "object": object }))
    }

    fn error(&self, status: &Status) -> Bytes {
        line(&json!({ "type": "ERROR", "object": status.to_value() }))
    }
}

fn line(value: &Value) -> Bytes {
    let mut line = value.to_string();
    line.push('\n');
    line.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_timeout_can_be_counted() {
        let query = Query::parse(Some("timeoutSeconds=9223372036854775807"));
        let timeout = WatchOptions::parse(&query).unwrap().timeout.unwrap();
        assert!(after(Instant::now(), timeout) > Instant::now());
    }

    #[test]
    fn a_watch_begins_where_it_was_asked_to() {
        let parse = |query: &str| {
            WatchOptions::parse(&Query::parse(Some(query)))
                .map(|options| (options.start, options.mark_initial_end))
        };
        let initial = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan";
        let rows = [
            ("".to_owned(), (Start::Present(None), false)),
            ("resourceVersion=0".to_owned(), (Start::Present(Some(Revision(0))), false)),
            ("resourceVersion=5".to_owned(), (Start::After(Revision(5)), false)),
            (format!("{initial}&allowWatchBookmarks=true"), (Start::Present(None), true)),
            (
                format!("{initial}&allowWatchBookmarks=true&resourceVersion=5"),
                (Start::Present(Some(Revision(5))), true),
            ),
            (
                "sendInitialEvents=false&resourceVersionMatch=NotOlderThan".to_owned(),
                (Start::Now, false),
            ),
        ];
        for (query, expected) in rows {
            assert_eq!(parse(&query).unwrap(), expected, "{query}");
        }
        for query in ["sendInitialEvents=true", "resourceVersionMatch=Exact", "timeoutSeconds=x"] {
            assert!(parse(query).is_err(), "{query}");
        }
    }
}
