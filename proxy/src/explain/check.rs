//! Whether the kernel has what the answer says. Needs root.

use super::Explanation;
use crate::{
    ProxyError,
    backend::BackendError,
    config::Mode,
    iptables,
    model::Family,
    nftables::{
        held::{Chosen, Held, Plan},
        observe::{Found, observe},
        socket::NftSocket,
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
        let Some(frontend) = answer.frontend else { return Ok(()) };
        let found = match self.config.mode {
            Mode::Nftables => self.check_nftables(&frontend),
            Mode::Iptables => self.check_iptables(&frontend),
            Mode::Userspace => return Ok(()),
        };
        answer.kernel = Some(found.map_err(|error| ProxyError::Unreadable(error.to_string()))?);
        Ok(())
    }

    fn check_nftables(&self, frontend: &Frontend) -> Result<Vec<String>, BackendError> {
        let layout = start::layout(&self.config, frontend.family);
        let held = match observe(&mut NftSocket::open()?, &layout)? {
            Found::Intact { held, .. } => held,
            Found::Different(why) => {
                return Ok(vec![format!("the table is not as it should be: {why}")]);
            }
        };
        let mut differences = Vec::new();
        let mut plan = Plan::default();
        held.plan(Unit::Frontend(*frontend), &self.desired, &mut plan);
        if !(plan.early.is_empty() && plan.changes.is_empty()) {
            differences.push(format!("{frontend}: {}", holds(&held, frontend)));
        }
        let addresses = self.desired.units().filter(|unit| match unit {
            Unit::Address(AddressSet::NodeAddresses, address) => {
                frontend.address.is_none() && Family::of(*address) == frontend.family
            }
            Unit::Address(_, address) => Some(*address) == frontend.address,
            Unit::Frontend(_) => false,
        });
        for unit in addresses {
            let mut plan = Plan::default();
            held.plan(unit, &self.desired, &mut plan);
            if let (Unit::Address(_, address), false) = (unit, plan.changes.is_empty()) {
                differences.push(format!("{address} is missing in its set"));
            }
        }
        Ok(differences)
    }

    fn check_iptables(&self, frontend: &Frontend) -> Result<Vec<String>, BackendError> {
        let Some(owner) = self.desired.owner(frontend) else { return Ok(Vec::new()) };
        let settings = start::settings(&self.config, frontend.family);
        let missing = iptables::missing(&settings, self.goal(), owner)?;
        Ok(missing.lines().map(|line| format!("would have to be restored: {line}")).collect())
    }
}

/// What the table has for a frontend, in words.
fn holds(held: &Held, frontend: &Frontend) -> String {
    let Some(found) = held.frontend(frontend) else { return "nothing is there".into() };
    match &found.chosen {
        _ if found.rejected => "it is rejected".into(),
        Some(Chosen::Drop) => "it is dropped".into(),
        Some(Chosen::Foreign) => "its verdict is not the proxy's".into(),
        None => "no verdict is there".into(),
        Some(Chosen::Pick(chain)) => {
            let endpoints: Vec<String> = found.slots.iter().map(ToString::to_string).collect();
            format!("it goes to {}: {}", chain.name(), endpoints.join(", "))
        }
    }
}
