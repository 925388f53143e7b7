//! What is measured: `keelson proxy`, and a kube-proxy beside it; what they say of themselves.

use std::{
    fs::File,
    path::PathBuf,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use keelson_tests::Machine;

use crate::{node::Running, services::load::metric};

/// How long a proxy may take until its rules are there: operators have reported 13 minutes.
pub(super) const LONGEST: Duration = Duration::from_secs(30 * 60);
/// Between two looks at what a proxy says of itself.
const STEP: Duration = Duration::from_millis(50);
/// How often in a row it must say the same for a sync to be over: each family is one of its own.
const SAME: usize = 3;

/// What runs: ours, or kube-proxy.
#[derive(Clone, Debug)]
pub(super) struct Contestant {
    pub(super) name: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
}

/// Ours, and the other one if there is one.
pub(super) fn contestants(kubeconfig: &str, kube_proxy: Option<PathBuf>) -> Vec<Contestant> {
    let common = ["--hostname-override", "neighbour", "--kubeconfig", kubeconfig];
    let ours = ["proxy"].iter().chain(&common).map(|a| (*a).to_owned()).collect();
    let mut all =
        vec![Contestant { name: "keelson proxy", program: Machine::binary(), arguments: ours }];
    if let Some(program) = kube_proxy {
        // The connection table's limit can't be raised everywhere.
        let mode = ["--proxy-mode", "nftables", "--conntrack-max-per-core", "0"];
        let arguments = common.iter().chain(&mode).map(|a| (*a).to_owned()).collect();
        all.push(Contestant { name: "kube-proxy", program, arguments });
    }
    all
}

/// A proxy that runs on the neighbour, and is killed in the end.
pub(super) struct Proxy(Child);

impl Proxy {
    /// Starts it.
    pub(super) fn start(machine: &Machine, contestant: &Contestant) -> anyhow::Result<Self> {
        let path = machine.dir().join(format!("{}.log", contestant.name.replace(' ', "-")));
        let log = File::options().create(true).append(true).open(path)?;
        let mut command = machine.neighbour_command(&contestant.program);
        command.args(&contestant.arguments).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        Ok(Self(command.spawn().with_context(|| contestant.program.display().to_string())?))
    }

    /// Its process.
    pub(super) fn pid(&self) -> i32 {
        // nsenter without --fork becomes the program it starts.
        self.0.id().cast_signed()
    }

    fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.0.try_wait()?.is_some())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How often something happened, and how long all of it took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Total {
    pub(super) count: f64,
    seconds: f64,
}

impl Total {
    fn of(text: &str, histogram: &str) -> Self {
        let value = |suffix| metric(text, &format!("{histogram}_{suffix}")).unwrap_or_default();
        Self { count: value("count"), seconds: value("sum") }
    }

    fn since(self, before: Self) -> Self {
        Self { count: self.count - before.count, seconds: self.seconds - before.seconds }
    }

    /// In milliseconds.
    pub(super) fn sum(self) -> f64 {
        self.seconds * 1e3
    }

    fn mean(self) -> Option<f64> {
        (self.count > 0.0).then(|| self.sum() / self.count)
    }
}

/// What a proxy says of itself on its metrics' port since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Account {
    /// Comparisons of everything with the kernel, in each family.
    pub(super) full: Total,
    /// Of how many families there were some.
    families: usize,
    syncs: Total,
    /// From an event to its commit; kube-proxy doesn't tell.
    commits: Total,
}

impl Account {
    fn read(text: &str) -> Self {
        let full = "kubeproxy_sync_full_proxy_rules_duration_seconds";
        let counts = text.lines().filter(|line| line.starts_with(&format!("{full}_count")));
        Self {
            full: Total::of(text, full),
            families: counts.filter(|line| !line.ends_with(" 0")).count(),
            syncs: Total::of(text, "kubeproxy_sync_proxy_rules_duration_seconds"),
            commits: Total::of(text, "keelson_proxy_event_to_commit_seconds"),
        }
    }

    /// What it says now.
    pub(super) fn now(running: &Running) -> anyhow::Result<Self> {
        let text = running.cluster.fetch_from_neighbour("http://127.0.0.1:10249/metrics");
        Ok(Self::read(&text.map_err(|error| anyhow::anyhow!("the proxy's metrics: {error}"))?))
    }

    /// What it says once it has compared everything and is at rest.
    pub(super) fn at_rest(running: &Running, proxy: &mut Proxy) -> anyhow::Result<Self> {
        let start = Instant::now();
        let (mut last, mut same) = (Self::default(), 0);
        while same < SAME {
            if proxy.has_ended()? {
                bail!("the proxy ended");
            }
            if start.elapsed() > LONGEST {
                bail!("no full sync in {LONGEST:?}, or no end of syncs");
            }
            // The step between two looks.
            std::thread::sleep(STEP);
            let now = Self::now(running).unwrap_or_default();
            same = if now == last && now.full.count > 0.0 { same + 1 } else { 0 };
            last = now;
        }
        Ok(last)
    }

    /// How often everything was compared.
    pub(super) fn full_syncs(&self) -> f64 {
        self.full.count / self.families.max(1) as f64
    }

    /// From an event to its commit since an earlier account, in milliseconds, as the mean; where
    /// that isn't told, how long a sync took.
    pub(super) fn commit_since(&self, before: &Self) -> Option<f64> {
        self.commits.since(before.commits).mean().or_else(|| self.syncs.since(before.syncs).mean())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_read_over_both_families() {
        let full = "kubeproxy_sync_full_proxy_rules_duration_seconds";
        let sync = "kubeproxy_sync_proxy_rules_duration_seconds";
        let text = |syncs: u32, seconds: f64| {
            format!(
                "{full}_sum{{ip_family=\"IPv4\"}} 0.2\n{full}_count{{ip_family=\"IPv4\"}} 2\n\
                 {full}_sum{{ip_family=\"IPv6\"}} 0.1\n{full}_count{{ip_family=\"IPv6\"}} 2\n\
                 {sync}_sum {seconds}\n{sync}_count {syncs}\n"
            )
        };
        let before = Account::read(&text(10, 1.0));
        assert_eq!((before.full_syncs(), before.full.count), (2.0, 4.0));
        assert!((before.full.sum() - 300.0).abs() < 1e-9, "{before:?}");
        let after = Account::read(&text(14, 1.2));
        assert!(after.commit_since(&before).is_some_and(|ms| (ms - 50.0).abs() < 1e-6));
        assert_eq!(after.commit_since(&after), None);
        let own = "keelson_proxy_event_to_commit_seconds_sum 0.003\n\
                   keelson_proxy_event_to_commit_seconds_count 3\n";
        let told = Account::read(&format!("{}{own}", text(14, 1.2)));
        assert!(told.commit_since(&before).is_some_and(|ms| (ms - 1.0).abs() < 1e-9));
    }
}
