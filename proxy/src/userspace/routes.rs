//! Local routes: they make a Service's address one of this node's, without an interface.

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

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
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use super::observe::{any_route, destination};
use crate::{config::DetectLocal, model::Family, rtnl::failed};

/// Who made a route, as the kernel keeps it: it tells ours from others'. `ip route show table local
/// proto 75` lists them.
pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Other(75);
/// The kernel's table of its own addresses.
const LOCAL: u8 = 255;
/// How many requests are under way at a time.
const AT_ONCE: usize = 64;
/// How many routes that are gone are remembered one by one; with more, everything is looked at.
const NEWS_MAX: usize = 1_024;

/// The routes of one family.
#[derive(Debug)]
pub(super) struct Routes {
    handle: Handle,
    /// Reads and writes the socket.
    _connection: AbortOnDropHandle<()>,
    family: Family,
    loopback: u32,
    held: BTreeSet<IpAddr>,
}

impl Routes {
    /// Opens a netlink socket in this thread's namespace.
    pub(super) fn open(family: Family) -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let loopback = nix::net::if_::if_nametoindex("lo")?;
        Ok(Self { handle, _connection: connection, family, loopback, held: BTreeSet::new() })
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

type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// Hears of changes of addresses and routes.
///
/// The kernel's messages are taken in as they come, whatever else is going on, and boiled down to
/// what matters: a load of thousands of routes of our own is told to us as well.
#[derive(Debug)]
pub(super) struct Monitor {
    news: Arc<News>,
    /// Reads the socket.
    _connection: AbortOnDropHandle<()>,
    /// Boils it down; ends with the socket.
    listening: AbortOnDropHandle<()>,
    ended: bool,
}

/// What was heard and not asked for yet.
#[derive(Debug, Default)]
struct News {
    waiting: Mutex<Waiting>,
    some: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    around: bool,
    gone: BTreeSet<IpAddr>,
}

impl News {
    fn add(&self, heard: Heard) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        match heard {
            Heard::RouteGone(address) if waiting.gone.len() < NEWS_MAX => {
                waiting.gone.insert(address);
            }
            _ => waiting.around = true,
        }
        self.some.notify_one();
    }

    fn take(&self) -> Option<Heard> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut waiting.around) {
            return Some(Heard::Around);
        }
        waiting.gone.pop_first().map(Heard::RouteGone)
    }
}

impl Monitor {
    /// Listens from now on.
    pub(super) fn open(family: Family, detect: &DetectLocal) -> io::Result<Self> {
        let groups = match family {
            Family::V4 => [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv4Route],
            Family::V6 => [MulticastGroup::Ipv6Ifaddr, MulticastGroup::Ipv6Route],
        };
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)?;
        let routes_count =
            matches!(detect, DetectLocal::Interface(_) | DetectLocal::InterfacePrefix(_));
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok(Self::over(messages, connection, routes_count))
    }

    fn over(messages: Messages, connection: AbortOnDropHandle<()>, routes_count: bool) -> Self {
        let news = Arc::new(News::default());
        let listening = listen(messages, Arc::clone(&news), routes_count);
        let listening = AbortOnDropHandle::new(tokio::spawn(listening));
        Self { news, _connection: connection, listening, ended: false }
    }

    /// The next that matters; `None` if the socket is gone.
    pub(super) async fn heard(&mut self) -> Option<Heard> {
        loop {
            if let Some(heard) = self.news.take() {
                return Some(heard);
            }
            if self.ended {
                return None;
            }
            tokio::select! {
                () = self.news.some.notified() => {}
                _ = &mut self.listening => self.ended = true,
            }
        }
    }
}

/// Takes in messages until the socket is gone.
async fn listen(mut messages: Messages, news: Arc<News>, routes_count: bool) {
    while let Some((message, _)) = messages.next().await {
        if let Some(heard) = matters(message.payload, routes_count) {
            news.add(heard);
        }
    }
}

/// What of a message matters; `routes_count` if routes tell where pods are.
fn matters(message: NetlinkPayload<RouteNetlinkMessage>, routes_count: bool) -> Option<Heard> {
    let counts = |route: &RouteMessage| routes_count && route.header.kind == RouteType::Unicast;
    match message {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_),
        )
        | NetlinkPayload::Overrun(_) => Some(Heard::Around),
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(route)) => {
            ours(&route).map(Heard::RouteGone).or(counts(&route).then_some(Heard::Around))
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) if counts(&route) => {
            Some(Heard::Around)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::channel::mpsc;

    use super::*;

    fn gone(n: u32) -> NetlinkMessage<RouteNetlinkMessage> {
        let builder = RouteMessageBuilder::<std::net::Ipv4Addr>::new();
        let builder = builder.destination_prefix(n.into(), 32).kind(RouteType::Local);
        let route = builder.table_id(LOCAL.into()).protocol(PROTOCOL).build();
        let payload = NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(route));
        NetlinkMessage::new(Default::default(), payload)
    }

    #[tokio::test]
    async fn a_flood_of_news_is_boiled_down_and_the_end_is_told() {
        let (sender, messages) = mpsc::unbounded();
        let connection = AbortOnDropHandle::new(tokio::spawn(std::future::pending()));
        let mut monitor = Monitor::over(messages, connection, false);
        let from = SocketAddr::new(0, 0);
        let first = 0x0a60_0001;
        for n in 0..2 * NEWS_MAX as u32 {
            sender.unbounded_send((gone(first + n), from)).unwrap();
        }
        drop(sender);
        let mut heard = Vec::new();
        let all = async {
            while let Some(one) = monitor.heard().await {
                heard.push(one);
            }
        };
        tokio::time::timeout(Duration::from_secs(10), all).await.expect("the end is told");
        assert!(heard.contains(&Heard::Around), "it was more than is remembered");
        assert!(heard.len() <= 2 * NEWS_MAX);
        assert!(heard.contains(&Heard::RouteGone(std::net::Ipv4Addr::from(first).into())));
    }
}
