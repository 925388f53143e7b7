//! The embedded runtime against the real kernel: processes, mounts, cgroups, namespaces, packets.
//!
//! Each test runs as a process of its own in network and mount namespaces of its own, with a cgroup
//! and folders of its own, and compares at its end what is left with nothing. They need root.

#![allow(clippy::unwrap_used)] // a panic is how a test fails

#[path = "embedded/fixture.rs"]
mod fixture;

use std::{path::Path, time::Duration};

use fixture::{Node, in_cgroup, in_namespaces, until};
use keelson_runtime_shim::{PodRuntime, runtime::*};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn lines(path: &Path) -> Vec<(String, String, String)> {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(|line| {
            let mut words = line.splitn(4, ' ').skip(1).map(str::to_owned);
            let mut next = || words.next().unwrap_or_default();
            (next(), next(), next())
        })
        .collect()
}

#[test]
fn a_container_runs_logs_and_ends() {
    in_namespaces("a_container_runs_logs_and_ends", async {
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
    in_namespaces("pods_outlive_the_runtime_that_made_them", async {
        let mut node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let runs = node.started(&pod, "runs", "while :; do echo tick; sleep 0.1; done").await;
        let ends = node.started(&pod, "ends", "sleep 0.5; exit 3").await;
        let made = node.container(&pod, "made", "exit 0", |_| {}).await;
        let before = node.runtime.container_status(&runs).await.unwrap();
        node.reopen(Duration::from_secs(1)).await;
        let after = node.runtime.container_status(&runs).await.unwrap();
        assert_eq!(after.state, ContainerState::Running);
        assert_eq!((after.pid, after.started_at), (before.pid, before.started_at));
        let ended = node.runtime.container_status(&ends).await.unwrap();
        assert_eq!((ended.state, ended.exit_code), (ContainerState::Exited, Some(3)));
        node.runtime.start_container(&made).await.unwrap();
        assert_eq!(node.exited(&made).await.exit_code, Some(0));
        let sandbox = node.runtime.pod_sandbox_status(&pod).await.unwrap();
        assert_eq!(sandbox.state, SandboxState::Ready);
        assert!(lines(&after.log_path).len() > 5);
        node.end().await;
    });
}

#[test]
fn a_shim_is_small_and_its_death_is_seen() {
    in_namespaces("a_shim_is_small_and_its_death_is_seen", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let id = node.started(&pod, "c", "while :; do echo some line; sleep 0.01; done").await;
        let shim = node.runtime.pod_sandbox_status(&pod).await.unwrap().shim_pid.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
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
fn no_line_is_lost_and_long_ones_are_split() {
    in_namespaces("no_line_is_lost_and_long_ones_are_split", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; \
                      head -c 40000 /dev/zero; echo";
        let id = node.container(&pod, "c", script, |_| {}).await;
        node.runtime.start_container(&id).await.unwrap();
        // Rotated while it writes: what is between the two files is in one of them.
        let log = node.runtime.container_status(&id).await.unwrap().log_path;
        let old = log.with_extension("old");
        until("it writes", || async { std::fs::metadata(&log).is_ok_and(|m| m.len() > 5000) })
            .await;
        std::fs::rename(&log, &old).unwrap();
        node.runtime.reopen_container_log(&id).await.unwrap();
        node.exited(&id).await;
        let mut all = lines(&old);
        all.extend(lines(&log));
        let numbered = all.iter().filter(|(_, tag, text)| tag == "F" && text.starts_with("line "));
        assert!(numbered.map(|(_, _, t)| t.clone()).eq((0..20000).map(|i| format!("line {i}"))));
        let tail: Vec<_> =
            all[20000..].iter().map(|(_, tag, text)| (tag.as_str(), text.len())).collect();
        assert_eq!(tail, [("P", 16384), ("P", 16384), ("F", 40000 - 2 * 16384)]);
        node.end().await;
    });
}

#[test]
fn commands_run_in_containers() {
    in_namespaces("commands_run_in_containers", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let id = node.started(&pod, "c", "sleep 1000").await;
        let run = |script: &str| {
            let command = ["sh".to_owned(), "-c".to_owned(), script.to_owned()];
            let runtime = node.runtime.clone();
            let id = id.clone();
            async move { runtime.exec_sync(&id, &command, Some(Duration::from_secs(10))).await }
        };
        let output = run("echo hello; echo oops >&2; exit 5").await.unwrap();
        assert_eq!(output.exit_code, 5);
        assert_eq!(
            (output.stdout.as_slice(), output.stderr.as_slice()),
            (&b"hello\n"[..], &b"oops\n"[..])
        );

        // The filter, the capabilities and the cgroup are the container's.
        let output =
            run("grep -E '^(Seccomp|CapBnd|NoNewPrivs):' /proc/self/status; cat /proc/1/cmdline")
                .await
                .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("Seccomp:\t2"), "{text}");
        assert!(text.contains("CapBnd:\t00000000a80425fb"), "{text}");
        assert!(text.contains("sleep"), "{text}");

        let late = node
            .runtime
            .exec_sync(&id, &["sleep".into(), "100".into()], Some(Duration::from_millis(100)))
            .await;
        assert!(matches!(late, Err(RuntimeError::Timeout { .. })), "{late:?}");
        let missing = node.runtime.exec_sync(&id, &["nothing-here".into()], None).await;
        assert!(missing.unwrap_err().to_string().contains("not found in $PATH"));

        // Standard input is handed through, and its end.
        let request = ExecRequest {
            command: vec!["cat".into()],
            stdin: true,
            stdout: true,
            ..ExecRequest::default()
        };
        let mut session = node.runtime.exec(&id, &request).await.unwrap();
        let mut stdin = session.stdin.take().unwrap();
        stdin.write_all(b"through").await.unwrap();
        drop(stdin);
        let mut text = String::new();
        session.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "through");
        assert_eq!(session.exit.await.unwrap().unwrap(), 0);

        // A terminal has a size, and says who has it.
        let request = ExecRequest {
            command: vec!["sh".into(), "-c".into(), "read x; stty size; tty; exit 4".into()],
            stdin: true,
            stdout: true,
            tty: true,
            ..ExecRequest::default()
        };
        let mut session = node.runtime.exec(&id, &request).await.unwrap();
        let size = TerminalSize { width: 91, height: 17 };
        session.resize.as_ref().unwrap().send(size).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        session.stdin.as_mut().unwrap().write_all(b"go\n").await.unwrap();
        let mut text = String::new();
        session.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
        assert!(text.contains("17 91") && text.contains("/dev/pts/0"), "{text:?}");
        assert_eq!(session.exit.await.unwrap().unwrap(), 4);
        node.end().await;
    });
}

