//! What is there, without touching it: names of tables and chains.

use super::{
    socket::{NftError, NftSocket},
    uapi::*,
};
use crate::model::Family;

/// Whether there is a table of this name.
///
/// # Errors
/// When the kernel doesn't answer.
pub(crate) fn has_table(
    socket: &mut NftSocket,
    family: Family,
    name: &str,
) -> Result<bool, NftError> {
    any(socket, family, NFT_MSG_GETTABLE, NFTA_TABLE_NAME, |found| found == name)
}

/// Whether any table has a chain of such a name, in this thread's network namespace.
///
/// # Errors
/// When the kernel doesn't answer.
pub(crate) fn has_chain(family: Family, is_one: impl Fn(&str) -> bool) -> Result<bool, NftError> {
    any(&mut NftSocket::open()?, family, NFT_MSG_GETCHAIN, NFTA_CHAIN_NAME, is_one)
}

fn any(
    socket: &mut NftSocket,
    family: Family,
    message: u8,
    name: u16,
    is_one: impl Fn(&str) -> bool,
) -> Result<bool, NftError> {
    let mut found = false;
    socket.list(
        family,
        message,
        |_| {},
        |message| found |= message.attributes().find_text(name).is_some_and(&is_one),
        || {},
    )?;
    Ok(found)
}
