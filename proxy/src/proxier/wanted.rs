//! What should be in force, as far as the API server has told.

use crate::{
    backend::Goal,
    model::{Family, table::ServiceTable},
    ruleset::desired::Desired,
};

/// All objects, and what follows from them.
pub(super) struct Wanted {
    /// Services with their slices.
    pub(super) objects: ServiceTable,
    /// What they come to.
    pub(super) desired: Desired,
    /// Which families are served.
    pub(super) families: Vec<Family>,
    /// Which were listed whole.
    pub(super) listed: Listed,
}

/// Which objects were listed whole.
#[derive(Default)]
pub(super) struct Listed {
    pub(super) services: bool,
    pub(super) slices: bool,
}

impl Wanted {
    /// Nothing yet, in these families.
    pub(super) fn new(families: Vec<Family>) -> Self {
        Self {
            objects: ServiceTable::default(),
            desired: Desired::default(),
            families,
            listed: Listed::default(),
        }
    }

    /// Whether all of it is known: nothing is written before.
    pub(super) fn is_known(&self) -> bool {
        self.listed.services && self.listed.slices
    }

    /// For a backend.
    pub(super) fn goal(&self) -> Goal<'_> {
        Goal { desired: &self.desired, objects: &self.objects }
    }
}
