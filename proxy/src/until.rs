//! Waiting in tests: for a condition, never for a time.

use std::time::{Duration, Instant};

/// How long what must happen may take on a machine that has much else to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until a condition holds; `what` is said when it doesn't in time.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    until_some(what, || condition().then_some(()));
}

/// Waits until there is something; `what` is said when there isn't in time.
pub(crate) fn until_some<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
