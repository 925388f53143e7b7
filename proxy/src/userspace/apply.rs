//! The relays' thread: brings routes and listeners in line.
//!
//! Order matters: what goes is closed before its route goes, and a route is there before its
//! listeners, so that no packet to a Service finds its way out of the node meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::{Arc, mpsc as blocking},
    time::Duration,
};

use futures::future::join_all;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Settings,
    dispatch::{Dispatch, Own},
    holder::Holders,
    limits::Quota,
    observe::{Surroundings, observe},
    plan::{Changes, Front, Listen, Rule},
    routes::{Heard, Monitor, Routes},
    tcp::{self, Connections},
    udp,
};
use crate::{
    backend::BackendError, config::NodePortAddresses, model::Protocol, ruleset::AddressSet,
};

/// How long after news of the node's network it is looked at: news come in swarms.
const SETTLE: Duration = Duration::from_millis(50);

/// What the proxy's thread asks for.
#[derive(Debug)]
pub(super) enum Order {
    /// Brings in line what is named.
    Bring { changes: Changes, answer: Answer<Brought> },
    /// Takes everything away.
    Remove { answer: Answer<()> },
}

type Answer<T> = blocking::Sender<Result<T, BackendError>>;

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Brought {
    /// Routes and listeners that came, went or changed.
    pub(super) changed: usize,
    /// How many ports there are now.
    pub(super) rules: usize,
    /// Ports that can't be listened on.
    pub(super) refused: Vec<(Front, BackendError)>,
    /// Addresses that can't be had.
    pub(super) refused_addresses: Vec<(AddressSet, IpAddr, BackendError)>,
}

/// A socket that is listened on.
#[derive(Debug)]
struct Listener {
    dispatch: Arc<Dispatch>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// Everything there is, and all that is known of what there should be.
#[derive(Debug)]
pub(super) struct Relaying {
    settings: Settings,
    rules: BTreeMap<Front, Arc<Rule>>,
    cluster_addresses: BTreeSet<IpAddr>,
    node_addresses: BTreeSet<IpAddr>,
    routes: Routes,
    /// `None` while it is not to be had.
    monitor: Option<Monitor>,
    around: watch::Sender<Arc<Surroundings>>,
    listeners: BTreeMap<Listen, Listener>,
    /// The same places, for those who must not relay to them.
    own: Arc<Own>,
    /// By the address that they came by.
    connections: BTreeMap<IpAddr, Connections>,
    quota: Arc<Quota>,
    /// What can't be listened on, for the next look around.
    unserved: BTreeSet<Listen>,
    look_at: Option<Instant>,
}

impl Relaying {
    /// Nothing yet, in this thread's namespace.
    pub(super) async fn open(settings: Settings) -> io::Result<Self> {
        let family = settings.family;
        let monitor = Monitor::open(family, &settings.detect_local)?;
        let mut routes = Routes::open(family)?;
        routes.probe().await?;
        let surroundings = observe(routes.handle(), family, &settings.detect_local).await?;
        let quota = Arc::new(Quota::new(family, settings.limits, settings.metrics.clone()));
        Ok(Self {
            settings,
            rules: BTreeMap::new(),
            cluster_addresses: BTreeSet::new(),
            node_addresses: BTreeSet::new(),
            routes,
            monitor: Some(monitor),
            around: watch::Sender::new(Arc::new(surroundings)),
            listeners: BTreeMap::new(),
            own: Arc::default(),
            connections: BTreeMap::new(),
            quota,
            unserved: BTreeSet::new(),
            look_at: None,
        })
    }

    /// Does as ordered until nobody can order any more; then takes everything away.
    pub(super) async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        loop {
            let look_at = self.look_at;
            let look = async {
                match look_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                order = orders.recv() => match order {
                    Some(Order::Bring { changes, answer }) => {
                        let _ = answer.send(self.bring(changes).await);
                    }
                    Some(Order::Remove { answer }) => {
                        let _ = answer.send(self.remove().await);
                    }
                    None => break,
                },
                heard = hear(&mut self.monitor) => match heard {
                    Some(Heard::RouteGone(address)) if !self.routes.has(address) => {}
                    Some(_) => {
                        self.look_at.get_or_insert_with(|| Instant::now() + SETTLE);
                    }
                    None => {
                        tracing::error!(
                            "changes of the node's addresses are not heard any more; listening again"
                        );
                        self.monitor = None;
                        self.look_at.get_or_insert_with(|| Instant::now() + self.settings.retry);
                    }
                },
                () = look => self.look().await,
            }
        }
        if let Err(error) = self.remove().await {
            tracing::error!(%error, "routes to services stay behind");
        }
    }

