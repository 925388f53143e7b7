//! The addresses of this machine's interfaces, and when there may be others.

use std::{collections::BTreeSet, io, net::IpAddr, time::Duration};

use futures::{StreamExt, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
    sys::SocketAddr,
};
use tokio_util::task::AbortOnDropHandle;

/// How often is looked where the kernel can't tell.
const PERIOD: Duration = Duration::from_secs(30);

/// Those of now, in this thread's network namespace.
pub(crate) fn local_addresses() -> BTreeSet<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return BTreeSet::new() };
    interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                (Some(v4), _) => Some(IpAddr::V4(v4.ip())),
                (_, Some(v6)) => Some(IpAddr::V6(v6.ip())),
                _ => None,
            }
        })
        .collect()
}

/// Tells when there may be others.
#[derive(Default)]
pub(crate) struct Moves {
    ear: Option<Ear>,
}

struct Ear {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    /// Reads the socket.
    _connection: AbortOnDropHandle<()>,
}

impl Ear {
    fn open() -> io::Result<Self> {
        let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok(Self { messages, _connection: connection })
    }

    /// Waits for news; false if there never will be any.
    async fn hears(&mut self) -> bool {
        while let Some((message, _)) = self.messages.next().await {
            match message.payload {
                NetlinkPayload::InnerMessage(
                    RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_),
                )
                | NetlinkPayload::Overrun(_) => return true,
                _ => {}
            }
        }
        false
    }
}

impl Moves {
    /// Waits until it is time to look. It is so too when listening begins, and from time to time
    /// where that can't be done.
    pub(crate) async fn wait(&mut self) {
        if let Some(ear) = &mut self.ear
            && ear.hears().await
        {
            return;
        }
        self.ear = match Ear::open() {
            Ok(ear) => Some(ear),
            Err(error) => {
                tracing::debug!(%error, "the kernel doesn't tell of addresses; looking for them");
                tokio::time::sleep(PERIOD).await;
                None
            }
        };
    }
}
