//! All rules as text, without touching the kernel.

use std::collections::BTreeSet;

use keelson_api::object::ObjectKey;

use super::{
    Settings,
    apply::{COMMENTED_MAX, node_addresses},
    held::{Held, Next},
    restore::Script,
    service::{Look, Rendered},
};
use crate::backend::Goal;

/// The input of `iptables-restore` that makes all rules from nothing.
pub(crate) fn text(settings: &Settings, goal: Goal<'_>) -> String {
    let node = node_addresses(goal.desired, settings.family);
    let render = |commented| -> Vec<(ObjectKey, Option<Rendered>)> {
        let look = Look { settings, node: &node, commented };
        let keys: BTreeSet<&ObjectKey> = goal.objects.keys().collect();
        keys.into_iter()
            .map(|key| {
                let rendered = Rendered::of(key, goal.objects, goal.desired, look);
                (key.clone(), Some(rendered))
            })
            .collect()
    };
    let held = Held::default();
    let mut services = render(true);
    if held.endpoints_after(&services) > COMMENTED_MAX {
        services = render(false);
    }
    let base = Some(settings.base(&node, true));
    Script::of(&held.plan(&Next { base, services, sweep: true })).text()
}
