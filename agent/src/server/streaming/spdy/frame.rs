//! SPDY/3.1 frames: their layout on the wire, and the compressed header blocks.
//!
//! Source: SPDY Protocol, Draft 3.1, section 2. Every length comes from a stranger and is bounded.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::dictionary::dictionary;

/// The version in every control frame.
const VERSION: u16 = 3;
/// The longest payload that is taken. A peer's data frames hold what one write held, 32 KiB with
/// client-go.
pub(super) const MAX_PAYLOAD: usize = 1 << 20;
/// The longest header block, unpacked.
const MAX_HEADERS: usize = 64 << 10;

/// The flag by which a side says that it sends no more on the stream.
const FLAG_FIN: u8 = 1;

/// A peer that does not speak the protocol.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    /// A frame of a version other than 3.
    #[error("SPDY frame of version {0}, not 3")]
    Version(u16),
    /// A frame that is longer than is taken.
    #[error("SPDY frame of {0} bytes is longer than the {MAX_PAYLOAD} that are taken")]
    TooLong(usize),
    /// A frame that is shorter than its kind needs.
    #[error("SPDY frame of type {0} is too short")]
    TooShort(u16),
    /// A header block that can't be unpacked.
    #[error("SPDY header block: {0}")]
    Headers(&'static str),
}

/// What a peer sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// A new stream with its headers.
    SynStream { stream: u32, headers: Vec<(String, String)>, fin: bool },
    /// The answer to a new stream.
    SynReply { stream: u32, fin: bool },
    /// Bytes of a stream.
    Data { stream: u32, bytes: Vec<u8>, fin: bool },
    /// A stream is broken off.
    Reset { stream: u32, status: u32 },
    /// To be sent back as it is.
    Ping { id: u32 },
    /// The peer takes no more streams.
    GoAway,
    /// Something that has no effect here: settings, window updates, more headers.
    Ignored,
}

/// The first eight bytes of every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Type of a control frame; none for data.
    kind: Option<u16>,
    stream: u32,
    flags: u8,
    /// Bytes that follow.
    pub(super) length: usize,
}

impl Head {
    pub(super) const LENGTH: usize = 8;

    pub(super) fn parse(bytes: [u8; Self::LENGTH]) -> Result<Self, FrameError> {
        let first = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let length = u32::from_be_bytes([0, bytes[5], bytes[6], bytes[7]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length));
        }
        let (kind, stream) = if first >> 31 == 1 {
            let version = (first >> 16) as u16 & 0x7fff;
            if version != VERSION {
                return Err(FrameError::Version(version));
            }
            (Some(first as u16), 0)
        } else {
            (None, first)
        };
        Ok(Self { kind, stream, flags: bytes[4], length })
    }
}

/// Packs and unpacks header blocks. One compressed stream goes through all blocks of a direction.
pub(super) struct Codec {
    compress: Compress,
    decompress: Decompress,
    dictionary: Vec<u8>,
}

impl Codec {
    pub(super) fn new() -> Result<Self, FrameError> {
        let dictionary = dictionary();
        let mut compress = Compress::new(Compression::best(), true);
        compress
            .set_dictionary(&dictionary)
            .map_err(|_| FrameError::Headers("the dictionary was refused"))?;
        Ok(Self { compress, decompress: Decompress::new(true), dictionary })
    }

    /// Takes a frame apart.
    pub(super) fn decode(&mut self, head: Head, payload: Vec<u8>) -> Result<Frame, FrameError> {
        let fin = head.flags & FLAG_FIN != 0;
        let Some(kind) = head.kind else {
            return Ok(Frame::Data { stream: head.stream, bytes: payload, fin });
        };
        let word = |at: usize| -> Result<u32, FrameError> {
            payload
                .get(at..at + 4)
                .and_then(|bytes| bytes.try_into().ok())
                .map(u32::from_be_bytes)
                .ok_or(FrameError::TooShort(kind))
        };
        match kind {
            1 => {
                let stream = word(0)? & 0x7fff_ffff;
                let block = payload.get(10..).ok_or(FrameError::TooShort(kind))?;
                Ok(Frame::SynStream { stream, headers: self.unpack(block)?, fin })
            }
            2 => {
                let stream = word(0)? & 0x7fff_ffff;
                // The block must go through the compressed stream even though nobody reads it.
                self.unpack(payload.get(4..).unwrap_or_default())?;
                Ok(Frame::SynReply { stream, fin })
            }
            3 => Ok(Frame::Reset { stream: word(0)? & 0x7fff_ffff, status: word(4)? }),
            6 => Ok(Frame::Ping { id: word(0)? }),
            7 => Ok(Frame::GoAway),
            8 => {
                self.unpack(payload.get(4..).unwrap_or_default())?;
                Ok(Frame::Ignored)
            }
            _ => Ok(Frame::Ignored),
        }
    }

