//! Whether the kernel has what the answer says. Needs root.

use std::collections::BTreeSet;

use super::Explanation;
use crate::{
    ProxyError,
    backend::BackendError,
    config::Mode,
    iptables,
    model::Family,
    nftables::{
        held::Plan,
        observe::{Found, observe},
        socket::NftSocket,
        text::differences,
    },
    ruleset::{AddressSet, Frontend, Unit},
    snapshot::Snapshot,
    start,
};

impl Snapshot {
    /// Asks the kernel whether it has the rules of an answer, and enters what it has otherwise.
    /// The mode of the userspace has nothing there that could be asked for.
    ///
    /// # Errors
    /// When the kernel can't be asked.
    pub fn check(&self, answer: &mut Explanation) -> Result<(), ProxyError> {
        let Some(family) = answer.met.first().map(Unit::family) else { return Ok(()) };
        let found = match self.config.mode {
            Mode::Nftables => self.check_nftables(family, &answer.met),
            Mode::Iptables => self.check_iptables(family, &answer.met),
            Mode::Userspace => return Ok(()),
        };
        answer.kernel = Some(found.map_err(|error| ProxyError::Unreadable(error.to_string()))?);
        Ok(())
    }

    fn check_nftables(
        &self,
        family: Family,
        met: &BTreeSet<Unit>,
    ) -> Result<Vec<String>, BackendError> {
        let written = start::layout(&self.config, family);
        let (held, strays) = match observe(&mut NftSocket::open()?, &written)? {
            Found::Intact { held, strays } => (held, strays),
            Found::Different(why) => {
                return Ok(vec![format!("the table is not as it should be: {why}")]);
            }
        };
        let mut units = met.clone();
        if met.iter().any(|unit| matches!(unit, Unit::Frontend(Frontend { address: None, .. }))) {
            let node = self.desired.node_addresses().iter().copied();
            let node = node.filter(|address| Family::of(*address) == family);
            units.extend(node.map(|address| Unit::Address(AddressSet::NodeAddresses, address)));
        }
        let mut plan = Plan::default();
        for unit in units {
            held.plan(unit, &self.desired, &mut plan);
        }
        Ok(differences(&written, [&plan.early, &plan.changes], &strays))
    }

    fn check_iptables(
        &self,
        family: Family,
        met: &BTreeSet<Unit>,
    ) -> Result<Vec<String>, BackendError> {
        let frontends = met.iter().filter_map(|unit| match unit {
            Unit::Frontend(frontend) => Some(*frontend),
            _ => None,
        });
        let settings = start::settings(&self.config, family);
        let (missing, excess) =
            iptables::differences(&settings, self.goal(), &frontends.collect::<Vec<_>>())?;
        let missing = missing.lines().map(|line| format!("would have to be restored: {line}"));
        let excess = excess.into_iter().map(|rule| format!("nobody wants: {rule}"));
        Ok(missing.chain(excess).collect())
    }
}
