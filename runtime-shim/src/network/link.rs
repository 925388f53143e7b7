//! Interfaces, addresses, routes and neighbours, over route netlink.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd,
    path::Path,
};

use futures::TryStreamExt;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        link::{InfoData, InfoVeth, LinkAttribute},
        neighbour::NeighbourState,
        route::RouteScope,
    },
};

use super::netns;
use crate::runtime::{Result, RuntimeError, SandboxId};

/// The gateway of every pod: an address that is nobody's, and of the link only.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The node's end of every pair has this hardware address, so that pods can know it beforehand.
const GATEWAY_MAC: [u8; 6] = [0xee; 6];
/// What the node's ends are called: this and the beginning of the sandbox's id.
pub(super) const PREFIX: &str = "kl";
/// What an interface takes if nothing says otherwise.
const DEFAULT_MTU: u32 = 1500;

/// The name of the node's end of a sandbox's pair. Names have 15 characters at most.
pub(super) fn host_name(sandbox: &SandboxId) -> String {
    format!("{PREFIX}{}", sandbox.as_str().get(..12).unwrap_or(sandbox.as_str()))
}

pub(super) fn failed(what: &str, error: &rtnetlink::Error) -> RuntimeError {
    let source = match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    };
    RuntimeError::Io { what: format!("the pod's network: {what}"), source }
}

/// A netlink connection of this thread's namespace; it ends with the handle.
fn open() -> io::Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    Ok(handle)
}

pub(super) fn netlink() -> Result<Handle> {
    open().map_err(|source| RuntimeError::Io { what: "route netlink".into(), source })
}

async fn index_of(handle: &Handle, name: &str) -> std::result::Result<u32, rtnetlink::Error> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await? {
        Some(link) => Ok(link.header.index),
        None => Err(rtnetlink::Error::RequestFailed),
    }
}

/// Makes the pair and sets up both of its ends.
pub(super) async fn connect(
    sandbox: &SandboxId,
    netns: &Path,
    address: Ipv4Addr,
    mtu: u32,
    alias: &str,
) -> Result<()> {
    let name = host_name(sandbox);
    let handle = netlink()?;
    let namespace = fs::File::open(netns).map_err(|source| RuntimeError::Io {
        what: format!("the pod's network namespace {}", netns.display()),
        source,
    })?;
    let inside = LinkMessageBuilder::<LinkUnspec>::new()
        .name("eth0")
        .mtu(mtu)
        .setns_by_fd(namespace.as_raw_fd())
        .build();
    let pair = LinkMessageBuilder::<LinkVeth>::new(&name, "eth0")
        .set_info_data(InfoData::Veth(InfoVeth::Peer(inside)))
        .address(GATEWAY_MAC.to_vec())
        .mtu(mtu)
        .build();
    handle.link().add(pair).execute().await.map_err(|e| failed(&format!("making {name}"), &e))?;
    let index = index_of(&handle, &name).await.map_err(|e| failed(&name, &e))?;
    let up = LinkMessageBuilder::<LinkUnspec>::new().index(index).alias(alias).up().build();
    handle.link().set(up).execute().await.map_err(|e| failed(&format!("setting {name} up"), &e))?;

    let path = netns.to_owned();
    netns::on_thread("the pod's network: setting up its interface".into(), move || {
        netns::enter(&path)?;
        tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
            set_up_inside(address).await.map_err(|e| match failed("", &e) {
                RuntimeError::Io { source, .. } => source,
                other => io::Error::other(other.to_string()),
            })
        })
    })
    .await?;

    // The node speaks to the pod from an address of its own, over an interface that has none.
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(address, 32)
        .output_interface(index)
        .scope(RouteScope::Link)
        .build();
    handle
        .route()
        .add(route)
        .replace()
        .execute()
        .await
        .map_err(|e| failed(&format!("the route to {address}"), &e))
}

