//! Routes to the pods of other nodes: each node's range by that node's address.
//!
//! They serve nodes that share a network segment. A route of somebody else's to the same range is
//! left alone. Ours are known by their protocol number, so that they can be compared and removed
//! without a record.

use std::{collections::BTreeMap, io, net::Ipv4Addr};

use futures::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol},
};

use super::link::{failed, netlink};
use crate::runtime::Result;

/// Who made a route (`ip route` shows `proto 75`). The kernel leaves the numbers above those it
/// knows to others.
const OURS: u8 = 75;

/// Ranges of pods, by the address of their node.
pub type NodeRoutes = BTreeMap<Ipv4Net, Ipv4Addr>;

/// What is to be done about one range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Add(Ipv4Net, Ipv4Addr),
    Remove(Ipv4Net, Ipv4Addr),
}

/// The way from the routes that there are to those that are wanted.
fn plan(wanted: &NodeRoutes, held: &NodeRoutes) -> Vec<Change> {
    let gone = held.iter().filter(|(range, via)| wanted.get(range) != Some(via));
    let new = wanted.iter().filter(|(range, via)| held.get(range) != Some(via));
    gone.map(|(range, via)| Change::Remove(*range, *via))
        .chain(new.map(|(range, via)| Change::Add(*range, *via)))
        .collect()
}

/// Makes the routes to other nodes' pods be these. Returns what could not be done, and why; the rest
/// is done.
///
/// # Errors
/// When the kernel doesn't tell which routes there are.
pub async fn set_node_routes(wanted: &NodeRoutes) -> Result<Vec<String>> {
    let handle = netlink()?;
    let mut problems = Vec::new();
    for change in plan(wanted, &held(&handle).await?) {
        let (range, via, done) = match change {
            Change::Add(range, via) => {
                (range, via, handle.route().add(route(range, via)).execute().await)
            }
            Change::Remove(range, via) => {
                (range, via, handle.route().del(route(range, via)).execute().await)
            }
        };
        let Err(error) = done else { continue };
        match code(&error) {
            // Somebody else sees to that range; or took ours away already.
            Some(libc::EEXIST) if matches!(change, Change::Add(..)) => {}
            Some(libc::ESRCH) if matches!(change, Change::Remove(..)) => {}
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => problems.push(format!(
                "{via}, which has the pods of {range}, is on no network of this machine: a route \
                 by a router is needed"
            )),
            _ => problems.push(format!("the route to {range} by {via}: {error}")),
        }
    }
    Ok(problems)
}

/// Removes the routes to other nodes' pods. Returns how many there were.
///
/// # Errors
/// When the kernel doesn't tell which routes there are, or keeps one.
pub async fn remove_node_routes() -> Result<usize> {
    let handle = netlink()?;
    let held = held(&handle).await?;
    for (range, via) in &held {
        let done = handle.route().del(route(*range, *via)).execute().await;
        if let Err(error) = done
            && code(&error) != Some(libc::ESRCH)
        {
            return Err(failed(&format!("removing the route to {range}"), &error));
        }
    }
    Ok(held.len())
}

fn route(range: Ipv4Net, via: Ipv4Addr) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(range.network(), range.prefix_len())
        .gateway(via)
        .protocol(RouteProtocol::Other(OURS))
        .build()
}

/// Our routes as the kernel has them.
async fn held(handle: &Handle) -> Result<NodeRoutes> {
    let mut routes = handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
    let mut held = NodeRoutes::new();
    while let Some(route) = routes.try_next().await.map_err(|e| failed("listing routes", &e))? {
        if route.header.protocol != RouteProtocol::Other(OURS) {
            continue;
        }
        let (mut to, mut via) = (None, None);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(address)) => to = Some(*address),
                RouteAttribute::Gateway(RouteAddress::Inet(address)) => via = Some(*address),
                _ => {}
            }
        }
        let range = to.and_then(|to| Ipv4Net::new(to, route.header.destination_prefix_length).ok());
        if let (Some(range), Some(via)) = (range, via) {
            held.insert(range, via);
        }
    }
    Ok(held)
}

fn code(error: &rtnetlink::Error) -> Option<i32> {
    let rtnetlink::Error::NetlinkError(message) = error else { return None };
    io::Error::raw_os_error(&message.to_io())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(text: &[(&str, &str)]) -> NodeRoutes {
        text.iter().map(|(range, via)| (range.parse().unwrap(), via.parse().unwrap())).collect()
    }

    #[test]
    fn only_the_difference_is_changed() {
        let held = routes(&[("10.0.1.0/24", "192.0.2.1"), ("10.0.2.0/24", "192.0.2.2")]);
        let wanted = routes(&[("10.0.2.0/24", "192.0.2.9"), ("10.0.3.0/24", "192.0.2.3")]);
        assert_eq!(plan(&held, &held), []);
        let net = |text: &str| text.parse().unwrap();
        assert_eq!(
            plan(&wanted, &held),
            [
                Change::Remove(net("10.0.1.0/24"), [192, 0, 2, 1].into()),
                Change::Remove(net("10.0.2.0/24"), [192, 0, 2, 2].into()),
                Change::Add(net("10.0.2.0/24"), [192, 0, 2, 9].into()),
                Change::Add(net("10.0.3.0/24"), [192, 0, 2, 3].into()),
            ]
        );
    }

    #[test]
    fn the_kernel_holds_them_and_others_are_left_alone() {
        // Namespaces belong to threads.
        let tested = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let ip = |arguments: &str| {
                let output = std::process::Command::new("ip")
                    .args(arguments.split(' '))
                    .output()
                    .expect("iproute2");
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                String::from_utf8_lossy(&output.stdout).into_owned()
            };
            ip("link set lo up");
            ip("link add eth0 type veth peer name eth1");
            ip("link set eth0 up");
            ip("link set eth1 up");
            ip("address add 192.0.2.1/24 dev eth0");
            ip("route add 10.0.9.0/24 via 192.0.2.9");
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let wanted = routes(&[("10.0.1.0/24", "192.0.2.2"), ("10.0.9.0/24", "192.0.2.3")]);
                assert_eq!(set_node_routes(&wanted).await.unwrap(), [""; 0]);
                assert!(ip("route").contains("10.0.1.0/24 via 192.0.2.2 dev eth0 proto 75"));
                assert!(ip("route").contains("10.0.9.0/24 via 192.0.2.9"), "another's route stays");
                let moved = routes(&[("10.0.1.0/24", "192.0.2.4"), ("10.0.2.0/24", "203.0.113.1")]);
                let problems = set_node_routes(&moved).await.unwrap();
                assert_eq!(problems.len(), 1, "{problems:?}");
                assert!(problems[0].contains("203.0.113.1"), "{problems:?}");
                assert!(ip("route").contains("10.0.1.0/24 via 192.0.2.4"));
                assert_eq!(remove_node_routes().await.unwrap(), 1);
                assert!(ip("route").contains("10.0.9.0/24"));
            });
        });
        tested.join().unwrap();
    }
}
