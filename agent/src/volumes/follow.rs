//! Keeps the files of one pod's volumes as its objects and tokens are now.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, PoisonError},
    time::Duration,
};

use futures::future;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use keelson_api::backoff::Backoff;
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;

use super::{
    VolumeError, blocking,
    plan::{self, FilesError, FilesPlan},
    writer,
};
use crate::environment::{
    AllocatableNow, DataName, ObjectError, ObjectSource, Token, TokenWish, Watched,
};

/// How long a mount waits for an object that the API server has not told of yet.
const OBJECT_WAIT: Duration = Duration::from_secs(10);
/// A token is renewed once a day, however long it is good for.
const TOKEN_DAY: SignedDuration = SignedDuration::from_hours(24);
/// Tries after a failed renewal or write.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// A volume, where it is, and what its files are made from.
type Followed = (String, PathBuf, FilesPlan);

/// Follows one pod's objects. Its task ends with [`Follower::stop`].
pub(super) struct Follower {
    objects: Arc<dyn ObjectSource>,
    allocatable: AllocatableNow,
    stop: CancellationToken,
    state: Arc<Mutex<State>>,
    /// Moves on when the pod was mounted again, maybe with other objects.
    mounted: watch::Sender<u64>,
    task: std::sync::Mutex<Option<tokio::task::JoinHandle<()>>>,
}

#[derive(Default)]
struct State {
    pod: Pod,
    volumes: Vec<Followed>,
    objects: BTreeMap<DataName, watch::Receiver<Watched>>,
    tokens: Vec<(TokenWish, Held)>,
}

/// A token, with when it was issued.
struct Held {
    token: Token,
    issued: Timestamp,
}

impl Held {
    /// At 80 % of its life, or after a day.
    fn renewal(&self) -> Timestamp {
        let life = self.token.expires.duration_since(self.issued);
        let after = (life * 4 / 5).min(TOKEN_DAY).max(SignedDuration::ZERO);
        self.issued.checked_add(after).unwrap_or(self.issued)
    }
}

impl Follower {
    pub(super) fn new(
        objects: Arc<dyn ObjectSource>,
        allocatable: AllocatableNow,
        stop: CancellationToken,
    ) -> Self {
        Self {
            objects,
            allocatable,
            stop,
            state: Arc::default(),
            mounted: watch::channel(0).0,
            task: std::sync::Mutex::default(),
        }
    }

    /// Writes the files as they are now, and again whenever they change.
    pub(super) async fn follow(
        self: &Arc<Self>,
        pod: &Pod,
        volumes: Vec<Followed>,
    ) -> Result<(), VolumeError> {
        let mut state = self.state.lock().await;
        if self.stop.is_cancelled() {
            let name = volumes.first().map_or("", |(name, ..)| name.as_str());
            return Err(VolumeError::new(name, "the pod is being removed"));
        }
        let wanted: Vec<DataName> =
            volumes.iter().flat_map(|(_, _, plan)| plan.objects()).collect();
        state.objects.retain(|name, _| wanted.contains(name));
        for name in wanted {
            let watch = |name: &DataName| self.objects.watch(name);
            state.objects.entry(name).or_insert_with_key(watch);
        }
        let deadline = tokio::time::Instant::now() + OBJECT_WAIT;
        for receiver in state.objects.values_mut() {
            let known = receiver.wait_for(|found| !matches!(found, Watched::Pending));
            // What is still unknown then is told by the plan.
            let _ = tokio::time::timeout_at(deadline, known).await;
        }
        state.pod = pod.clone();
        state.volumes = volumes;
        let outcome = self.write(&mut state).await.map(drop);
        drop(state);
        self.mounted.send_modify(|times| *times += 1);
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if task.is_none() {
            // It keeps the follower until `stop`, or until the whole agent stops.
            *task = Some(tokio::spawn(Arc::clone(self).run(self.mounted.subscribe())));
        }
        outcome
    }

