//! From objects to a backend, one change at a time and without the loop, in a host's namespace.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex},
};

use keelson_api::object::ObjectKey;
use serde_json::Value;

use super::fixture::{Addresses, POD_RANGES};
use crate::{
    DetectLocal, Mode, ProxyConfig,
    backend::{Applied, Backend, Goal},
    conntrack::{ConntrackTable, stale::Tracker},
    iptables::{self, Variant},
    model::{
        Family, Problem,
        service_ranges::ServiceRanges,
        services::Service,
        slices::{Place, Slice},
        table::ServiceTable,
    },
    netns::Namespace,
    ruleset::{
        AddressSet, Unit,
        desired::{Desired, ServiceRules},
    },
    start,
};

/// The configuration that tests begin with: pods are told by their range.
pub(super) fn config(mode: Mode) -> ProxyConfig {
    let ranges = POD_RANGES.iter().map(|range| range.parse().unwrap()).collect();
    ProxyConfig { mode, detect_local: DetectLocal::Ranges(ranges), ..ProxyConfig::new("here") }
}

/// Opens the backend of one family, in the namespace of the calling thread.
fn open(config: &ProxyConfig, family: Family, variant: Variant) -> Box<dyn Backend> {
    if variant != Variant::Host {
        let settings = iptables::Settings { variant, ..start::settings(config, family) };
        let mut rules = iptables::Rules::open(settings).unwrap();
        rules.probe().unwrap();
        return Box::new(rules);
    }
    let config = ProxyConfig { families: vec![family], ..config.clone() };
    let mut chosen = start::choose(&config).unwrap();
    assert_eq!(chosen.mode, config.mode);
    chosen.backends.remove(0)
}

/// What a proxy knows of its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    /// Those of its object.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) place: Place,
}

impl Node {
    /// Where tests begin.
    pub(super) fn usual(family: Family) -> Self {
        Self { addresses: vec![Addresses(family).node()], place: place() }
    }

    fn rules(&self) -> ServiceRules {
        let addresses = self.addresses.iter();
        ServiceRules {
            addresses: addresses.map(|a| (AddressSet::NodeAddresses, *a)).collect(),
            ..ServiceRules::default()
        }
    }
}

struct State {
    objects: ServiceTable,
    desired: Desired,
    backend: Box<dyn Backend>,
    stale: Tracker,
    family: Family,
    ranges: ServiceRanges,
    place: Place,
}

/// Everything between objects and packets, but for the loop.
pub(super) struct Proxy<'a> {
    host: &'a Namespace,
    config: ProxyConfig,
    family: Family,
    state: Arc<Mutex<State>>,
    runtime: Arc<tokio::runtime::Runtime>,
}

impl<'a> Proxy<'a> {
    /// A proxy that knows of nothing but the node's address. What the kernel holds is compared.
    pub(super) fn start(host: &'a Namespace, config: &ProxyConfig, family: Family) -> Self {
        Self::start_by(Variant::Host, host, config, family)
    }

    /// As [`Self::start`], in the iptables mode by one of the two programs of that name.
    pub(super) fn start_by(
        variant: Variant,
        host: &'a Namespace,
        config: &ProxyConfig,
        family: Family,
    ) -> Self {
        Self::start_at(variant, host, config, family, &Node::usual(family))
    }

    fn start_at(
        variant: Variant,
        host: &'a Namespace,
        config: &ProxyConfig,
        family: Family,
        node: &Node,
    ) -> Self {
        let runtime = host.run(|| {
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()
        });
        let runtime = Arc::new(runtime.unwrap());
        let (opened, entered) = (config.clone(), Arc::clone(&runtime));
        let backend = host.run(move || {
            let _guard = entered.enter();
            open(&opened, family, variant)
        });
        let mut desired = Desired::default();
        desired.replace(&ObjectKey::default(), Some(node.rules()));
        let state = State {
            objects: ServiceTable::default(),
            desired,
            backend,
            stale: Tracker::default(),
            family,
            ranges: ServiceRanges::default(),
            place: node.place.clone(),
        };
        let state = Arc::new(Mutex::new(state));
        Self { host, config: config.clone(), family, state, runtime }
    }

    /// One that was started with these objects, and what it wrote.
    pub(super) fn knowing(
        host: &'a Namespace,
        config: &ProxyConfig,
        family: Family,
        node: &Node,
        objects: Vec<Value>,
    ) -> (Self, Applied) {
        let proxy = Self::start_at(Variant::Host, host, config, family, node);
        proxy.with(move |state| {
            for object in objects {
                if object["kind"] == "ServiceCIDR" {
                    state.read_ranges(object);
                    continue;
                }
                let (touched, _) = state.read(object);
                for key in touched {
                    let rules = state.objects.rules(&key, &[state.family]).map(|(rules, _)| rules);
                    state.desired.replace(&key, rules);
                }
            }
        });
        let applied = proxy.synchronize();
        (proxy, applied)
    }

    /// Another proxy that knows the same objects, as after a restart. This one is not used again.
    pub(super) fn restarted(self) -> Self {
        let again = Self::start(self.host, &self.config, self.family);
        {
            let (mut old, mut new) = (self.state.lock().unwrap(), again.state.lock().unwrap());
            std::mem::swap(&mut old.objects, &mut new.objects);
            std::mem::swap(&mut old.desired, &mut new.desired);
            std::mem::swap(&mut old.ranges, &mut new.ranges);
        }
        again
    }

