//! Errors of the kernel's answers about routes and interfaces.

use std::io;

/// What the system said.
pub(crate) fn failed(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}
