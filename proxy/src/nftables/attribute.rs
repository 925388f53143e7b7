//! Netlink messages and attributes, written into and read from one buffer.
//!
//! The frames are those that `netlink-packet-netfilter` describes, and the tests read what is
//! written here with that crate. They are written straight into one buffer all the same, since a
//! load of 30,000 Services is 100,000 elements, and a tree of them is an allocation for each
//! attribute.

use super::uapi::NLA_TYPE_MASK;

/// Length of `struct nlmsghdr`.
pub(crate) const NLMSG_HEADER: usize = 16;
/// Length of `struct nfgenmsg`.
pub(crate) const NFGEN_HEADER: usize = 4;
/// The longest attribute: its length field has 16 bits.
pub(crate) const ATTRIBUTE_MAX: usize = u16::MAX as usize;

/// The header of one message of a netfilter subsystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// `subsystem << 8 | message`, or one of netlink's own.
    pub(crate) kind: u16,
    /// `NLM_F_*`.
    pub(crate) flags: u16,
    /// Which message an answer is for.
    pub(crate) sequence: u32,
    /// `AF_INET`, `AF_INET6` or `AF_UNSPEC`.
    pub(crate) family: u8,
    /// The subsystem in batch frames, else 0.
    pub(crate) resource: u16,
}

/// Appends messages and attributes to a buffer.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
    overlong: bool,
}

impl Writer {
    /// What was written.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether an attribute is longer than its length field can say: what was written says something
    /// else than it should, and must not be sent.
    pub(crate) fn is_overlong(&self) -> bool {
        self.overlong
    }

    /// How much was written.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Writes a message whose attributes `body` writes.
    pub(crate) fn message(&mut self, header: Header, body: impl FnOnce(&mut Self)) {
        let start = self.begin_message(header);
        body(self);
        self.end_message(start);
    }

    /// Starts a message; [`Self::end_message`] takes what this returns.
    pub(crate) fn begin_message(&mut self, header: Header) -> usize {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&header.kind.to_ne_bytes());
        self.bytes.extend_from_slice(&header.flags.to_ne_bytes());
        self.bytes.extend_from_slice(&header.sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[header.family, 0]);
        self.bytes.extend_from_slice(&header.resource.to_be_bytes());
        start
    }

    /// Sets the length of the message that starts at `start`.
    pub(crate) fn end_message(&mut self, start: usize) {
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Adds flags to the message that starts at `start`.
    pub(crate) fn add_flags(&mut self, start: usize, flags: u16) {
        let at = start + 6..start + 8;
        let before = u16::from_ne_bytes([self.bytes[at.start], self.bytes[at.start + 1]]);
        self.bytes[at].copy_from_slice(&(before | flags).to_ne_bytes());
    }

    /// An attribute of these bytes.
    pub(crate) fn bytes_attribute(&mut self, kind: u16, value: &[u8]) {
        let length = self.length(4 + value.len());
        self.bytes.extend_from_slice(&length);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
    }

    /// An attribute of a number in network order, as netfilter has all its numbers.
    pub(crate) fn u32_attribute(&mut self, kind: u16, value: u32) {
        self.bytes_attribute(kind, &value.to_be_bytes());
    }

    /// An attribute of a text with the zero byte that ends it.
    pub(crate) fn text_attribute(&mut self, kind: u16, value: &str) {
        let length = self.length(4 + value.len() + 1);
        self.bytes.extend_from_slice(&length);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    /// An attribute that holds the attributes which `body` writes.
    pub(crate) fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let start = self.begin_nest(kind);
        body(self);
        self.end_nest(start);
    }

    /// Starts a nested attribute; [`Self::end_nest`] takes what this returns.
    pub(crate) fn begin_nest(&mut self, kind: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | super::uapi::NLA_F_NESTED).to_ne_bytes());
        start
    }

    /// Sets the length of the nested attribute that starts at `start`.
    pub(crate) fn end_nest(&mut self, start: usize) {
        let length = self.length(self.bytes.len() - start);
        self.bytes[start..start + 2].copy_from_slice(&length);
    }

    fn length(&mut self, length: usize) -> [u8; 2] {
        self.overlong |= length > ATTRIBUTE_MAX;
        u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes()
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

/// The attributes in a buffer. A length that doesn't fit ends the list, and nothing past the
/// buffer is read: what comes from the kernel is input from outside like any other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let head = self.0.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]) & NLA_TYPE_MASK;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

impl<'a> Attributes<'a> {
    /// The first attribute of this kind.
    pub(crate) fn find(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find_map(|(k, value)| (k == kind).then_some(value))
    }

    /// The first attribute of this kind as a number in network order.
    pub(crate) fn find_u32(self, kind: u16) -> Option<u32> {
        self.find(kind)?.first_chunk().copied().map(u32::from_be_bytes)
    }

    /// The first attribute of this kind as text.
    pub(crate) fn find_text(self, kind: u16) -> Option<&'a str> {
        text(self.find(kind)?)
    }
}

