//! Bounds what a tar reader must keep in memory.
//!
//! Long names and extended attributes come in entries of their own before the entry they belong
//! to, and a reader holds them whole. Their size is the archive's word, so a stream that passes
//! through [`Framed`] is followed header by header, and ends in an error where such an entry is
//! larger than any honest one.

use std::io::{self, Read};

use tar::Header;

const BLOCK: usize = 512;
/// PATH_MAX for names; extended attributes may be 64 KiB each.
const MAX_EXTENSION: u64 = 1 << 20;
/// Blocks that go on with the list of a sparse file's parts; each names 21 of them.
const MAX_SPARSE_BLOCKS: u32 = 4096;

/// What the next bytes of the stream are.
enum Expect {
    /// A header, of which this many bytes are in `block`.
    Header(usize),
    /// More of the list of a sparse file's parts.
    Sparse(usize, u32),
    /// Content and padding. A local extension's content is kept, to learn the size it may state.
    Content { left: u64, extension: bool },
    /// Whatever comes after the end of the archive.
    Tail,
}

/// A reader that passes a tar stream through and checks its framing.
pub(super) struct Framed<R> {
    inner: R,
    expect: Expect,
    block: [u8; BLOCK],
    extension: Vec<u8>,
    /// The content that follows the sparse list.
    after_sparse: u64,
}

impl<R: Read> Framed<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            expect: Expect::Header(0),
            block: [0; BLOCK],
            extension: Vec::new(),
            after_sparse: 0,
        }
    }

    fn follow(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match &mut self.expect {
                Expect::Tail => return Ok(()),
                Expect::Content { left, extension } => {
                    let take = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    if *extension {
                        self.extension.extend_from_slice(&bytes[..take]);
                    }
                    *left -= take as u64;
                    bytes = &bytes[take..];
                    if *left == 0 {
                        self.expect = Expect::Header(0);
                    }
                }
                Expect::Header(filled) | Expect::Sparse(filled, _) => {
                    let take = (BLOCK - *filled).min(bytes.len());
                    self.block[*filled..*filled + take].copy_from_slice(&bytes[..take]);
                    *filled += take;
                    bytes = &bytes[take..];
                    if *filled == BLOCK {
                        self.expect = self.after_block()?;
                    }
                }
            }
        }
        Ok(())
    }

    fn after_block(&mut self) -> io::Result<Expect> {
        if let Expect::Sparse(_, blocks) = self.expect {
            // In an extension block the byte after the 21 parts says whether another follows.
            let more = self.block[504] != 0;
            return match (more, blocks) {
                (true, MAX_SPARSE_BLOCKS..) => Err(refused("a sparse file has too many parts")),
                (true, _) => Ok(Expect::Sparse(0, blocks + 1)),
                (false, _) => Ok(content(self.after_sparse, false)),
            };
        }
        if self.block.iter().all(|b| *b == 0) {
            return Ok(Expect::Tail);
        }
        let header = Header::from_byte_slice(&self.block);
        let kind = header.entry_type();
        let is_extension = kind.is_gnu_longname()
            || kind.is_gnu_longlink()
            || kind.is_pax_local_extensions()
            || kind.is_pax_global_extensions();
        let mut size = header.entry_size()?;
        if is_extension {
            if size > MAX_EXTENSION {
                return Err(refused("a name or attribute is too large"));
            }
            return Ok(content(size, kind.is_pax_local_extensions()));
        }
        let stated = stated_size(&self.extension);
        self.extension.clear();
        size = stated.unwrap_or(size);
        let extended_sparse =
            kind.is_gnu_sparse() && header.as_gnu().is_some_and(tar::GnuHeader::is_extended);
        if extended_sparse {
            self.after_sparse = size;
            return Ok(Expect::Sparse(0, 1));
        }
        Ok(content(size, false))
    }
}

fn content(size: u64, extension: bool) -> Expect {
    match size.checked_next_multiple_of(BLOCK as u64) {
        Some(0) => Expect::Header(0),
        Some(left) => Expect::Content { left, extension },
        // The reader refuses such a size by itself.
        None => Expect::Tail,
    }
}

/// The `size` record of a local extension, which wins over the header's.
fn stated_size(extension: &[u8]) -> Option<u64> {
    tar::PaxExtensions::new(extension)
        .filter_map(Result::ok)
        .filter(|record| record.key_bytes() == b"size")
        .find_map(|record| record.value().ok()?.parse().ok())
}

fn refused(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

impl<R: Read> Read for Framed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.follow(&buffer[..read])?;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: tar::EntryType, size: u64) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    fn passes(bytes: &[u8]) -> io::Result<u64> {
        io::copy(&mut Framed::new(bytes), &mut io::sink())
    }

    #[test]
    fn an_oversized_name_or_attribute_is_refused() {
        use tar::EntryType as Kind;
        for kind in [Kind::GNULongName, Kind::GNULongLink, Kind::XHeader, Kind::XGlobalHeader] {
            assert!(passes(&header(kind, MAX_EXTENSION)).is_ok());
            assert!(passes(&header(kind, MAX_EXTENSION + 1)).is_err());
        }
        assert!(passes(&header(Kind::Regular, MAX_EXTENSION + 1)).is_ok());
    }

    #[test]
    fn a_header_hidden_behind_a_stated_size_is_found() {
        // The file's header says 0 bytes, its extension says 512: the block after it is content.
        let mut bytes = header(tar::EntryType::XHeader, 12);
        let mut record = b"12 size=512\n".to_vec();
        record.resize(BLOCK, 0);
        bytes.extend(record);
        bytes.extend(header(tar::EntryType::Regular, 0));
        bytes.extend([b'x'; BLOCK]);
        bytes.extend(header(tar::EntryType::GNULongName, MAX_EXTENSION + 1));
        assert!(passes(&bytes).is_err());
    }

    #[test]
    fn what_comes_after_the_end_is_not_looked_at() {
        let mut bytes = vec![0; 2 * BLOCK];
        bytes.extend(header(tar::EntryType::GNULongName, MAX_EXTENSION + 1));
        assert_eq!(passes(&bytes).unwrap(), 3 * BLOCK as u64);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_in_any_pieces_do_not_panic(bytes in proptest::collection::vec(0u8.., 0..3000)) {
            let _ = passes(&bytes);
        }
    }
}
