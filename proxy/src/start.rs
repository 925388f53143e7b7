//! Which backend puts the rules into force.
//!
//! The mode that was asked for comes first. Where the machine can't do it the next one is taken,
//! and that is said loudly: a node whose Services answer in another way is worth more than one
//! whose Services don't answer. What is only in the way for a moment (somebody holds iptables' lock,
//! the kernel has no room) is no reason for that: it is waited for.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use keelson_api::backoff::Backoff;
use tokio_util::sync::CancellationToken;

use crate::{
    ProxyError,
    backend::{Backend, BackendError},
    config::{Mode, ProxyConfig},
    iptables::{self, Rules, Variant, canary::Canary, counters::Counters},
    model::Family,
    nftables::{apply::Table, layout::Layout, monitor::Writing, socket::NftError},
    rights,
    userspace::{self, Limits, RelayMetrics, Relays, Settings, UdpTimes},
};

/// The oldest kernel whose nftables has all that the rules need; kube-proxy's nftables mode asks
/// for the same.
pub(crate) const KERNEL_MIN: (u32, u32) = (5, 13);
/// For how long the mode that was asked for is tried where something is in the way.
const PATIENCE: Duration = Duration::from_secs(8);
/// The first and the longest wait between two tries.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Why a mode or a family can't be used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    /// The machine lacks something: to try again changes nothing.
    #[error(transparent)]
    Lacking(ProxyError),
    /// Something is in the way: another try may go better.
    #[error(transparent)]
    Busy(ProxyError),
}

impl Unusable {
    fn of_nftables(error: NftError) -> Self {
        let busy = error.is_busy();
        Self::new(busy, ProxyError::kernel(error))
    }

    fn of(error: &BackendError, named: impl FnOnce(String) -> ProxyError) -> Self {
        Self::new(error.is_busy(), named(error.to_string()))
    }

    fn new(busy: bool, error: ProxyError) -> Self {
        if busy { Self::Busy(error) } else { Self::Lacking(error) }
    }

    fn is_busy(&self) -> bool {
        matches!(self, Self::Busy(_))
    }

    fn into_error(self) -> ProxyError {
        match self {
            Self::Lacking(error) | Self::Busy(error) => error,
        }
    }
}

impl From<ProxyError> for Unusable {
    fn from(error: ProxyError) -> Self {
        Self::Lacking(error)
    }
}

/// The mode in force, with what it needs.
pub(crate) struct Chosen {
    pub(crate) mode: Mode,
    /// One for each family, the primary one first.
    pub(crate) backends: Vec<Box<dyn Backend>>,
    /// The netlink sockets that write, so that a monitor doesn't take them for others.
    pub(crate) ports: Vec<Writing>,
    /// What relays count, in the userspace mode.
    pub(crate) relays: Option<RelayMetrics>,
    /// What notices changes of rules by others, where the kernel doesn't tell.
    pub(crate) canaries: Vec<Canary>,
    /// Families that are not served, and why.
    unserved: Vec<(Family, Unusable)>,
    /// What reads the packets that rules count.
    pub(crate) counters: Vec<Counters>,
}

impl std::fmt::Debug for Chosen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chosen").field("mode", &self.mode).field("ports", &self.ports).finish()
    }
}

impl Chosen {
    /// Which families are served.
    pub(crate) fn families(&self) -> Vec<Family> {
        self.backends.iter().map(|backend| backend.family()).collect()
    }
}

/// Opens the backends of the mode that was asked for, or of the next that works. What is only in the
/// way of the mode that was asked for, or of one of its families, is waited for first. `None` if
/// `shutdown` comes before.
///
/// # Errors
/// When none works: why the one that was asked for doesn't.
pub(crate) async fn choose_patiently(
    config: &ProxyConfig,
    shutdown: &CancellationToken,
) -> Result<Option<Chosen>, ProxyError> {
    rights::check(config.mode)?;
    let config = Arc::new(config.clone());
    let open_asked = {
        let config = Arc::clone(&config);
        move || open(config.mode, &config)
    };
    let choosing = async {
        let asked = wait_while_busy(open_asked, PATIENCE, tokio::time::sleep).await?;
        blocking(move || settle_on(&config, asked)).await?
    };
    unless_stopped(choosing, shutdown).await
}

/// What comes of it, or `None` if `shutdown` comes first.
async fn unless_stopped<T, E>(
    work: impl Future<Output = Result<T, E>>,
    shutdown: &CancellationToken,
) -> Result<Option<T>, E> {
    tokio::select! {
        done = work => done.map(Some),
        () = shutdown.cancelled() => Ok(None),
    }
}

