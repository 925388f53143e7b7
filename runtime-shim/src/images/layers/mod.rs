//! A layer: from an archive of somebody else's making to a folder that overlay can stack.
//!
//! ```text
//!   blob ─► digest, size ─► gzip | zstd | tar ─► diff id, bound ─► framing ─► tar ─► tree
//!            (what came)      (by its magic)      (what it holds)   (bounded)         (rooted)
//! ```
//!
//! Nothing in an archive is trusted. What it holds is written by [`tree::Tree`], which can't leave
//! its folder; how much it holds is bounded by [`Budget`]; what the reader keeps in memory is
//! bounded by [`framing::Framed`]. A layer becomes visible by one rename, after all of it is on the
//! disk and both of its digests were right.

mod framing;
mod tree;
mod unpack;

pub(crate) use unpack::{Budget, LayerBlob, Unpacked, decompressed, unpack};

/// Why a layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    /// The archive holds what must not or can't be unpacked.
    #[error("layer {layer}: {reason}")]
    Refused {
        /// The layer's diff id, or its file.
        layer: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It is not what its name says.
    #[error("layer {layer}: digest mismatch: expected {expected}, got {actual}")]
    DigestMismatch {
        /// The layer's diff id.
        layer: String,
        /// As the manifest or configuration says.
        expected: String,
        /// As it is.
        actual: String,
    },
    /// The disk, not the archive.
    #[error("layer {layer}: {what}: {source}")]
    Io {
        /// The layer's diff id.
        layer: String,
        /// What was being done.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
}
