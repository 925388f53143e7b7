//! Another program that keeps changing the proxy's table: most likely another proxy with other
//! settings. Each mending provokes the next edit, so it is put off longer and longer.

use std::{
    fs,
    time::{Duration, Instant},
};

use super::{
    attribute::Message,
    uapi::{NFTA_GEN_PROC_NAME, NFTA_GEN_PROC_PID},
};

/// So many edits are mended at once, if they come within [`WINDOW`].
const EDITS: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);
/// How long the first mending after that is put off; then twice as long each time.
const FIRST: Duration = Duration::from_secs(1);

/// How long mending is put off.
#[derive(Debug)]
pub(super) struct Patience {
    longest: Duration,
    begun: Option<Instant>,
    edits: u32,
    wait: Duration,
    /// When the last one that was put off was mended.
    mended: Option<Instant>,
}

impl Patience {
    /// Mending is never put off longer than this.
    pub(super) fn new(longest: Duration) -> Self {
        Self { longest, begun: None, edits: 0, wait: Duration::ZERO, mended: None }
    }

    /// How long to wait before an edit that was heard of now is mended, and whether that is the
    /// first wait of many.
    pub(super) fn after_edit(&mut self, now: Instant) -> (Duration, bool) {
        if self.longest.is_zero() {
            return (Duration::ZERO, false);
        }
        let calm = WINDOW.max(self.wait * 2);
        if self.mended.is_some_and(|at| now.saturating_duration_since(at) > calm) {
            *self = Self::new(self.longest);
        }
        if self.begun.is_none_or(|at| now.saturating_duration_since(at) > WINDOW) {
            self.begun = Some(now);
            self.edits = 0;
        }
        self.edits += 1;
        let first = self.wait.is_zero();
        if first && self.edits <= EDITS {
            return (Duration::ZERO, false);
        }
        self.wait = (self.wait * 2).max(FIRST).min(self.longest);
        self.mended = Some(now + self.wait);
        (self.wait, first)
    }
}

/// Who made a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    /// The process, as this process sees it if it is in the host's namespace.
    pub(crate) pid: u32,
    /// What it is called.
    pub(crate) name: String,
}

impl Program {
    /// Whom the kernel names in the message that ends a transaction: a thread, where one of several
    /// has made the change.
    pub(super) fn read(message: &Message<'_>) -> Option<Self> {
        let attributes = message.attributes();
        let pid = attributes.find_u32(NFTA_GEN_PROC_PID)?;
        let name = attributes.find_text(NFTA_GEN_PROC_NAME).unwrap_or_default();
        Some(Self { pid, name: name.to_owned() })
    }

    /// The process whose thread this is, while it lives.
    pub(super) fn process(self) -> Self {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let leader =
            status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
        let name = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).ok();
        match leader.and_then(|pid| Some((pid, name(pid)?))) {
            Some((pid, name)) => Self { pid, name: name.trim().to_owned() },
            None => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_few_edits_are_mended_at_once() {
        let (mut patience, start) = (Patience::new(30 * SECOND), Instant::now());
        for n in 0..100 {
            assert_eq!(patience.after_edit(start + n * SECOND), (Duration::ZERO, false), "{n}");
        }
    }

    #[test]
    fn a_fight_is_put_off_longer_each_time_until_it_is_over() {
        let (mut patience, mut now) = (Patience::new(5 * SECOND), Instant::now());
        for _ in 0..EDITS {
            assert_eq!(patience.after_edit(now).0, Duration::ZERO);
            now += Duration::from_millis(30);
        }
        for (wait, first) in [(1, true), (2, false), (4, false), (5, false), (5, false)] {
            assert_eq!(patience.after_edit(now), (wait * SECOND, first));
            now += wait * SECOND + Duration::from_millis(30);
        }
        now += 11 * SECOND;
        assert_eq!(patience.after_edit(now), (Duration::ZERO, false), "it was quiet meanwhile");
    }
}
