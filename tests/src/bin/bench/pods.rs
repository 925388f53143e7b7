//! How long a pod takes from the answer of its creation, with its image on the machine already.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use anyhow::Context;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, PostParams, WatchEvent, WatchParams},
};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::{
    api::{self, in_time, milliseconds},
    inside::{inside, inside_async},
    node::Running,
    report::{Figure, Section, Unit},
    runc::Bundle,
    statistics::Samples,
};

/// The image, by its name and by the archive it is imported from.
const IMAGE: &str = "busybox:test";

/// Creates `count` pods one after the other, and runs each one's bundle with runc.
pub(crate) fn measure(count: usize) -> anyhow::Result<Section> {
    let running = Running::start()?;
    running.cluster.make_busybox_image();
    let machine = &running.cluster.machine;
    let (data_dir, netns) = (running.data_dir(), machine.netns());
    let mut bundle = None;
    let mut runc = Samples::default();
    let mut moments = Moments::default();
    // One more, which is not counted: it reads the image's files into memory.
    for number in 0..=count {
        if number % 10 == 0 {
            eprintln!("pods: {number} of {count}");
        }
        let name = format!("pod-{number}");
        let pod = inside_async(&netns, || one_pod(&data_dir, &name))?;
        if bundle.is_none() {
            let config = container_config(&running)?;
            let archive = machine.dir().join("busybox.tar");
            bundle = Some(Bundle::like(&config, &archive, machine.dir())?);
        }
        inside_async(&netns, || remove(&data_dir, &name, &mut moments, number > 0))?;
        let took = inside(&netns, || bundle.as_mut().context("a bundle")?.run())?;
        if number > 0 {
            runc.add(took);
            moments.add(&pod);
        }
    }
    drop(bundle);
    running.stop();
    let beside = "runc run -d";
    Ok(Section {
        title: format!(
            "A pod of one container ({IMAGE}, on the machine already), one at a time, from the answer of its \
             create; beside it `runc run --detach` of the same bundle, turn by turn"
        ),
        command: "tools/bench --only pods".to_owned(),
        figures: vec![
            Figure::new("create asked → answered", Unit::Milliseconds, moments.answered),
            Figure::new("→ bound to the node", Unit::Milliseconds, moments.bound),
            Figure::new("→ Running", Unit::Milliseconds, moments.running)
                .beside(beside, runc.clone())
                .aim(80.0),
            Figure::new("→ Ready", Unit::Milliseconds, moments.ready).beside(beside, runc),
            Figure::new("delete answered → gone", Unit::Milliseconds, moments.gone),
        ],
    })
}

/// What was seen of all pods, in milliseconds.
#[derive(Debug, Default)]
struct Moments {
    answered: Samples,
    bound: Samples,
    running: Samples,
    ready: Samples,
    gone: Samples,
}

impl Moments {
    fn add(&mut self, pod: &OnePod) {
        self.answered.add(milliseconds(pod.asked, pod.answered));
        self.bound.add(milliseconds(pod.answered, pod.seen.bound));
        self.running.add(milliseconds(pod.answered, pod.seen.running));
        self.ready.add(milliseconds(pod.answered, pod.seen.ready));
    }
}

/// The moments of one pod.
#[derive(Debug)]
struct OnePod {
    asked: Instant,
    answered: Instant,
    seen: Seen,
}

/// When a watch first showed a pod so.
#[derive(Clone, Copy, Debug)]
struct Seen {
    bound: Instant,
    running: Instant,
    ready: Instant,
}

/// Creates a pod and waits until it is ready.
async fn one_pod(data_dir: &std::path::Path, name: &str) -> anyhow::Result<OnePod> {
    let client = api::client(data_dir).await?;
    let watch = Watch::start(client.clone()).await?;
    let pods: Api<Pod> = Api::default_namespaced(client);
    // So that the creation finds an open connection, as a client that is at work has one.
    pods.get_opt(name).await?;
    let asked = Instant::now();
    pods.create(&PostParams::default(), &pod(name)?).await?;
    let answered = Instant::now();
    let seen = watch.ready(name).await?;
    Ok(OnePod { asked, answered, seen })
}

