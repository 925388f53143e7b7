//! A machine of the test's own, made of namespaces.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
};

use tempfile::TempDir;

/// The machine's address.
pub const NODE_ADDRESS: &str = "10.99.0.1";
/// The neighbour's address.
pub const NEIGHBOUR_ADDRESS: &str = "10.99.0.2";

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A network namespace with an address, a neighbour, and a folder.
#[derive(Debug)]
pub struct Machine {
    name: String,
    dir: TempDir,
}

impl Machine {
    /// Makes one.
    ///
    /// # Panics
    /// When that fails: tests need root and iproute2.
    pub fn new() -> Self {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("kt{}-{number}", std::process::id());
        let dir = tempfile::Builder::new().prefix("keelson-test-").tempdir().expect("a folder");
        let machine = Self { name, dir };
        let (node, neighbour) = (machine.netns(), machine.neighbour_netns());
        for line in [
            format!("netns add {node}"),
            format!("netns add {neighbour}"),
            format!("-n {node} link add eth0 type veth peer name eth0 netns {neighbour}"),
            format!("-n {node} link set lo up"),
            format!("-n {neighbour} link set lo up"),
            format!("-n {node} address add {NODE_ADDRESS}/24 dev eth0"),
            format!("-n {neighbour} address add {NEIGHBOUR_ADDRESS}/24 dev eth0"),
            format!("-n {node} link set eth0 up"),
            format!("-n {neighbour} link set eth0 up"),
            format!("-n {node} route add default via {NEIGHBOUR_ADDRESS}"),
            format!("-n {neighbour} route add default via {NODE_ADDRESS}"),
        ] {
            ip(&line);
        }
        machine
    }

    /// The name of the machine's network namespace.
    pub fn netns(&self) -> String {
        self.name.clone()
    }

    /// The name of its neighbour's.
    pub fn neighbour_netns(&self) -> String {
        format!("{}n", self.name)
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The binary under test: `KEELSON_BINARY`, else the release build of this checkout.
    ///
    /// # Panics
    /// When there is none: `make build` makes it.
    pub fn binary() -> PathBuf {
        let path = std::env::var_os("KEELSON_BINARY").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/keelson"),
            PathBuf::from,
        );
        assert!(path.exists(), "{} is missing: run `make build`", path.display());
        path
    }

    /// A program, to be run on the machine.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        Self::command_in(&self.netns(), program)
    }

    /// A program, to be run on the neighbour.
    pub fn neighbour_command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        Self::command_in(&self.neighbour_netns(), program)
    }

    fn command_in(netns: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        // `ip netns exec` would make a mount namespace too, and hide what the program mounts.
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{netns}")).arg("--").arg(program);
        command
    }

    /// Runs keelson with its data folder on this machine.
    pub fn keelson(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(Self::binary());
        command.args(arguments).arg("--data-dir").arg(self.data_dir());
        command
    }

    /// The data folder.
    pub fn data_dir(&self) -> PathBuf {
        self.dir().join("k")
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for netns in [self.netns(), self.neighbour_netns()] {
            let _ = Command::new("ip").args(["netns", "delete", &netns]).output();
        }
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What a program that should have succeeded printed.
///
/// # Panics
/// When it failed, with what it said.
pub fn stdout_of(what: &str, output: &Output) -> String {
    assert!(
        output.status.success(),
        "{what}: {}\nstdout: {}\nstderr: {}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