#[test]
fn what_is_asked_for_is_enforced() {
    in_namespaces("what_is_asked_for_is_enforced", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let script = "grep Seccomp: /proc/self/status; id; mount -t tmpfs x /etc || echo no mount; \
            mknod /disk b 7 0; ls /disk; cat /disk || echo no device; \
            cat /dev/zero | head -c 3 | wc -c; touch /sys/x || echo no sys; \
            echo 1 > /proc/sys/net/ipv4/ip_forward || echo no proc; \
            cat /proc/self/cgroup; for f in /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max; do \
            test ! -e $f || echo 1 > $f || echo no cgroup; done; \
            unshare -n true || echo no unshare; df /dev/shm | tail -1; ls /proc | grep -c '^[0-9]'";
        let plain = node.container(&pod, "plain", script, |_| {}).await;
        node.runtime.start_container(&plain).await.unwrap();
        let status = node.exited(&plain).await;
        let text = std::fs::read_to_string(&status.log_path).unwrap();
        for expected in [
            "Seccomp:\t2",
            "uid=0",
            "no mount",
            "no device",
            // The device rules say so, not the lack of a device.
            "can't open '/disk': Operation not permitted",
            "F /disk",
            " 3\n",
            "no sys",
            "no proc",
            "no cgroup",
            "no unshare",
            "65536",
        ] {
            assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
        }

        let user = node
            .container(&pod, "user", "id -u; id -g; id -G; grep -E 'CapEff|NoNew' /proc/self/status; touch /x || echo read only; echo to-stdout > /dev/stdout", |c| {
                c.security.run_as_user = Some(1000);
                c.security.run_as_group = Some(2000);
                c.security.supplemental_groups = vec![3000];
                c.security.no_new_privileges = true;
                c.security.readonly_rootfs = true;
            })
            .await;
        node.runtime.start_container(&user).await.unwrap();
        let status = node.exited(&user).await;
        let text = std::fs::read_to_string(&status.log_path).unwrap();
        for expected in [
            "F 1000",
            "F 2000",
            "2000 3000",
            "CapEff:\t0000000000000000",
            "NoNewPrivs:\t1",
            "read only",
            "to-stdout",
        ] {
            assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
        }

        // What can't be had is refused, and says why.
        let config = node.config("wrong", "true", |c| {
            c.security.add_capabilities = vec!["SYS_NOTHING".into()];
        });
        let error = node.runtime.create_container(&pod, &config).await.unwrap_err().to_string();
        assert!(error.contains("SYS_NOTHING"), "{error}");
        let missing =
            node.container(&pod, "missing", "true", |c| c.command = vec!["/no/such".into()]).await;
        let error = node.runtime.start_container(&missing).await.unwrap_err().to_string();
        assert!(error.contains("/no/such"), "{error}");
        let status = node.runtime.container_status(&missing).await.unwrap();
        assert_eq!((status.exit_code, status.reason.as_str()), (Some(128), "StartError"));
        node.end().await;
    });
}

