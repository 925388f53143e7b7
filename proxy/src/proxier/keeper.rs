//! The rules of one family: what waits to be written, what was refused, and when to try again.
//!
//! Each family has its keeper, and none waits for another: where the kernel or a program takes no
//! IPv6 rules, IPv4's are written as ever, and the other way round.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use keelson_api::{backoff::Backoff, object::ObjectKey};

use super::reports::{Refusals, Reports, drifted, refused, written};
use crate::{
    backend::{Applied, Backend, Forget, Goal, Stale},
    conntrack::stale::Tracker,
    model::Family,
    ruleset::{Unit, desired::Outcome},
};

/// How long after a commit the last packet that didn't see it is surely through.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// The first and the longest wait before what was refused is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// Tries that fail may take this part of the time: one that hangs must not keep everybody waiting.
const SHARE: u32 = 10;
/// The longest wait for a try that takes long.
const RETRY_MAX: Duration = Duration::from_secs(300);
/// How many changes that aren't in force yet are measured.
const TRIGGERED_MAX: usize = 65_536;

/// Holds the rules of one family against what is desired.
pub(super) struct Keeper {
    backend: Box<dyn Backend>,
    doubt: Option<Doubt>,
    /// What changed since the last write.
    dirty: HashSet<Unit>,
    /// What was refused by itself; its old rules stay, and all else goes on meanwhile.
    refused: HashSet<Unit>,
    /// What of it was told.
    told: Refusals,
    retry: Retry,
    /// Whether rules were ever written.
    in_force: bool,
    unwritten: Unwritten,
    second_look: SecondLook,
    /// Which connections the changes since the last write leave behind.
    stale: Tracker,
}

/// Why everything is compared with what is in force before anything else is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doubt {
    /// Nobody has looked yet.
    Start,
    /// A write failed, and nobody knows how far it got.
    Failure,
    /// Another program wrote.
    Drift,
}

/// When to try again.
struct Retry {
    at: Option<Instant>,
    /// Nothing could be written at all: everything waits until then.
    blocked: bool,
    backoff: Backoff,
}

/// Changes that are not in force yet, for the time that they take.
#[derive(Default)]
struct Unwritten {
    /// When the first of them came in.
    since: Option<Instant>,
    /// What changed when, as its slice has it.
    triggered: Vec<(ObjectKey, Timestamp)>,
}

/// What sticky clients are to forget once more, as packets write too.
#[derive(Default)]
struct SecondLook {
    forget: Vec<Forget>,
    at: Option<Instant>,
}

/// What came of writing.
#[derive(Debug)]
pub(super) enum Commit {
    /// Nothing can be written now; it is tried again.
    Waits,
    /// There was nothing to do.
    Idle,
    /// All that had changed was tried.
    Tried {
        /// Everything was compared.
        full: bool,
        /// Rules are in force for the first time.
        first: bool,
        /// Connections that the change leaves behind.
        stale: Vec<Stale>,
    },
}

impl Keeper {
    /// Keeps the rules of a backend, of which nothing is known yet.
    pub(super) fn new(backend: Box<dyn Backend>) -> Self {
        let stale = Tracker::of(backend.family(), false);
        Self {
            backend,
            doubt: Some(Doubt::Start),
            dirty: HashSet::new(),
            refused: HashSet::new(),
            told: Refusals::default(),
            retry: Retry { at: None, blocked: false, backoff: Backoff::new(RETRY.0, RETRY.1) },
            in_force: false,
            unwritten: Unwritten::default(),
            second_look: SecondLook::default(),
            stale,
        }
    }

    /// Counts TCP connections to endpoints that are gone among the stale ones too.
    pub(super) fn count_tcp(&mut self, tcp: bool) {
        self.stale = Tracker::of(self.family(), tcp);
    }

    /// Whose rules.
    pub(super) fn family(&self) -> Family {
        self.backend.family()
    }

    /// Whether connections live in the kernel's table.
    pub(super) fn tracks_connections(&self) -> bool {
        self.backend.tracks_connections()
    }

    /// The most endpoints of one port that can be put into force without keeping others waiting.
    pub(super) fn endpoints_max(&self) -> usize {
        self.backend.endpoints_max()
    }

    /// A number that is another after each change of the rules by anybody, if there is one.
    pub(super) fn generation(&mut self) -> Option<u32> {
        self.backend.generation()
    }

    /// Whether nothing could be written the last time.
    pub(super) fn is_blocked(&self) -> bool {
        self.retry.blocked
    }

    /// Notes what a change of a Service touches. Whether there is anything to write for it.
    pub(super) fn changed(&mut self, outcome: &Outcome, at: Option<Instant>) -> bool {
        if self.doubt != Some(Doubt::Start) {
            self.stale.changed(outcome);
        }
        let family = self.family();
        let mut own =
            outcome.dirty.iter().copied().filter(|unit| unit.family() == family).peekable();
        let touched = own.peek().is_some();
        self.dirty.extend(own);
        if touched && self.unwritten.since.is_none() {
            self.unwritten.since = at;
        }
        touched
    }

