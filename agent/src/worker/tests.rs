//! The plan's tables, and whole lives of pods on a runtime in memory.

use std::{sync::Arc, time::Duration};

use keelson_runtime_shim::runtime::{ContainerState, PodRuntime as _, SandboxState};

use super::{
    fixture::{self, FakeRuntime, at, exited, running, sandbox},
    knowledge::{Deletion, Volumes},
    *,
};
use crate::{labels, pods::PodDirectory, probe::ProbeState, volumes::MountedVolumes};

fn desired(pod: Pod) -> Desired {
    Desired { pod: Arc::new(pod), origin: Origin::Api, stop: None }
}

fn mounted() -> Knowledge {
    Knowledge { volumes: Volumes::Mounted(MountedVolumes::default()), ..Default::default() }
}

const POLICY: Policy = Policy { longest_back_off: backoff::LONGEST };

/// The plan's actions in short words.
fn actions(desired: &Desired, observed: &Observed, knowledge: &Knowledge) -> Vec<String> {
    let plan = plan::plan(desired, observed, knowledge, POLICY, at(0));
    plan.actions
        .into_iter()
        .map(|action| match action {
            Action::MountVolumes => "mount".to_owned(),
            Action::RefreshVolumes => "refresh".to_owned(),
            Action::CreateSandbox { attempt } => format!("sandbox {attempt}"),
            Action::StopSandbox(id) => format!("stop {id}"),
            Action::RemoveSandbox(id) => format!("remove {id}"),
            Action::StartContainer { name, attempt, .. } => format!("start {name} {attempt}"),
            Action::KillContainer { name, grace, .. } => {
                format!("kill {name} {}", grace.as_secs())
            }
            Action::RemoveContainer(id) => format!("remove {id}"),
            Action::UnmountVolumes => "unmount".to_owned(),
            Action::DeletePod => "delete".to_owned(),
            Action::Finish => "finish".to_owned(),
        })
        .collect()
}

fn observed(containers: Vec<keelson_runtime_shim::runtime::ContainerStatus>) -> Observed {
    Observed::new(vec![sandbox("s0", 0, SandboxState::Ready)], containers)
}

fn with_init(names: &[(&str, bool)]) -> Pod {
    let mut pod = fixture::pod(&["a"]);
    let init = names.iter().map(|(name, sidecar)| {
        let mut container = fixture::container(name);
        container.restart_policy = sidecar.then(|| "Always".to_owned());
        container
    });
    pod.spec.as_mut().unwrap().init_containers = Some(init.collect());
    pod
}

#[test]
fn a_pod_comes_up_in_order() {
    let pod = with_init(&[("i1", false), ("side", true), ("i2", false)]);
    let none = Observed::default();
    let rows: [(&str, Knowledge, Observed, &[&str]); 8] = [
        ("volumes come first", Knowledge::default(), none.clone(), &["mount"]),
        ("then the sandbox", mounted(), none, &["sandbox 0"]),
        ("then the first init container", mounted(), observed(vec![]), &["start i1 0"]),
        ("which must end", mounted(), observed(vec![running("i1", 0)]), &[]),
        ("the sidecar is next", mounted(), observed(vec![exited("i1", 0, 0)]), &["start side 0"]),
        (
            "a sidecar that runs lets the next begin",
            mounted(),
            observed(vec![exited("i1", 0, 0), running("side", 0)]),
            &["start i2 0"],
        ),
        (
            "all others follow",
            mounted(),
            observed(vec![exited("i1", 0, 0), running("side", 0), exited("i2", 0, 0)]),
            &["start a 0"],
        ),
        (
            "a sidecar that ended starts again beside the main containers",
            mounted(),
            observed(vec![exited("side", 0, 1), running("a", 0)]),
            &["start side 1"],
        ),
    ];
    for (why, knowledge, observed, expected) in rows {
        assert_eq!(actions(&desired(pod.clone()), &observed, &knowledge), expected, "{why}");
    }
}

#[test]
fn the_restart_policy_decides_what_follows_an_end() {
    let rows: [(&str, i32, &[&str]); 6] = [
        ("Always", 0, &["start a 1"]),
        ("Always", 1, &["start a 1"]),
        ("OnFailure", 1, &["start a 1"]),
        ("OnFailure", 0, &["stop s0"]),
        ("Never", 1, &["stop s0"]),
        ("Never", 0, &["stop s0"]),
    ];
    for (policy, code, expected) in rows {
        let mut pod = fixture::pod(&["a"]);
        pod.spec.as_mut().unwrap().restart_policy = Some(policy.to_owned());
        let observed = observed(vec![exited("a", 0, code)]);
        assert_eq!(
            actions(&desired(pod), &observed, &mounted()),
            expected,
            "{policy} after {code}"
        );
    }
}

