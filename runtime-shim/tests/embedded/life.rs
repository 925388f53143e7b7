//! Pods and containers from beginning to end.

use std::{path::PathBuf, time::Duration};

use keelson_runtime_shim::{PodRuntime, runtime::*};

use crate::{
    fixture::{Node, in_namespaces, until},
    lines,
};

#[test]
fn a_container_runs_logs_and_ends() {
    in_namespaces("life::a_container_runs_logs_and_ends", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let id = node
            .container(&pod, "c", "echo out; echo err >&2; printf rest; hostname; exit 7", |_| {})
            .await;
        let mut events = node.runtime.events();
        let begun = std::time::Instant::now();
        node.runtime.start_container(&id).await.unwrap();
        println!("start took {:?}", begun.elapsed());
        let status = node.exited(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (Some(7), "Error"));
        assert!(status.started_at <= status.finished_at);
        let own = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        let logged = lines(&status.log_path);
        assert!(logged.contains(&own("stdout", "F", "out")), "{logged:?}");
        assert!(logged.contains(&own("stderr", "F", "err")), "{logged:?}");
        assert!(logged.contains(&own("stdout", "F", "restone")), "{logged:?}");
        let (mut started, mut exited) = (false, false);
        while !(started && exited) {
            let event = tokio::time::timeout(Duration::from_secs(5), events.recv()).await;
            let event = event.unwrap().unwrap();
            assert_eq!((event.pod_uid.as_str(), event.container.as_ref()), ("uid-one", Some(&id)));
            started |= event.kind == RuntimeEventKind::ContainerStarted;
            exited |= event.kind == RuntimeEventKind::ContainerExited;
        }
        node.end().await;
    });
}

#[test]
fn pods_outlive_the_runtime_that_made_them() {
    in_namespaces("life::pods_outlive_the_runtime_that_made_them", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let runs = node.started(&pod, "runs", "while :; do echo tick; sleep 0.01; done").await;
        let script = "while [ ! -e /end ]; do sleep 0.01; done; exit 3";
        let ends = node.started(&pod, "ends", script).await;
        let made = node.container(&pod, "made", "exit 0", |_| {}).await;
        let before = node.runtime.container_status(&runs).await.unwrap();
        let ending = node.runtime.container_status(&ends).await.unwrap().pid.unwrap();
        let meanwhile = async {
            std::fs::write(format!("/proc/{ending}/root/end"), "").unwrap();
            let process = PathBuf::from(format!("/proc/{ending}"));
            until("the one container ends", || async { !process.exists() }).await;
            let logged = lines(&before.log_path).len();
            until("the other logs on", || async { lines(&before.log_path).len() > logged + 5 })
                .await;
        };
        let node = node.reopen(meanwhile).await;
        let after = node.runtime.container_status(&runs).await.unwrap();
        assert_eq!(after.state, ContainerState::Running);
        assert_eq!((after.pid, after.started_at), (before.pid, before.started_at));
        let ended = node.runtime.container_status(&ends).await.unwrap();
        assert_eq!((ended.state, ended.exit_code), (ContainerState::Exited, Some(3)));
        node.runtime.start_container(&made).await.unwrap();
        assert_eq!(node.exited(&made).await.exit_code, Some(0));
        let sandbox = node.runtime.pod_sandbox_status(&pod).await.unwrap();
        assert_eq!(sandbox.state, SandboxState::Ready);
        assert_eq!(after.log_path, before.log_path);
        node.end().await;
    });
}

#[test]
fn a_shim_is_small_and_its_death_is_seen() {
    in_namespaces("life::a_shim_is_small_and_its_death_is_seen", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let id = node.started(&pod, "c", "while :; do echo some line; sleep 0.01; done").await;
        let shim = node.runtime.pod_sandbox_status(&pod).await.unwrap().shim_pid.unwrap();
        let log = node.runtime.container_status(&id).await.unwrap().log_path;
        until("it has its work to do", || async { lines(&log).len() > 30 }).await;
        let rollup = std::fs::read_to_string(format!("/proc/{shim}/smaps_rollup")).unwrap();
        let private: u64 = rollup
            .lines()
            .filter(|l| l.starts_with("Private_"))
            .filter_map(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum();
        println!("a shim's private memory: {private} KiB");
        assert!(private < 2048, "{rollup}");
        for tree in std::fs::read_to_string(format!("/proc/{shim}/cgroup")).unwrap().lines() {
            assert!(tree.ends_with("/keelson-shims"), "{tree}");
        }

        // Somebody kills it: the pod is not ready, and can be removed all the same.
        assert!(
            std::process::Command::new("kill")
                .args(["-9", &shim.to_string()])
                .status()
                .unwrap()
                .success()
        );
        until("the sandbox is not ready", || async {
            let status = node.runtime.pod_sandbox_status(&pod).await.unwrap();
            status.state == SandboxState::NotReady
        })
        .await;
        let status = node.runtime.container_status(&id).await.unwrap();
        assert_eq!(status.state, ContainerState::Unknown);
        node.runtime.stop_pod_sandbox(&pod).await.unwrap();
        assert_eq!(node.exited(&id).await.exit_code, Some(137));
        node.runtime.remove_pod_sandbox(&pod).await.unwrap();
        assert!(node.runtime.list_containers(None).await.unwrap().is_empty());
        let other = node.pod("two", |_| {}).await;
        node.started(&other, "c", "sleep 100").await;
        node.end().await;
    });
}

#[test]
fn too_much_memory_is_seen_as_such() {
    in_namespaces("life::too_much_memory_is_seen_as_such", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let hog = node
            .container(&pod, "hog", "x=a; while :; do x=$x$x; done", |c| {
                c.resources.memory_limit = Some(32 << 20);
            })
            .await;
        node.runtime.start_container(&hog).await.unwrap();
        let status = node.exited(&hog).await;
        assert!(status.oom_killed, "{status:?}");
        assert_eq!((status.exit_code, status.reason.as_str()), (Some(137), "OOMKilled"));
        node.end().await;
    });
}

#[test]
fn containers_stop_when_asked_and_when_made_to() {
    in_namespaces("life::containers_stop_when_asked_and_when_made_to", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let polite =
            node.started(&pod, "polite", "trap 'exit 9' TERM; while :; do sleep 0.05; done").await;
        let deaf = node.started(&pod, "deaf", "trap '' TERM; while :; do sleep 0.05; done").await;
        node.runtime.exec_sync(&polite, &["true".into()], None).await.unwrap();
        node.runtime.stop_container(&polite, Duration::from_secs(10)).await.unwrap();
        assert_eq!(node.exited(&polite).await.exit_code, Some(9));
        node.runtime.stop_container(&deaf, Duration::from_millis(300)).await.unwrap();
        assert_eq!(node.exited(&deaf).await.exit_code, Some(137));
        node.runtime.stop_container(&deaf, Duration::from_secs(1)).await.unwrap();
        node.runtime.remove_container(&deaf).await.unwrap();
        node.runtime.remove_container(&deaf).await.unwrap();
        assert!(node.runtime.container_status(&deaf).await.is_err());
        node.end().await;
    });
}