/// A text that may end in a zero byte.
pub(crate) fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes.split(|b| *b == 0).next().unwrap_or_default()).ok()
}

/// One message out of an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    /// `subsystem << 8 | message`, or one of netlink's own.
    pub(crate) kind: u16,
    /// `NLM_F_*`.
    pub(crate) flags: u16,
    /// Which request it answers.
    pub(crate) sequence: u32,
    /// All after the netlink header.
    pub(crate) payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// The attributes after the netfilter header.
    pub(crate) fn attributes(&self) -> Attributes<'a> {
        Attributes(self.payload.get(NFGEN_HEADER..).unwrap_or_default())
    }

    /// The address family in the netfilter header.
    pub(crate) fn family(&self) -> Option<u8> {
        self.payload.first().copied()
    }
}

/// The messages in a buffer; a length that doesn't fit ends the list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Messages<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let head = self.0.first_chunk::<NLMSG_HEADER>()?;
        let number =
            |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let length = usize::try_from(number(0)).ok()?;
        let payload = self.0.get(NLMSG_HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes([head[4], head[5]]),
            flags: u16::from_ne_bytes([head[6], head[7]]),
            sequence: number(8),
            payload,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut writer = Writer::default();
        let header = Header { kind: 0x0a0c, flags: 5, sequence: 7, family: 2, resource: 0 };
        writer.message(header, |w| {
            w.text_attribute(1, "keelson");
            w.nest(3, |w| w.u32_attribute(2, 9));
        });
        assert_eq!(writer.len() % 4, 0);
        let message = Messages(writer.bytes()).next().unwrap();
        assert_eq!((message.kind, message.flags, message.sequence), (0x0a0c, 5, 7));
        assert_eq!(message.attributes().find_text(1), Some("keelson"));
        let nested = Attributes(message.attributes().find(3).unwrap());
        assert_eq!(nested.find_u32(2), Some(9));
    }

    #[test]
    fn an_attribute_that_is_too_long_is_never_sent() {
        let long = vec![0; ATTRIBUTE_MAX];
        let text = "x".repeat(ATTRIBUTE_MAX);
        let bodies: [&dyn Fn(&mut Writer); 3] = [
            &|w| w.bytes_attribute(1, &long),
            &|w| w.text_attribute(1, &text),
            // Each of these fits, and what they are in doesn't.
            &|w| w.nest(1, |w| (0..3).for_each(|_| w.bytes_attribute(1, &long[..30_000]))),
        ];
        for body in bodies {
            let mut writer = Writer::default();
            body(&mut writer);
            assert!(writer.is_overlong());
        }
        let mut writer = Writer::default();
        writer.bytes_attribute(1, &long[..ATTRIBUTE_MAX - 4]);
        assert!(!writer.is_overlong());
    }

    proptest! {
        #[test]
        fn no_answer_is_read_past_its_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in Messages(&bytes) {
                for (_, value) in message.attributes() {
                    let _ = Attributes(value).count();
                }
            }
        }
    }
}
