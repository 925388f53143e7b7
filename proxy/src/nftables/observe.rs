//! Reading back what the kernel holds: at the start and after somebody else's edit, never else.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::{HashMap, HashSet},
};

use super::{
    batch::{Chain, SetKind, TABLE},
    changes::Changes,
    compare::{FoundChain, FoundRule, FoundSet, FoundTable},
    elements::{all_elements, list_elements, read_endpoints},
    held::Held,
    intervals::Intervals,
    layout::{DynamicChain, Layout, SERVICE_RANGES, endpoints_lane},
    reading::Reading,
    socket::{NftError, NftSocket},
    sources::{Sources, SourcesId},
    uapi::*,
};

/// What was found in the kernel.
#[derive(Debug)]
pub(crate) enum Found {
    /// The table with all its chains and rules as this program would make them.
    Intact {
        /// Its elements and picking chains.
        held: Box<Held>,
        /// Elements that make no sense, to be removed.
        strays: Changes,
    },
    /// No table, or one of another release or configuration, or one that somebody has edited.
    Different(String),
}

/// Reads the table of the layout's family.
///
/// # Errors
/// When the kernel doesn't answer.
pub(crate) fn observe(socket: &mut NftSocket, layout: &Layout) -> Result<Found, NftError> {
    let different = |why: String| Ok(Found::Different(why));
    let generation = socket.generation()?;
    let table = match found_table(socket, layout)? {
        Ok(table) => table,
        Err(why) => return different(why),
    };
    let sets = sets(socket, layout)?;
    if let Some(why) = sets_difference(layout, &sets) {
        return different(why);
    }
    let chains = chains(socket, layout)?;
    let mut picks = HashSet::new();
    let mut expected: HashMap<String, Chain> =
        layout.chains().into_iter().map(|chain| (chain.name.clone(), chain)).collect();
    for (name, found) in &chains {
        let chain = match (expected.remove(name), DynamicChain::parse(name)) {
            (Some(chain), _) => chain,
            (None, Some(dynamic)) => {
                picks.insert(dynamic);
                layout.dynamic_chain(dynamic)
            }
            (None, None) => return different(format!("there is a chain {name} that isn't ours")),
        };
        if let Some(why) = found.difference(&chain) {
            return different(why);
        }
    }
    if let Some(name) = expected.keys().next() {
        return different(format!("the chain {name} is gone"));
    }
    if let Some(pick) = Layout::common_chains().find(|pick| !picks.contains(pick)) {
        return different(format!("the chain {} is gone", pick.name()));
    }

    if let Some(why) = table.difference(chains.len() + sets.len()) {
        return different(why);
    }

    let lists = sets.keys().filter_map(|name| SourcesId::parse(name));
    let lists: HashSet<SourcesId> = lists.collect();
    for id in &lists {
        let found = all_elements(socket, layout.family, &id.name())?;
        let list = Sources::read(layout.family, &found);
        if !picks.contains(&DynamicChain::Sources(*id)) || list.is_none_or(|l| l.id() != *id) {
            return different(format!("the set {} was edited", id.name()));
        }
    }

    let ranges = all_elements(socket, layout.family, SERVICE_RANGES)?;
    let Some(ranges) = Intervals::read(layout.family, &ranges) else {
        return different(format!("the set {SERVICE_RANGES} was edited"));
    };

    let mut reading = Reading::new(layout.family);
    let (mut plain, mut of_endpoints) = (Vec::new(), Vec::new());
    for set in layout.sets() {
        // What packets write isn't ours to compare.
        let (SetKind::Plain, Cow::Borrowed(name)) = (set.kind, set.name) else { continue };
        match endpoints_lane(name) {
            Some(lane) => of_endpoints.push((name, lane)),
            None => plain.push(name),
        }
    }
    for name in plain {
        list_elements(socket, layout.family, name, |element| reading.element(name, &element))?;
    }
    // Now the verdicts tell how many endpoints there should be.
    for (name, lane) in of_endpoints {
        let count = sets.get(name).and_then(|set| set.count);
        read_endpoints(socket, &mut reading, name, lane, count, generation)?;
    }
    let (mut held, strays) = reading.finish();
    held.enter_found(picks);
    held.service_ranges = Some(ranges).filter(|ranges| !ranges.is_empty());
    Ok(Found::Intact { held: Box::new(held), strays })
}

