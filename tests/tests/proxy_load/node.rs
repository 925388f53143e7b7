//! A node with pods that answer, a control plane, and `keelson proxy` as a process that is killed
//! and started.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use keelson_tests::{
    DEADLINE, Machine, NODE_ADDRESS,
    inside::{enter, inside},
    stdout_of, wait_for,
};

/// How many pods there are.
pub(crate) const PODS: u8 = 4;
/// Where pods answer with their number.
pub(crate) const PORT: u16 = 8_080;
/// Where they answer with their number, and then to every word.
pub(crate) const TALK: u16 = 9_090;

/// What puts the rules into force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Nftables,
    Iptables,
    Userspace,
}

impl Mode {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Userspace => "userspace",
        }
    }
}

/// The node. Everything ends with it.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) machine: Machine,
    control_plane: Child,
    proxy: Option<Child>,
}

impl Node {
    /// Makes the pods and starts the control plane.
    pub(crate) fn start() -> Self {
        let machine = Machine::new();
        fs::create_dir_all(machine.data_dir()).expect("a folder");
        let mut control_plane = machine.keelson(&["control-plane", "--node-name", "n1"]);
        let control_plane = logged(&machine, "control-plane", &mut control_plane);
        let node = Self { machine, control_plane, proxy: None };
        // Without rules packets to a Service leave by a way that leads nowhere: sent back where
        // they came from they would be answered with a redirect.
        let nowhere = node.pod(0);
        ip(&format!("netns add {nowhere}"));
        node.sh(&format!(
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0 \
             net.netfilter.nf_conntrack_tcp_timeout_time_wait=5 net.netfilter.nf_conntrack_udp_timeout=5
             ip link add out type veth peer name eth0 netns {nowhere}; ip link set out up
             ip -n {nowhere} link set eth0 up
             ip addr add 203.0.113.1/24 dev out
             ip neigh add 203.0.113.2 dev out lladdr 02:00:00:00:00:01
             ip route replace default via 203.0.113.2 src {NODE_ADDRESS}"
        ));
        for n in 1..=PODS {
            node.make_pod(n);
        }
        // Apart from the ports that clients choose themselves.
        let places = [node.machine.netns(), node.machine.neighbour_netns()];
        for netns in places.into_iter().chain((1..=PODS).map(|n| node.pod(n))) {
            let range = inside(&netns, || {
                Ok(fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10000 29999")?)
            });
            range.expect("a range of ports");
        }
        let admin = node.machine.data_dir().join("admin.conf");
        wait_for("the API server", DEADLINE, || {
            let mut kubectl = node.machine.command("kubectl");
            kubectl.args(["get", "--raw", "/readyz", "--kubeconfig"]).arg(&admin);
            let output = kubectl.output().expect("kubectl");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.success() { Ok(()) } else { Err(said) }
        });
        node
    }

    fn make_pod(&self, n: u8) {
        let pod = self.pod(n);
        ip(&format!("netns add {pod}"));
        self.sh(&format!(
            "ip link add pod{n} type veth peer name eth0 netns {pod}
             ip addr add 10.244.{n}.1/24 dev pod{n}; ip link set pod{n} up"
        ));
        for line in [
            "link set lo up".to_owned(),
            format!("addr add {}/24 dev eth0", pod_address(n)),
            "link set eth0 up".to_owned(),
            format!("route add default via 10.244.{n}.1"),
        ] {
            ip(&format!("-n {pod} {line}"));
        }
        serve(&pod, n);
    }

    /// The network namespace of a pod; 0 is where packets get lost.
    pub(crate) fn pod(&self, n: u8) -> String {
        format!("{}p{n}", self.machine.netns())
    }

    /// Runs a shell script on the node.
    pub(crate) fn sh(&self, script: &str) -> String {
        let output = self.machine.command("sh").args(["-ec", script]).output().expect("sh");
        stdout_of(script, &output)
    }

    /// Starts the proxy in a mode, without waiting for anything.
    pub(crate) fn start_proxy(&mut self, mode: Mode) {
        assert!(self.proxy.is_none(), "one at a time");
        let kubeconfig = self.machine.data_dir().join("kube-proxy.conf");
        let mut command = self.machine.keelson(&["proxy", "--hostname-override", "n1"]);
        command.arg("--kubeconfig").arg(kubeconfig);
        command.args(["--proxy-mode", mode.as_str(), "--bind-address", NODE_ADDRESS]);
        // How soon the iptables mode notices that another program changed its rules.
        command.args(["--iptables-sync-period", "300ms"]);
        self.proxy = Some(logged(&self.machine, "proxy", &mut command));
    }

    /// Waits until a started proxy's rules are in force, and those of other modes gone.
    pub(crate) fn wait_in_force(&self, mode: Mode) {
        wait_for(&format!("{} to be in force", mode.as_str()), DEADLINE, || {
            let found = self.page("/proxyMode")?;
            let syncs = self.metric("kubeproxy_sync_full_proxy_rules_duration_seconds_count")?;
            if found == mode.as_str() && syncs >= 1.0 { Ok(()) } else { Err(found) }
        });
        wait_for(&format!("nothing but {} to be there", mode.as_str()), DEADLINE, || {
            let left = self.rules_of_others(mode);
            if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
        });
    }

    /// Whether packets find their way to the Service that stays, in the iptables mode.
    pub(crate) fn iptables_lead_to_services(&self) -> bool {
        let saved = self.sh("iptables-save -t nat");
        let hooked = |chain: &str| {
            let begin = format!("-A {chain} ");
            saved.lines().any(|l| l.starts_with(&begin) && l.ends_with("-j KUBE-SERVICES"))
        };
        let leads = saved.lines().any(|l| l.starts_with("-A KUBE-SERVICES -d 10.96.0.90/32"));
        hooked("PREROUTING") && hooked("OUTPUT") && leads
    }

    fn rules_of_others(&self, mode: Mode) -> Vec<String> {
        let mut left = Vec::new();
        for (other, script, mark) in [
            (Mode::Nftables, "nft list tables", "keelson-proxy"),
            (Mode::Iptables, "iptables-save -t nat", "KUBE-SERVICES"),
            (Mode::Userspace, "ip route show table local proto 75", "local"),
        ] {
            if other != mode {
                let listed = self.sh(script);
                left.extend(listed.lines().filter(|l| l.contains(mark)).map(str::to_owned));
            }
        }
        left
    }

    /// Kills the proxy as a crash would.
    pub(crate) fn kill_proxy(&mut self) {
        let mut proxy = self.proxy.take().expect("a running proxy");
        let ended = proxy.try_wait().expect("wait");
        assert!(ended.is_none(), "the proxy ended by itself: {ended:?}");
        proxy.kill().expect("kill");
        proxy.wait().expect("wait");
    }

    /// Ends the proxy as systemd does.
    pub(crate) fn stop_proxy(&mut self) {
        let mut proxy = self.proxy.take().expect("a running proxy");
        // SAFETY: a signal to a process that we started and have not waited for.
        unsafe { libc::kill(proxy.id().cast_signed(), libc::SIGTERM) };
        let status = proxy.wait().expect("wait");
        assert!(status.success(), "the proxy: {status}");
    }

    /// A page of the running proxy.
    pub(crate) fn page(&self, path: &str) -> Result<String, String> {
        let got = inside(&self.machine.netns(), || {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 10_249))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: n1\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        });
        let text = got.map_err(|error| error.to_string())?;
        let (_, body) = text.split_once("\r\n\r\n").ok_or_else(|| text.clone())?;
        Ok(body.to_owned())
    }

    /// The sum of a metric's series.
    pub(crate) fn metric(&self, name: &str) -> Result<f64, String> {
        let page = self.page("/metrics")?;
        let values = page.lines().filter(|line| line.starts_with(name)).filter_map(|line| {
            line.rsplit_once(' ').and_then(|(_, value)| value.parse::<f64>().ok())
        });
        Ok(values.sum())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for child in self.proxy.iter_mut().chain([&mut self.control_plane]) {
            let _ = child.kill();
            let _ = child.wait();
        }
        for n in 0..=PODS {
            let _ = Command::new("ip").args(["netns", "delete", &self.pod(n)]).output();
        }
        if thread::panicking() {
            let log = fs::read_to_string(self.machine.dir().join("proxy.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("log of the proxy:\n{}", lines[lines.len().saturating_sub(80)..].join("\n"));
        }
    }
}

/// A pod's address.
pub(crate) fn pod_address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, n, 2)
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2");
    stdout_of(&format!("ip {arguments}"), &output);
}

fn logged(machine: &Machine, name: &str, command: &mut Command) -> Child {
    let path = machine.dir().join(format!("{name}.log"));
    let log = File::options().create(true).append(true).open(path).expect("a log");
    command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
    command.spawn().expect("the binary")
}

/// Answers in a namespace until the process ends.
fn serve(netns: &str, n: u8) {
    for port in [PORT, TALK] {
        let address = SocketAddrV4::new(pod_address(n), port);
        let bound = inside(netns, || Ok((TcpListener::bind(address)?, UdpSocket::bind(address)?)));
        let (listener, socket) = bound.expect("a pod's port");
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.write_all(&[n]);
                if port == TALK {
                    thread::spawn(move || {
                        let mut word = [0];
                        while stream.read_exact(&mut word).is_ok() {
                            if stream.write_all(&word).is_err() {
                                return;
                            }
                        }
                    });
                }
            }
        });
        thread::spawn(move || {
            let mut buffer = [0; 16];
            while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&[n], peer);
            }
        });
    }
}

/// Asks on a thread in a namespace.
pub(crate) fn in_namespace<T: Send + 'static>(
    netns: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let netns = netns.to_owned();
    thread::spawn(move || {
        enter(&netns).expect("a network namespace");
        work()
    })
}