/// Does what runs programs or otherwise takes its time where it keeps no task waiting.
///
/// # Errors
/// When it panics.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ProxyError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        tracing::error!(%error, "a part of the start failed");
        ProxyError::Ended
    })
}

/// Tries until nothing is in the way any more, or for so long: what the last try came to.
///
/// # Errors
/// When a try panics.
async fn wait_while_busy<W: Future<Output = ()>>(
    open: impl Fn() -> Result<Chosen, Unusable> + Clone + Send + 'static,
    patience: Duration,
    wait: impl Fn(Duration) -> W,
) -> Result<Result<Chosen, Unusable>, ProxyError> {
    let (begin, mut backoff) = (Instant::now(), Backoff::new(RETRY.0, RETRY.1));
    let mut tries = 0;
    loop {
        let opened = blocking(open.clone()).await?;
        let busy = match &opened {
            Ok(chosen) => chosen.unserved.iter().map(|(_, why)| why).find(|why| why.is_busy()),
            Err(why) => Some(why).filter(|why| why.is_busy()),
        };
        let busy = busy.map(ToString::to_string);
        tries += 1;
        // A try may itself wait for long, and one is not enough.
        let over = begin.elapsed() >= patience && tries > 1;
        let Some(why) = busy.filter(|_| !over) else { return Ok(opened) };
        let pause = backoff.next_wait();
        tracing::warn!(why, again_in = ?pause, "something is in the way of the proxy; trying again");
        // What was opened is closed, which takes its time too.
        blocking(move || drop(opened)).await?;
        wait(pause).await;
    }
}

/// Opens the backends of the mode that was asked for, or of the next that works, at once.
pub(crate) fn choose(config: &ProxyConfig) -> Result<Chosen, ProxyError> {
    settle_on(config, open(config.mode, config))
}

/// Takes the mode that was asked for, as it was opened, or the next that works.
fn settle_on(config: &ProxyConfig, asked: Result<Chosen, Unusable>) -> Result<Chosen, ProxyError> {
    let (mut asked, mut first) = (Some(asked), None);
    for mode in order(config.mode) {
        match asked.take().unwrap_or_else(|| open(mode, config)) {
            Ok(chosen) => {
                if mode != config.mode {
                    tracing::error!(
                        asked = config.mode.as_str(),
                        mode = mode.as_str(),
                        "the mode that was asked for doesn't work here; another one is in force"
                    );
                }
                if mode == Mode::Userspace {
                    tracing::warn!("userspace mode: {}", userspace::WARNING);
                }
                for (family, why) in &chosen.unserved {
                    let (family, mode) = (family.as_str(), mode.as_str());
                    match why {
                        Unusable::Lacking(ProxyError::NoIpv6) => {
                            tracing::warn!(family, mode, "this family is not served: {why}");
                        }
                        _ => tracing::error!(family, mode, "this family is not served: {why}"),
                    }
                }
                return Ok(chosen);
            }
            Err(why) => {
                tracing::error!(%why, mode = mode.as_str(), "this mode doesn't work here");
                first.get_or_insert(why);
            }
        }
    }
    Err(first.map_or(ProxyError::Ended, Unusable::into_error))
}

/// Does what needs more rights than writing rules does, for the mode that will be in force.
///
/// # Errors
/// When no mode works, or rules that a setting needs can't be written.
pub(crate) fn initialize(config: &ProxyConfig) -> Result<(), ProxyError> {
    rights::check(config.mode)?;
    // Opening the backends loads the kernel's modules, which brings the settings.
    let chosen = choose(config)?;
    if chosen.mode != Mode::Iptables {
        return Ok(());
    }
    let backend = |error: BackendError| ProxyError::Iptables(error.to_string());
    for family in chosen.families() {
        let rules = Rules::open(settings(config, family)).map_err(backend)?;
        rules.open_loopback().map_err(backend)?;
    }
    Ok(())
}

/// The mode that was asked for, then packet filters, then relays.
fn order(asked: Mode) -> Vec<Mode> {
    let mut order = vec![asked];
    if asked != Mode::Userspace {
        order.extend([Mode::Nftables, Mode::Iptables].into_iter().filter(|mode| *mode != asked));
        order.push(Mode::Userspace);
    }
    order
}

