//! Hearing of others who change the rules: each mode has its own ear.
//!
//! An ear that fails is not the end of hearing: it is opened again, and meanwhile the rules are looked
//! at from time to time.

use std::{
    io,
    time::{Duration, Instant},
};

use keelson_api::backoff::Backoff;
use prometheus::IntCounter;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    backend::BackendError,
    iptables::canary::Canary,
    nftables::monitor::{Heard, Monitor},
    watches::{Change, ChangeKind},
};

/// The first wait before an ear that failed is opened again; the longest is the sync period.
const RETRY: Duration = Duration::from_millis(100);

/// Where what was heard goes.
#[derive(Clone, Debug)]
pub(crate) struct Hearing {
    /// The loop's queue.
    pub(crate) changes: mpsc::Sender<Change>,
    /// How often is looked where nobody tells.
    pub(crate) period: Duration,
    /// Counts ears that failed.
    pub(crate) failures: IntCounter,
    pub(crate) shutdown: CancellationToken,
}

impl Hearing {
    /// Tells the loop; false if it is over.
    async fn tell(&self, cause: &'static str) -> bool {
        self.changes.send(ChangeKind::Drift(cause).into()).await.is_ok()
    }

    /// Waits; false if it is all over before.
    async fn wait(&self, time: Duration) -> bool {
        tokio::select! {
            () = tokio::time::sleep(time) => true,
            () = self.shutdown.cancelled() => false,
        }
    }
}

/// What hears of others at once.
pub(crate) trait Ear: Send {
    /// Waits until something was heard that concerns the proxy.
    ///
    /// # Errors
    /// When it hears nothing any more.
    fn heard(&mut self) -> impl Future<Output = io::Result<Heard>> + Send;
}

impl Ear for Monitor {
    async fn heard(&mut self) -> io::Result<Heard> {
        self.heard().await
    }
}

/// What finds out about others by looking. A copy of it goes on where it fails.
pub(crate) trait Eye: Clone + Send + 'static {
    /// Whether another program has changed the rules since they were written. It may take long.
    ///
    /// # Errors
    /// When it can't look.
    fn changed(&mut self) -> Result<bool, BackendError>;
}

impl Eye for Canary {
    fn changed(&mut self) -> Result<bool, BackendError> {
        self.changed()
    }
}

/// Tells the loop when another program changed the proxy's rules. Where there is no ear to be had,
/// or it fails, the loop looks from time to time until there is one again.
pub(crate) async fn monitor<E: Ear>(open: impl Fn() -> io::Result<E>, hearing: Hearing) {
    let mut backoff = Backoff::new(RETRY, hearing.period);
    let mut failed = false;
    loop {
        let begin = Instant::now();
        let error = match open() {
            Ok(mut ear) => {
                // Nobody knows what happened meanwhile.
                if failed && !hearing.tell("period").await {
                    return;
                }
                let Some(error) = listen(&mut ear, &hearing).await else { return };
                error
            }
            Err(error) => error,
        };
        failed = true;
        hearing.failures.inc();
        if begin.elapsed() > hearing.period {
            backoff.reset();
        }
        let wait = backoff.next_wait().min(hearing.period);
        tracing::error!(
            %error, again_in = ?wait,
            "the kernel doesn't tell of changes of the rules by other programs; looking for them \
             until it does"
        );
        if !hearing.wait(wait).await || !hearing.tell("period").await {
            return;
        }
    }
}

/// Listens until the ear fails; `None` if it is all over.
async fn listen(ear: &mut impl Ear, hearing: &Hearing) -> Option<io::Error> {
    loop {
        let heard = tokio::select! {
            heard = ear.heard() => heard,
            () = hearing.shutdown.cancelled() => return None,
        };
        let cause = match heard {
            Ok(Heard::Edited) => "edit",
            Ok(Heard::Overflow) => "overflow",
            Err(error) => return Some(error),
        };
        if !hearing.tell(cause).await {
            return None;
        }
    }
}

/// Looks from time to time whether others changed the proxy's rules, and tells the loop.
pub(crate) async fn look<E: Eye>(mut eye: E, hearing: Hearing) {
    while hearing.wait(hearing.period).await && look_now(&mut eye, &hearing).await {}
}

/// Looks at the proxy's iptables as soon as the kernel tells that another program wrote to their
/// tables, and from time to time as well, and tells the loop.
pub(crate) async fn look_when_told(
    open: impl Fn() -> io::Result<Monitor>,
    mut canary: Canary,
    hearing: Hearing,
) {
    loop {
        let error = match open() {
            Ok(mut monitor) => match told(&mut monitor, &mut canary, &hearing).await {
                Some(error) => error,
                None => return,
            },
            Err(error) => error,
        };
        hearing.failures.inc();
        tracing::warn!(
            %error, again_in = ?hearing.period,
            "the kernel doesn't tell of changes of iptables' rules; they are looked for until it does"
        );
        if !hearing.wait(hearing.period).await || !look_now(&mut canary, &hearing).await {
            return;
        }
    }
}

