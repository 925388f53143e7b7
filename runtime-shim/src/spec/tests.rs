//! Specs as a whole, against golden files.
//!
//! Written anew by `KEELSON_BLESS=1 cargo test -p keelson-runtime-shim spec`; look at the difference.

use std::path::Path;

use super::*;
use crate::runtime::*;

struct Case {
    sandbox: SandboxConfig,
    container: ContainerConfig,
    image: ImageConfiguration,
    host: Host,
    places: Places,
    user: LinuxUser,
    devices: Vec<DeviceNode>,
    localhost_seccomp: Option<Vec<u8>>,
}

fn case() -> Case {
    let image = serde_json::from_value(json!({
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": []},
        "config": {
            "Entrypoint": ["/entry"],
            "Cmd": ["default"],
            "Env": ["A=image", "B=image"],
            "WorkingDir": "/work",
            "StopSignal": "SIGQUIT",
        },
    }))
    .unwrap();
    Case {
        sandbox: SandboxConfig { hostname: "pod".into(), ..SandboxConfig::default() },
        container: ContainerConfig { name: "c".into(), ..ContainerConfig::default() },
        image,
        host: Host {
            architecture: "x86_64".into(),
            cgroup_v2: true,
            swap_accounting: false,
            capabilities: capabilities_from_bits(u64::MAX),
            hostname: "node".into(),
            mqueue: true,
        },
        places: Places {
            rootfs: "/c/rootfs".into(),
            shm: "/s/shm".into(),
            resolv_conf: "/s/resolv.conf".into(),
            hostname: "/s/hostname".into(),
            cgroup: "/kubepods/podx/c".into(),
            cgroup_v1: Vec::new(),
            netns: Some("/run/netns/s".into()),
            shim_pid: 42,
            pod_init: None,
        },
        user: LinuxUser { uid: 0, gid: 0, supplemental_groups: vec![0] },
        devices: Vec::new(),
        localhost_seccomp: None,
    }
}

impl Case {
    fn build(&self) -> Result<Value, SpecError> {
        let inputs = Inputs {
            sandbox: &self.sandbox,
            container: &self.container,
            image: &self.image,
            host: &self.host,
            places: &self.places,
            user: &self.user,
            devices: &self.devices,
            localhost_seccomp: self.localhost_seccomp.clone(),
        };
        let written = build_value(&inputs)?;
        let spec = build(&inputs)?;
        // A misspelt name would be dropped without a word when the value becomes a spec.
        let read = serde_json::to_value(&spec).unwrap();
        assert_contains(&read, &written, "");
        Ok(written)
    }
}

/// Everything that was written is in what was read.
fn assert_contains(read: &Value, written: &Value, at: &str) {
    match (read, written) {
        (Value::Object(read), Value::Object(written)) => {
            for (name, value) in written {
                let empty = value.as_object().is_some_and(serde_json::Map::is_empty)
                    || value.as_array().is_some_and(Vec::is_empty);
                match read.get(name) {
                    Some(found) => assert_contains(found, value, &format!("{at}.{name}")),
                    None => assert!(empty, "{at}.{name} got lost"),
                }
            }
        }
        (Value::Array(read), Value::Array(written)) if at.contains(".capabilities.") => {
            // A set, in whatever order.
            assert_eq!(read.len(), written.len(), "{at}");
        }
        (Value::Array(read), Value::Array(written)) => {
            assert_eq!(read.len(), written.len(), "{at}");
            for (read, written) in read.iter().zip(written) {
                assert_contains(read, written, at);
            }
        }
        (read, written) => assert_eq!(read, written, "{at}"),
    }
}

fn golden(name: &str, case: &Case) {
    let mut spec = case.build().unwrap();
    // The long lists have tests of their own.
    if let Some(names) = spec.pointer_mut("/linux/seccomp/syscalls/0/names") {
        *names = json!("…");
    }
    let text = serde_json::to_string_pretty(&spec).unwrap() + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/spec/golden/{name}.json"));
    if std::env::var_os("KEELSON_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        text == expected,
        "{name} is not as in {}; if that is right, write it anew with KEELSON_BLESS=1:\n{text}",
        path.display()
    );
}

#[test]
fn a_plain_container() {
    let mut case = case();
    case.container.security.seccomp = SeccompProfile::RuntimeDefault;
    golden("plain", &case);
}