    /// Looks at what may have changed around, and brings in line what depends on it.
    async fn look(&mut self) {
        self.look_at = None;
        self.listen_again();
        let before: BTreeSet<IpAddr> = self.routes.all().collect();
        match self.observe().await {
            Ok(mut ports) => {
                ports.append(&mut self.unserved);
                let lost = before.iter().filter(|address| !self.routes.has(**address)).count();
                if lost > 0 {
                    tracing::warn!(
                        lost,
                        "another program removed routes to services; mending them"
                    );
                    if let Some(metrics) = &self.settings.metrics {
                        metrics.lost_routes(self.settings.family, lost);
                    }
                }
                let addresses = self.rules.keys().filter_map(|front| front.address);
                let addresses = addresses.chain(self.cluster_addresses.iter().copied()).collect();
                let brought = self.reconcile(&ports, addresses).await;
                for (front, error) in &brought.refused {
                    tracing::warn!(port = ?front, %error, "a service's port isn't served");
                    self.look_at = Some(Instant::now() + self.settings.retry);
                }
                for (_, address, error) in &brought.refused_addresses {
                    tracing::warn!(%address, %error, "a service's address isn't served");
                    self.look_at = Some(Instant::now() + self.settings.retry);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "can't look at the node's addresses; trying again");
                self.look_at = Some(Instant::now() + self.settings.retry);
            }
        }
    }

    /// Listens for changes again if that ended, before looking at what was missed.
    fn listen_again(&mut self) {
        if self.monitor.is_some() {
            return;
        }
        match Monitor::open(self.settings.family, &self.settings.detect_local) {
            Ok(monitor) => self.monitor = Some(monitor),
            Err(error) => {
                tracing::warn!(%error, "changes of the node's addresses can't be heard; trying again");
                self.look_at = Some(Instant::now() + self.settings.retry);
            }
        }
    }

    /// Reads routes and addresses; which ports have to be looked at for it.
    async fn observe(&mut self) -> io::Result<BTreeSet<Listen>> {
        let before = self.node_port_addresses();
        let (family, detect) = (self.settings.family, &self.settings.detect_local);
        let surroundings = observe(self.routes.handle(), family, detect).await?;
        self.routes.observe().await?;
        self.around.send_replace(Arc::new(surroundings));
        let after = self.node_port_addresses();
        let changed = before.symmetric_difference(&after).copied();
        Ok(self.node_ports_on(changed))
    }

    /// Brings in line what is named.
    async fn bring(&mut self, changes: Changes) -> Result<Brought, BackendError> {
        let mut addresses = BTreeSet::new();
        let mut ports = BTreeSet::new();
        if changes.full {
            let observed = self.observe().await;
            let doing = || "look at the node's addresses and routes".into();
            ports = observed.map_err(|source| BackendError::Io { doing: doing(), source })?;
            addresses.extend(self.routes.all());
            addresses.extend(std::mem::take(&mut self.cluster_addresses));
            let rules = std::mem::take(&mut self.rules);
            addresses.extend(rules.keys().filter_map(|front| front.address));
            ports.extend(self.listeners.keys().copied());
            self.node_addresses.clear();
        }
        let before = self.node_port_addresses();
        for (set, changed) in [
            (&mut self.cluster_addresses, &changes.cluster_addresses),
            (&mut self.node_addresses, &changes.node_addresses),
        ] {
            for (address, there) in changed {
                if *there {
                    set.insert(*address)
                } else {
                    set.remove(address)
                };
            }
        }
        let after = self.node_port_addresses();
        ports.extend(self.node_ports_on(before.symmetric_difference(&after).copied()));
        addresses.extend(changes.cluster_addresses.iter().map(|(address, _)| *address));
        for (front, rule) in changes.rules {
            match rule.filter(|_| front.protocol != Protocol::Sctp) {
                Some(rule) => self.rules.insert(front, Arc::new(rule)),
                None => self.rules.remove(&front),
            };
            let Front { protocol, port, .. } = front;
            addresses.extend(front.address);
            let on = front.address.map_or_else(|| after.clone(), |a| BTreeSet::from([a]));
            ports.extend(on.into_iter().map(|address| Listen { address, protocol, port }));
        }
        let brought = self.reconcile(&ports, addresses).await;
        if let Some((_, _, error)) = brought.refused_addresses.first()
            && let BackendError::Io { source, .. } = error
            && source.raw_os_error() == Some(libc::EPERM)
        {
            return Err(BackendError::Io {
                doing: "add local routes for services, which needs CAP_NET_ADMIN".into(),
                source: io::Error::from_raw_os_error(libc::EPERM),
            });
        }
        Ok(brought)
    }

