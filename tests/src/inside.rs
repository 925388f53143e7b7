//! Doing something in another network namespace, on a thread of its own: a namespace belongs to a
//! thread, so nothing else of this process moves.

use std::{fs::File, panic, thread};

use anyhow::Context;
use nix::sched::{CloneFlags, setns};

/// Runs `work` in the named network namespace and waits for it.
///
/// # Errors
/// When the namespace can't be entered, or `work` fails.
pub fn inside<T: Send>(
    netns: &str,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(netns)?;
            work()
        });
        thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
    })
}

/// Runs asynchronous work in the named network namespace and waits for it. All of its sockets are
/// made there, since everything runs on that one thread.
///
/// # Errors
/// As [`inside`].
pub fn inside_async<T, F>(netns: &str, work: impl FnOnce() -> F + Send) -> anyhow::Result<T>
where
    T: Send,
    F: Future<Output = anyhow::Result<T>>,
{
    inside(netns, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(work())
    })
}

/// Moves this thread into the named network namespace.
///
/// # Errors
/// When there is none, or that is not allowed.
pub fn enter(netns: &str) -> anyhow::Result<()> {
    let path = format!("/run/netns/{netns}");
    let file = File::open(&path).with_context(|| format!("network namespace {path}"))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter network namespace {path}"))
}
