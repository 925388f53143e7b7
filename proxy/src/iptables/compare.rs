//! What the kernel lacks of one Service's rules, for who asks why a packet goes where it goes.

use keelson_api::object::ObjectKey;

use super::{
    Settings,
    apply::{node_addresses, read},
    held::{Held, Next},
    program::Programs,
    restore::Script,
    service::{Look, Rendered},
};
use crate::backend::{BackendError, Goal};

/// The input of `iptables-restore` that would bring a Service's rules in line with what is desired;
/// empty if they are.
///
/// # Errors
/// When the kernel's rules can't be read.
pub(crate) fn missing(
    settings: &Settings,
    goal: Goal<'_>,
    service: &ObjectKey,
) -> Result<String, BackendError> {
    let programs = Programs::find(settings.family, settings.variant)?;
    let node = node_addresses(goal.desired, settings.family);
    let mut held = Held::default();
    held.observed(read(&programs)?);
    let input = |commented| {
        let look = Look { settings, node: &node, commented };
        let rendered = Rendered::of(service, goal.objects, goal.desired, look);
        let services = vec![(service.clone(), Some(rendered))];
        Script::of(&held.plan(&Next { base: None, services, sweep: false })).text()
    };
    let commented = input(true);
    // With very many endpoints rules have no comments.
    Ok(if commented.is_empty() || input(false).is_empty() { String::new() } else { commented })
}