/// Whether the kernel has taken this layout before, whatever became of it since.
///
/// # Errors
/// When the kernel doesn't answer.
pub(crate) fn was_taken(socket: &mut NftSocket, layout: &Layout) -> Result<bool, NftError> {
    Ok(found_table(socket, layout)?.is_ok())
}

/// The table, or why there is none of this release and configuration.
fn found_table(
    socket: &mut NftSocket,
    layout: &Layout,
) -> Result<Result<FoundTable, String>, NftError> {
    Ok(match any_table(socket, layout)? {
        None => Err("there is no table yet".into()),
        Some(table) if table.comment != layout.fingerprint() => {
            Err("it was written by another release or with another configuration".into())
        }
        Some(table) => Ok(table),
    })
}

fn any_table(socket: &mut NftSocket, layout: &Layout) -> Result<Option<FoundTable>, NftError> {
    let mut table = None;
    socket.list(
        layout.family,
        NFT_MSG_GETTABLE,
        |_| {},
        |message| {
            if let Some(found) = FoundTable::read(message.attributes()) {
                table = Some(found);
            }
        },
        || {},
    )?;
    Ok(table)
}

/// The sets, by name.
fn sets(socket: &mut NftSocket, layout: &Layout) -> Result<HashMap<String, FoundSet>, NftError> {
    let sets: RefCell<HashMap<String, FoundSet>> = RefCell::default();
    socket.list(
        layout.family,
        NFT_MSG_GETSET,
        |w| w.text_attribute(NFTA_SET_TABLE, TABLE),
        |message| {
            let attributes = message.attributes();
            if attributes.find_text(NFTA_SET_TABLE) == Some(TABLE)
                && let Some(name) = attributes.find_text(NFTA_SET_NAME)
            {
                sets.borrow_mut().insert(name.to_owned(), FoundSet::read(attributes));
            }
        },
        || sets.borrow_mut().clear(),
    )?;
    Ok(sets.into_inner())
}

/// What differs between the sets that there should be and those that are there.
fn sets_difference(layout: &Layout, sets: &HashMap<String, FoundSet>) -> Option<String> {
    let expected = layout.sets();
    if let Some(set) = expected.iter().find(|set| !sets.contains_key(&*set.name)) {
        return Some(format!("the map {} is gone", set.name));
    }
    sets.iter().find_map(|(name, found)| {
        let fixed = expected.iter().find(|set| set.name == *name).cloned();
        let list = || SourcesId::parse(name).map(|id| layout.source_set(id));
        match fixed.or_else(list) {
            None => Some(format!("there is a set {name} that isn't ours")),
            Some(set) => {
                (!found.is(&set)).then(|| format!("the set {name} was declared otherwise"))
            }
        }
    })
}

fn chains(
    socket: &mut NftSocket,
    layout: &Layout,
) -> Result<HashMap<String, FoundChain>, NftError> {
    let chains: RefCell<HashMap<String, FoundChain>> = RefCell::default();
    socket.list(
        layout.family,
        NFT_MSG_GETCHAIN,
        |w| w.text_attribute(NFTA_CHAIN_TABLE, TABLE),
        |message| {
            let attributes = message.attributes();
            let Some(name) = attributes.find_text(NFTA_CHAIN_NAME) else { return };
            if attributes.find_text(NFTA_CHAIN_TABLE) != Some(TABLE) {
                return;
            }
            chains.borrow_mut().insert(name.to_owned(), FoundChain::read(attributes));
        },
        || chains.borrow_mut().clear(),
    )?;
    socket.list(
        layout.family,
        NFT_MSG_GETRULE,
        |w| w.text_attribute(NFTA_RULE_TABLE, TABLE),
        |message| {
            let attributes = message.attributes();
            if attributes.find_text(NFTA_RULE_TABLE) != Some(TABLE) {
                return;
            }
            let mut chains = chains.borrow_mut();
            if let Some(name) = attributes.find_text(NFTA_RULE_CHAIN)
                && let Some(chain) = chains.get_mut(name)
            {
                chain.rules.push(FoundRule::read(attributes));
            }
        },
        || chains.borrow_mut().values_mut().for_each(|chain| chain.rules.clear()),
    )?;
    Ok(chains.into_inner())
}
