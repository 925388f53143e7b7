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
    let goes = |jump: &Jump| !(guarded && jump.target == GUARD);
    let leading: Vec<Jump>;
    (delta.farewells, leading) =
        present.jumps.into_iter().filter(goes).partition(Jump::is_built_in);
    delta.led_to = leading.iter().map(|jump| (jump.table, jump.target.clone())).collect();
    // What is empty already, and has to stay, is no work.
    let stays = |table: Table, chain: &dyn ToString, is_empty: bool| {
        is_empty && delta.led_to.contains(&(table, chain.to_string()))
    };
    let own = present.own.iter();
    delta.gone = own
        .filter(|(chain, content)| !stays(Table::Nat, chain, content.is_empty()))
        .map(|(chain, _)| *chain)
        .collect();
    delta.gone.sort_unstable();
    let base = |at: &(Table, &'static str)| {
        present.base.get(at).is_some_and(|content| !stays(at.0, &at.1, content.is_empty()))
    };
    delta.unchained = CHAINS.into_iter().filter(base).collect();
    let places = present
        .places
        .iter()
        .map(|(place, lines)| (place.table(), place.name(), lines.set.is_empty()))
        .filter(|(table, name, empty)| !stays(*table, name, *empty))
        .map(|(table, name, _)| (table, name));
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
    for Jump { table, chain, rule, target } in leading {
        tracing::warn!(
            table = table.as_str(),
            chain,
            rule,
            "another program's rule leads to {target}, which stays for it, empty: what it wants of \
             a proxy is not done any more"
        );
    }
    Ok(())
}
