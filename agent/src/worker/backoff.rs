//! How long to wait before something is tried again.
//!
//! The wait before a container's restart is kept on the container itself (an annotation), so an
//! agent that was killed goes on where it was.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Container;
use keelson_runtime_shim::runtime::ContainerStatus;

use crate::labels;

/// The first wait before a crashed container, or a failed image pull, is tried again.
pub(crate) const FIRST: Duration = Duration::from_secs(10);
/// The longest wait.
pub(crate) const LONGEST: Duration = Duration::from_secs(300);
/// The longest wait before making a sandbox, mounting volumes or creating a container again.
const LONGEST_SETUP: Duration = Duration::from_secs(10);

/// When an ended container may start again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Restart {
    /// Now; the wait to be remembered for the restart after this one, none for a new definition.
    Now(Option<Duration>),
    /// It is in `CrashLoopBackOff`.
    Later {
        /// When the wait is over.
        at: Timestamp,
        /// The whole wait, as its message shows it.
        wait: Duration,
    },
}

/// When the ended container `last` may be followed by its next attempt.
///
/// The documented rule: at once after the first end, then 10 s after the end, doubling up to
/// `longest`; forgotten when the container ran for twice the longest wait (10 minutes).
pub(crate) fn restart(
    last: &ContainerStatus,
    container: &Container,
    longest: Duration,
    now: Timestamp,
) -> Restart {
    if !labels::is_current(last, container) {
        return Restart::Now(None);
    }
    let first = FIRST.min(longest);
    let wait = last.annotations.get(labels::BACK_OFF).and_then(|seconds| seconds.parse().ok());
    let Some(wait) = wait.map(Duration::from_secs) else { return Restart::Now(Some(first)) };
    let ended = last.finished_at.unwrap_or(last.created_at);
    if seconds_between(last.created_at, ended) > longest.as_secs_f64() * 2.0 {
        return Restart::Now(Some(first));
    }
    let at = after(ended, wait);
    if now < at { Restart::Later { at, wait } } else { Restart::Now(Some((wait * 2).min(longest))) }
}

/// The wait before an image is pulled again after `failures` failed pulls.
pub(crate) fn pull_wait(failures: u32) -> Duration {
    doubled(FIRST, failures, LONGEST)
}

/// The wait before another step of a pod's setup is tried again after `failures` failures: short,
/// so that what was missing is noticed soon after it is there.
pub(crate) fn setup_wait(failures: u32) -> Duration {
    doubled(Duration::from_secs(1), failures, LONGEST_SETUP)
}

fn doubled(first: Duration, failures: u32, longest: Duration) -> Duration {
    first
        .saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX))
        .min(longest)
}

/// `wait` after `start`.
pub(crate) fn after(start: Timestamp, wait: Duration) -> Timestamp {
    SignedDuration::try_from(wait)
        .ok()
        .and_then(|wait| start.checked_add(wait).ok())
        .unwrap_or(Timestamp::MAX)
}

/// From `start` to `end`, zero if `end` is earlier.
pub(crate) fn until(start: Timestamp, end: Timestamp) -> Duration {
    Duration::try_from(end.duration_since(start)).unwrap_or_default()
}

fn seconds_between(start: Timestamp, end: Timestamp) -> f64 {
    end.duration_since(start).as_secs_f64()
}

/// A duration as Go prints it: `10s`, `1m20s`, `5m0s`.
pub(crate) fn go_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) if seconds == 0 && !duration.is_zero() => {
            format!("{}ms", duration.as_micros() as f64 / 1000.0)
        }
        (0, 0) => match duration.subsec_millis() {
            0 => format!("{rest}s"),
            millis => format!("{}s", rest as f64 + f64::from(millis) / 1000.0),
        },
        (0, minutes) => format!("{minutes}m{rest}s"),
        (hours, minutes) => format!("{hours}h{minutes}m{rest}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::fixture;

    #[test]
    fn waits_are_10_s_doubling_to_5_min_and_forgotten_after_10_min() {
        let container = fixture::container("app");
        let rows = [
            // (wait on the container, ran for, ended ago, expected)
            (None, 1, 0, Restart::Now(Some(FIRST))),
            (Some(10), 1, 3, Restart::Later { at: fixture::at(-3 + 10), wait: FIRST }),
            (Some(10), 1, 10, Restart::Now(Some(Duration::from_secs(20)))),
            (Some(160), 1, 200, Restart::Now(Some(LONGEST))),
            (Some(300), 1, 301, Restart::Now(Some(LONGEST))),
            (Some(300), 601, 0, Restart::Now(Some(FIRST))),
        ];
        for (wait, ran, ended, expected) in rows {
            let mut status = fixture::exited("app", 1, 1);
            status.created_at = fixture::at(-ended - ran);
            status.finished_at = Some(fixture::at(-ended));
            if let Some(wait) = wait {
                status.annotations.insert(labels::BACK_OFF.to_owned(), wait.to_string());
            }
            status.annotations.insert(labels::HASH.to_owned(), labels::container_hash(&container));
            assert_eq!(
                restart(&status, &container, LONGEST, fixture::at(0)),
                expected,
                "wait {wait:?}, ran {ran} s, ended {ended} s ago"
            );
        }
    }

    #[test]
    fn a_changed_image_starts_without_waiting() {
        let mut container = fixture::container("app");
        let mut status = fixture::exited("app", 5, 1);
        status.annotations.insert(labels::BACK_OFF.to_owned(), "300".to_owned());
        status.annotations.insert(labels::HASH.to_owned(), labels::container_hash(&container));
        container.image = Some("other:2".to_owned());
        assert_eq!(restart(&status, &container, LONGEST, fixture::at(0)), Restart::Now(None));
    }

    #[test]
    fn durations_read_as_in_go() {
        let rows = [
            (10_000, "10s"),
            (80_000, "1m20s"),
            (300_000, "5m0s"),
            (1_500, "1.5s"),
            (250, "250ms"),
        ];
        for (millis, text) in rows {
            assert_eq!(go_duration(Duration::from_millis(millis)), text);
        }
    }
}
