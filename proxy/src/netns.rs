//! Network namespaces for tests: each lives as long as the thread that holds it.

use std::{
    process::Command,
    sync::mpsc::{self, Sender},
};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with nothing but loopback, gone when this is dropped.
pub(crate) struct Namespace {
    jobs: Sender<Job>,
    thread: i32,
}

impl Namespace {
    /// Makes a namespace. Needs root.
    pub(crate) fn new() -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (ready, started) = mpsc::channel();
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            ready.send(nix::unistd::gettid().as_raw()).unwrap();
            for job in queue {
                job();
            }
        });
        let namespace = Self { jobs, thread: started.recv().unwrap() };
        namespace.sh("ip link set lo up");
        namespace
    }

    /// Runs something in the namespace and waits for it.
    pub(crate) fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let job = Box::new(move || {
            let _ = done.send(f());
        });
        self.jobs.send(job).unwrap();
        result.recv().expect("the job panicked in its namespace")
    }

    /// Runs a shell command there and returns what it printed.
    pub(crate) fn sh(&self, command: &str) -> String {
        let (ok, output) = self.try_sh(command);
        assert!(ok, "{command}: {output}");
        output
    }

    /// Runs a shell command there: whether it went well, and what it printed.
    pub(crate) fn try_sh(&self, command: &str) -> (bool, String) {
        let command = command.to_owned();
        self.run(move || {
            let output = Command::new("sh").args(["-ec", &command]).output().unwrap();
            let text = [&output.stdout[..], &output.stderr[..]].concat();
            (output.status.success(), String::from_utf8_lossy(&text).into_owned())
        })
    }

    /// Joins this namespace to another one by a pair of interfaces.
    pub(crate) fn join(&self, name: &str, other: &Self, other_name: &str) {
        let path = format!("/proc/{}/task/{}/ns/net", std::process::id(), other.thread);
        self.sh(&format!("ip link add {name} type veth peer name {other_name} netns {path}"));
        self.sh(&format!("ip link set {name} up"));
        other.sh(&format!("ip link set {other_name} up"));
    }
}