#[test]
fn privileges_mounts_and_limits_are_given_as_asked() {
    in_namespaces("privileges_mounts_and_limits_are_given_as_asked", async {
        let node = Node::start().await;
        let pod = node
            .pod("one", |c| {
                c.sysctls =
                    [("net.ipv4.ip_unprivileged_port_start", "100"), ("kernel.shmmni", "77")]
                        .map(|(k, v)| (k.to_owned(), v.to_owned()))
                        .into();
                c.dns =
                    Some(DnsConfig { servers: vec!["10.96.0.10".into()], ..DnsConfig::default() });
            })
            .await;
        let shared = tempfile::tempdir().unwrap();
        std::fs::write(shared.path().join("file"), "from the host").unwrap();
        let mount = |path: &str, readonly| Mount {
            container_path: path.into(),
            host_path: shared.path().into(),
            readonly,
            recursive_readonly: readonly,
            propagation: MountPropagation::Private,
        };
        let script = "grep CapBnd /proc/self/status; cat /etc/resolv.conf; mount -t tmpfs x /etc && echo mounted; umount /etc; \
            cat /dev/full | head -c 1 | wc -c; cat /data/file; echo written > /data/new; \
            touch /fixed/x || echo fixed; cat /proc/sys/net/ipv4/ip_unprivileged_port_start \
            /proc/sys/kernel/shmmni /etc/resolv.conf /etc/hostname; grep Seccomp: /proc/self/status";
        let all = node
            .container(&pod, "all", script, |c| {
                c.security.privileged = true;
                c.mounts = vec![mount("/data", false), mount("/fixed", true)];
            })
            .await;
        node.runtime.start_container(&all).await.unwrap();
        let status = node.exited(&all).await;
        let text = std::fs::read_to_string(&status.log_path).unwrap();
        for expected in [
            "mounted",
            "from the host",
            "fixed",
            "F 100",
            "F 77",
            "nameserver 10.96.0.10",
            "F one",
            "Seccomp:\t0",
        ] {
            assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
        }
        assert_eq!(std::fs::read_to_string(shared.path().join("new")).unwrap(), "written\n");

        let limits = LinuxResources {
            cpu_shares: Some(512),
            cpu_quota: Some(20_000),
            cpu_period: Some(100_000),
            memory_limit: Some(64 << 20),
            pids_limit: Some(50),
            // Can't be lowered everywhere: then it is left, with a warning.
            oom_score_adj: Some(-998),
            ..LinuxResources::default()
        };
        let limited = node
            .container(&pod, "limited", "cat /sys/fs/cgroup/pids/pids.max; sleep 1000", |c| {
                c.resources = limits.clone();
            })
            .await;
        node.runtime.start_container(&limited).await.unwrap();
        let pid = node.runtime.container_status(&limited).await.unwrap().pid.unwrap();
        let expected = [
            ("cpu", "cpu.shares", "cpu.weight", "512", "59"),
            ("cpu", "cpu.cfs_quota_us", "cpu.max", "20000", "20000 100000"),
            ("memory", "memory.limit_in_bytes", "memory.max", "67108864", "67108864"),
            ("pids", "pids.max", "pids.max", "50", "50"),
        ];
        let check = |when: &str| {
            for (controller, v1, v2, expected_v1, expected_v2) in expected {
                let value = in_cgroup(pid, controller, v1, v2);
                assert!(value == expected_v1 || value == expected_v2, "{when}: {v2}: {value}");
            }
        };
        check("after the start");
        node.runtime.update_container_resources(&limited, &limits).await.unwrap();
        check("after a change to the same");
        let shares = LinuxResources { cpu_shares: Some(512), ..LinuxResources::default() };
        node.runtime.set_parent_cgroup("kubepods", &shares).await.unwrap();
        let value = in_cgroup(pid, "cpu", "../../cpu.shares", "../../cpu.weight");
        assert!(value == "512" || value == "59", "of all pods: {value}");
        let memory = || async {
            let stats = node.runtime.list_pod_sandbox_stats().await.unwrap();
            stats[0].containers.iter().find(|c| c.id == limited).unwrap().usage.memory_limit
        };
        assert_eq!(memory().await, Some(64 << 20));
        for memory_limit in [128 << 20, 32 << 20] {
            let resources =
                LinuxResources { memory_limit: Some(memory_limit), ..LinuxResources::default() };
            node.runtime.update_container_resources(&limited, &resources).await.unwrap();
            assert_eq!(memory().await, Some(u64::try_from(memory_limit).unwrap()));
        }
        node.end().await;
    });
}

