//! Why an endpoint is eligible, or isn't.

use serde::Serialize;

use crate::model::{
    eligible::{Topology, merged_endpoints},
    slices::{Hint, Slice, SliceEndpoint},
    table::PortPlan,
};

/// One endpoint of a Service's port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Candidate {
    /// Its address and port.
    pub endpoint: String,
    /// Whether traffic may go there.
    pub eligible: bool,
    /// Why, or why not.
    pub why: &'static str,
}

impl Candidate {
    /// Makes it not eligible for a reason of the client's.
    pub(super) fn refuse(&mut self, why: &'static str) {
        if self.eligible {
            self.eligible = false;
            self.why = why;
        }
    }
}

/// All endpoints of a port, eligible or not.
pub(super) fn candidates<'a>(
    plan: &PortPlan<'_>,
    slices: impl Iterator<Item = &'a Slice>,
    local: bool,
) -> Vec<Candidate> {
    let (all, _) = merged_endpoints(slices, plan.port, plan.family);
    let unheeded = Unheeded::of(all.iter().map(|(_, state)| state));
    let chosen = if local { &plan.eligible.local } else { &plan.eligible.cluster };
    let candidates = all.into_iter().map(|(endpoint, state)| {
        let eligible = chosen.binary_search(&endpoint).is_ok();
        let why = if eligible {
            why_eligible(&state, local, plan.eligible.topology, unheeded)
        } else {
            why_not(&state, local, plan.eligible.topology)
        };
        Candidate { endpoint: endpoint.to_string(), eligible, why }
    });
    candidates.collect()
}

/// Why hints don't decide although there are some.
#[derive(Clone, Copy)]
enum Unheeded {
    /// A ready endpoint has none.
    OneLacks,
    /// All ready endpoints have one, but none is for here.
    NoneHere,
}

impl Unheeded {
    fn of<'a>(states: impl Iterator<Item = &'a SliceEndpoint> + Clone) -> Option<Self> {
        let ready = || states.clone().filter(|state| state.ready);
        let lacks = |hint: fn(&SliceEndpoint) -> Hint| {
            let count = ready().filter(|state| hint(state) == Hint::Absent).count();
            (count < ready().count()).then_some(count > 0)
        };
        let lacking = lacks(|state| state.zone_hint).or_else(|| lacks(|state| state.node_hint))?;
        Some(if lacking { Self::OneLacks } else { Self::NoneHere })
    }
}

fn why_eligible(
    state: &SliceEndpoint,
    local: bool,
    topology: Topology,
    unheeded: Option<Unheeded>,
) -> &'static str {
    match (state.ready, local, topology, unheeded) {
        (false, ..) => "it terminates, but serves still, and none is ready",
        (true, true, ..) => "ready, and on this node",
        (true, false, Topology::Node, _) => "ready, and its hints name this node",
        (true, false, Topology::Zone, _) => "ready, and its hints name this zone",
        (true, false, Topology::Anywhere, None) => "ready",
        (true, false, Topology::Anywhere, Some(Unheeded::OneLacks)) => {
            match (state.zone_hint, state.node_hint) {
                (Hint::Absent, Hint::Absent) => {
                    "ready; it has no hints, so those of the others are ignored"
                }
                _ => "ready; its hints are ignored, as another ready endpoint has none",
            }
        }
        (true, false, Topology::Anywhere, Some(Unheeded::NoneHere)) => {
            "ready; hints are ignored, as none of them is for here"
        }
    }
}

fn why_not(state: &SliceEndpoint, local: bool, topology: Topology) -> &'static str {
    if local && !state.local {
        return "on another node, and the traffic policy is Local";
    }
    match (state.ready, state.serving, state.terminating) {
        (true, ..) if !topology.admits(state) => match topology {
            Topology::Node => "its hints name other nodes",
            _ => "its hints name other zones",
        },
        (true, ..) => "there are more endpoints than are served",
        (false, false, true) => "it terminates and doesn't serve any more",
        (false, true, true) => "it terminates, and others are ready",
        (false, ..) => "not ready",
    }
}
