//! The dispatcher with a runtime that keeps everything in memory.

use k8s_openapi::api::core::v1::ContainerPort;

use super::*;
use crate::worker::fixture;

fn with_port(name: &str) -> Arc<Pod> {
    let mut pod = fixture::pod(&[name]);
    pod.metadata.name = Some(name.to_owned());
    pod.metadata.uid = Some(format!("uid-{name}"));
    pod.spec.as_mut().unwrap().containers[0].ports =
        Some(vec![ContainerPort { container_port: 80, host_port: Some(80), ..Default::default() }]);
    Arc::new(pod)
}

/// How long a failed worker's pod waits here: far longer than anything else takes.
const LONG: Duration = Duration::from_secs(5);

struct Dispatching {
    context: Arc<Context>,
    changes: mpsc::Sender<Change>,
    running: tokio::task::JoinHandle<()>,
    _node: watch::Sender<Arc<admission::NodeView>>,
    _uid: watch::Sender<Option<String>>,
}

impl Dispatching {
    fn start(runtime: &Arc<fixture::FakeRuntime>, folder: &std::path::Path) -> Self {
        let context = fixture::context(Arc::clone(runtime), folder);
        let node = admission::NodeView { max_pods: 10, ..Default::default() };
        let (_node, node_view) = watch::channel(Arc::new(node));
        let (_uid, node_uid) = watch::channel(None);
        let (told, _) = watch::channel(Arc::default());
        let mut dispatcher =
            Dispatcher::new(Arc::clone(&context), node_view, node_uid, HashMap::new(), told);
        dispatcher.take_over = LONG;
        let (changes, changed) = mpsc::channel(4);
        let events = keelson_runtime_shim::PodRuntime::events(&**runtime);
        let running = tokio::spawn(dispatcher.run(changed, events));
        Self { context, changes, running, _node, _uid }
    }

    async fn set(&self, pods: Vec<Arc<Pod>>) {
        self.changes.send(Change::Static(pods)).await.unwrap();
    }

    async fn until(&self, name: &str, wanted: &str) {
        let phase = || {
            let pod = self.context.directory.pod("default", name)?;
            view::phase(&pod).map(str::to_owned)
        };
        let reached = async {
            while phase().as_deref() != Some(wanted) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let reached = tokio::time::timeout(Duration::from_secs(30), reached).await;
        assert!(reached.is_ok(), "{name} is {:?}, not {wanted}", phase());
    }

    async fn stop(self) {
        self.context.shutdown.cancel();
        self.running.await.unwrap();
    }
}

#[tokio::test]
async fn a_refused_static_pod_runs_as_soon_as_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let dispatching = Dispatching::start(&fixture::FakeRuntime::new(), folder.path());
    let (first, second) = (with_port("a"), with_port("b"));
    dispatching.set(vec![first, Arc::clone(&second)]).await;
    dispatching.until("a", "Running").await;
    dispatching.until("b", "Failed").await;
    dispatching.set(vec![second]).await;
    dispatching.until("b", "Running").await;
    dispatching.stop().await;
}

#[tokio::test]
async fn a_worker_that_panics_is_replaced_and_holds_up_no_other_pod() {
    let named = |name: &str| {
        let mut pod = Pod::clone(&with_port(name));
        pod.spec.as_mut().unwrap().containers[0].ports = None;
        Arc::new(pod)
    };
    let folder = tempfile::tempdir().unwrap();
    let runtime = fixture::FakeRuntime::new();
    let dispatching = Dispatching::start(&runtime, folder.path());
    runtime.panic_at_start("a");
    let begun = tokio::time::Instant::now();
    dispatching.set(vec![named("a")]).await;
    let panicked = async {
        while runtime.panics_at_start("a") {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let panicked = tokio::time::timeout(Duration::from_secs(30), panicked).await;
    assert!(panicked.is_ok(), "a was never started");
    dispatching.set(vec![named("a"), named("b")]).await;
    dispatching.until("b", "Running").await;
    assert!(begun.elapsed() < LONG, "b waited {:?}", begun.elapsed());
    dispatching.until("a", "Running").await;
    assert!(begun.elapsed() >= LONG, "not at once: {:?}", begun.elapsed());
    let sandboxes = runtime.calls().into_iter().filter(|call| call.starts_with("run sandbox"));
    assert_eq!(sandboxes.count(), 2, "the failed pod keeps its own");
    dispatching.stop().await;
}