    fn unpack(&mut self, block: &[u8]) -> Result<Vec<(String, String)>, FrameError> {
        let mut plain = Vec::with_capacity(1024);
        let mut rest = block;
        while !rest.is_empty() {
            if plain.len() == plain.capacity() {
                plain.reserve(1024);
            }
            if plain.len() > MAX_HEADERS {
                return Err(FrameError::Headers("longer than is taken"));
            }
            let (before_in, before_out) = (self.decompress.total_in(), plain.len());
            match self.decompress.decompress_vec(rest, &mut plain, FlushDecompress::Sync) {
                Ok(Status::StreamEnd) => {
                    return Err(FrameError::Headers("the compressed stream ended"));
                }
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.decompress
                        .set_dictionary(&self.dictionary)
                        .map_err(|_| FrameError::Headers("another dictionary than SPDY/3's"))?;
                }
                Err(_) => return Err(FrameError::Headers("not compressed data")),
            }
            let used = (self.decompress.total_in() - before_in) as usize;
            if used == 0 && plain.len() == before_out && plain.len() < plain.capacity() {
                return Err(FrameError::Headers("cut short"));
            }
            rest = &rest[used..];
        }
        parse_pairs(&plain)
    }

    fn pack(&mut self, headers: &[(&str, &str)]) -> Result<Vec<u8>, FrameError> {
        let mut plain = Vec::new();
        put_word(&mut plain, headers.len());
        for (name, value) in headers {
            for text in [name, value] {
                put_word(&mut plain, text.len());
                plain.extend_from_slice(text.as_bytes());
            }
        }
        let mut block = Vec::with_capacity(plain.len() + 64);
        let mut rest = plain.as_slice();
        loop {
            let before = self.compress.total_in();
            self.compress
                .compress_vec(rest, &mut block, FlushCompress::Sync)
                .map_err(|_| FrameError::Headers("can't be compressed"))?;
            rest = &rest[(self.compress.total_in() - before) as usize..];
            if rest.is_empty() && block.len() < block.capacity() {
                return Ok(block);
            }
            block.reserve(64);
        }
    }

    /// Accepts a stream.
    pub(super) fn syn_reply(&mut self, stream: u32) -> Result<Vec<u8>, FrameError> {
        let block = self.pack(&[])?;
        let mut payload = stream.to_be_bytes().to_vec();
        payload.extend_from_slice(&block);
        Ok(control(2, 0, &payload))
    }

    /// Opens a stream: what a client does; the tests' peer needs it.
    #[cfg(test)]
    pub(super) fn syn_stream(&mut self, stream: u32, headers: &[(&str, &str)]) -> Vec<u8> {
        let block = self.pack(headers).unwrap();
        let mut payload = stream.to_be_bytes().to_vec();
        payload.extend_from_slice(&[0; 6]);
        payload.extend_from_slice(&block);
        control(1, 0, &payload)
    }
}

fn put_word(into: &mut Vec<u8>, value: usize) {
    into.extend_from_slice(&(value as u32).to_be_bytes());
}

fn parse_pairs(plain: &[u8]) -> Result<Vec<(String, String)>, FrameError> {
    let mut rest = plain;
    let word = |rest: &mut &[u8]| -> Result<usize, FrameError> {
        let (bytes, tail) =
            rest.split_first_chunk::<4>().ok_or(FrameError::Headers("cut short"))?;
        *rest = tail;
        Ok(u32::from_be_bytes(*bytes) as usize)
    };
    let count = word(&mut rest)?;
    if count > 100 {
        return Err(FrameError::Headers("too many headers"));
    }
    let mut pairs = Vec::with_capacity(count);
    for _ in 0..count {
        let mut text = || -> Result<String, FrameError> {
            let length = word(&mut rest)?;
            let (bytes, tail) =
                rest.split_at_checked(length).ok_or(FrameError::Headers("cut short"))?;
            rest = tail;
            String::from_utf8(bytes.to_vec()).map_err(|_| FrameError::Headers("not text"))
        };
        // Names travel in lower case.
        pairs.push((text()?.to_ascii_lowercase(), text()?));
    }
    Ok(pairs)
}

