//! Names that are not the cluster's: asked of the machine's own servers.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use hickory_proto::op::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    sync::Semaphore,
    time::{Instant, timeout},
};

/// How long one server is given.
const PATIENCE: Duration = Duration::from_secs(2);
/// How many questions may be under way; more are refused.
const MOST_QUESTIONS: usize = 256;
/// How long the list of servers is kept before the file is read again.
const FRESH: Duration = Duration::from_secs(5);
/// How many servers are tried (what the resolver library uses too).
const MOST_SERVERS: usize = 3;
const LARGEST: usize = 65_535;

/// Why a name could not be looked up elsewhere.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForwardError {
    #[error("no name servers to ask: {0} names none but this one")]
    NoServers(String),
    #[error("too many questions are under way")]
    Busy,
    #[error("no server answered; the last said: {0}")]
    Unanswered(String),
}

/// Asks other servers.
#[derive(Debug)]
pub(crate) struct Forwarder {
    resolv_conf: PathBuf,
    /// Addresses that lead back here.
    own: Vec<IpAddr>,
    known: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
    free: Semaphore,
}

impl Forwarder {
    /// Asks the servers that the file names, but never those that lead back.
    pub(crate) fn new(resolv_conf: PathBuf, own: Vec<IpAddr>) -> Self {
        Self { resolv_conf, own, known: Mutex::new(None), free: Semaphore::new(MOST_QUESTIONS) }
    }

    async fn servers(&self) -> Vec<SocketAddr> {
        {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((read, servers)) = known.as_ref()
                && read.elapsed() < FRESH
            {
                return servers.clone();
            }
        }
        let text = tokio::fs::read(&self.resolv_conf).await.unwrap_or_default();
        let servers = servers(&String::from_utf8_lossy(&text), &self.own);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some((Instant::now(), servers.clone()));
        servers
    }

    /// Asks a question, which is a whole message, and returns the answer to it.
    ///
    /// # Errors
    /// When there is nobody to ask, or nobody answers in time.
    pub(crate) async fn ask(&self, question: &Message) -> Result<Message, ForwardError> {
        let Ok(_permit) = self.free.try_acquire() else { return Err(ForwardError::Busy) };
        let servers = self.servers().await;
        if servers.is_empty() {
            return Err(ForwardError::NoServers(self.resolv_conf.display().to_string()));
        }
        let mut last = String::new();
        for server in servers {
            match timeout(PATIENCE, ask_one(server, question)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => last = format!("{server}: {error}"),
                Err(_) => last = format!("{server}: no answer in {} s", PATIENCE.as_secs()),
            }
        }
        Err(ForwardError::Unanswered(last))
    }
}

/// The servers in a resolver configuration, without those that lead back here.
fn servers(resolv_conf: &str, own: &[IpAddr]) -> Vec<SocketAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            if words.next() != Some("nameserver") {
                return None;
            }
            // A zone after '%' is for link-local addresses, which can't be asked without it.
            words.next()?.parse::<IpAddr>().ok()
        })
        .filter(|address| !own.contains(address) && !address.is_unspecified())
        .take(MOST_SERVERS)
        .map(|address| SocketAddr::new(address, 53))
        .collect()
}

async fn ask_one(server: SocketAddr, question: &Message) -> Result<Message, std::io::Error> {
    let mut asked = question.clone();
    // A number of its own, so that nobody can guess it from the outside.
    asked.metadata.id = rand::random();
    let bytes = asked.to_vec().map_err(std::io::Error::other)?;
    let answer = ask_udp(server, &bytes, &asked).await?;
    let mut answer =
        if answer.metadata.truncation { ask_tcp(server, &bytes, &asked).await? } else { answer };
    answer.metadata.id = question.metadata.id;
    Ok(answer)
}

fn answers(asked: &Message, bytes: &[u8]) -> Option<Message> {
    let answer = Message::from_vec(bytes).ok()?;
    (answer.metadata.id == asked.metadata.id && answer.queries == asked.queries).then_some(answer)
}

async fn ask_udp(
    server: SocketAddr,
    bytes: &[u8],
    asked: &Message,
) -> Result<Message, std::io::Error> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; 4_096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // What does not belong to the question is not believed.
        if let Some(answer) = answers(asked, &buffer[..length]) {
            return Ok(answer);
        }
    }
}

async fn ask_tcp(
    server: SocketAddr,
    bytes: &[u8],
    asked: &Message,
) -> Result<Message, std::io::Error> {
    let length = u16::try_from(bytes.len()).map_err(std::io::Error::other)?;
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&[&length.to_be_bytes(), bytes].concat()).await?;
    let length = usize::from(stream.read_u16().await?).min(LARGEST);
    let mut buffer = vec![0; length];
    stream.read_exact(&mut buffer).await?;
    answers(asked, &buffer)
        .ok_or_else(|| std::io::Error::other("the answer is to another question"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_and_loops_left_out() {
        let text = "# made by hand\nsearch example.com\nnameserver 10.0.0.1\nnameserver 10.96.0.10\n\
                    nameserver ::1\nnameserver nonsense\nnameserver 0.0.0.0\noptions ndots:5\n";
        let own = ["10.96.0.10".parse().unwrap()];
        assert_eq!(
            servers(text, &own),
            ["10.0.0.1:53".parse().unwrap(), "[::1]:53".parse::<SocketAddr>().unwrap()]
        );
    }
}
