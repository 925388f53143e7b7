//! Whether the kernel has what the answer says. Needs root.

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
        let Some(unit) = answer.decided_by else { return Ok(()) };
        let found = match (self.config.mode, unit) {
            (Mode::Nftables, unit) => self.check_nftables(unit),
            (Mode::Iptables, Unit::Frontend(frontend)) => self.check_iptables(&frontend),
            (Mode::Iptables | Mode::Userspace, _) => return Ok(()),
        };
        answer.kernel = Some(found.map_err(|error| ProxyError::Unreadable(error.to_string()))?);
        Ok(())
    }

    fn check_nftables(&self, unit: Unit) -> Result<Vec<String>, BackendError> {
        let written = start::layout(&self.config, unit.family());
        let (held, strays) = match observe(&mut NftSocket::open()?, &written)? {
            Found::Intact { held, strays } => (held, strays),
            Found::Different(why) => {
                return Ok(vec![format!("the table is not as it should be: {why}")]);
            }
        };
        let related = self.desired.units().filter(|other| match (unit, other) {
            (Unit::Frontend(frontend), Unit::Address(AddressSet::NodeAddresses, address)) => {
                frontend.address.is_none() && Family::of(*address) == frontend.family
            }
            (Unit::Frontend(frontend), Unit::Address(_, address)) => {
                Some(*address) == frontend.address
            }
            _ => false,
        });
        let mut plan = Plan::default();
        for unit in [unit].into_iter().chain(related) {
            held.plan(unit, &self.desired, &mut plan);
        }
        Ok(differences(&written, [&plan.early, &plan.changes], &strays))
    }

    fn check_iptables(&self, frontend: &Frontend) -> Result<Vec<String>, BackendError> {
        let Some(owner) = self.desired.owner(frontend) else { return Ok(Vec::new()) };
        let settings = start::settings(&self.config, frontend.family);
        let missing = iptables::missing(&settings, self.goal(), owner)?;
        Ok(missing.lines().map(|line| format!("would have to be restored: {line}")).collect())
    }
}
