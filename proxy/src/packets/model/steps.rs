//! Which changes there are, and what each does to the world.

use proptest::prelude::*;

use super::{
    oddities::{Oddity, Stray},
    world::{CLAIMS, Families, Here, Kind, Point, Ranges, ServiceRanges, Slice, Spec, World},
};
use crate::packets::fixture::PODS;

/// How many Services there are at the most, and how many cluster addresses they share.
pub(super) const SERVICES: u8 = 3;
/// How many slices there are at the most.
const SLICES: u8 = 5;

/// What happens.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// A Service as a whole.
    Service(u8, Spec),
    /// One field of a Service, taken from another one.
    Tweak(u8, Field, Spec),
    RemoveService(u8),
    /// A slice as a whole, maybe of another Service than before.
    Slice(u8, Slice),
    /// One endpoint of a slice.
    Point(u8, usize, Point),
    /// A slice's first endpoint moves to another slice: in between it is in both, or in none.
    Move {
        from: u8,
        to: u8,
        doubled: bool,
    },
    RemoveSlice(u8),
    /// Where Services' addresses come from.
    Ranges(ServiceRanges),
    /// The node's address or zone changes.
    Node(Here),
    /// The proxy is started again.
    Restart,
    /// Another program edits the rules.
    Edit(usize),
}

/// A field of a Service.
#[derive(Clone, Copy, Debug)]
pub(super) enum Field {
    Kind,
    Families,
    Cluster,
    Claim,
    Created,
    Ports,
    ExternalIp,
    Balancer,
    InternalPolicy,
    ExternalPolicy,
    Affinity,
    Ranges,
    HealthCheck,
    Oddity,
}

/// One change that a proxy sees.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Service(u8, Option<Spec>),
    Slice(u8, Option<Slice>),
    Ranges(ServiceRanges),
    Node(Here),
    Restart,
    Edit(usize),
}

impl Step {
    /// What it comes to in this world, one after the other.
    pub(super) fn changes(self, world: &World) -> Vec<Change> {
        match self {
            Self::Service(n, spec) => vec![Change::Service(n, Some(spec))],
            Self::Tweak(n, field, other) => {
                let Some(spec) = world.services.get(&n) else { return vec![] };
                vec![Change::Service(n, Some(tweaked(spec.clone(), field, other)))]
            }
            Self::RemoveService(n) => vec![Change::Service(n, None)],
            Self::Slice(id, slice) => vec![Change::Slice(id, Some(slice))],
            Self::Point(id, index, point) => {
                let Some(mut slice) = world.slices.get(&id).cloned() else { return vec![] };
                let count = slice.points.len().max(1);
                match slice.points.get_mut(index % count) {
                    Some(before) => *before = point,
                    None => slice.points.push(point),
                }
                vec![Change::Slice(id, Some(slice))]
            }
            Self::Move { from, to, doubled } => {
                let both = (world.slices.get(&from).cloned(), world.slices.get(&to).cloned());
                let (Some(mut source), Some(mut target)) = both else { return vec![] };
                if from == to || source.points.is_empty() {
                    return vec![];
                }
                target.points.push(source.points.remove(0));
                let mut changes =
                    vec![Change::Slice(to, Some(target)), Change::Slice(from, Some(source))];
                if !doubled {
                    changes.reverse();
                }
                changes
            }
            Self::RemoveSlice(id) => vec![Change::Slice(id, None)],
            Self::Ranges(ranges) => vec![Change::Ranges(ranges)],
            Self::Node(here) => vec![Change::Node(here)],
            Self::Restart => vec![Change::Restart],
            Self::Edit(which) => vec![Change::Edit(which)],
        }
    }
}