#[test]
fn a_crash_loop_waits() {
    let mut status = exited("a", 3, 1);
    status.annotations.insert(labels::BACK_OFF.to_owned(), "40".to_owned());
    let observed = observed(vec![status]);
    let desired = desired(fixture::pod(&["a"]));
    let plan = plan::plan(&desired, &observed, &mounted(), POLICY, at(0));
    assert_eq!((plan.actions, plan.wake), (vec![], Some(at(39))));
}

#[test]
fn probes_and_changes_stop_a_container() {
    let mut pod = fixture::pod(&["a"]);
    let container = &mut pod.spec.as_mut().unwrap().containers[0];
    container.liveness_probe = Some(k8s_openapi::api::core::v1::Probe {
        termination_grace_period_seconds: Some(7),
        ..Default::default()
    });
    let mut knowledge = mounted();
    let state = ProbeState { liveness: Verdict::Failure, ..Default::default() };
    knowledge.probes.insert(running("a", 0).id, state);
    let observed = observed(vec![running("a", 0)]);
    assert_eq!(actions(&desired(pod.clone()), &observed, &knowledge), ["kill a 7"]);
    let mut changed = running("a", 0);
    changed.annotations.insert(labels::HASH.to_owned(), "other".to_owned());
    let observed = Observed::new(vec![sandbox("s0", 0, SandboxState::Ready)], vec![changed]);
    assert_eq!(actions(&desired(pod), &observed, &mounted()), ["kill a 30"]);
}

#[test]
fn a_lost_sandbox_is_stopped_and_replaced() {
    let lost = Observed::new(vec![sandbox("s0", 0, SandboxState::NotReady)], vec![]);
    let pod = desired(fixture::pod(&["a"]));
    let mut knowledge = mounted();
    assert_eq!(actions(&pod, &lost, &knowledge), ["stop s0"]);
    knowledge.stopped_sandboxes.insert(SandboxId("s0".to_owned()));
    assert_eq!(actions(&pod, &lost, &knowledge), ["sandbox 1", "remove s0"][..1]);
}

#[test]
fn a_pod_goes_down_in_order() {
    let mut pod = with_init(&[("s1", true), ("s2", true)]);
    pod.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(5)));
    pod.metadata.deletion_grace_period_seconds = Some(5);
    let pod = desired(pod);
    let mut knowledge = mounted();
    let all = observed(vec![running("s1", 0), running("s2", 0), running("a", 0)]);
    assert_eq!(actions(&pod, &all, &knowledge), ["kill a 5"]);
    let sidecars = observed(vec![running("s1", 0), running("s2", 0), exited("a", 0, 0)]);
    assert_eq!(actions(&pod, &sidecars, &knowledge), ["kill s2 5"]);
    knowledge.stopping = Some(Stopping { grace: Duration::from_secs(5), deadline: at(-1) });
    assert_eq!(actions(&pod, &sidecars, &knowledge), ["kill s1 0", "kill s2 0"]);
    let still = observed(vec![exited("a", 0, 0)]);
    assert_eq!(actions(&pod, &still, &knowledge), ["stop s0"]);
    knowledge.stopped_sandboxes.insert(SandboxId("s0".to_owned()));
    assert_eq!(actions(&pod, &still, &knowledge), ["unmount"]);
    knowledge.volumes = Volumes::Unmounted;
    assert_eq!(actions(&pod, &still, &knowledge), [""; 0], "the last status is written first");
    knowledge.final_status_written = true;
    assert_eq!(actions(&pod, &still, &knowledge), ["remove s0"]);
    assert_eq!(actions(&pod, &Observed::default(), &knowledge), ["delete"]);
    knowledge.deletion = Deletion::Done;
    assert_eq!(actions(&pod, &Observed::default(), &knowledge), ["finish"]);
}

#[test]
fn a_shorter_grace_counts_from_now() {
    let seconds = Duration::from_secs;
    let first = Stopping::asked(None, seconds(30), at(0));
    assert_eq!(first.deadline, at(30));
    assert_eq!(Stopping::asked(Some(first), seconds(60), at(5)).deadline, at(30));
    assert_eq!(Stopping::asked(Some(first), seconds(5), at(10)).deadline, at(15));
    assert_eq!(Stopping::asked(Some(first), seconds(25), at(10)).deadline, at(30));
}

