//! Taking away what this proxy, another one, or the other iptables has left.

use super::{
    Variant,
    apply::read,
    base::{CHAINS, GUARD},
    chain::Table,
    held::{Delta, Jump},
    loopback::{self, LOCALNET_SET},
    program::{Programs, has_legacy_tables},
    restore::Script,
};
use crate::{backend::BackendError, model::Family, nftables::look};

/// Removes the chains and rules of any proxy, ours and kube-proxy's, that either variant of
/// iptables has; it is no error if there are none, or no iptables. Where there surely are none,
/// nothing is run.
///
/// # Errors
/// When they can't be removed.
pub(crate) fn cleanup(family: Family) -> Result<(), BackendError> {
    // Chains of the old tables are seen only by asking iptables itself. Where the kernel doesn't
    // say, that is asked too.
    let nft = look::has_chain(family, |chain| chain.starts_with("KUBE-")).unwrap_or(true);
    if !nft && !has_legacy_tables(family) {
        return Ok(());
    }
    let mut found = Vec::new();
    for variant in [Variant::Nft, Variant::Legacy] {
        match Programs::find(family, variant) {
            Ok(programs) => found.push(programs),
            Err(error) => tracing::debug!(%error, "no rules of this iptables are removed"),
        }
    }
    if found.is_empty() {
        // A host that has but one calls it nothing else.
        found.extend(Programs::find(family, Variant::Host));
    }
    found.iter().try_for_each(loopback::set_back)?;
    found.iter().try_for_each(remove)
}

/// Removes the chains and rules of any proxy that the variant has which is not the host's: one
/// that ran with it would go on translating. Where there surely are none, or it isn't installed,
/// nothing is run.
///
/// # Errors
/// As [`cleanup`].
pub(crate) fn cleanup_other_variant(family: Family) -> Result<(), BackendError> {
    let other = match Programs::find(family, Variant::Host)?.legacy {
        true => Variant::Nft,
        false => Variant::Legacy,
    };
    let some = match other {
        Variant::Legacy => has_legacy_tables(family),
        _ => look::has_chain(family, |chain| chain.starts_with("KUBE-")).unwrap_or(true),
    };
    if !some {
        return Ok(());
    }
    match Programs::find(family, other) {
        Ok(programs) => remove(&programs),
        Err(error) => {
            tracing::debug!(%error, "no rules of the other iptables are removed");
            Ok(())
        }
    }
}

pub(super) fn remove(programs: &Programs) -> Result<(), BackendError> {
    let present = read(programs)?;
    let mut delta = Delta { outdated: present.outdated, ..Delta::default() };
    // The guard stays while there is something to guard: whoever else needs that setting would be
    // open to the neighbours without it.
    let guarded = loopback::is_open(programs);
    if guarded && !present.guest_chains.is_empty() {
        tracing::info!(
            "{GUARD} stays, since {} is 1: without it neighbours could reach loopback \
             addresses. It is not looked after from now on",
            loopback::ROUTE_LOCALNET
        );
    }
    let goes = |jump: &Jump| !(guarded && jump.rule.ends_with(GUARD));
    delta.farewells = present.jumps.into_iter().filter(goes).collect();
    delta.gone = present.own.into_keys().collect();
    delta.gone.sort_unstable();
    delta.unchained = CHAINS.into_iter().filter(|at| present.base.contains_key(at)).collect();
    let places = present.places.keys().map(|place| (place.table(), place.name()));
    delta.unchained.extend(places);
    delta.unchained.extend(present.of_ipvs);
    if !guarded {
        delta.unchained.extend(present.guest_chains);
        if present.noted {
            delta.unchained.push((Table::Filter, LOCALNET_SET));
        }
    }
    let input = Script::of(&delta).text();
    if input.is_empty() {
        return Ok(());
    }
    programs.restore(input)?;
    tracing::info!(iptables = programs.version, "rules of a proxy are removed");
    Ok(())
}
