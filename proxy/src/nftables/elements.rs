//! Reading the elements of one set or map, all of them or those that are known to be there.
//!
//! The kernel lists a hash table in messages of at most 32 KiB, whatever room the reader offers
//! (`netlink_recvmsg` caps what it remembers of that), and it looks for the place where each message
//! goes on by walking over all elements before it (`__nft_rhash_walk`). So a listing of n elements
//! costs n² steps: 60,000 take a tenth of a second, 250,000 two seconds. Asked for by its key, each
//! element costs the same, however many there are. The verdicts say which keys of endpoints there
//! should be, and the kernel how many there are: if all are there that should be, and no more in
//! number, there are no others.

use std::sync::Arc;

use super::{
    attribute::{Attributes, Message, Writer},
    batch::{Bytes, Data, Element, TABLE},
    keys::{frontend_key, read_endpoint},
    reading::Reading,
    socket::{NftError, NftSocket},
    uapi::*,
};
use crate::{
    model::{Endpoint, Family},
    ruleset::{Frontend, Lane},
};

/// From so many elements on, asking for each takes less time than listing them.
const BY_KEY_MIN: u32 = 50_000;
/// Elements asked for at once: all answers have to fit in the socket's buffer.
const KEYS_AT_ONCE: usize = 200;

/// Hands on each element of a set.
///
/// A listing that is begun again lists again what was taken in before; what another program
/// removed meanwhile is told by the monitor.
pub(super) fn list_elements(
    socket: &mut NftSocket,
    family: Family,
    set: &str,
    mut each: impl FnMut(Element),
) -> Result<(), NftError> {
    socket.list(
        family,
        NFT_MSG_GETSETELEM,
        |w| name_set(w, set),
        |message| elements_of(message).for_each(&mut each),
        || {},
    )
}

/// The elements of a set, each once.
pub(super) fn all_elements(
    socket: &mut NftSocket,
    family: Family,
    set: &str,
) -> Result<Vec<Element>, NftError> {
    let mut elements = Vec::new();
    list_elements(socket, family, set, |element| elements.push(element))?;
    elements.sort_by_key(|element| element.key);
    elements.dedup();
    Ok(elements)
}

/// Takes in a lane's map of endpoints, whose verdicts were taken in before. `count` is how many
/// elements it has, if the kernel tells, in the generation of the tables in which that was asked.
/// Whether each was asked for by its key.
pub(super) fn read_endpoints(
    socket: &mut NftSocket,
    reading: &mut Reading,
    set: &'static str,
    lane: Lane,
    count: Option<u32>,
    generation: u32,
) -> Result<bool, NftError> {
    if let Some(count) = count.filter(|count| *count >= BY_KEY_MIN) {
        let frontends = reading.picks(lane);
        let expected: u64 = frontends.iter().map(|(_, endpoints)| u64::from(*endpoints)).sum();
        if expected == u64::from(count)
            && let Some(rows) = get_rows(socket, set, &frontends)?
            && socket.generation()? == generation
        {
            for ((frontend, _), slots) in frontends.iter().zip(rows) {
                reading.row(*frontend, slots);
            }
            return Ok(true);
        }
    }
    let family = reading.family();
    list_elements(socket, family, set, |element| reading.element(set, &element))?;
    reading.rows();
    Ok(false)
}

/// The endpoints of each of these frontends, by index, if each is there.
fn get_rows(
    socket: &mut NftSocket,
    set: &str,
    frontends: &[(Frontend, u32)],
) -> Result<Option<Vec<Arc<[Endpoint]>>>, NftError> {
    let keys = frontends.iter().flat_map(|(frontend, endpoints)| {
        let key = frontend_key(frontend);
        (0..*endpoints).map(move |index| (frontend.family, key.part(&index.to_ne_bytes())))
    });
    let mut rows = Vec::with_capacity(frontends.len());
    let mut found = Vec::new();
    let mut keys = keys.peekable();
    while let Some((family, _)) = keys.peek().copied() {
        let some: Vec<Bytes> = keys.by_ref().take(KEYS_AT_ONCE).map(|(_, key)| key).collect();
        if !get(socket, family, set, &some, &mut found)? {
            return Ok(None);
        }
        let mut used = 0;
        while let Some((_, endpoints)) = frontends.get(rows.len())
            && let Some(row) = found.get(used..used + *endpoints as usize)
        {
            rows.push(row.into());
            used += row.len();
        }
        found.drain(..used);
    }
    Ok(Some(rows))
}

/// Asks for the endpoints with these keys. False if one isn't there.
fn get(
    socket: &mut NftSocket,
    family: Family,
    set: &str,
    keys: &[Bytes],
    endpoints: &mut Vec<Endpoint>,
) -> Result<bool, NftError> {
    let mut waiting = keys.iter();
    let mut as_asked = true;
    let asked = socket.get(
        family,
        NFT_MSG_GETSETELEM,
        |w| {
            name_set(w, set);
            w.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |w| {
                for key in keys {
                    w.nest(NFTA_LIST_ELEM, |w| {
                        w.nest(NFTA_SET_ELEM_KEY, |w| {
                            w.bytes_attribute(NFTA_DATA_VALUE, key.as_slice());
                        });
                    });
                }
            });
        },
        |message| {
            for element in elements_of(message) {
                // The kernel answers in the order of the question.
                let endpoint = match &element.data {
                    Data::Value(value) if waiting.next() == Some(&element.key) => {
                        read_endpoint(value.as_slice(), family)
                    }
                    _ => None,
                };
                as_asked &= endpoint.is_some();
                endpoints.extend(endpoint);
            }
        },
    );
    match asked {
        Ok(()) => Ok(as_asked && waiting.next().is_none()),
        // A listing will say what is there instead.
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(false),
        Err(NftError::AnswersLost) => Ok(false),
        Err(error) => Err(error),
    }
}

fn name_set(w: &mut Writer, set: &str) {
    w.text_attribute(NFTA_SET_ELEM_LIST_TABLE, TABLE);
    w.text_attribute(NFTA_SET_ELEM_LIST_SET, set);
}

fn elements_of(message: Message<'_>) -> impl Iterator<Item = Element> {
    let list = message.attributes().find(NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
    Attributes(list).filter_map(|(_, element)| Element::parse(Attributes(element)))
}
