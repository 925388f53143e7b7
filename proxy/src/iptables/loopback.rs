//! Node ports on loopback addresses: the setting of the kernel that they need, who has set it, and
//! the rules that guard against its misuse.

use super::{
    apply::{Rules, read},
    base::{GUARD, guard},
    chain::Table,
    held::{Delta, Present},
    observe,
    program::Programs,
    restore::Script,
};
use crate::backend::BackendError;

/// Lets node ports answer on loopback addresses.
pub(super) const ROUTE_LOCALNET: &str = "net/ipv4/conf/all/route_localnet";
/// An empty chain of the filter table that tells that `route_localnet` was 0 before the iptables mode
/// needed it, so that who takes over sets it back. Like the setting it doesn't outlive the kernel.
pub(crate) const LOCALNET_SET: &str = "KEELSON-LOCALNET";

impl Rules {
    /// Has node ports answer on loopback, if that is wanted: what needs more rights than writing
    /// rules does.
    ///
    /// # Errors
    /// When the guard can't be written, without which it would be dangerous.
    pub(crate) fn open_loopback(&self) -> Result<(), BackendError> {
        if !self.settings.node_ports_on_loopback() {
            return Ok(());
        }
        let mut present = read(&self.programs)?;
        let mut delta = Delta::default();
        for guest in guard().into_iter().filter(|guest| !present.guests.contains(guest)) {
            let at = (guest.table, guest.chain);
            if guest.chain == GUARD && present.guest_chains.insert(at) {
                delta.guest_chains.push(at);
            }
            delta.guests.push(guest);
        }
        // The chain before those who jump there.
        delta.guests.sort_by_key(|guest| guest.chain != GUARD);
        let input = Script::of(&delta).text();
        if !input.is_empty() {
            self.programs.restore(input)?;
        }
        self.route_localnet();
        Ok(())
    }

    /// After the rules that guard against its misuse are in force, and never without them.
    pub(super) fn route_localnet(&self) {
        if !self.settings.node_ports_on_loopback() {
            return;
        }
        let closed = self.programs.setting(ROUTE_LOCALNET).is_ok_and(|value| value == "0");
        if let Err(error) = self.programs.set(ROUTE_LOCALNET, "1") {
            tracing::warn!(
                %error, setting = ROUTE_LOCALNET,
                "node ports won't answer on loopback addresses; set it, or localhostNodePorts to false"
            );
            return;
        }
        let mut held = self.held();
        held.note |= closed;
        if held.note && !held.present.noted {
            match self.programs.restore(format!("*filter\n:{LOCALNET_SET} - [0:0]\nCOMMIT\n")) {
                Ok(()) => held.present.noted = true,
                Err(error) => tracing::warn!(
                    %error, setting = ROUTE_LOCALNET,
                    "no note of who set it: another mode will leave it set, and guarded"
                ),
            }
        }
    }

    /// Sets back what an earlier start has set, if node ports are not wanted on loopback any more;
    /// then there is nothing to guard.
    ///
    /// # Errors
    /// When the guard can't be removed.
    pub(super) fn leave_loopback(&self) -> Result<(), BackendError> {
        if self.settings.node_ports_on_loopback() || !self.held().present.noted {
            return Ok(());
        }
        if !close(&self.programs) {
            return Ok(());
        }
        let mut delta = Delta::default();
        {
            let present = &self.held().present;
            let to_guard = present.jumps.iter().filter(|jump| jump.target == GUARD);
            delta.farewells = to_guard.cloned().collect();
            delta.unchained = present.guest_chains.iter().copied().collect();
        }
        delta.unchained.push((Table::Filter, LOCALNET_SET));
        self.programs.restore(Script::of(&delta).text())?;
        self.held().note = false;
        self.observe()
    }
}

/// Whether the setting is on, whoever has set it.
pub(super) fn is_open(programs: &Programs) -> bool {
    programs.setting(ROUTE_LOCALNET).is_ok_and(|value| value == "1")
}

/// Sets `route_localnet` back if the iptables mode has set it, while its guard is still there.
pub(super) fn set_back(programs: &Programs) -> Result<(), BackendError> {
    let mut present = Present::default();
    observe::read(Table::Filter, &programs.save(Table::Filter)?, &mut present);
    if !present.noted {
        return Ok(());
    }
    close(programs);
    Ok(())
}

/// Whether it could be set back.
fn close(programs: &Programs) -> bool {
    let set = programs.set(ROUTE_LOCALNET, "0");
    match &set {
        Ok(()) => tracing::info!(setting = ROUTE_LOCALNET, "set back to 0, as it was"),
        Err(error) => tracing::warn!(%error, setting = ROUTE_LOCALNET, "it can't be set back"),
    }
    set.is_ok()
}