    async fn reconcile(
        &mut self,
        ports: &BTreeSet<Listen>,
        addresses: BTreeSet<IpAddr>,
    ) -> Brought {
        let mut brought = Brought::default();
        for listen in ports {
            self.unserved.remove(listen);
            if self.rule(*listen).is_none()
                && let Some(listener) = self.listeners.remove(listen)
            {
                listener.close().await;
                self.own.remove(*listen);
                brought.changed += 1;
            }
        }
        self.route(addresses, &mut brought).await;
        let mut holders = Holders::default();
        for listen in ports {
            let Some((front, rule)) = self.rule(*listen) else { continue };
            match self.listeners.get(listen) {
                Some(listener) => brought.changed += usize::from(listener.dispatch.set_rule(&rule)),
                None => match self.listen(*listen, rule) {
                    Ok(listener) => {
                        self.listeners.insert(*listen, listener);
                        brought.changed += 1;
                    }
                    Err(source) => {
                        self.unserved.insert(*listen);
                        brought.refused.push((front, refusal(*listen, source, &mut holders)));
                    }
                },
            }
        }
        brought.rules = self.rules.len() + self.routes.len();
        brought
    }

    /// Brings the routes to these addresses in line.
    async fn route(&mut self, addresses: BTreeSet<IpAddr>, brought: &mut Brought) {
        let local = Arc::clone(&self.around.borrow());
        let (wanted, unwanted): (Vec<IpAddr>, Vec<IpAddr>) = addresses
            .into_iter()
            .partition(|a| !local.local.contains(a) && self.is_service_address(*a));
        let gone: Vec<IpAddr> = unwanted.into_iter().filter(|a| self.routes.has(*a)).collect();
        let new: Vec<IpAddr> = wanted.into_iter().filter(|a| !self.routes.has(*a)).collect();
        brought.changed += gone.len() + new.len();
        // Their packets would not come here any more: better that both ends know.
        let ended = gone.iter().filter_map(|address| self.connections.remove(address));
        join_all(ended.map(Connections::reset)).await;
        for (doing, results) in [
            ("remove the local route to", self.routes.remove(gone).await),
            ("add a local route to", self.routes.add(new).await),
        ] {
            for (address, source) in results {
                let error = BackendError::Io { doing: format!("{doing} {address}"), source };
                let set = AddressSet::ClusterAddresses;
                brought.refused_addresses.push((set, address, error));
            }
        }
    }

    /// Takes everything away.
    async fn remove(&mut self) -> Result<(), BackendError> {
        self.rules.clear();
        self.cluster_addresses.clear();
        self.node_addresses.clear();
        for (listen, listener) in std::mem::take(&mut self.listeners) {
            listener.close().await;
            self.own.remove(listen);
        }
        let connections = std::mem::take(&mut self.connections).into_values();
        join_all(connections.map(Connections::reset)).await;
        let failed = |source| BackendError::Io { doing: "remove local routes".into(), source };
        self.routes.observe().await.map_err(failed)?;
        let refused = self.routes.remove(self.routes.all().collect()).await;
        refused.into_iter().next().map_or(Ok(()), |(_, source)| Err(failed(source)))
    }

    fn listen(&mut self, listen: Listen, rule: Arc<Rule>) -> io::Result<Listener> {
        let limits = self.settings.limits;
        if self.listeners.len() >= limits.listeners {
            return Err(io::Error::other(format!(
                "there are {} listeners already (raise the limit of open files)",
                limits.listeners
            )));
        }
        let (own, around) = (Arc::clone(&self.own), self.around.subscribe());
        let dispatch = Arc::new(Dispatch::new(listen, own, rule, around, limits.affinity));
        let stop = CancellationToken::new();
        let address = listen.socket_address();
        let (quota, chosen) = (Arc::clone(&self.quota), Arc::clone(&dispatch));
        let task = if listen.protocol == Protocol::Tcp {
            let connections = self.connections.entry(listen.address).or_default().clone();
            let relay = tcp::Relay { dispatch: chosen, quota, connections };
            tokio::spawn(tcp::serve(tcp::listen(address)?, relay, stop.clone()))
        } else {
            let relay = udp::Relay {
                dispatch: chosen,
                quota,
                clients: limits.udp_clients,
                times: self.settings.udp,
            };
            tokio::spawn(udp::serve(udp::listen(address)?, relay, stop.clone()))
        };
        self.own.insert(listen);
        Ok(Listener { dispatch, stop, task })
    }

