//! One agent's connection: frames in, frames and descriptors out.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read},
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use crate::{
    protocol::{MAX_MESSAGE, Message, Request},
    sys,
};

/// The most messages that wait for one connection; whoever reads so slowly is hung up on, and asks
/// for the list when it is back.
const MAX_QUEUED: usize = 4096;

pub(crate) struct Connection {
    pub(crate) socket: UnixStream,
    input: Vec<u8>,
    pub(crate) output: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    pub(crate) subscribed: bool,
    pub(crate) broken: bool,
}

impl Connection {
    pub(crate) fn new(socket: UnixStream) -> Connection {
        Connection {
            socket,
            input: Vec::new(),
            output: VecDeque::new(),
            subscribed: false,
            broken: false,
        }
    }

    /// Sends a message, now or when there is room.
    pub(crate) fn queue(&mut self, message: &Message, fds: Vec<OwnedFd>) {
        let Ok(body) = serde_json::to_vec(message) else { return };
        let mut frame = u32::try_from(body.len()).unwrap_or(0).to_le_bytes().to_vec();
        frame.extend_from_slice(&body);
        self.output.push_back((frame, fds));
        if self.output.len() > MAX_QUEUED {
            self.broken = true;
        }
        self.flush();
    }

    /// Sends what waits, as far as it is taken.
    pub(crate) fn flush(&mut self) {
        while let Some((bytes, fds)) = self.output.front_mut() {
            match sys::send(&self.socket, bytes, fds) {
                Ok(n) => {
                    fds.clear();
                    bytes.drain(..n);
                    if bytes.is_empty() {
                        self.output.pop_front();
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.broken = true;
                    return;
                }
            }
        }
    }

    /// Reads what there is; gives the requests that are whole.
    pub(crate) fn read(&mut self) -> Vec<Request> {
        let mut chunk = [0; 8192];
        loop {
            match self.socket.read(&mut chunk) {
                Ok(0) => {
                    self.broken = true;
                    break;
                }
                Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.broken = true;
                    break;
                }
            }
        }
        let mut requests = Vec::new();
        while let Some(head) = self.input.first_chunk::<4>() {
            let length = u32::from_le_bytes(*head) as usize;
            if length > MAX_MESSAGE {
                self.broken = true;
                break;
            }
            let Some(body) = self.input.get(4..4 + length) else { break };
            match serde_json::from_slice(body) {
                Ok(request) => requests.push(request),
                // Without the request's id there is nothing to answer to.
                Err(_) => self.broken = true,
            }
            self.input.drain(..4 + length);
        }
        if self.input.is_empty() {
            self.input = Vec::new();
        }
        requests
    }
}
