//! Local routes: they make a Service's address one of this node's, without an interface.

use std::{collections::BTreeSet, io, net::IpAddr};

use futures::{StreamExt, TryStreamExt, channel::mpsc::UnboundedReceiver, stream};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        route::{RouteMessage, RouteProtocol, RouteScope, RouteType},
    },
    sys::SocketAddr,
};
use tokio_util::task::AbortOnDropHandle;

use super::observe::{any_route, destination};
use crate::{config::DetectLocal, model::Family};

/// Who made a route, as the kernel keeps it: it tells ours from others'. `ip route show table local
/// proto 75` lists them.
pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Other(75);
/// The kernel's table of its own addresses.
const LOCAL: u8 = 255;
/// How many requests are under way at a time.
const AT_ONCE: usize = 64;

/// What the system said.
pub(super) fn failed(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

/// The routes of one family.
#[derive(Debug)]
pub(super) struct Routes {
    handle: Handle,
    family: Family,
    loopback: u32,
    held: BTreeSet<IpAddr>,
    _connection: AbortOnDropHandle<()>,
}

impl Routes {
    /// Opens a netlink socket in this thread's namespace.
    pub(super) fn open(family: Family) -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let loopback = nix::net::if_::if_nametoindex("lo")?;
        Ok(Self { handle, family, loopback, held: BTreeSet::new(), _connection })
    }

    /// Whether routes may be changed at all: removes one that nobody has.
    pub(super) async fn probe(&mut self) -> io::Result<()> {
        // For documentation only.
        let nobody = match self.family {
            Family::V4 => IpAddr::from([192, 0, 2, 0]),
            Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0]),
        };
        self.remove(vec![nobody]).await.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// The netlink socket.
    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Whether there is one to this address.
    pub(super) fn has(&self, address: IpAddr) -> bool {
        self.held.contains(&address)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.held.iter().copied()
    }

    /// Looks at what there is: those of a killed run, and those that somebody removed.
    pub(super) async fn observe(&mut self) -> io::Result<()> {
        let mut found = BTreeSet::new();
        let mut routes = self.handle.route().get(any_route(self.family)).execute();
        while let Some(route) = routes.try_next().await.map_err(failed)? {
            found.extend(ours(&route));
        }
        self.held = found;
        Ok(())
    }

    /// Adds routes; what could not be added is returned.
    pub(super) async fn add(&mut self, addresses: Vec<IpAddr>) -> Vec<(IpAddr, io::Error)> {
        let results = self.each(addresses, |handle, message| async move {
            handle.route().add(message).execute().await
        });
        let mut refused = Vec::new();
        for (address, result) in results.await {
            match result {
                Ok(()) => {
                    self.held.insert(address);
                }
                // It is local by somebody else's route, who will also take it away.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                Err(error) => refused.push((address, error)),
            }
        }
        refused
    }

    /// Removes routes; it is no error if they are gone.
    pub(super) async fn remove(&mut self, addresses: Vec<IpAddr>) -> Vec<(IpAddr, io::Error)> {
        let results = self.each(addresses, |handle, message| async move {
            handle.route().del(message).execute().await
        });
        let mut refused = Vec::new();
        for (address, result) in results.await {
            match result {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                    refused.push((address, error));
                }
                _ => {
                    self.held.remove(&address);
                }
            }
        }
        refused
    }

    async fn each<F: Future<Output = Result<(), rtnetlink::Error>>>(
        &self,
        addresses: Vec<IpAddr>,
        act: impl Fn(Handle, RouteMessage) -> F,
    ) -> Vec<(IpAddr, io::Result<()>)> {
        let requests = addresses.into_iter().map(|address| {
            let request = act(self.handle.clone(), self.message(address));
            async move { (address, request.await.map_err(failed)) }
        });
        stream::iter(requests).buffer_unordered(AT_ONCE).collect().await
    }

    /// `local ADDRESS dev lo table local proto 75`.
    fn message(&self, address: IpAddr) -> RouteMessage {
        fn whole<T>(builder: RouteMessageBuilder<T>, loopback: u32) -> RouteMessage {
            let builder = builder.kind(RouteType::Local).scope(RouteScope::Host);
            builder.table_id(LOCAL.into()).protocol(PROTOCOL).output_interface(loopback).build()
        }
        match address {
            IpAddr::V4(address) => {
                let builder = RouteMessageBuilder::<std::net::Ipv4Addr>::new();
                whole(builder.destination_prefix(address, 32), self.loopback)
            }
            IpAddr::V6(address) => {
                let builder = RouteMessageBuilder::<std::net::Ipv6Addr>::new();
                whole(builder.destination_prefix(address, 128), self.loopback)
            }
        }
    }
}

/// The address that one of our routes makes local.
fn ours(route: &RouteMessage) -> Option<IpAddr> {
    let header = &route.header;
    if header.protocol != PROTOCOL || header.kind != RouteType::Local || header.table != LOCAL {
        return None;
    }
    destination(route).filter(|net| net.prefix_len() == net.max_prefix_len()).map(|net| net.addr())
}

/// What was heard of the node's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// One of our routes is gone; perhaps we removed it.
    RouteGone(IpAddr),
    /// Addresses, or routes to pods, or nobody knows as it was too much to hear.
    Around,
}

/// Hears of changes of addresses and routes.
#[derive(Debug)]
pub(super) struct Monitor {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    /// Whether routes tell where pods are.
    routes_count: bool,
    _connection: AbortOnDropHandle<()>,
}

impl Monitor {
    /// Listens from now on.
    pub(super) fn open(family: Family, detect: &DetectLocal) -> io::Result<Self> {
        let groups = match family {
            Family::V4 => [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv4Route],
            Family::V6 => [MulticastGroup::Ipv6Ifaddr, MulticastGroup::Ipv6Route],
        };
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)?;
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let routes_count =
            matches!(detect, DetectLocal::Interface(_) | DetectLocal::InterfacePrefix(_));
        Ok(Self { messages, routes_count, _connection })
    }

    /// The next that matters; `None` if the socket is gone.
    pub(super) async fn heard(&mut self) -> Option<Heard> {
        loop {
            let (message, _) = self.messages.next().await?;
            match message.payload {
                NetlinkPayload::InnerMessage(
                    RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_),
                )
                | NetlinkPayload::Overrun(_) => return Some(Heard::Around),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(route)) => {
                    let ours = ours(&route).map(Heard::RouteGone);
                    let heard = ours.or(self.counts(&route).then_some(Heard::Around));
                    if heard.is_some() {
                        return heard;
                    }
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route))
                    if self.counts(&route) =>
                {
                    return Some(Heard::Around);
                }
                _ => {}
            }
        }
    }

    fn counts(&self, route: &RouteMessage) -> bool {
        self.routes_count && route.header.kind == RouteType::Unicast
    }
}