fn control(kind: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = (0x8000_u16 | VERSION).to_be_bytes().to_vec();
    frame.extend_from_slice(&kind.to_be_bytes());
    put_length(&mut frame, flags, payload.len());
    frame.extend_from_slice(payload);
    frame
}

fn put_length(frame: &mut Vec<u8>, flags: u8, length: usize) {
    frame.push(flags);
    frame.extend_from_slice(&(length as u32).to_be_bytes()[1..]);
}

/// Bytes of a stream, at most [`MAX_PAYLOAD`] at once.
pub(super) fn data(stream: u32, bytes: &[u8], fin: bool) -> Vec<u8> {
    debug_assert!(bytes.len() <= MAX_PAYLOAD, "callers cut at MAX_PAYLOAD");
    let mut frame = stream.to_be_bytes().to_vec();
    put_length(&mut frame, if fin { FLAG_FIN } else { 0 }, bytes.len());
    frame.extend_from_slice(bytes);
    frame
}

/// Breaks a stream off.
pub(super) fn reset(stream: u32, status: u32) -> Vec<u8> {
    control(3, 0, &[stream.to_be_bytes(), status.to_be_bytes()].concat())
}

/// Sends a ping back.
pub(super) fn ping(id: u32) -> Vec<u8> {
    control(6, 0, &id.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(codec: &mut Codec, frame: &[u8]) -> Result<Frame, FrameError> {
        let head = Head::parse(frame[..8].try_into().unwrap())?;
        codec.decode(head, frame[8..].to_vec())
    }

    #[test]
    fn headers_go_through_one_compressed_stream() {
        let (mut client, mut server) = (Codec::new().unwrap(), Codec::new().unwrap());
        for (stream, kind) in [(1, "error"), (3, "stdin"), (5, "stdout")] {
            let frame = client.syn_stream(stream, &[("streamtype", kind)]);
            assert_eq!(
                decode(&mut server, &frame).unwrap(),
                Frame::SynStream {
                    stream,
                    headers: vec![("streamtype".into(), kind.into())],
                    fin: false
                }
            );
            let reply = server.syn_reply(stream).unwrap();
            assert_eq!(
                decode(&mut client, &reply).unwrap(),
                Frame::SynReply { stream, fin: false }
            );
        }
    }

    #[test]
    fn data_resets_and_pings_come_back() {
        let mut codec = Codec::new().unwrap();
        assert_eq!(
            decode(&mut codec, &data(7, b"abc", true)).unwrap(),
            Frame::Data { stream: 7, bytes: b"abc".to_vec(), fin: true }
        );
        assert_eq!(
            decode(&mut codec, &reset(7, 5)).unwrap(),
            Frame::Reset { stream: 7, status: 5 }
        );
        assert_eq!(decode(&mut codec, &ping(9)).unwrap(), Frame::Ping { id: 9 });
    }

    #[test]
    fn long_and_foreign_frames_are_refused() {
        assert!(matches!(
            Head::parse([0, 0, 0, 1, 0, 0xff, 0xff, 0xff]),
            Err(FrameError::TooLong(_))
        ));
        assert!(matches!(Head::parse([0x80, 2, 0, 1, 0, 0, 0, 0]), Err(FrameError::Version(2))));
    }

    proptest! {
        #[test]
        fn arbitrary_frames_never_panic(kind in 0_u16..12, payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut codec = Codec::new().unwrap();
            let _ = decode(&mut codec, &control(kind, 0, &payload));
        }

        #[test]
        fn long_header_values_survive(value in "[ -~]{0,5000}") {
            let (mut client, mut server) = (Codec::new().unwrap(), Codec::new().unwrap());
            let frame = client.syn_stream(1, &[("name", &value)]);
            let decoded = decode(&mut server, &frame).unwrap();
            prop_assert_eq!(decoded, Frame::SynStream { stream: 1, headers: vec![("name".into(), value)], fin: false });
        }
    }
}
