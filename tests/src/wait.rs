//! Waiting for a condition, with a deadline instead of a guess.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(50);

/// Waits until `look` finds something, and returns it.
///
/// # Panics
/// When `deadline` passes first; the message says what was waited for and what was seen last.
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) if start.elapsed() > deadline => {
                panic!("waited {deadline:?} for {what}; last seen: {seen}")
            }
            // Not a guess at how long something takes: the step between two looks.
            Err(_) => thread::sleep(STEP),
        }
    }
}

/// Waits until `holds` is true.
///
/// # Panics
/// When `deadline` passes first.
pub fn wait_until(what: &str, deadline: Duration, mut holds: impl FnMut() -> bool) {
    wait_for(what, deadline, || if holds() { Ok(()) } else { Err("not so yet".to_owned()) });
}