fn tweaked(mut spec: Spec, field: Field, other: Spec) -> Spec {
    match field {
        Field::Kind => spec.kind = other.kind,
        Field::Families => spec.families = other.families,
        Field::Cluster => spec.cluster = other.cluster,
        Field::Claim => spec.claim = other.claim,
        Field::Created => spec.created = other.created,
        Field::Ports => spec.ports = other.ports,
        Field::ExternalIp => spec.external_ip = !spec.external_ip,
        Field::Balancer => {
            (spec.proxied, spec.unallocated) = (other.proxied, other.unallocated);
        }
        Field::InternalPolicy => spec.internal_local = !spec.internal_local,
        Field::ExternalPolicy => spec.external_local = !spec.external_local,
        Field::Affinity => spec.affinity = other.affinity,
        Field::Ranges => spec.ranges = other.ranges,
        Field::HealthCheck => spec.health_check = other.health_check,
        Field::Oddity => spec.oddity = other.oddity,
    }
    spec
}

impl World {
    /// Takes in a change of an object.
    pub(super) fn take_in(&mut self, change: &Change) {
        match change.clone() {
            Change::Service(n, Some(spec)) => drop(self.services.insert(n, spec)),
            Change::Service(n, None) => drop(self.services.remove(&n)),
            Change::Slice(id, Some(slice)) => drop(self.slices.insert(id, slice)),
            Change::Slice(id, None) => drop(self.slices.remove(&id)),
            Change::Ranges(ranges) => self.ranges = ranges,
            Change::Node(here) => self.here = here,
            Change::Restart | Change::Edit(_) => {}
        }
    }
}

/// Sequences of steps, beginning with a Service that has endpoints.
pub(super) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let id = 0..SLICES;
    let n = 1..=SERVICES;
    let step = prop_oneof![
        3 => (n.clone(), spec()).prop_map(|(n, spec)| Step::Service(n, spec)),
        8 => (n.clone(), field(), spec()).prop_map(|(n, field, spec)| Step::Tweak(n, field, spec)),
        1 => n.prop_map(Step::RemoveService),
        3 => (id.clone(), slice()).prop_map(|(id, slice)| Step::Slice(id, slice)),
        4 => (id.clone(), 0usize..4, point()).prop_map(|(id, i, point)| Step::Point(id, i, point)),
        2 => (id.clone(), id.clone(), any::<bool>())
            .prop_map(|(from, to, doubled)| Step::Move { from, to, doubled }),
        1 => id.prop_map(Step::RemoveSlice),
        1 => service_ranges().prop_map(Step::Ranges),
        2 => here().prop_map(Step::Node),
        1 => Just(Step::Restart),
        1 => (0usize..100).prop_map(Step::Edit),
    ];
    let begin = (spec(), slice(), slice(), 1..=SERVICES, service_ranges());
    let begin = begin.prop_map(|(spec, one, two, second, ranges)| {
        let slice = |service, slice| Slice { service, other_family: false, ..slice };
        vec![
            Step::Service(1, Spec { kind: Kind::LoadBalancer, ..spec.clone() }),
            Step::Slice(0, slice(1, one)),
            Step::Slice(1, slice(second, two)),
            Step::Service(2, spec),
            Step::Ranges(ranges),
        ]
    });
    (begin, proptest::collection::vec(step, 8..20)).prop_map(|(begin, rest)| [begin, rest].concat())
}

fn field() -> impl Strategy<Value = Field> {
    proptest::sample::select(vec![
        Field::Kind,
        Field::Families,
        Field::Cluster,
        Field::Claim,
        Field::Created,
        Field::Ports,
        Field::ExternalIp,
        Field::Balancer,
        Field::InternalPolicy,
        Field::ExternalPolicy,
        Field::Affinity,
        Field::Ranges,
        Field::HealthCheck,
        Field::Oddity,
    ])
}

fn here() -> impl Strategy<Value = Here> {
    let usual = prop_oneof![3 => Just(Some(true)), 3 => Just(Some(false)), 1 => Just(None)];
    let zone = prop_oneof![2 => Just(Some(0)), 2 => Just(Some(1)), 1 => Just(None)];
    (usual, zone).prop_map(|(usual, zone)| Here { usual, zone })
}

