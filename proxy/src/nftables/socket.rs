//! Transactions and questions over a [wire](super::wire): a commit is one system call and one or
//! two reads.

use std::io;

use super::{
    attribute::{Attributes, Header, Message, Messages, Writer},
    batch::Batch,
    uapi::*,
    wire::{Wire, error_of, force_buffer},
};
use crate::{
    backend::{BackendError, is_busy},
    model::Family,
};

/// How many times a listing that a commit of somebody else tore is begun again.
const LISTING_TRIES: usize = 10;

/// Why the kernel's tables could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NftError {
    /// The kernel refused a message, and with it the whole transaction.
    #[error("{subject}: {source}{}", explanation.as_ref().map(|e| format!(" ({e})")).unwrap_or_default())]
    Refused {
        /// What the message was about.
        subject: String,
        /// What the kernel said in words, if it did.
        explanation: Option<String>,
        /// What the kernel said as a number.
        source: io::Error,
    },
    /// The socket failed.
    #[error("{doing}: {source}")]
    Socket {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel's answers didn't fit in the socket's buffer, so nobody knows what happened.
    #[error("the kernel's answers to a transaction were lost")]
    AnswersLost,
    /// Others changed the tables all the while they were being listed.
    #[error("the tables changed {LISTING_TRIES} times while they were being listed")]
    Restless,
}

impl NftError {
    /// Whether it is not for something that is lacking: another try soon may go better.
    pub(crate) fn is_busy(&self) -> bool {
        match self {
            Self::Refused { source, .. } | Self::Socket { source, .. } => {
                source.raw_os_error().is_some_and(is_busy)
            }
            Self::AnswersLost | Self::Restless => true,
        }
    }
}

impl From<NftError> for BackendError {
    fn from(error: NftError) -> Self {
        Self::Kernel { busy: error.is_busy(), message: error.to_string() }
    }
}

impl NftError {
    /// The error number, if the kernel gave one.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } | Self::Socket { source, .. } => source.raw_os_error(),
            Self::AnswersLost | Self::Restless => None,
        }
    }
}

fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> NftError {
    move |source| NftError::Socket { doing, source }
}

/// A socket to the kernel's tables.
#[derive(Debug)]
pub(crate) struct NftSocket {
    wire: Wire,
    send_limit: usize,
    sequence: u32,
}

impl NftSocket {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel has no netfilter sockets or the process may not have one.
    pub(crate) fn open() -> Result<Self, NftError> {
        let wire = Wire::open().map_err(failed("open a netfilter socket"))?;
        force_buffer(wire.socket(), libc::SO_RCVBUFFORCE, 4 << 20);
        Ok(Self::over(wire))
    }

    /// Talks over this wire.
    pub(crate) fn over(wire: Wire) -> Self {
        Self { wire, send_limit: 0, sequence: 0 }
    }

    /// The number by which the kernel names this socket in its notifications.
    pub(crate) fn port(&self) -> u32 {
        self.wire.port()
    }

    /// Carries out a transaction.
    ///
    /// # Errors
    /// [`NftError::Refused`] with the first message that the kernel refused; then nothing of the
    /// transaction was done.
    pub(crate) fn commit(&mut self, batch: &mut Batch) -> Result<(), NftError> {
        if batch.is_empty() {
            return Ok(());
        }
        batch.finish();
        self.transact(batch)
    }