    /// Stops following; no file is written after it returns.
    pub(super) async fn stop(&self) {
        self.stop.cancel();
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            // It ends by itself after what it is writing.
            let _ = task.await;
        }
        *self.state.lock().await = State::default();
    }

    async fn run(self: Arc<Self>, mut mounted: watch::Receiver<u64>) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut retry = None;
        loop {
            let (mut receivers, renewal) = {
                let state = self.state.lock().await;
                let renewal = state.tokens.iter().map(|(_, held)| held.renewal()).min();
                (state.objects.values().cloned().collect::<Vec<_>>(), renewal)
            };
            let renewal = renewal.map(|at| {
                let left = at.duration_since(Timestamp::now());
                Duration::try_from(left).unwrap_or(Duration::ZERO)
            });
            let wait = match (retry, renewal) {
                // While something fails, the back-off decides: a renewal may be what fails.
                (Some(retry), _) => Some(retry),
                (None, renewal) => renewal,
            };
            let waited = async {
                match wait {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => future::pending().await,
                }
            };
            let changed = async {
                let changes = receivers.iter_mut().map(|receiver| Box::pin(receiver.changed()));
                let changes: Vec<_> = changes.collect();
                if changes.is_empty() {
                    return future::pending().await;
                }
                if let (Err(_), ..) = future::select_all(changes).await {
                    // A watch that ended (nobody serves it any more) would come back at once.
                    tokio::time::sleep(RETRY.1).await;
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = waited => {}
                () = changed => {}
                ended = mounted.changed() => {
                    if ended.is_err() {
                        return;
                    }
                    // Written by whoever mounted it; only what to wait for may be new.
                    continue;
                }
            }
            let mut state = self.state.lock().await;
            // Seen from here on; the clones above are gone.
            for receiver in state.objects.values_mut() {
                receiver.mark_unchanged();
            }
            retry = match self.write(&mut state).await {
                Ok(true) => {
                    backoff.reset();
                    None
                }
                Ok(false) => Some(backoff.next_wait()),
                Err(error) => {
                    let pod = state.pod.metadata.name.as_deref().unwrap_or_default();
                    tracing::warn!(pod, %error, "updating a volume; its old content stays");
                    Some(backoff.next_wait())
                }
            };
        }
    }

    /// Writes all volumes as they should be now; the first error of any, after all were tried.
    ///
    /// False if old content or an old token had to do, so that it is tried again.
    async fn write(&self, state: &mut State) -> Result<bool, VolumeError> {
        let (_, group) = plan::owners(&state.pod);
        let allocatable = (self.allocatable)();
        let wishes: Vec<TokenWish> =
            state.volumes.iter().flat_map(|(_, _, plan)| plan.tokens()).collect();
        let mut refusals = BTreeMap::new();
        let mut fresh = true;
        state.tokens.retain(|(wish, _)| wishes.contains(wish));
        for wish in wishes {
            match self.renew(state, &wish).await {
                Ok(renewed) => fresh &= renewed,
                Err(error) => {
                    refusals.insert((wish.audience.clone(), wish.expiration_seconds), error);
                }
            }
        }
        let mut failed = None;
        for (name, path, plan) in &state.volumes {
            let tokens = plan.tokens();
            let refusal = tokens
                .iter()
                .find_map(|wish| refusals.get(&(wish.audience.clone(), wish.expiration_seconds)));
            let files = match refusal {
                Some(error) => Err(FilesError::Object(error.clone())),
                None => plan.files(
                    &state.pod,
                    &allocatable,
                    |name| {
                        let known = state.objects.get(name);
                        known.map_or(Watched::Pending, |receiver| receiver.borrow().clone())
                    },
                    |wish| {
                        let held = state.tokens.iter().find(|(of, _)| of == wish);
                        held.map(|(_, held)| held.token.token.clone())
                    },
                ),
            };
            let written = match files {
                Ok(files) => {
                    let path = path.clone();
                    let write = move || writer::write(&path, &files, group).map(drop);
                    blocking(write).await.map_err(|error| error.to_string())
                }
                // After a restart of the agent while the API server is away: what is on the disk
                // is what the pod runs with.
                Err(FilesError::Object(ObjectError::Unreachable(reason)))
                    if writer::is_written(path) =>
                {
                    tracing::debug!(volume = name, reason, "keeping a volume's content");
                    fresh = false;
                    Ok(())
                }
                Err(error) => Err(error.to_string()),
            };
            if let Err(reason) = written {
                failed.get_or_insert_with(|| VolumeError::new(name, reason));
            }
        }
        failed.map_or(Ok(fresh), Err)
    }

    /// Gets the token if there is none or it is due. False if it is due, can't be renewed, and is
    /// still good.
    async fn renew(&self, state: &mut State, wish: &TokenWish) -> Result<bool, ObjectError> {
        let now = Timestamp::now();
        let held = state.tokens.iter().position(|(of, _)| of == wish);
        if held.is_some_and(|at| state.tokens[at].1.renewal() > now) {
            return Ok(true);
        }
        match self.objects.token(wish).await {
            Ok(token) => {
                let held_now = Held { token, issued: now };
                match held {
                    Some(at) => state.tokens[at].1 = held_now,
                    None => state.tokens.push((wish.clone(), held_now)),
                }
                Ok(true)
            }
            Err(error) if held.is_some_and(|at| state.tokens[at].1.token.expires > now) => {
                tracing::warn!(%error, "renewing a token; the old one is still good");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_renewed_at_four_fifths_of_their_life_or_after_a_day() {
        let issued = Timestamp::from_second(1_000_000).unwrap();
        for (life, renewal) in [(600, 480), (3600, 2880), (86_400 * 365, 86_400), (0, 0), (-5, 0)] {
            let expires = Timestamp::from_second(1_000_000 + life).unwrap();
            let held = Held { token: Token { token: "t".into(), expires }, issued };
            assert_eq!(held.renewal().as_second(), 1_000_000 + renewal, "{life}");
        }
    }
}
