//! What a container may and may not do.

use keelson_runtime_shim::{PodRuntime, runtime::*};

use crate::fixture::{Node, in_cgroup, in_namespaces};

#[test]
fn what_is_asked_for_is_enforced() {
    in_namespaces("enforced::what_is_asked_for_is_enforced", async {
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
    in_namespaces("enforced::privileges_mounts_and_limits_are_given_as_asked", async {
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
