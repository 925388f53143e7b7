//! Which endpoint a client gets.

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Instant,
};

use tokio::sync::{Notify, watch};

use super::{
    observe::Surroundings,
    plan::{Listen, Rule},
    recent::Recent,
};
use crate::model::Endpoint;

/// Why a client gets none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It comes from where it may not.
    Source,
    /// There is no endpoint for it, or none that wasn't tried.
    NoEndpoint,
}

impl Refusal {
    /// As it stands in metrics' labels.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::NoEndpoint => "endpoint",
        }
    }
}

/// Where this process itself listens for clients of Services. A Service whose endpoint is such a
/// place would be relayed to itself for ever, until there are no connections left for others.
#[derive(Debug, Default)]
pub(super) struct Own(RwLock<HashSet<Listen>>);

impl Own {
    /// Notes a place.
    pub(super) fn insert(&self, listen: Listen) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(listen);
    }

    /// Notes that nobody listens there any more.
    pub(super) fn remove(&self, listen: Listen) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&listen);
    }

    fn has(&self, listen: Listen) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&listen)
    }
}

/// A listener's choice, which changes under it.
#[derive(Debug)]
pub(super) struct Dispatch {
    listen: Listen,
    own: Arc<Own>,
    state: Mutex<State>,
    around: watch::Receiver<Arc<Surroundings>>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    rule: Arc<Rule>,
    /// Where clients went, and when they last chose.
    remembered: Recent<IpAddr, (Endpoint, Instant)>,
}

impl Dispatch {
    /// A choice by this rule, for what listens there.
    pub(super) fn new(
        listen: Listen,
        own: Arc<Own>,
        rule: Arc<Rule>,
        around: watch::Receiver<Arc<Surroundings>>,
        affinity_clients: usize,
    ) -> Self {
        let state = State { rule, remembered: Recent::new(affinity_clients) };
        Self { listen, own, state: Mutex::new(state), around, changed: Notify::new() }
    }

    /// Chooses by another rule from now on; whether it is another one.
    pub(super) fn set_rule(&self, rule: &Arc<Rule>) -> bool {
        let mut state = self.state();
        if state.rule == *rule {
            return false;
        }
        state.rule = Arc::clone(rule);
        state.remembered.retain(|_, (endpoint, _)| rule.sticks_to(*endpoint));
        drop(state);
        self.changed.notify_one();
        true
    }

    /// Returns after the rule was changed. For one task at a time.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The endpoint for a client: the one it had if it is sticky, else any that wasn't tried.
    pub(super) fn choose(
        &self,
        client: IpAddr,
        tried: &[Endpoint],
        now: Instant,
    ) -> Result<Endpoint, Refusal> {
        let mut state = self.state();
        let rule = Arc::clone(&state.rule);
        let choice = rule.choice(self.inside(client, &rule)).ok_or(Refusal::NoEndpoint)?;
        if !choice.admits(client) {
            return Err(Refusal::Source);
        }
        if let Some(time) = choice.affinity
            && let Some((endpoint, since)) = state.remembered.touch(&client)
            && now.saturating_duration_since(*since) < time
            && choice.has(*endpoint)
            && !tried.contains(endpoint)
            && !self.is_own(*endpoint)
        {
            *since = now;
            return Ok(*endpoint);
        }
        let excluded = |endpoint: &Endpoint| tried.contains(endpoint) || self.is_own(*endpoint);
        let endpoint = pick(&choice.endpoints, excluded).ok_or(Refusal::NoEndpoint)?;
        if choice.affinity.is_some() {
            state.remembered.insert(client, (endpoint, now));
        }
        Ok(endpoint)
    }

    /// Whether a client that was sent to this endpoint may stay there.
    pub(super) fn permits(&self, client: IpAddr, endpoint: Endpoint) -> bool {
        let rule = Arc::clone(&self.state().rule);
        let choice = rule.choice(self.inside(client, &rule));
        choice.is_some_and(|choice| choice.admits(client) && choice.has(endpoint))
    }

    /// Whether there are no more endpoints than this for a client.
    pub(super) fn is_last(&self, client: IpAddr, tried: usize) -> bool {
        let rule = Arc::clone(&self.state().rule);
        rule.choice(self.inside(client, &rule)).is_none_or(|c| c.endpoints.len() <= tried)
    }

    fn inside(&self, client: IpAddr, rule: &Rule) -> bool {
        // The node's own packets to an address that is local by a route come from that address.
        rule.tells_inside()
            && (client == self.listen.address || self.around.borrow().inside(client))
    }

