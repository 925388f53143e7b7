//! What the kernel has otherwise of what a packet meets, for who asks why it goes where it goes.

use std::{collections::BTreeSet, sync::Arc};

use ipnet::IpNet;
use keelson_api::object::ObjectKey;

use super::{
    Settings,
    apply::{node_addresses, read},
    chain::{Place, protocol_name},
    held::{Held, Next},
    program::Programs,
    restore::Script,
    service::{Look, Rendered},
};
use crate::{
    backend::{BackendError, Goal},
    ruleset::Frontend,
};

/// What differs from what is desired of some frontends: the input of `iptables-restore` that would
/// bring what is lacking of the rules of their Services, and the rules for these frontends that no
/// Service wants.
///
/// # Errors
/// When the kernel's rules can't be read.
pub(crate) fn differences(
    settings: &Settings,
    goal: Goal<'_>,
    frontends: &[Frontend],
) -> Result<(String, Vec<String>), BackendError> {
    let programs = Programs::find(settings.family, settings.variant)?;
    let node = node_addresses(goal.desired, settings.family);
    let mut held = Held::default();
    held.observed(read(&programs)?);
    let owners: BTreeSet<&ObjectKey> =
        frontends.iter().filter_map(|frontend| goal.desired.owner(frontend)).collect();
    let mut wanted: BTreeSet<(Place, Arc<str>)> = BTreeSet::new();
    let mut missing = |commented| {
        let look = Look { settings, node: &node, commented };
        let services = owners.iter().map(|owner| {
            let rendered = Rendered::of(owner, goal.objects, goal.desired, look);
            wanted.extend(rendered.lines.iter().cloned());
            ((*owner).clone(), Some(rendered))
        });
        let next = Next { base: None, services: services.collect(), sweep: false };
        Script::of(&held.plan(&next)).text()
    };
    // With very many endpoints rules have no comments.
    let (commented, bare) = (missing(true), missing(false));
    let missing = if bare.is_empty() { bare } else { commented };
    let mut excess = Vec::new();
    for (place, lines) in &held.present.places {
        let theirs = lines.set.iter().filter(|line| {
            *place != Place::HealthChecks
                && frontends.iter().any(|frontend| is_for(line, frontend))
                && !wanted.contains(&(*place, Arc::clone(line)))
        });
        let table = place.table().as_str();
        excess.extend(theirs.map(|line| format!("-t {table} -A {} {line}", place.name())));
    }
    excess.sort_unstable();
    Ok((missing, excess))
}

/// Whether a line of a chain that Services share is for a frontend.
fn is_for(line: &str, frontend: &Frontend) -> bool {
    let after = |option: &str| {
        let mut words = line.split(' ').skip_while(|word| *word != option);
        words.nth(1)
    };
    let address = match (after("-d").map(str::parse::<IpNet>), frontend.address) {
        (None, None) => true,
        (Some(Ok(range)), Some(address)) => range.contains(&address),
        _ => false,
    };
    address
        && after("-p") == Some(protocol_name(frontend.protocol))
        && after("--dport").and_then(|port| port.parse().ok()) == Some(frontend.port)
}