    /// Notes when a change of this Service's slices happened.
    pub(super) fn triggered(&mut self, service: ObjectKey, at: Timestamp) {
        // What was there before the start is not late.
        if self.in_force && self.unwritten.triggered.len() < TRIGGERED_MAX {
            self.unwritten.triggered.push((service, at));
        }
    }

    /// Another program may have changed the rules. Whether that is news.
    pub(super) fn doubted(&mut self) -> bool {
        let news = self.doubt.is_none();
        self.doubt.get_or_insert(Doubt::Drift);
        news
    }

    /// When there is something to do though nothing changes.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        self.retry.at.into_iter().chain(self.second_look.at).min()
    }

    /// Writes what changed, and what is to be tried again by now.
    pub(super) fn commit(&mut self, goal: Goal<'_>, reports: &Reports, now: Instant) -> Commit {
        self.look_again(now);
        if self.retry.at.is_some_and(|at| at <= now) {
            self.retry.at = None;
            self.retry.blocked = false;
            self.dirty.extend(self.refused.drain());
        }
        if self.retry.blocked {
            return Commit::Waits;
        }
        let full = self.doubt.is_some();
        if !full && self.dirty.is_empty() {
            self.tell_times(goal, reports);
            return Commit::Idle;
        }
        // After a load there is no need for room for as much again.
        let mut units: Vec<Unit> = std::mem::take(&mut self.dirty).into_iter().collect();
        units.sort_unstable();
        let (begin, family) = (Instant::now(), self.family());
        let result =
            if full { self.backend.synchronize(goal) } else { self.backend.apply(&units, goal) };
        let took = begin.elapsed();
        match result {
            Ok(applied) => {
                written(reports, family, full, took, &applied);
                reports.metrics.holds(family, self.backend.units());
                if applied.drifted {
                    drifted(reports, family, "refusal");
                }
                let named = (!full).then_some(&units[..]);
                refused(reports, goal, &mut self.told, named, &applied);
                self.note_refused(&units, full, &applied, now + took, took);
                self.forget(applied.forget, now);
                self.doubt = None;
                self.tell_times(goal, reports);
                Commit::Tried {
                    full,
                    first: !std::mem::replace(&mut self.in_force, true),
                    stale: self.stale.settle_except(goal.desired, goal.objects, &self.refused),
                }
            }
            Err(error) => {
                reports.metrics.failed(family, full);
                self.doubt = Some(Doubt::Failure);
                self.retry.blocked = true;
                let wait = self.retry.later(now + took, took);
                tracing::error!(
                    %error, family = family.as_str(), again_in = ?wait,
                    "rules not written; trying again"
                );
                Commit::Waits
            }
        }
    }

    fn note_refused(
        &mut self,
        units: &[Unit],
        full: bool,
        applied: &Applied,
        now: Instant,
        took: Duration,
    ) {
        if full {
            self.refused.clear();
        } else {
            // These were tried just now.
            units.iter().for_each(|unit| {
                self.refused.remove(unit);
            });
        }
        let again = applied.refused.iter().filter(|(_, error)| error.may_pass());
        self.refused.extend(again.map(|(unit, _)| *unit));
        if self.refused.is_empty() {
            self.retry.at = None;
            self.retry.backoff.reset();
        } else if self.retry.at.is_none() {
            self.retry.later(now, took);
        }
    }

    /// Has sticky clients forget, and again when packets that were under way are through.
    fn forget(&mut self, forget: Vec<Forget>, now: Instant) {
        if forget.is_empty() {
            return;
        }
        self.forget_now(&forget);
        self.second_look.at.get_or_insert(now + SECOND_LOOK);
        self.second_look.forget.extend(forget);
    }

    fn look_again(&mut self, now: Instant) {
        if self.second_look.at.is_some_and(|at| at <= now) {
            let look = std::mem::take(&mut self.second_look);
            self.forget_now(&look.forget);
        }
    }

    fn forget_now(&mut self, forget: &[Forget]) {
        if let Err(error) = self.backend.forget(forget) {
            tracing::warn!(
                %error, family = self.family().as_str(),
                "sticky clients may be sent to endpoints that are gone"
            );
        }
    }

    /// Tells how long changes took to be in force; those of refused Services go on waiting.
    fn tell_times(&mut self, goal: Goal<'_>, reports: &Reports) {
        let family = self.family();
        reports.health.updated(family);
        let metrics = &reports.metrics;
        if let Some(since) = self.unwritten.since.take() {
            metrics.committed(since.elapsed());
        }
        let waiting: HashSet<&ObjectKey> = self
            .refused
            .iter()
            .filter_map(|unit| match unit {
                Unit::Frontend(frontend) => goal.desired.owner(frontend),
                Unit::Address(..) | Unit::ServiceRanges(_) => None,
            })
            .collect();
        self.unwritten.triggered.retain(|(service, at)| {
            let waits = waiting.contains(service);
            if !waits {
                metrics.programmed(family, *at);
            }
            waits
        });
    }
}

impl Retry {
    /// Sets when to try again, after a try that took so long.
    fn later(&mut self, now: Instant, took: Duration) -> Duration {
        let wait = self.backoff.next_wait().max((took * SHARE).min(RETRY_MAX));
        self.at = Some(now + wait);
        wait
    }
}
