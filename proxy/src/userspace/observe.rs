//! What is around the relays: the node's addresses, and where its pods are.

use std::{collections::HashSet, io, net::IpAddr};

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::AddressAttribute,
        link::LinkAttribute,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
    },
};

use crate::{config::DetectLocal, model::Family, rtnl::failed};

/// What clients are told apart by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Surroundings {
    /// Addresses of this node's interfaces.
    pub(super) local: HashSet<IpAddr>,
    /// Where pods have their addresses.
    pub(super) pods: Vec<IpNet>,
}

impl Surroundings {
    /// Whether a client is the node itself or a pod.
    pub(super) fn inside(&self, client: IpAddr) -> bool {
        client.is_loopback()
            || self.local.contains(&client)
            || self.pods.iter().any(|range| range.contains(&client))
    }
}

/// Looks around.
pub(super) async fn observe(
    handle: &Handle,
    family: Family,
    detect: &DetectLocal,
) -> io::Result<Surroundings> {
    let pods = match detect {
        DetectLocal::Nothing | DetectLocal::NodeCidr => Vec::new(),
        DetectLocal::Ranges(ranges) => ranges.clone(),
        DetectLocal::Interface(name) => behind(handle, family, |link| link == name).await?,
        DetectLocal::InterfacePrefix(prefix) => {
            behind(handle, family, |link| link.starts_with(prefix.as_str())).await?
        }
    };
    Ok(Surroundings { local: local_addresses(handle, family).await?, pods })
}

async fn local_addresses(handle: &Handle, family: Family) -> io::Result<HashSet<IpAddr>> {
    let mut found = HashSet::new();
    let mut messages = handle.address().get().execute();
    while let Some(message) = messages.try_next().await.map_err(failed)? {
        let (mut local, mut address) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                // Where there is a peer its address is the other attribute.
                AddressAttribute::Local(ip) => local = Some(*ip),
                AddressAttribute::Address(ip) => address = Some(*ip),
                _ => {}
            }
        }
        found.extend(local.or(address).filter(|ip| Family::of(*ip) == family));
    }
    Ok(found)
}

/// The destinations of routes out of interfaces with such names: a packet filter would look where a
/// packet came in, and a relay can only look where its answer goes.
async fn behind(
    handle: &Handle,
    family: Family,
    matches: impl Fn(&str) -> bool,
) -> io::Result<Vec<IpNet>> {
    let mut interfaces = HashSet::new();
    let mut links = handle.link().get().execute();
    while let Some(link) = links.try_next().await.map_err(failed)? {
        let named = link.attributes.iter().any(|attribute| match attribute {
            LinkAttribute::IfName(name) => matches(name),
            _ => false,
        });
        if named {
            interfaces.insert(link.header.index);
        }
    }
    let mut ranges = Vec::new();
    let mut routes = handle.route().get(any_route(family)).execute();
    while let Some(route) = routes.try_next().await.map_err(failed)? {
        let out = route.attributes.iter().any(|attribute| match attribute {
            RouteAttribute::Oif(index) => interfaces.contains(index),
            _ => false,
        });
        if out
            && route.header.kind == RouteType::Unicast
            && let Some(range) = destination(&route).filter(|range| range.prefix_len() > 0)
        {
            ranges.push(range);
        }
    }
    ranges.sort_unstable();
    ranges.dedup();
    Ok(ranges)
}

/// A message that asks for all routes of a family.
pub(super) fn any_route(family: Family) -> RouteMessage {
    let mut message = RouteMessageBuilder::<IpAddr>::new().build();
    message.header.address_family = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    message
}

/// Where a route leads.
pub(super) fn destination(route: &RouteMessage) -> Option<IpNet> {
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    })?;
    IpNet::new(address, route.header.destination_prefix_length).ok()
}