    fn is_own(&self, endpoint: Endpoint) -> bool {
        let Endpoint { address, port } = endpoint;
        self.own.has(Listen { address, port, protocol: self.listen.protocol })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Any endpoint that isn't excluded.
fn pick(endpoints: &[Endpoint], excluded: impl Fn(&Endpoint) -> bool) -> Option<Endpoint> {
    let any = |endpoints: &[Endpoint]| {
        endpoints.get(rand::random_range(0..endpoints.len().max(1))).copied()
    };
    // Mostly none is excluded.
    any(endpoints).filter(|endpoint| !excluded(endpoint)).or_else(|| {
        let left: Vec<Endpoint> = endpoints.iter().copied().filter(|e| !excluded(e)).collect();
        any(&left)
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use keelson_api::object::ObjectKey;

    use super::*;
    use crate::{
        model::{Family, Protocol},
        ruleset::{
            Action, Frontend, Masquerade,
            desired::{Desired, ServiceRules},
        },
        userspace::plan::Changes,
    };

    const LISTEN: Listen = Listen {
        address: IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1)),
        protocol: Protocol::Tcp,
        port: 80,
    };
    const HOUR: Duration = Duration::from_secs(3_600);

    fn rule(endpoints: &[u8], affinity: Option<Duration>) -> Arc<Rule> {
        let frontend = Frontend::at([10, 96, 0, 1], Protocol::Tcp, 80);
        let endpoints = endpoints.iter().map(|n| endpoint(*n)).collect();
        let masquerade = Masquerade::Always;
        let action = Action::Forward { endpoints, masquerade, affinity, sources: None };
        let rules = ServiceRules { frontends: vec![(frontend, action)], ..Default::default() };
        let mut desired = Desired::default();
        desired.replace(&ObjectKey::new("d", "web"), Some(rules));
        Arc::new(Changes::all(Family::V4, &desired).rules.remove(0).1.unwrap())
    }

    fn endpoint(n: u8) -> Endpoint {
        Endpoint { address: [10, 244, 0, n].into(), port: 80 }
    }

    fn dispatch(rule: Arc<Rule>) -> Dispatch {
        let (_, around) = watch::channel(Arc::default());
        Dispatch::new(LISTEN, Arc::default(), rule, around, 2)
    }

    fn client(n: u8) -> IpAddr {
        [192, 0, 2, n].into()
    }

    #[test]
    fn nobody_is_sent_where_this_process_listens_itself() {
        let own = Arc::new(Own::default());
        let (_, around) = watch::channel(Arc::default());
        let rule = rule(&[1, 2], Some(HOUR));
        let dispatch = Dispatch::new(LISTEN, Arc::clone(&own), rule, around, 100);
        let listen = |n| Listen { address: endpoint(n).address, ..LISTEN };
        let now = Instant::now();
        let first = dispatch.choose(client(1), &[], now).unwrap();
        let chosen = if first == endpoint(1) { 1 } else { 2 };
        own.insert(listen(chosen));
        for n in 1..50 {
            assert_ne!(dispatch.choose(client(n), &[], now), Ok(first));
        }
        own.insert(listen(3 - chosen));
        assert_eq!(dispatch.choose(client(1), &[], now), Err(Refusal::NoEndpoint));
        own.remove(listen(chosen));
        assert_eq!(dispatch.choose(client(1), &[], now), Ok(first));
        // The same number of another protocol is another port.
        own.insert(Listen { protocol: Protocol::Udp, ..listen(chosen) });
        assert_eq!(dispatch.choose(client(1), &[], now), Ok(first));
    }

    #[test]
    fn every_endpoint_is_chosen_equally_often() {
        let dispatch = dispatch(rule(&[1, 2, 3], None));
        let mut counts: BTreeMap<Endpoint, u32> = BTreeMap::new();
        for _ in 0..9_000 {
            *counts.entry(dispatch.choose(client(1), &[], Instant::now()).unwrap()).or_default() +=
                1;
        }
        // 3,000 of each are expected with a deviation of 45; 6 of these are a failure in 100 million.
        assert!(counts.len() == 3 && counts.values().all(|n| (2_730..=3_270).contains(n)));
    }

    #[test]
    fn what_was_tried_is_not_tried_again() {
        let dispatch = dispatch(rule(&[1, 2, 3], Some(HOUR)));
        let mut tried = Vec::new();
        for _ in 0..3 {
            tried.push(dispatch.choose(client(1), &tried, Instant::now()).unwrap());
        }
        tried.sort_unstable();
        assert_eq!(tried, [1, 2, 3].map(endpoint));
        let now = Instant::now();
        assert_eq!(dispatch.choose(client(1), &tried, now), Err(Refusal::NoEndpoint));
    }

    #[test]
    fn a_sticky_client_stays_until_its_time_or_its_endpoint_is_over() {
        let all: Vec<u8> = (1..=200).collect();
        let dispatch = dispatch(rule(&all, Some(HOUR)));
        let begin = Instant::now();
        let first = dispatch.choose(client(1), &[], begin).unwrap();
        // The time begins anew with each connection.
        let mut now = begin;
        for _ in 0..5 {
            now += HOUR * 9 / 10;
            assert_eq!(dispatch.choose(client(1), &[], now), Ok(first));
        }
        // Of 200 endpoints a new choice is another one, nearly always.
        let again = (0..5).any(|_| {
            now += HOUR;
            dispatch.choose(client(1), &[], now) != Ok(first)
        });
        assert!(again, "the time is over");

        let last = dispatch.choose(client(1), &[], now).unwrap();
        assert!(dispatch.permits(client(1), last));
        let others: Vec<u8> = all.iter().copied().filter(|n| endpoint(*n) != last).collect();
        assert!(dispatch.set_rule(&rule(&others, Some(HOUR))));
        assert!(!dispatch.permits(client(1), last));
        assert_ne!(dispatch.choose(client(1), &[], now), Ok(last), "its endpoint is gone");
        assert!(!dispatch.set_rule(&rule(&others, Some(HOUR))), "the same again");

        // Two more clients, and the first is forgotten.
        let first = dispatch.choose(client(1), &[], now).unwrap();
        for n in [2, 3] {
            dispatch.choose(client(n), &[], now).unwrap();
        }
        assert_eq!(dispatch.state().remembered.get(&client(1)), None, "it had {first}");
    }
}