#[test]
fn a_restricted_container_with_mounts_and_limits_on_version_1() {
    let mut case = case();
    case.host.cgroup_v2 = false;
    case.host.swap_accounting = true;
    case.places.cgroup_v1 = vec![
        ("cpu".into(), "/sys/fs/cgroup/cpu/kubepods/podx/c".into()),
        ("memory".into(), "/sys/fs/cgroup/memory/kubepods/podx/c".into()),
    ];
    case.user = LinuxUser { uid: 1000, gid: 2000, supplemental_groups: vec![2000, 3000] };
    case.container = ContainerConfig {
        name: "c".into(),
        command: vec!["run".into()],
        env: vec![("B".into(), "pod".into()), ("C".into(), "x=y".into())],
        tty: true,
        resources: LinuxResources {
            cpu_shares: Some(512),
            cpu_quota: Some(50_000),
            cpu_period: Some(100_000),
            memory_limit: Some(64 << 20),
            pids_limit: Some(100),
            ..LinuxResources::default()
        },
        security: ContainerSecurity {
            drop_capabilities: vec!["ALL".into()],
            add_capabilities: vec!["NET_BIND_SERVICE".into()],
            no_new_privileges: true,
            readonly_rootfs: true,
            ..ContainerSecurity::default()
        },
        mounts: vec![
            Mount {
                container_path: "/etc/hosts".into(),
                host_path: "/pod/hosts".into(),
                readonly: false,
                recursive_readonly: false,
                propagation: MountPropagation::Private,
            },
            Mount {
                container_path: "/dev/shm".into(),
                host_path: "/pod/shm".into(),
                readonly: true,
                recursive_readonly: true,
                propagation: MountPropagation::HostToContainer,
            },
        ],
        devices: Vec::new(),
        ..ContainerConfig::default()
    };
    case.devices = vec![DeviceNode {
        path: "/dev/fuse".into(),
        block: false,
        major: 10,
        minor: 229,
        mode: 0o666,
        uid: 0,
        gid: 0,
        access: "rw".into(),
    }];
    golden("restricted", &case);
}

#[test]
fn a_privileged_container_on_the_hosts_namespaces() {
    let mut case = case();
    case.sandbox.hostname = String::new();
    case.sandbox.namespaces = NamespaceOptions {
        host_network: true,
        host_pid: true,
        host_ipc: true,
        share_process_namespace: false,
    };
    case.places.netns = None;
    case.container.security.privileged = true;
    case.container.security.seccomp = SeccompProfile::RuntimeDefault;
    golden("privileged", &case);
}

#[test]
fn commands_follow_the_documented_table() {
    let own = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
    for (command, args, expected) in [
        (own(&[]), own(&[]), own(&["/entry", "default"])),
        (own(&["x"]), own(&[]), own(&["x"])),
        (own(&[]), own(&["y"]), own(&["/entry", "y"])),
        (own(&["x"]), own(&["y"]), own(&["x", "y"])),
    ] {
        let mut case = case();
        case.container.command = command;
        case.container.args = args;
        assert_eq!(case.build().unwrap()["process"]["args"], json!(expected));
    }
}

#[test]
fn what_cannot_be_had_is_refused() {
    let refused = |change: &dyn Fn(&mut Case), word: &str| {
        let mut case = case();
        change(&mut case);
        let error = case.build().unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    refused(
        &|c| {
            c.image.set_config(None);
        },
        "no command",
    );
    refused(&|c| c.container.working_dir = Some("here".into()), "here");
    refused(&|c| c.container.env = vec![("A=B".into(), String::new())], "A=B");
    refused(
        &|c| {
            c.host.cgroup_v2 = false;
            c.container.resources.unified = BTreeMap::from([("memory.high".into(), "1".into())]);
        },
        "memory.high",
    );
    refused(&|c| c.container.security.seccomp = SeccompProfile::Localhost("/p".into()), "/p");
    let mount = |path: &str, recursive| Mount {
        container_path: path.into(),
        host_path: "/x".into(),
        readonly: false,
        recursive_readonly: recursive,
        propagation: MountPropagation::Private,
    };
    refused(&|c| c.container.mounts = vec![mount("/a/../..", false)], "..");
    refused(&|c| c.container.mounts = vec![mount("/", false)], "\"/\"");
    refused(&|c| c.container.mounts = vec![mount("/a", true)], "recursively");
}

#[test]
fn stop_signals_have_names_and_numbers() {
    let mut container = ContainerConfig::default();
    let image = case().image;
    assert_eq!(stop_signal(&container, &image).unwrap(), libc::SIGQUIT);
    for (name, number) in
        [("SIGTERM", 15), ("usr1", 10), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX", 64)]
    {
        container.stop_signal = Some(name.into());
        assert_eq!(stop_signal(&container, &image).unwrap(), number, "{name}");
    }
    for name in ["SIGNOTHING", "0", "65", "RTMIN+99"] {
        container.stop_signal = Some(name.into());
        assert!(stop_signal(&container, &image).is_err(), "{name}");
    }
}