fn open(mode: Mode, config: &ProxyConfig) -> Result<Chosen, Unusable> {
    let mut chosen = Chosen {
        mode,
        backends: Vec::new(),
        ports: Vec::new(),
        canaries: Vec::new(),
        unserved: Vec::new(),
        counters: Vec::new(),
        relays: None,
    };
    if mode == Mode::Userspace {
        chosen.relays = Some(RelayMetrics::new().map_err(ProxyError::from)?);
    }
    let primary = config.primary_family();
    for family in config.wanted_families() {
        let opened = if family == Family::V6 && !kernel_has_ipv6() {
            Err(ProxyError::NoIpv6.into())
        } else {
            open_family(config, family, &mut chosen)
        };
        match opened {
            Ok(backend) => chosen.backends.push(backend),
            Err(why) if family == primary => return Err(why),
            Err(why) => chosen.unserved.push((family, why)),
        }
    }
    Ok(chosen)
}

fn open_family(
    config: &ProxyConfig,
    family: Family,
    chosen: &mut Chosen,
) -> Result<Box<dyn Backend>, Unusable> {
    match chosen.mode {
        Mode::Nftables => {
            check_kernel()?;
            let table = Table::open(layout(config, family));
            let mut table = table.map_err(Unusable::of_nftables)?;
            table.probe().map_err(Unusable::of_nftables)?;
            chosen.ports.push(table.writing());
            Ok(Box::new(table))
        }
        Mode::Iptables => {
            let failed = |error: BackendError| Unusable::of(&error, ProxyError::Iptables);
            let mut rules = Rules::open(settings(config, family)).map_err(failed)?;
            rules.probe().map_err(failed)?;
            chosen.canaries.push(rules.canary());
            chosen.counters.push(rules.counters());
            Ok(Box::new(rules))
        }
        Mode::Userspace => {
            let usual = Settings::new(family);
            let settings = Settings {
                detect_local: config.detect_local.clone(),
                node_port_addresses: config.node_port_addresses.clone(),
                localhost_node_ports: config.localhost_node_ports,
                limits: Limits::of_this_process(config.wanted_families().len()),
                metrics: chosen.relays.clone(),
                udp: UdpTimes {
                    single: given(config.conntrack.udp_timeout, usual.udp.single),
                    stream: given(config.conntrack.udp_stream_timeout, usual.udp.stream),
                    ..usual.udp
                },
                ..usual
            };
            let failed = |error: BackendError| Unusable::of(&error, ProxyError::Relays);
            Ok(Box::new(Relays::open(settings).map_err(failed)?))
        }
    }
}

/// A time-out of the connection table; zero leaves it as it is.
fn given(configured: Option<Duration>, usual: Duration) -> Duration {
    configured.filter(|time| !time.is_zero()).unwrap_or(usual)
}

/// What of the configuration is in the rules of the nftables mode.
pub(crate) fn layout(config: &ProxyConfig, family: Family) -> Layout {
    Layout {
        family,
        detect_local: config.detect_local.clone(),
        masquerade_all: config.masquerade_all,
        masquerade_mark: config.masquerade_mark(),
        node_port_addresses: config.node_port_addresses.clone(),
    }
}

/// What of the configuration is in the rules of the iptables mode.
pub(crate) fn settings(config: &ProxyConfig, family: Family) -> iptables::Settings {
    iptables::Settings {
        family,
        variant: Variant::Host,
        detect_local: config.detect_local.clone(),
        masquerade_all: config.masquerade_all,
        masquerade_mark: config.masquerade_mark(),
        node_port_addresses: config.node_port_addresses.clone(),
        localhost_node_ports: config.localhost_node_ports,
        tcp_be_liberal: config.conntrack.tcp_be_liberal,
    }
}

/// Whether the kernel has IPv6 in this network namespace at all; where it is only switched off for
/// interfaces there is nothing to serve either, but rules do no harm.
pub(crate) fn kernel_has_ipv6() -> bool {
    std::path::Path::new("/proc/thread-self/net/if_inet6").exists()
}

fn check_kernel() -> Result<(), ProxyError> {
    let names = nix::sys::utsname::uname().map_err(|errno| ProxyError::Io {
        doing: "ask for the kernel's release",
        source: errno.into(),
    })?;
    let release = names.release().to_string_lossy().into_owned();
    if kernel_is_too_old(&release) {
        return Err(ProxyError::KernelTooOld { found: release });
    }
    Ok(())
}