fn spec() -> impl Strategy<Value = Spec> {
    let flag = any::<bool>;
    let kind = prop_oneof![
        1 => Just(Kind::Headless),
        1 => Just(Kind::ExternalName),
        1 => Just(Kind::OtherProxy),
        3 => Just(Kind::ClusterIp),
        4 => Just(Kind::NodePort),
        8 => Just(Kind::LoadBalancer),
    ];
    let families = prop_oneof![4 => Just(Families::This), 2 => Just(Families::Both), 1 => Just(Families::Other)];
    let ports = prop_oneof![
        4 => Just([Some(0), None]),
        1 => Just([Some(1), None]),
        1 => Just([None, Some(0)]),
        1 => Just([Some(0), Some(1)]),
        1 => Just([Some(1), Some(0)]),
    ];
    let affinity = prop_oneof![3 => Just(None), 1 => Just(Some(1)), 2 => Just(Some(1000)), 1 => Just(Some(10_800))];
    let ranges = prop_oneof![
        4 => Just(Ranges::Anybody), 2 => Just(Ranges::Some), 1 => Just(Ranges::OtherFamily),
        1 => Just(Ranges::Odd),
    ];
    let health_check = prop_oneof![Just(None), (32_100..32_102u16).prop_map(Some)];
    let numbers = (1..=SERVICES, 0..CLAIMS, 0u8..3, health_check);
    let oddity = prop_oneof![
        6 => Just(Oddity::None),
        1 => Just(Oddity::FamiliesLie),
        1 => Just(Oddity::SecondAddress),
        1 => Just(Oddity::BadAddresses),
        1 => Just(Oddity::TwinPorts),
        1 => Just(Oddity::BadPorts),
        1 => Just(Oddity::Spelled),
    ];
    let flags = (flag(), flag(), flag(), flag(), oddity);
    let rare = (proptest::bool::weighted(0.2), proptest::bool::weighted(0.2));
    (kind, families, numbers, ports, affinity, ranges, flags, rare).prop_map(
        |(
            kind,
            families,
            (cluster, claim, created, health_check),
            ports,
            affinity,
            ranges,
            flags,
            rare,
        )| Spec {
            kind,
            families,
            cluster,
            claim,
            created,
            ports,
            external_ip: flags.0,
            proxied: rare.0,
            unallocated: rare.1,
            internal_local: flags.1,
            external_local: flags.2,
            affinity,
            ranges,
            health_check,
            publish_not_ready: flags.3,
            oddity: flags.4,
        },
    )
}

fn service_ranges() -> impl Strategy<Value = ServiceRanges> {
    any::<[bool; 3]>().prop_map(|[clusters, some_clusters, external]| ServiceRanges {
        clusters,
        some_clusters,
        external,
    })
}

fn slice() -> impl Strategy<Value = Slice> {
    let number = || prop_oneof![3 => Just(Some(8080)), 1 => Just(Some(9090)), 1 => Just(None)];
    let points = proptest::collection::vec(point(), 0..5);
    let rare = || proptest::bool::weighted(0.1);
    let stray = proptest::sample::select(vec![
        Stray::OtherFamily,
        Stray::Loopback,
        Stray::LinkLocal,
        Stray::Multicast,
        Stray::Unspecified,
        Stray::Misspelled,
    ]);
    let stray = proptest::option::weighted(0.3, stray);
    (1..=SERVICES, rare(), (number(), number()), (stray, rare()), points).prop_map(
        |(service, other_family, ports, (stray, spelled), points)| Slice {
            service,
            other_family,
            ports: ports.into(),
            stray,
            spelled,
            points,
        },
    )
}

fn point() -> impl Strategy<Value = Point> {
    let state = prop_oneof![
        4 => Just(Some((true, true, false))),
        1 => Just(None),
        2 => Just(Some((false, true, true))),
        1 => Just(Some((false, false, true))),
        1 => Just(Some((false, false, false))),
        // As with `publishNotReadyAddresses`.
        1 => Just(Some((true, true, true))),
    ];
    let zone = prop_oneof![2 => Just(None), 2 => Just(Some(0)), 1 => Just(Some(1))];
    let node = prop_oneof![2 => Just(None), 2 => Just(Some(true)), 1 => Just(Some(false))];
    (1..=PODS, state, proptest::bool::weighted(0.9), zone, node)
        .prop_map(|(pod, state, placed, zone, node)| Point { pod, state, placed, zone, node })
}