#[test]
fn too_much_memory_is_seen_as_such() {
    in_namespaces("too_much_memory_is_seen_as_such", async {
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
    in_namespaces("containers_stop_when_asked_and_when_made_to", async {
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

#[test]
fn attaching_joins_the_streams() {
    in_namespaces("attaching_joins_the_streams", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let id = node
            .container(&pod, "c", "while read line; do echo got $line; done; echo end", |c| {
                c.stdin = true;
                c.stdin_once = true;
            })
            .await;
        node.runtime.start_container(&id).await.unwrap();
        let request = ExecRequest { stdin: true, stdout: true, ..ExecRequest::default() };
        let mut session = node.runtime.attach(&id, &request).await.unwrap();
        let mut stdin = session.stdin.take().unwrap();
        stdin.write_all(b"one\ntwo\n").await.unwrap();
        drop(stdin);
        let mut text = String::new();
        session.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "got one\ngot two\nend\n");
        assert_eq!(session.exit.await.unwrap().unwrap(), 0);
        let status = node.exited(&id).await;
        assert_eq!(lines(&status.log_path).len(), 3);

        let id = node
            .container(&pod, "t", "stty -echo; while read line; do echo got $line; done", |c| {
                c.stdin = true;
                c.tty = true;
            })
            .await;
        node.runtime.start_container(&id).await.unwrap();
        let mut session = node.runtime.attach(&id, &request).await.unwrap();
        session.stdin.as_mut().unwrap().write_all(b"one\n").await.unwrap();
        let mut buffer = [0; 256];
        let mut seen = String::new();
        while !seen.contains("got one") {
            let n = session.stdout.as_mut().unwrap().read(&mut buffer).await.unwrap();
            assert_ne!(n, 0, "{seen}");
            seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
        node.end().await;
    });
}

#[test]
fn pods_and_node_reach_each_other() {
    in_namespaces("pods_and_node_reach_each_other", async {
        let node = Node::start().await;
        let server = node
            .pod("server", |c| {
                c.port_mappings = vec![PortMapping {
                    protocol: Protocol::Tcp,
                    container_port: 80,
                    host_port: 8080,
                    host_ip: None,
                }];
            })
            .await;
        let serve = "while :; do echo -e 'HTTP/1.0 200 OK\\r\\n\\r\\nserved' | nc -l -p 80; done";
        let served = node.started(&server, "s", serve).await;
        let address = node.runtime.pod_sandbox_status(&server).await.unwrap().ips[0];
        let get = |host: String, port: &'static str| async move {
            let output = tokio::process::Command::new("busybox")
                .args(["nc", "-w", "2", &host, port])
                .stdin(std::process::Stdio::null())
                .output()
                .await
                .unwrap();
            String::from_utf8_lossy(&output.stdout).contains("served")
        };
        until("the server answers", || get(address.to_string(), "80")).await;
        until("the host port answers", || get("127.0.0.1".into(), "8080")).await;
        until("the host port answers outside", || get("192.0.2.1".into(), "8080")).await;

        let client = node.pod("client", |_| {}).await;
        let asks = node.started(&client, "c", "sleep 1000").await;
        let from_pod = |in_pod: &ContainerId, host: String, port: &'static str| {
            let (runtime, asks) = (node.runtime.clone(), in_pod.clone());
            async move {
                let command = ["nc", "-w", "2", &host, port].map(str::to_owned);
                let output = runtime.exec_sync(&asks, &command, None).await.unwrap();
                String::from_utf8_lossy(&output.stdout).contains("served")
            }
        };
        until("a pod reaches another", || from_pod(&asks, address.to_string(), "80")).await;
        until("a pod reaches a host port", || from_pod(&asks, "192.0.2.1".into(), "8080")).await;
        until("a pod reaches itself", || from_pod(&served, "192.0.2.1".into(), "8080")).await;
        until("a forwarded port answers", || async {
            // The server takes one connection at a time, and is away in between.
            let Ok(mut forwarded) = node.runtime.port_forward(&server, 80).await else {
                return false;
            };
            let _ = forwarded.write_all(b"GET / HTTP/1.0\r\n\r\n").await;
            let mut text = String::new();
            let _ = forwarded.read_to_string(&mut text).await;
            text.contains("served")
        })
        .await;

        let stats = node.runtime.list_pod_sandbox_stats().await.unwrap();
        let stats = stats.iter().find(|s| s.id == server).unwrap();
        assert_eq!(stats.interfaces[0].name, "eth0");
        assert!(stats.interfaces[0].rx_bytes > 0 && stats.usage.memory_usage > 0);
        assert!(stats.containers.iter().any(|c| c.id == served && c.usage.pids > 0));

        let clash = node
            .runtime
            .run_pod_sandbox(&node.sandbox("clash", |c| {
                c.port_mappings = vec![PortMapping {
                    protocol: Protocol::Tcp,
                    container_port: 1,
                    host_port: 8080,
                    host_ip: Some("192.0.2.1".parse().unwrap()),
                }];
            }))
            .await;
        assert!(clash.unwrap_err().to_string().contains("8080"));
        node.end().await;
    });
}

#[test]
fn namespaces_are_shared_as_asked() {
    in_namespaces("namespaces_are_shared_as_asked", async {
        let node = Node::start().await;
        let pod = node.pod("shared", |c| c.namespaces.share_process_namespace = true).await;
        let first = node.started(&pod, "a", "exec sleep 1234").await;
        let second = node.started(&pod, "b", "sleep 1000").await;
        let ps = node.runtime.exec_sync(&second, &["ps".into()], None).await.unwrap();
        let text = String::from_utf8_lossy(&ps.stdout).into_owned();
        assert!(text.contains("sleep 1234") && text.contains("keelson-pause"), "{text}");
        // Even one that may trace others finds nothing of the host behind the first process.
        let pid = node.runtime.container_status(&first).await.unwrap().pid.unwrap();
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let shared = namespace(&pid.to_string()).unwrap();
        let read = |path: String| std::fs::read_to_string(path).unwrap_or_default();
        let pause = std::fs::read_dir("/proc")
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .find(|pid| {
                namespace(pid).as_ref() == Some(&shared)
                    && read(format!("/proc/{pid}/comm")) == "keelson-pause\n"
            })
            .unwrap();
        assert_eq!(std::fs::read_dir(format!("/proc/{pause}/root")).unwrap().count(), 0);
        assert_eq!(read(format!("/proc/{pause}/cmdline")).trim_end_matches('\0'), "keelson-pause");
        let status = read(format!("/proc/{pause}/status"));
        let capabilities: Vec<_> = status.lines().filter(|l| l.starts_with("Cap")).collect();
        assert_eq!(capabilities.len(), 5, "{status}");
        assert!(capabilities.iter().all(|l| l.ends_with("\t0000000000000000")), "{status}");
        assert!(status.contains("Uid:\t65535"), "{status}");
        node.runtime.stop_container(&first, Duration::ZERO).await.unwrap();
        assert_eq!(node.exited(&first).await.exit_code, Some(137));
        let host = node
            .pod("host", |c| {
                c.namespaces = NamespaceOptions {
                    host_network: true,
                    host_pid: true,
                    host_ipc: true,
                    ..NamespaceOptions::default()
                };
                c.hostname = String::new();
            })
            .await;
        let status = node.runtime.pod_sandbox_status(&host).await.unwrap();
        assert!(status.ips.is_empty() && status.netns.is_none());
        let id = node
            .started(
                &host,
                "h",
                "ip addr | grep 192.0.2.1 && readlink /proc/self/ns/pid && sleep 1000",
            )
            .await;
        let own = std::fs::read_link("/proc/self/ns/pid").unwrap();
        let log = node.runtime.container_status(&id).await.unwrap().log_path;
        until("it says so", || async {
            std::fs::read_to_string(&log).unwrap_or_default().contains(&*own.to_string_lossy())
        })
        .await;
        node.end().await;
    });
}