/// A release that can't be read is tried: the kernel itself says what it lacks.
fn kernel_is_too_old(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < KERNEL_MIN,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    use tokio::sync::Notify;

    use super::*;

    #[test]
    fn old_kernels_are_named() {
        for (release, old) in [
            ("6.18.44-fc", false),
            ("5.13.0", false),
            ("5.12.19-generic", true),
            ("4.19.0", true),
            ("unknown", false),
        ] {
            assert_eq!(kernel_is_too_old(release), old, "{release}");
        }
    }

    #[test]
    fn what_was_asked_for_comes_first_and_relays_last() {
        use Mode::{Iptables, Nftables, Userspace};
        assert_eq!(order(Nftables), [Nftables, Iptables, Userspace]);
        assert_eq!(order(Iptables), [Iptables, Nftables, Userspace]);
        assert_eq!(order(Userspace), [Userspace]);
    }

    fn chosen(unserved: Vec<(Family, Unusable)>) -> Chosen {
        Chosen {
            mode: Mode::Iptables,
            backends: Vec::new(),
            ports: Vec::new(),
            relays: None,
            canaries: Vec::new(),
            counters: Vec::new(),
            unserved,
        }
    }

    fn busy() -> Unusable {
        let (program, message) = ("iptables-restore".to_owned(), "the lock is held".to_owned());
        Unusable::of(&BackendError::Busy { program, message }, ProxyError::Iptables)
    }

    fn lacking() -> Unusable {
        let (program, message) = ("iptables".to_owned(), "is not installed".to_owned());
        Unusable::of(&BackendError::Program { program, message }, ProxyError::Iptables)
    }

    /// How often was tried, with what the tries come to; the last of them is repeated.
    async fn tries(patience: Duration, mut results: Vec<Result<Chosen, Unusable>>) -> usize {
        results.reverse();
        let (results, tries) = (Arc::new(Mutex::new(results)), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&tries);
        let open = move || {
            counted.fetch_add(1, Ordering::Relaxed);
            let mut results = results.lock().unwrap();
            if results.len() > 1 { results.pop().unwrap() } else { Err(busy()) }
        };
        let wait = |pause| async move { assert!(pause <= RETRY.1.mul_f64(1.5)) };
        assert!(wait_while_busy(open, patience, wait).await.is_ok());
        tries.load(Ordering::Relaxed)
    }

    /// A program that holds up whoever runs it holds up nobody else, on the one thread that there
    /// is, and no stop.
    #[tokio::test]
    async fn a_try_that_hangs_can_be_given_up() {
        let (release, hangs) = mpsc::channel::<()>();
        let hangs = Arc::new(Mutex::new(hangs));
        let begun = Arc::new(Notify::new());
        let begins = Arc::clone(&begun);
        let open = move || {
            begins.notify_one();
            // Until the other end is gone.
            let _ = hangs.lock().unwrap().recv();
            Ok(chosen(Vec::new()))
        };
        let shutdown = CancellationToken::new();
        let trying = wait_while_busy(open, PATIENCE, tokio::time::sleep);
        let stop = async {
            begun.notified().await;
            shutdown.cancel();
        };
        let (given_up, ()) = tokio::join!(unless_stopped(trying, &shutdown), stop);
        assert!(given_up.unwrap().is_none());
        drop(release);
    }

    #[tokio::test]
    async fn what_is_in_the_way_is_waited_for_and_what_is_lacking_is_not() {
        let well = || Ok(chosen(Vec::new()));
        let half = |why| Ok(chosen(vec![(Family::V6, why)]));
        let long = Duration::from_secs(60);
        assert_eq!(tries(long, vec![well(), well()]).await, 1);
        assert_eq!(tries(long, vec![Err(lacking()), well()]).await, 1);
        assert_eq!(tries(long, vec![half(lacking()), well()]).await, 1, "IPv6 that isn't there");
        assert_eq!(tries(long, vec![Err(busy()), Err(busy()), well(), well()]).await, 3);
        assert_eq!(tries(long, vec![half(busy()), half(busy()), well(), well()]).await, 3);
        assert_eq!(tries(Duration::ZERO, vec![Err(busy())]).await, 2, "it has an end");
    }

    #[test]
    fn not_now_is_told_from_never_by_type() {
        let of = |errno| {
            let source = std::io::Error::from_raw_os_error(errno);
            Unusable::of_nftables(NftError::Socket { doing: "try", source })
        };
        for errno in [libc::EBUSY, libc::EINTR, libc::ENOBUFS, libc::EAGAIN, libc::ENOMEM] {
            assert!(matches!(of(errno), Unusable::Busy(_)), "{errno}");
        }
        for errno in [libc::EPERM, libc::EOPNOTSUPP, libc::ENOENT, libc::EINVAL] {
            assert!(matches!(of(errno), Unusable::Lacking(_)), "{errno}");
        }
    }
}
