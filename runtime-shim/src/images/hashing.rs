//! SHA-256, by which everything in the store is named.

use std::io::{self, Read, Write};

use sha2::{Digest as _, Sha256};

use super::reference::Digest;

/// The digest of some bytes.
pub(crate) fn digest(bytes: &[u8]) -> Digest {
    digest_of(Sha256::new_with_prefix(bytes))
}

/// The digest of what a hasher was fed.
pub(crate) fn digest_of(hash: Sha256) -> Digest {
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Digest::from_hex(&hex).unwrap_or_else(|| unreachable!("SHA-256 has 32 bytes"))
}

/// Copies all of `from` into `to`, at most `limit` bytes; returns how many and their digest.
pub(crate) fn copy(
    from: &mut impl Read,
    to: &mut impl Write,
    limit: u64,
) -> io::Result<(u64, Digest)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 128 << 10];
    let mut length = 0;
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok((length, digest_of(hash))),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        length += read as u64;
        if length > limit {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it is larger than {limit} bytes"),
            ));
        }
        hash.update(&buffer[..read]);
        to.write_all(&buffer[..read])?;
    }
}
