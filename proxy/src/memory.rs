//! Memory that only a load needs.

/// Gives what a large load needed, and nothing uses any more, back to the system. The allocator
/// keeps it otherwise, and most proxies never need as much again.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: there is no pointer to get wrong, and any thread may call it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