/// The pod's side. Runs in its namespace.
async fn set_up_inside(address: Ipv4Addr) -> std::result::Result<(), rtnetlink::Error> {
    let handle = open().map_err(|_| rtnetlink::Error::RequestFailed)?;
    let lo = index_of(&handle, "lo").await?;
    let eth0 = index_of(&handle, "eth0").await?;
    for index in [lo, eth0] {
        let up = LinkMessageBuilder::<LinkUnspec>::new().index(index).up().build();
        handle.link().set(up).execute().await?;
    }
    handle.address().add(eth0, IpAddr::V4(address), 32).execute().await?;
    handle
        .neighbours()
        .add(eth0, IpAddr::V4(GATEWAY))
        .link_layer_address(&GATEWAY_MAC)
        .state(NeighbourState::Permanent)
        .execute()
        .await?;
    let to_gateway = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(GATEWAY, 32)
        .output_interface(eth0)
        .scope(RouteScope::Link)
        .build();
    handle.route().add(to_gateway).execute().await?;
    let default =
        RouteMessageBuilder::<Ipv4Addr>::new().gateway(GATEWAY).output_interface(eth0).build();
    handle.route().add(default).execute().await
}

/// Removes a sandbox's pair; the pod's end and the route go with it.
pub(super) async fn disconnect(sandbox: &SandboxId) -> Result<()> {
    let name = host_name(sandbox);
    let handle = netlink()?;
    let Ok(index) = index_of(&handle, &name).await else { return Ok(()) };
    match handle.link().del(index).execute().await {
        Ok(()) => Ok(()),
        Err(rtnetlink::Error::NetlinkError(e))
            if e.to_io().raw_os_error() == Some(libc::ENODEV) =>
        {
            Ok(())
        }
        Err(e) => Err(failed(&format!("removing {name}"), &e)),
    }
}

/// Removes the interfaces that are ours and not among the known. Returns how many there were.
pub(super) async fn remove_unknown(alias: &str, known: &[String]) -> Result<usize> {
    let handle = netlink()?;
    let mut links = handle.link().get().execute();
    let mut unknown = Vec::new();
    while let Some(link) = links.try_next().await.map_err(|e| failed("listing interfaces", &e))? {
        let mut name = String::new();
        let mut ours = false;
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(n) => name.clone_from(n),
                LinkAttribute::IfAlias(a) => ours = a == alias,
                _ => {}
            }
        }
        if ours && name.starts_with(PREFIX) && !known.contains(&name) {
            unknown.push(link.header.index);
        }
    }
    for index in &unknown {
        // One whose namespace is just going away may go with it.
        let _ = handle.link().del(*index).execute().await;
    }
    Ok(unknown.len())
}

/// The packet size of the interface of the host's default route.
pub(super) async fn default_mtu() -> u32 {
    let found = async {
        let handle = open().ok()?;
        let mut routes =
            handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        while let Some(route) = routes.try_next().await.ok()? {
            if route.header.destination_prefix_length != 0 {
                continue;
            }
            let index = route.attributes.iter().find_map(|a| match a {
                rtnetlink::packet_route::route::RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            })?;
            let link = handle.link().get().match_index(index).execute().try_next().await.ok()??;
            return link.attributes.iter().find_map(|a| match a {
                LinkAttribute::Mtu(mtu) => Some(*mtu),
                _ => None,
            });
        }
        None
    };
    found.await.unwrap_or(DEFAULT_MTU)
}

fn sysctl(path: &str, value: &str) -> Result<()> {
    let file = format!("/proc/sys/net/ipv4/{path}");
    if fs::read_to_string(&file).is_ok_and(|t| t.trim() == value) {
        return Ok(());
    }
    fs::write(&file, value)
        .map_err(|source| RuntimeError::Io { what: format!("setting {file} to {value}"), source })
}

/// Lets the node forward packets, which pods need for everything but the node itself.
pub(super) fn enable_forwarding() -> Result<()> {
    sysctl("ip_forward", "1")
}

/// Lets answers to what came from the node's own loopback back in: a host port on `localhost`. That
/// nobody else uses this is seen to by the packet filter.
pub(super) fn allow_loopback_source(sandbox: &SandboxId) -> Result<()> {
    sysctl(&format!("conf/{}/route_localnet", host_name(sandbox)), "1")
}
