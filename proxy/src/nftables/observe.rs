//! Reading back what the kernel holds: at the start and after somebody else's edit, never else.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::{HashMap, HashSet},
};

use super::{
    attribute::Attributes,
    batch::{Chain, Element, SetKind, TABLE, comment_of},
    changes::Changes,
    held::Held,
    layout::DynamicChain,
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
    let Some(comment) = table_comment(socket, layout)? else {
        return different("there is no table yet".into());
    };
    if comment != layout.fingerprint() {
        return different("it was written by another release or with another configuration".into());
    }
    let sets = set_names(socket, layout)?;
    if let Some(set) = layout.sets().iter().find(|set| !sets.contains(&*set.name)) {
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

    let lists = sets.iter().filter_map(|name| SourcesId::parse(name));
    let lists: HashSet<SourcesId> = lists.collect();
    for id in &lists {
        let found = elements(socket, layout, &id.name())?;
        let list = Sources::read(layout.family, &found);
        if !picks.contains(&DynamicChain::Sources(*id)) || list.is_none_or(|l| l.id() != *id) {
            return different(format!("the set {} was edited", id.name()));
        }
    }

    let mut reading = Reading::new(layout.family);
    for set in layout.sets() {
        // What packets write isn't ours to compare.
        let (SetKind::Plain, Cow::Borrowed(name)) = (set.kind, set.name) else { continue };
        list_elements(socket, layout, name, |element| reading.element(name, &element))?;
    }
    let (mut held, strays) = reading.finish();
    held.chains = picks;
    for id in lists {
        held.enter_list(id);
    }
    Ok(Found::Intact { held: Box::new(held), strays })
}

/// Hands on each element of a set.
///
/// A listing that is begun again lists again what was taken in before; what another program
/// removed meanwhile is told by the monitor.
fn list_elements(
    socket: &mut NftSocket,
    layout: &Layout,
    set: &str,
    mut each: impl FnMut(Element),
) -> Result<(), NftError> {
    socket.list(
        layout.family,
        NFT_MSG_GETSETELEM,
        |w| {
            w.text_attribute(NFTA_SET_ELEM_LIST_TABLE, TABLE);
            w.text_attribute(NFTA_SET_ELEM_LIST_SET, set);
        },
        |message| {
            let Some(list) = message.attributes().find(NFTA_SET_ELEM_LIST_ELEMENTS) else {
                return;
            };
            for (_, element) in Attributes(list) {
                if let Some(element) = Element::parse(Attributes(element)) {
                    each(element);
                }
            }
        },
        || {},
    )
}

/// The elements of a set, each once.
fn elements(socket: &mut NftSocket, layout: &Layout, set: &str) -> Result<Vec<Element>, NftError> {
    let mut elements = Vec::new();
    list_elements(socket, layout, set, |element| elements.push(element))?;
    elements.sort_by_key(|element| element.key);
    elements.dedup();
    Ok(elements)
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

fn set_names(socket: &mut NftSocket, layout: &Layout) -> Result<HashSet<String>, NftError> {
    let mut names = HashSet::new();
    socket.list(
        layout.family,
        NFT_MSG_GETSET,
        |w| w.text_attribute(NFTA_SET_TABLE, TABLE),
        |message| {
            let attributes = message.attributes();
            if attributes.find_text(NFTA_SET_TABLE) == Some(TABLE)
                && let Some(name) = attributes.find_text(NFTA_SET_NAME)
            {
                names.insert(name.to_owned());
            }
        },
        || {},
    )?;
    Ok(names)
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