/// Removes a pod and waits until it is gone.
async fn remove(
    data_dir: &std::path::Path,
    name: &str,
    moments: &mut Moments,
    counts: bool,
) -> anyhow::Result<()> {
    let client = api::client(data_dir).await?;
    let pods: Api<Pod> = Api::default_namespaced(client);
    let version = pods.list(&ListParams::default()).await?.metadata.resource_version;
    let version = version.unwrap_or_default();
    let mut events = pods.watch(&WatchParams::default(), &version).await?.boxed();
    pods.delete(name, &DeleteParams::default()).await?;
    let answered = Instant::now();
    in_time("the pod to be gone", async {
        while let Some(event) = events.try_next().await? {
            if matches!(event, WatchEvent::Deleted(pod) if pod.name_any() == name) {
                break;
            }
        }
        Ok(())
    })
    .await?;
    if counts {
        moments.gone.add(milliseconds(answered, Instant::now()));
    }
    Ok(())
}

/// Creates many pods at once and waits until all are ready; how long that took, in milliseconds.
///
/// # Errors
/// When one is refused, or they don't get ready in time.
pub(crate) async fn create_all(
    data_dir: &std::path::Path,
    names: Vec<String>,
) -> anyhow::Result<f64> {
    let client = api::client(data_dir).await?;
    let watch = Watch::start(client.clone()).await?;
    let pods: Api<Pod> = Api::default_namespaced(client);
    let asked = Instant::now();
    for name in &names {
        pods.create(&PostParams::default(), &pod(name)?).await?;
    }
    let mut last = asked;
    for name in &names {
        last = last.max(watch.ready(name).await?.ready);
    }
    Ok(milliseconds(asked, last))
}

/// A pod that runs until it is asked to end, and then ends at once.
fn pod(name: &str) -> anyhow::Result<Pod> {
    Ok(serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"bench": "pod"}},
        "spec": {"containers": [{
            "name": "c",
            "image": IMAGE,
            "command": ["sh", "-c", "trap 'exit 0' TERM; sleep 86400 & wait"],
        }]},
    }))?)
}

/// The OCI configuration of the only container that runs.
fn container_config(running: &Running) -> anyhow::Result<PathBuf> {
    let containers = running.data_dir().join("runtime/containers");
    let entries = std::fs::read_dir(&containers)
        .with_context(|| format!("the runtime's containers in {}", containers.display()))?;
    entries
        .flatten()
        .map(|entry| entry.path().join("config.json"))
        .find(|path| path.exists())
        .with_context(|| format!("no container in {} has a config.json", containers.display()))
}

/// A watch over pods, which remembers when it first saw each in each state.
struct Watch {
    seen: Arc<Mutex<HashMap<String, Progress>>>,
    changed: Arc<Notify>,
    task: tokio::task::JoinHandle<()>,
}

/// What was seen of one pod so far.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    bound: Option<Instant>,
    running: Option<Instant>,
    ready: Option<Instant>,
}

impl Progress {
    fn see(&mut self, pod: &Value, now: Instant) {
        let first = |moment: &mut Option<Instant>, holds: bool| {
            if holds {
                moment.get_or_insert(now);
            }
        };
        first(&mut self.bound, !pod["spec"]["nodeName"].is_null());
        first(&mut self.running, pod["status"]["phase"] == "Running");
        first(&mut self.ready, api::is_true(&pod["status"]["conditions"], "Ready"));
    }

    fn complete(&self) -> Option<Seen> {
        Some(Seen { bound: self.bound?, running: self.running?, ready: self.ready? })
    }
}

impl Watch {
    async fn start(client: Client) -> anyhow::Result<Self> {
        let pods: Api<Pod> = Api::default_namespaced(client);
        let version = pods.list(&ListParams::default()).await?.metadata.resource_version;
        let mut events =
            pods.watch(&WatchParams::default(), &version.unwrap_or_default()).await?.boxed();
        let seen: Arc<Mutex<HashMap<String, Progress>>> = Arc::default();
        let changed = Arc::new(Notify::new());
        let task = tokio::spawn({
            let (seen, changed) = (Arc::clone(&seen), Arc::clone(&changed));
            async move {
                while let Some(Ok(event)) = events.next().await {
                    let (WatchEvent::Added(pod) | WatchEvent::Modified(pod)) = event else {
                        continue;
                    };
                    let now = Instant::now();
                    let value = serde_json::to_value(&pod).unwrap_or_default();
                    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    seen.entry(pod.name_any()).or_default().see(&value, now);
                    changed.notify_one();
                }
            }
        });
        Ok(Self { seen, changed, task })
    }

    /// Waits until a pod is ready.
    async fn ready(&self, name: &str) -> anyhow::Result<Seen> {
        in_time(&format!("pod {name} to be ready"), async {
            loop {
                let progress =
                    self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied();
                if let Some(seen) = progress.and_then(|progress| progress.complete()) {
                    return Ok(seen);
                }
                self.changed.notified().await;
            }
        })
        .await
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}
