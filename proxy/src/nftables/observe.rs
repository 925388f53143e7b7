//! Reading back what the kernel holds: at the start and after somebody else's edit, never else.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::{HashMap, HashSet},
};

use super::{
    attribute::Attributes,
    batch::{Chain, SetKind, TABLE, comment_of},
    changes::Changes,
    elements::{all_elements, list_elements, read_endpoints},
    held::Held,
    layout::{DynamicChain, endpoints_lane},
    reading::Reading,
    rules::Layout,
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

/// A chain as the kernel lists it.
#[derive(Debug, Default)]
struct FoundChain {
    hook: Option<(u32, i32)>,
    comments: Vec<String>,
}

/// Reads the table of the layout's family.
///
/// # Errors
/// When the kernel doesn't answer.
pub(crate) fn observe(socket: &mut NftSocket, layout: &Layout) -> Result<Found, NftError> {
    let different = |why: String| Ok(Found::Different(why));
    let generation = socket.generation()?;
    if let Some(why) = not_ours(socket, layout)? {
        return different(why);
    }
    let sets = sets(socket, layout)?;
    if let Some(set) = layout.sets().iter().find(|set| !sets.contains_key(&*set.name)) {
        return different(format!("the map {} is gone", set.name));
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
        let hook = chain.hook.map(|hook| (hook.hook, hook.priority));
        if hook != found.hook || !chain.rules.iter().map(|r| &r.comment).eq(&found.comments) {
            return different(format!("the chain {name} was edited"));
        }
    }
    if let Some(name) = expected.keys().next() {
        return different(format!("the chain {name} is gone"));
    }
    if let Some(pick) = Layout::common_chains().find(|pick| !picks.contains(pick)) {
        return different(format!("the chain {} is gone", pick.name()));
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
        let count = sets.get(name).copied().flatten();
        read_endpoints(socket, &mut reading, name, lane, count, generation)?;
    }
    let (mut held, strays) = reading.finish();
    held.enter_found(picks);
    Ok(Found::Intact { held: Box::new(held), strays })
}

/// Whether the kernel has taken this layout before, whatever became of it since.
///
/// # Errors
/// When the kernel doesn't answer.
pub(crate) fn was_taken(socket: &mut NftSocket, layout: &Layout) -> Result<bool, NftError> {
    Ok(not_ours(socket, layout)?.is_none())
}

/// Why a table is none of this release and configuration.
fn not_ours(socket: &mut NftSocket, layout: &Layout) -> Result<Option<String>, NftError> {
    Ok(match table_comment(socket, layout)? {
        None => Some("there is no table yet".into()),
        Some(comment) if comment != layout.fingerprint() => {
            Some("it was written by another release or with another configuration".into())
        }
        Some(_) => None,
    })
}

fn table_comment(socket: &mut NftSocket, layout: &Layout) -> Result<Option<String>, NftError> {
    let mut comment = None;
    socket.list(
        layout.family,
        NFT_MSG_GETTABLE,
        |_| {},
        |message| {
            let attributes = message.attributes();
            if attributes.find_text(NFTA_TABLE_NAME) == Some(TABLE) {
                let data = attributes.find(NFTA_TABLE_USERDATA).and_then(comment_of);
                comment = Some(data.unwrap_or_default().to_owned());
            }
        },
        || {},
    )?;
    Ok(comment)
}

/// The sets' names, and how many elements each has where the kernel tells (since Linux 6.16).
fn sets(socket: &mut NftSocket, layout: &Layout) -> Result<HashMap<String, Option<u32>>, NftError> {
    let mut sets = HashMap::new();
    socket.list(
        layout.family,
        NFT_MSG_GETSET,
        |w| w.text_attribute(NFTA_SET_TABLE, TABLE),
        |message| {
            let attributes = message.attributes();
            if attributes.find_text(NFTA_SET_TABLE) == Some(TABLE)
                && let Some(name) = attributes.find_text(NFTA_SET_NAME)
            {
                sets.insert(name.to_owned(), attributes.find_u32(NFTA_SET_COUNT));
            }
        },
        || {},
    )?;
    Ok(sets)
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
            let hook = attributes.find(NFTA_CHAIN_HOOK).map(Attributes).and_then(|hook| {
                let priority = hook.find_u32(NFTA_HOOK_PRIORITY)? as i32;
                Some((hook.find_u32(NFTA_HOOK_HOOKNUM)?, priority))
            });
            chains.borrow_mut().insert(name.to_owned(), FoundChain { hook, comments: Vec::new() });
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
            let comment = attributes.find(NFTA_RULE_USERDATA).and_then(comment_of);
            let mut chains = chains.borrow_mut();
            if let Some(name) = attributes.find_text(NFTA_RULE_CHAIN)
                && let Some(chain) = chains.get_mut(name)
            {
                chain.comments.push(comment.unwrap_or_default().to_owned());
            }
        },
        || chains.borrow_mut().values_mut().for_each(|chain| chain.comments.clear()),
    )?;
    Ok(chains.into_inner())
}