/// Looks whenever it is told to, until the monitor fails; `None` if it is all over.
async fn told(monitor: &mut Monitor, canary: &mut Canary, hearing: &Hearing) -> Option<io::Error> {
    let own = canary.own_programs();
    loop {
        tokio::select! {
            told = monitor.others(|pid| own.include(pid)) => {
                if let Err(error) = told {
                    return Some(error);
                }
            }
            () = tokio::time::sleep(hearing.period) => {}
            () = hearing.shutdown.cancelled() => return None,
        }
        // Each look takes its time, and others may write without pause.
        let rest = canary.not_before().map(|at| at.saturating_duration_since(Instant::now()));
        if !hearing.wait(rest.unwrap_or_default()).await || !look_now(canary, hearing).await {
            return None;
        }
    }
}

/// One look; false if it is all over.
async fn look_now<E: Eye>(eye: &mut E, hearing: &Hearing) -> bool {
    let mut looking = eye.clone();
    // It runs programs and waits for them.
    let looked = tokio::task::spawn_blocking(move || {
        let changed = looking.changed();
        (looking, changed)
    });
    match looked.await {
        Ok((back, changed)) => {
            *eye = back;
            match changed {
                Ok(true) => return hearing.tell("canary").await,
                Ok(false) => {}
                Err(_) if hearing.shutdown.is_cancelled() => {}
                Err(error) => {
                    hearing.failures.inc();
                    tracing::warn!(%error, "can't look whether others changed the rules; trying again");
                }
            }
        }
        Err(error) => {
            hearing.failures.inc();
            tracing::error!(%error, "a look whether others changed the rules failed; trying again");
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::{Arc, Mutex},
    };

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn hearing(period: Duration) -> (Hearing, mpsc::Receiver<Change>) {
        let (changes, queue) = mpsc::channel(10);
        let failures = IntCounter::new("failures", "Failures.").unwrap();
        (Hearing { changes, period, failures, shutdown: CancellationToken::new() }, queue)
    }

    async fn next(queue: &mut mpsc::Receiver<Change>) -> &'static str {
        let change = tokio::time::timeout(PATIENCE, queue.recv()).await;
        match change.expect("something is told in time").unwrap().kind {
            ChangeKind::Drift(cause) => cause,
            other => panic!("{other:?}"),
        }
    }

    /// Hears what it is told to, and then fails.
    struct Scripted(VecDeque<Heard>);

    impl Ear for Scripted {
        async fn heard(&mut self) -> io::Result<Heard> {
            self.0.pop_front().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
        }
    }

    #[tokio::test]
    async fn an_ear_that_fails_is_opened_again_and_meanwhile_is_looked() {
        let (hearing, mut queue) = hearing(Duration::from_millis(300));
        let (failures, shutdown) = (hearing.failures.clone(), hearing.shutdown.clone());
        let scripts = Mutex::new(VecDeque::from([
            Ok(vec![Heard::Edited]),
            Err(libc::EMFILE),
            Ok(vec![Heard::Overflow]),
        ]));
        let open = move || match scripts.lock().unwrap().pop_front() {
            Some(Ok(heard)) => Ok(Scripted(heard.into())),
            Some(Err(errno)) => Err(io::Error::from_raw_os_error(errno)),
            None => Err(io::Error::from_raw_os_error(libc::EPERM)),
        };
        let running = tokio::spawn(monitor(open, hearing));
        // Heard; failed, so looked; not to be had, so looked; to be had again, so looked; heard.
        for expected in ["edit", "period", "period", "period", "overflow"] {
            assert_eq!(next(&mut queue).await, expected);
        }
        for _ in 0..3 {
            assert_eq!(next(&mut queue).await, "period", "as long as there is none");
        }
        assert!(failures.get() >= 4);
        shutdown.cancel();
        tokio::time::timeout(PATIENCE, running).await.expect("it ends").unwrap();
    }

    /// Looks as it is told.
    #[derive(Clone)]
    struct Told(Arc<Mutex<VecDeque<&'static str>>>);

    impl Eye for Told {
        fn changed(&mut self) -> Result<bool, BackendError> {
            let told = self.0.lock().unwrap().pop_front();
            match told {
                Some("changed") => Ok(true),
                Some("fails") => Err(BackendError::Unsupported("as told".into())),
                Some(_) => panic!("as told"),
                None => Ok(false),
            }
        }
    }

    #[tokio::test]
    async fn a_look_that_fails_or_panics_is_not_the_last() {
        let (hearing, mut queue) = hearing(Duration::from_millis(5));
        let (failures, shutdown) = (hearing.failures.clone(), hearing.shutdown.clone());
        let eye = Told(Arc::new(Mutex::new(["fails", "panics", "changed"].into())));
        let running = tokio::spawn(look(eye, hearing));
        assert_eq!(next(&mut queue).await, "canary");
        assert_eq!(failures.get(), 2);
        shutdown.cancel();
        tokio::time::timeout(PATIENCE, running).await.expect("it ends").unwrap();
    }
}
