//! Networks and namespaces between pods and the node.

use std::time::Duration;

use keelson_runtime_shim::{PodRuntime, runtime::*};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fixture::{Node, in_namespaces, until};

#[test]
fn pods_and_node_reach_each_other() {
    in_namespaces("shared::pods_and_node_reach_each_other", async {
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
    in_namespaces("shared::namespaces_are_shared_as_asked", async {
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
