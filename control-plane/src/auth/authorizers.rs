//! Whether they may: `system:masters`, then the node authorizer, then RBAC.

use std::sync::Arc;

use super::{
    Attributes, Authorizer, Decision,
    node::NodeAuthorizer,
    rbac::{Rbac, is_master},
};
use crate::lookup::Lookup;

/// All authorizers, in order. The first that allows or denies decides.
pub struct Authorizers {
    node: NodeAuthorizer,
    rbac: Arc<Rbac>,
}

/// The API server's authorizers over its watch cache.
pub fn authorizers(lookup: Arc<dyn Lookup>) -> Authorizers {
    Authorizers {
        node: NodeAuthorizer::new(Arc::clone(&lookup)),
        rbac: Arc::new(Rbac::new(lookup)),
    }
}

impl Authorizers {
    /// The RBAC authorizer alone, which also knows what a user may do in all.
    #[must_use]
    pub fn rbac(&self) -> &Arc<Rbac> {
        &self.rbac
    }
}

impl Authorizer for Authorizers {
    fn authorize(&self, attributes: &Attributes) -> Decision {
        if is_master(&attributes.user) {
            return Decision::Allow(String::new());
        }
        let mut reasons = Vec::new();
        for authorizer in [&self.node as &dyn Authorizer, &*self.rbac] {
            match authorizer.authorize(attributes) {
                Decision::NoOpinion(reason) if reason.is_empty() => {}
                Decision::NoOpinion(reason) => reasons.push(reason),
                decided => return decided,
            }
        }
        Decision::NoOpinion(reasons.join(", "))
    }
}