#[test]
fn one_ended_attempt_is_kept_before_the_newest() {
    let pod = desired(fixture::pod(&["a"]));
    let observed = observed(vec![exited("a", 0, 1), exited("a", 1, 1), running("a", 2)]);
    assert_eq!(actions(&pod, &observed, &mounted()), ["remove a-0"]);
    // while it waits to be restarted, too: `lastState` and `logs --previous` show the one before
    let waiting = self::observed(vec![exited("a", 0, 1), exited("a", 1, 1), exited("a", 2, 1)]);
    let mut back_off = waiting;
    back_off.containers[2].annotations.insert(labels::BACK_OFF.to_owned(), "10".to_owned());
    assert_eq!(actions(&pod, &back_off, &mounted()), ["remove a-0"]);
}

#[test]
fn a_container_that_was_never_let_go_is_made_anew() {
    let pod = desired(fixture::pod(&["a"]));
    let observed = observed(vec![fixture::in_state("a", 0, ContainerState::Created)]);
    assert_eq!(actions(&pod, &observed, &mounted()), ["remove a-0"]);
}

struct Life {
    runtime: Arc<FakeRuntime>,
    context: Arc<Context>,
    handle: Handle,
    task: tokio::task::JoinHandle<Ended>,
    pump: tokio::task::JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl Life {
    fn begin(pod: Pod, origin: Origin) -> Self {
        Self::prepare(pod, origin, |_| ())
    }

    fn prepare(pod: Pod, origin: Origin, prepare: impl FnOnce(&FakeRuntime)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = FakeRuntime::new();
        prepare(&runtime);
        let context = fixture::context(Arc::clone(&runtime), folder.path());
        let desired = Desired { pod: Arc::new(pod), origin, stop: None };
        let (worker, handle) = Worker::new(Arc::clone(&context), desired, vec![], None);
        let task = tokio::spawn(worker.run());
        let (mut events, changed) = (runtime.events(), Arc::clone(&handle.changed));
        let pump = tokio::spawn(async move {
            while events.recv().await.is_ok() {
                changed.notify_one();
            }
        });
        Self { runtime, context, handle, task, pump, _folder: folder }
    }

    fn pod(&self) -> Option<Arc<Pod>> {
        self.context.directory.pod("default", "web")
    }

    fn status(&self) -> PodStatus {
        self.pod().and_then(|pod| pod.status.clone()).unwrap_or_default()
    }

    async fn until(&self, what: &str, done: impl Fn(&PodStatus) -> bool) {
        let waiting = async {
            while !done(&self.status()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(20), waiting).await.is_err() {
            panic!("not {what}: {:#?}\n{:?}", self.status(), self.runtime.calls());
        }
    }

    async fn end(self) -> Vec<String> {
        self.handle.desired.send_modify(|desired| desired.stop = Some(Stop::Gone));
        let ended = tokio::time::timeout(Duration::from_secs(20), self.task).await;
        assert_eq!(ended.unwrap().unwrap(), Ended::Done);
        self.pump.abort();
        self.runtime.calls()
    }
}

fn ready(status: &PodStatus) -> bool {
    status
        .conditions
        .iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn waiting(status: &PodStatus) -> Option<&str> {
    let state = status.container_statuses.as_ref()?.first()?.state.as_ref()?;
    state.waiting.as_ref()?.reason.as_deref()
}

#[tokio::test]
async fn a_pod_lives_and_goes() {
    let life = Life::begin(with_init(&[("i", false)]), Origin::Static);
    let runtime = Arc::clone(&life.runtime);
    let init_runs = |_: &PodStatus| {
        runtime.latest("i").is_some_and(|status| status.state == ContainerState::Running)
    };
    life.until("initializing", init_runs).await;
    assert_eq!(life.status().phase.as_deref(), Some("Pending"));
    life.runtime.exit("i", 0);
    life.until("ready", ready).await;
    let status = life.status();
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(status.pod_ip.as_deref(), Some("127.0.0.1"));
    assert_eq!(status.qos_class.as_deref(), Some("BestEffort"));
    let calls = life.end().await;
    assert_eq!(
        calls,
        [
            "run sandbox 0",
            "create i",
            "start i",
            "create a",
            "start a",
            "stop a within 30",
            "stop sandbox",
            "remove sandbox"
        ]
    );
}

#[tokio::test]
async fn a_crash_is_restarted_and_then_waits() {
    let life = Life::begin(fixture::pod(&["a"]), Origin::Static);
    life.until("ready", ready).await;
    life.runtime.exit("a", 3);
    let restarted = |status: &PodStatus| {
        status.container_statuses.as_ref().is_some_and(|all| all[0].restart_count == 1)
            && ready(status)
    };
    life.until("restarted", restarted).await;
    let last = life.status().container_statuses.unwrap()[0].last_state.clone().unwrap();
    assert_eq!(last.terminated.unwrap().exit_code, 3);
    life.runtime.exit("a", 4);
    life.until("waiting", |status| waiting(status) == Some("CrashLoopBackOff")).await;
    let state = life.status().container_statuses.unwrap()[0].state.clone().unwrap();
    assert_eq!(
        state.waiting.unwrap().message.as_deref(),
        Some("back-off 10s restarting failed container=a pod=web_default(uid-1)")
    );
    assert_eq!(life.status().phase.as_deref(), Some("Running"));
    life.end().await;
}

#[tokio::test]
async fn a_missing_image_is_named() {
    let mut pod = fixture::pod(&["a"]);
    pod.spec.as_mut().unwrap().containers[0].image = Some("missing:1".to_owned());
    let life = Life::begin(pod.clone(), Origin::Static);
    life.until("failed", |status| waiting(status) == Some("ErrImagePull")).await;
    life.until("waiting", |status| waiting(status) == Some("ImagePullBackOff")).await;
    pod.spec.as_mut().unwrap().containers[0].image = Some("app:1".to_owned());
    life.handle.desired.send_modify(|desired| desired.pod = Arc::new(pod));
    life.until("ready", ready).await;
    life.end().await;
}

#[tokio::test]
async fn a_job_ends() {
    let mut pod = fixture::pod(&["a"]);
    pod.spec.as_mut().unwrap().restart_policy = Some("Never".to_owned());
    let life = Life::begin(pod, Origin::Static);
    life.until("ready", ready).await;
    life.runtime.exit("a", 0);
    life.until("succeeded", |status| status.phase.as_deref() == Some("Succeeded")).await;
    life.end().await;
}

#[tokio::test]
async fn readiness_and_liveness_follow_their_probes() {
    use k8s_openapi::api::core::v1::{ExecAction, Probe};
    let probe = |command: &str, failures| {
        Some(Probe {
            exec: Some(ExecAction { command: Some(vec![command.to_owned()]) }),
            period_seconds: Some(1),
            failure_threshold: Some(failures),
            ..Default::default()
        })
    };
    let mut pod = fixture::pod(&["a"]);
    let container = &mut pod.spec.as_mut().unwrap().containers[0];
    container.readiness_probe = probe("ready", 1);
    container.liveness_probe = probe("alive", 1);
    let life = Life::begin(pod, Origin::Static);
    life.until("ready", ready).await;
    life.runtime.exec_code("ready", 1);
    life.until("unready", |status| !ready(status)).await;
    life.runtime.exec_code("ready", 0);
    life.until("ready again", ready).await;
    life.runtime.exec_code("alive", 1);
    let restarted = |status: &PodStatus| {
        status.container_statuses.as_ref().is_some_and(|all| all[0].restart_count == 1)
    };
    life.until("restarted", restarted).await;
    assert!(life.runtime.calls().contains(&"stop a within 30".to_owned()));
    life.end().await;
}

#[tokio::test]
async fn hooks_run_before_ready_and_before_the_end() {
    use k8s_openapi::api::core::v1::{ExecAction, Lifecycle, LifecycleHandler};
    let hook = |command: &str| {
        Some(LifecycleHandler {
            exec: Some(ExecAction { command: Some(vec![command.to_owned()]) }),
            ..Default::default()
        })
    };
    let mut pod = fixture::pod(&["a"]);
    pod.spec.as_mut().unwrap().containers[0].lifecycle =
        Some(Lifecycle { post_start: hook("hello"), pre_stop: hook("bye"), stop_signal: None });
    let life = Life::begin(pod, Origin::Static);
    life.until("ready", ready).await;
    let calls = life.end().await;
    let place = |call: &str| calls.iter().position(|known| known == call).unwrap();
    assert!(place("start a") < place("exec hello"));
    assert!(place("exec bye") < place("stop a within 30"));
}

#[tokio::test]
async fn a_new_worker_finds_what_runs() {
    let life = Life::begin(fixture::pod(&["a"]), Origin::Static);
    life.until("ready", ready).await;
    life.task.abort();
    let before = life.runtime.calls();
    let sandboxes = life.runtime.list_pod_sandboxes().await.unwrap();
    let desired =
        Desired { pod: Arc::new(fixture::pod(&["a"])), origin: Origin::Static, stop: None };
    let ids = sandboxes.into_iter().map(|sandbox| sandbox.id).collect();
    let context = fixture::context(Arc::clone(&life.runtime), life._folder.path());
    let (worker, _handle) = Worker::new(Arc::clone(&context), desired, ids, None);
    let task = tokio::spawn(worker.run());
    let waiting = async {
        while !context
            .directory
            .pod("default", "web")
            .and_then(|pod| pod.status.clone())
            .is_some_and(|status| ready(&status))
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap();
    assert_eq!(life.runtime.calls(), before, "nothing had to be done");
    task.abort();
}

#[tokio::test]
async fn a_container_whose_post_start_fails_stops_by_its_hook() {
    use k8s_openapi::api::core::v1::{ExecAction, Lifecycle, LifecycleHandler};
    let hook = |command: &str| {
        Some(LifecycleHandler {
            exec: Some(ExecAction { command: Some(vec![command.to_owned()]) }),
            ..Default::default()
        })
    };
    let mut pod = fixture::pod(&["a"]);
    pod.spec.as_mut().unwrap().containers[0].lifecycle =
        Some(Lifecycle { post_start: hook("hello"), pre_stop: hook("bye"), stop_signal: None });
    let life = Life::prepare(pod, Origin::Static, |runtime| runtime.exec_code("hello", 1));
    life.until("failed", |status| waiting(status) == Some("PostStartHookError")).await;
    let calls = life.runtime.calls();
    let place = |call: &str| calls.iter().position(|known| known == call).unwrap();
    assert!(place("exec hello") < place("exec bye"));
    assert!(place("exec bye") < place("stop a within 30"));
    life.end().await;
}

fn status_of(
    pod: &Pod,
    containers: Vec<keelson_runtime_shim::runtime::ContainerStatus>,
) -> PodStatus {
    let observed = observed(containers);
    status::pod_status(&StatusInput {
        pod,
        observed: &observed,
        knowledge: &mounted(),
        stopping: plan::stopped(&desired(pod.clone()), &observed, at(0)) != Stopped::No,
        stop: None,
        past_deadline: false,
        is_static: false,
        host_ips: &[],
        runtime_name: "fake",
        longest_back_off: backoff::LONGEST,
        now: at(0),
    })
}

#[test]
fn what_never_began_waits_when_an_init_container_fails() {
    let mut pod = with_init(&[("i", false)]);
    pod.spec.as_mut().unwrap().restart_policy = Some("Never".to_owned());
    let status = status_of(&pod, vec![exited("i", 0, 1)]);
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(waiting(&status), Some("PodInitializing"));
    // what had run before was lost
    let ready = fixture_status("i", |status| status.ready = true);
    let made = fixture_status("a", |status| status.container_id = Some("fake://a-0".to_owned()));
    pod.status = Some(PodStatus {
        phase: Some("Failed".to_owned()),
        init_container_statuses: Some(vec![ready]),
        container_statuses: Some(vec![made]),
        ..Default::default()
    });
    let status = status_of(&pod, Vec::new());
    let state = status.container_statuses.unwrap()[0].state.clone().unwrap();
    assert_eq!(state.terminated.unwrap().exit_code, 137);
}

fn fixture_status(
    name: &str,
    change: impl FnOnce(&mut k8s_openapi::api::core::v1::ContainerStatus),
) -> k8s_openapi::api::core::v1::ContainerStatus {
    let mut status =
        k8s_openapi::api::core::v1::ContainerStatus { name: name.to_owned(), ..Default::default() };
    change(&mut status);
    status
}

#[test]
fn the_image_is_shown_as_the_user_named_it() {
    let mut status = running("a", 0);
    status.image = "sha256:0123".to_owned();
    status.annotations.insert(labels::IMAGE.to_owned(), "registry.example/app:1".to_owned());
    let shown = status_of(&fixture::pod(&["a"]), vec![status]).container_statuses.unwrap();
    assert_eq!(shown[0].image, "registry.example/app:1");
}