    /// What a socket there should do, and by which port; `None` if there should be none.
    fn rule(&self, listen: Listen) -> Option<(Front, Arc<Rule>)> {
        let Listen { address, protocol, port } = listen;
        let own = Front { address: Some(address), protocol, port };
        let (front, rule) = match self.rules.get(&own) {
            // A Service's own address goes before node ports.
            Some(rule) => (own, rule),
            None if self.is_node_port_address(address) => {
                let front = Front { address: None, protocol, port };
                (front, self.rules.get(&front)?)
            }
            None => return None,
        };
        rule.listens().then(|| (front, Arc::clone(rule)))
    }

    fn is_service_address(&self, address: IpAddr) -> bool {
        let first = Front { address: Some(address), protocol: Protocol::Tcp, port: 0 };
        self.cluster_addresses.contains(&address)
            || self.rules.range(first..).next().is_some_and(|(f, _)| f.address == Some(address))
    }

    fn is_node_port_address(&self, address: IpAddr) -> bool {
        match &self.settings.node_port_addresses {
            NodePortAddresses::Primary => self.node_addresses.contains(&address),
            NodePortAddresses::Ranges(ranges) => {
                self.around.borrow().local.contains(&address)
                    && ranges.iter().any(|range| range.contains(&address))
                    && (self.settings.localhost_node_ports || !address.is_loopback())
                    && !is_link_local(address)
            }
        }
    }

    fn node_port_addresses(&self) -> BTreeSet<IpAddr> {
        let local = Arc::clone(&self.around.borrow());
        let candidates = local.local.iter().chain(&self.node_addresses).copied();
        candidates.filter(|address| self.is_node_port_address(*address)).collect()
    }

    /// Where all node ports are listened on, on these addresses.
    fn node_ports_on(&self, addresses: impl Iterator<Item = IpAddr>) -> BTreeSet<Listen> {
        let node_ports: Vec<&Front> =
            self.rules.keys().take_while(|f| f.address.is_none()).collect();
        addresses
            .flat_map(|address| {
                node_ports.iter().map(move |front| Listen {
                    address,
                    protocol: front.protocol,
                    port: front.port,
                })
            })
            .collect()
    }
}

impl Listener {
    /// Closes the socket before it returns: the port may be wanted again at once.
    async fn close(self) {
        self.stop.cancel();
        let _ = self.task.await;
    }
}

/// The next that is heard; nothing, while there is nothing to hear with.
async fn hear(monitor: &mut Option<Monitor>) -> Option<Heard> {
    match monitor {
        Some(monitor) => monitor.heard().await,
        None => std::future::pending().await,
    }
}

/// Those need a scope to be listened on, and nobody is told such an address.
fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

fn refusal(listen: Listen, source: io::Error, holders: &mut Holders) -> BackendError {
    let mut doing = format!("listen on {} {}", listen.protocol, listen.socket_address());
    if source.kind() == io::ErrorKind::AddrInUse
        && let Some(holder) = holders.of(listen)
    {
        doing.push_str(&format!(", which {holder} has"));
    } else if source.kind() == io::ErrorKind::PermissionDenied {
        doing.push_str(", for which CAP_NET_BIND_SERVICE is needed");
    }
    BackendError::Io { doing, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_may_not_be_listened_on_says_which_right_is_lacking() {
        let address = [10, 96, 0, 1].into();
        let listen = Listen { address, protocol: Protocol::Tcp, port: 80 };
        let why = io::Error::from_raw_os_error(libc::EACCES);
        let said = refusal(listen, why, &mut Holders::default()).to_string();
        assert!(said.starts_with("listen on TCP 10.96.0.1:80"), "{said}");
        assert!(said.contains("CAP_NET_BIND_SERVICE"), "{said}");
    }
}
