//! Over a real store.

use bytes::Bytes;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::store::{
    Expect,
    embedded::{EmbeddedOptions, EmbeddedStore},
};

struct World {
    _dir: TempDir,
    store: Arc<EmbeddedStore>,
    cache: Arc<Cache>,
    shutdown: CancellationToken,
}

impl Drop for World {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

async fn world() -> World {
    let dir = TempDir::new().unwrap();
    let store =
        Arc::new(EmbeddedStore::open(&dir.path().join("s"), &EmbeddedOptions::default()).unwrap());
    let cache = Arc::new(Cache::load(&Registry::builtin(), &*store).await.unwrap());
    let shutdown = CancellationToken::new();
    tokio::spawn(Arc::clone(&cache).run(store.clone(), shutdown.clone()));
    World { _dir: dir, store, cache, shutdown }
}

fn config_map(namespace: &str, name: &str, app: &str) -> Bytes {
    let object = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"namespace": namespace, "name": name, "labels": {"app": app}},
    });
    serde_json::to_vec(&object).unwrap().into()
}

impl World {
    async fn put(&self, namespace: &str, name: &str, app: &str) -> Revision {
        let key = format!("core/configmaps/{namespace}/{name}");
        let expect = match self.store.get(&key).await.unwrap() {
            Some(stored) => Expect::Modified(stored.modified),
            None => Expect::Absent,
        };
        let revision =
            self.store.put(&key, config_map(namespace, name, app), expect).await.unwrap();
        self.cache.reach(revision).await;
        revision
    }
}

fn app(object: &Value) -> &str {
    object["metadata"]["labels"]["app"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn objects_are_found_as_soon_as_their_revision_is_reached() {
    let world = world().await;
    let revision = world.put("a", "one", "x").await;
    let found = world.cache.get("", "configmaps", Some("a"), "one").unwrap();
    assert_eq!(found["metadata"]["resourceVersion"], revision.to_string());
    world.put("a-b", "two", "x").await;
    // A namespace is no prefix of another.
    assert_eq!(world.cache.list("", "configmaps", Some("a")).len(), 1);
    assert_eq!(world.cache.list("", "configmaps", None).len(), 2);
    assert!(world.cache.list("", "nonsense", None).is_empty());
}

#[tokio::test]
async fn a_watcher_sees_each_event_once_by_what_it_asked_for() {
    let world = world().await;
    let cache = world.cache.resource("", "configmaps").unwrap();
    let from = world.put("a", "one", "x").await;
    let mut watcher = cache.watch(from).unwrap();
    world.put("a", "one", "y").await; // no longer x
    world.put("a", "one", "x").await; // again
    let last = world.put("a", "one", "x").await;
    world.store.delete("core/configmaps/a/one", last).await.unwrap();
    let mut kinds = Vec::new();
    while kinds.len() < 4 {
        for event in watcher.next().await.unwrap() {
            let selected = event.select(|object| app(object) == "x").unwrap();
            // What went out of sight is shown as it was.
            assert_eq!(app(&selected.object), "x");
            assert_eq!(selected.object["metadata"]["resourceVersion"], event.revision.to_string());
            kinds.push(selected.kind);
        }
    }
    use EventKind::*;
    assert_eq!(kinds, [Deleted, Added, Modified, Deleted]);
    world.cache.reach(Revision(last.0 + 1)).await;
    assert_eq!(watcher.bookmark().unwrap().unwrap(), Revision(last.0 + 1));
}

#[tokio::test]
async fn an_event_is_encoded_once_for_all() {
    let world = world().await;
    let cache = world.cache.resource("", "configmaps").unwrap();
    let mut watchers = [cache.watch(Revision(1)).unwrap(), cache.watch(Revision(1)).unwrap()];
    world.put("a", "one", "x").await;
    let mut encoded = Vec::new();
    for watcher in &mut watchers {
        encoded.push(watcher.next().await.unwrap()[0].encoded(EventKind::Added));
    }
    assert_eq!(encoded[0].as_ptr(), encoded[1].as_ptr());
    assert!(encoded[0].starts_with(br#"{"type":"ADDED","object":{"#));
    assert!(encoded[0].ends_with(b"}\n"));
}

#[tokio::test]
async fn a_watcher_who_comes_late_sees_what_one_who_keeps_up_does() {
    let world = world().await;
    let cache = world.cache.resource("", "configmaps").unwrap();
    let mut early = cache.watch(Revision(1)).unwrap();
    let mut seen = Vec::new();
    let shown = |event: &Event| {
        let previous = event.previous.as_deref().map(|object| app(object).to_owned());
        (event.key().to_owned(), event.encoded(EventKind::Modified), previous, event.deleted)
    };
    let mut last = Revision(1);
    for turn in 0..40 {
        last = world.put("a", &format!("{}", turn % 3), &format!("app-{turn}")).await;
        seen.extend(early.next().await.unwrap().iter().map(|event| shown(event)));
    }
    world.store.delete("core/configmaps/a/0", last).await.unwrap();
    seen.extend(early.next().await.unwrap().iter().map(|event| shown(event)));
    let mut late = cache.watch(Revision(1)).unwrap();
    let at_once: Vec<_> = late.next().await.unwrap().iter().map(|event| shown(event)).collect();
    assert_eq!(at_once.len(), 41);
    assert_eq!(at_once, seen);
}

#[tokio::test]
async fn a_watcher_that_is_too_slow_is_told_so() {
    let world = world().await;
    let cache = world.cache.resource("", "configmaps").unwrap();
    let mut slow = cache.watch(Revision(1)).unwrap();
    let object: Value = serde_json::from_slice(&config_map("a", "one", "x")).unwrap();
    for revision in 2..6000 {
        cache.put("a/one", object.clone(), 100, Revision(revision));
    }
    assert!(slow.next().await.is_err());
    assert!(cache.watch(Revision(3)).is_err());
    assert!(cache.watch(Revision(5998)).is_ok());
    for revision in 6000..6100 {
        cache.put("a/one", object.clone(), 1 << 20, Revision(revision));
    }
    // However large they are, the last few are kept.
    assert!(cache.watch(Revision(6100 - 64)).is_ok());
    assert!(cache.watch(Revision(6100 - 80)).is_err());
}

#[tokio::test]
async fn pages_say_what_is_left() {
    let world = world().await;
    for name in ["a", "b", "c", "d"] {
        world.put("n", name, if name == "c" { "y" } else { "x" }).await;
    }
    let cache = world.cache.resource("", "configmaps").unwrap();
    let (first, left) = cache.page(Some("n"), None, 2, |_| true);
    assert_eq!((first.items.len(), left.more, left.remaining), (2, true, 2));
    let (rest, left) = cache.page(Some("n"), Some("n/b"), 2, |object| app(object) == "x");
    assert_eq!((&*rest.items[0].0, left.more), ("n/d", false));
    assert!(cache.unchanged_since(first.revision));
}

#[tokio::test]
async fn watches_go_on_over_a_restart() {
    let world = world().await;
    let before = world.put("a", "one", "x").await;
    world.put("a", "one", "y").await;
    let again = Arc::new(Cache::load(&Registry::builtin(), &*world.store).await.unwrap());
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(Arc::clone(&again).run(world.store.clone(), shutdown.clone()));
    let mut watcher = again.resource("", "configmaps").unwrap().watch(before).unwrap();
    assert_eq!(app(&watcher.next().await.unwrap()[0].object), "y");
    shutdown.cancel();
    task.await.unwrap();
}