    /// Does something with the backend, in the host's namespace.
    fn with<T: Send + 'static>(&self, act: impl FnOnce(&mut State) -> T + Send + 'static) -> T {
        let (state, runtime) = (Arc::clone(&self.state), Arc::clone(&self.runtime));
        self.host.run(move || {
            let _guard = runtime.enter();
            let mut state = state.lock().unwrap();
            act(&mut state)
        })
    }

    /// Takes in a Service, EndpointSlice or ServiceCIDR as it is now.
    pub(super) fn set(&self, object: Value) -> Applied {
        self.with(move |state| {
            if object["kind"] == "ServiceCIDR" {
                let dirty = state.read_ranges(object);
                return state.write(&dirty);
            }
            let (touched, problems) = state.read(object);
            assert_eq!(problems, []);
            state.commit(&touched)
        })
    }

    /// The same, of an object that may have something wrong in it.
    pub(super) fn take_in(&self, object: Value) -> Applied {
        self.with(move |state| {
            let (touched, _) = state.read(object);
            state.commit(&touched)
        })
    }

    /// Takes in that an object of this kind is gone.
    pub(super) fn remove(&self, kind: &str, name: &str) -> Applied {
        let (service, ranges) = (kind == "Service", kind == "ServiceCIDR");
        let key = ObjectKey::new("d", name);
        self.with(move |state| {
            if ranges {
                state.ranges.remove(key.name());
                let dirty = state.desired.set_service_ranges(state.ranges.all()).dirty;
                return state.write(&dirty);
            }
            let touched = if service {
                state.objects.set_service(&key, None);
                vec![key]
            } else {
                state.objects.set_slice(&key, None)
            };
            state.commit(&touched)
        })
    }

    /// Takes in what the node's object says. If it is in another zone, its slices have to be read
    /// again by whoever keeps them.
    pub(super) fn set_node(&self, node: Node) -> Applied {
        self.with(move |state| {
            let outcome = state.desired.replace(&ObjectKey::default(), Some(node.rules()));
            state.place = node.place;
            state.write(&outcome.dirty)
        })
    }

    /// Compares all with what is in force.
    pub(super) fn synchronize(&self) -> Applied {
        self.with(|state| {
            let goal = Goal { desired: &state.desired, objects: &state.objects };
            let applied = state.backend.synchronize(goal).unwrap();
            assert_served(&applied);
            applied
        })
    }

    /// Takes all rules away.
    pub(super) fn clear(&self) {
        self.with(|state| state.backend.remove().unwrap());
    }
}

impl State {
    /// Takes in an object: which Services it touches, and what is wrong in it.
    fn read(&mut self, object: Value) -> (Vec<ObjectKey>, Vec<Problem>) {
        let key = key(&object);
        if object["kind"] == "Service" {
            let (service, problems) = Service::read(&serde_json::from_value(object).unwrap());
            self.objects.set_service(&key, service);
            (vec![key], problems)
        } else {
            let object = serde_json::from_value(object).unwrap();
            let (slice, problems) = Slice::read(&object, &self.place);
            (self.objects.set_slice(&key, slice), problems)
        }
    }

    /// Takes in a ServiceCIDR: what may have to be written.
    fn read_ranges(&mut self, object: Value) -> Vec<Unit> {
        assert_eq!(self.ranges.set(&serde_json::from_value(object).unwrap()), []);
        self.desired.set_service_ranges(self.ranges.all()).dirty
    }

    fn commit(&mut self, touched: &[ObjectKey]) -> Applied {
        let mut dirty: Vec<Unit> = Vec::new();
        for key in touched {
            let rules = self.objects.rules(key, &[self.family]).map(|(rules, _)| rules);
            let outcome = self.desired.replace(key, rules);
            self.stale.changed(&outcome);
            dirty.extend(outcome.dirty);
        }
        self.write(&dirty)
    }

    fn write(&mut self, dirty: &[Unit]) -> Applied {
        let goal = Goal { desired: &self.desired, objects: &self.objects };
        let applied = self.backend.apply(dirty, goal).unwrap();
        assert_served(&applied);
        if self.backend.tracks_connections() {
            let stale = self.stale.settle(&self.desired, &self.objects);
            ConntrackTable::open().unwrap().forget(&stale).unwrap();
        }
        self.backend.forget(&applied.forget).unwrap();
        applied
    }
}

/// Nothing was refused but what the backend documents never to serve.
fn assert_served(applied: &Applied) {
    let refused: Vec<_> = applied.refused.iter().filter(|(_, error)| error.may_pass()).collect();
    assert!(refused.is_empty(), "{refused:?}");
}

/// Where tests take place.
pub(super) fn place() -> Place {
    Place { node: "here".into(), zone: Some("zone-a".into()) }
}

pub(super) fn key(object: &Value) -> ObjectKey {
    let text = |field: &str| object["metadata"][field].as_str().unwrap();
    ObjectKey::new(text("namespace"), text("name"))
}