    /// Has the kernel check a transaction without doing it.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub(crate) fn check(&mut self, batch: &mut Batch) -> Result<(), NftError> {
        batch.finish_unclosed();
        self.transact(batch)
    }

    fn transact(&mut self, batch: &Batch) -> Result<(), NftError> {
        if batch.is_overlong() {
            return Err(NftError::Refused {
                subject: "the transaction".to_owned(),
                explanation: Some("an attribute is longer than netlink can tell".to_owned()),
                source: io::Error::from_raw_os_error(libc::EMSGSIZE),
            });
        }
        let length = batch.bytes().len();
        if length > self.send_limit {
            // A load is several megabytes. The kernel counts its own overhead too and wants the
            // whole batch in one piece.
            self.send_limit = length.saturating_mul(2).max(1 << 20);
            force_buffer(self.wire.socket(), libc::SO_SNDBUFFORCE, self.send_limit);
        }
        self.send(batch.bytes(), "send a transaction")?;
        let last = batch.last_sequence();
        let mut done = false;
        let mut refusal = None;
        while let Some(messages) = self.read_some()? {
            for message in Messages(messages) {
                let Some(code) = error_code(&message) else { continue };
                if code != 0 && refusal.is_none() {
                    let subject = batch.subject(message.sequence).map_or_else(
                        || "the transaction".to_owned(),
                        std::string::ToString::to_string,
                    );
                    refusal = Some(refused(subject, code, &message));
                }
                done |= code == 0 && message.sequence == last;
            }
            if done {
                break;
            }
        }
        if done || refusal.is_some() {
            self.wire.settled();
        }
        match refusal {
            Some(refusal) => Err(refusal),
            None if done => Ok(()),
            None => Err(NftError::AnswersLost),
        }
    }

    /// Lists what `message` (a `NFT_MSG_GET*`) lists, handing each answer to `each`.
    ///
    /// # Errors
    /// When the kernel refuses, or when others keep changing what is being listed.
    pub(crate) fn list(
        &mut self,
        family: Family,
        message: u8,
        attributes: impl Fn(&mut Writer),
        mut each: impl FnMut(Message<'_>),
        mut restart: impl FnMut(),
    ) -> Result<(), NftError> {
        for _ in 0..LISTING_TRIES {
            let sequence = self.ask(family, message, NLM_F_DUMP, &attributes)?;
            if self.read_listing(sequence, &mut each)? {
                return Ok(());
            }
            restart();
        }
        Err(NftError::Restless)
    }

    /// Asks for single things and hands on each answer, in the order of the question.
    ///
    /// # Errors
    /// [`NftError::Refused`] when one of them isn't there; those before it were handed on.
    pub(crate) fn get(
        &mut self,
        family: Family,
        message: u8,
        attributes: impl Fn(&mut Writer),
        mut each: impl FnMut(Message<'_>),
    ) -> Result<(), NftError> {
        let sequence = self.ask(family, message, 0, attributes)?;
        while let Some(messages) = self.read_some()? {
            for message in Messages(messages).filter(|m| m.sequence == sequence) {
                match error_code(&message) {
                    Some(0) => {}
                    Some(code) => return Err(refused("a question".into(), code, &message)),
                    None => each(message),
                }
            }
        }
        self.wire.settled();
        Ok(())
    }

    /// The generation of the tables: it grows with every commit, whoever's.
    ///
    /// # Errors
    /// When the kernel doesn't say.
    pub(crate) fn generation(&mut self) -> Result<u32, NftError> {
        let sequence = self.ask(Family::V4, NFT_MSG_GETGEN, 0, |_| {})?;
        let mut generation = None;
        while let Some(messages) = self.read_some()? {
            for message in Messages(messages).filter(|m| m.sequence == sequence) {
                if let Some(code) = error_code(&message)
                    && code != 0
                {
                    return Err(refused("the generation".into(), code, &message));
                }
                if message.kind & 0xff == u16::from(NFT_MSG_NEWGEN) {
                    generation = message.attributes().find_u32(NFTA_GEN_ID);
                }
            }
            if let Some(generation) = generation {
                self.wire.settled();
                return Ok(generation);
            }
        }
        Err(NftError::AnswersLost)
    }

    fn ask(
        &mut self,
        family: Family,
        message: u8,
        flags: u16,
        attributes: impl Fn(&mut Writer),
    ) -> Result<u32, NftError> {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let mut writer = Writer::default();
        let header = Header {
            kind: u16::from(NFNL_SUBSYS_NFTABLES) << 8 | u16::from(message),
            flags: NLM_F_REQUEST | flags,
            sequence: self.sequence,
            family: family.protocol_family(),
            resource: 0,
        };
        writer.message(header, attributes);
        self.send(writer.bytes(), "ask for the tables")?;
        Ok(self.sequence)
    }

    /// Reads to the end of a listing. False if it was torn.
    fn read_listing(
        &mut self,
        sequence: u32,
        each: &mut impl FnMut(Message<'_>),
    ) -> Result<bool, NftError> {
        let mut torn = false;
        while let Some(messages) = self.read_some()? {
            for message in Messages(messages).filter(|m| m.sequence == sequence) {
                torn |= message.flags & NLM_F_DUMP_INTR != 0;
                if message.kind == NLMSG_DONE {
                    self.wire.settled();
                    return Ok(!torn);
                }
                let Some(code) = error_code(&message) else {
                    each(message);
                    continue;
                };
                let ended = match -i64::from(code) {
                    0 => continue,
                    errno if errno == i64::from(libc::EINTR) => Ok(false),
                    // What isn't there has nothing to list.
                    errno if errno == i64::from(libc::ENOENT) => Ok(true),
                    _ => Err(refused("a listing".into(), code, &message)),
                };
                self.wire.settled();
                return ended;
            }
        }
        Err(NftError::AnswersLost)
    }

    fn send(&mut self, bytes: &[u8], doing: &'static str) -> Result<(), NftError> {
        self.wire.send(bytes).map_err(failed(doing))
    }

    /// What waits to be read, or nothing.
    fn read_some(&mut self) -> Result<Option<&[u8]>, NftError> {
        self.wire.read().map_err(|source| match source.raw_os_error() {
            Some(libc::ENOBUFS) => NftError::AnswersLost,
            _ => NftError::Socket { doing: "read the kernel's answer", source },
        })
    }
}

/// The code of an answer that says whether a request was done: 0 if it was.
fn error_code(message: &Message<'_>) -> Option<i32> {
    if message.kind != NLMSG_ERROR {
        return None;
    }
    message.payload.first_chunk().copied().map(i32::from_ne_bytes)
}

fn refused(subject: String, code: i32, message: &Message<'_>) -> NftError {
    // error code, then the header of the refused message, its body unless capped, then attributes.
    let explanation = (message.flags & NLM_F_ACK_TLVS != 0)
        .then(|| {
            let quoted =
                message.payload.get(4..8)?.first_chunk().copied().map(u32::from_ne_bytes)?;
            let skip = if message.flags & NLM_F_CAPPED != 0 { 16 } else { quoted as usize };
            let attributes = message.payload.get(4 + skip.next_multiple_of(4)..)?;
            Attributes(attributes).find_text(NLMSGERR_ATTR_MSG).map(str::to_owned)
        })
        .flatten();
    NftError::Refused { subject, explanation, source: error_of(code) }
}
