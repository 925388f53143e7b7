//! Reading the cluster's present objects from memory.

use std::sync::Arc;

use serde_json::Value;

/// The watch cache as the rest of the API server sees it: what authorization and admission decide
/// by. Never blocks and never does I/O.
pub trait Lookup: Send + Sync + 'static {
    /// One object of a resource, named as in URLs (`""`, `"pods"`).
    fn get(
        &self,
        group: &str,
        plural: &str,
        namespace: Option<&str>,
        name: &str,
    ) -> Option<Arc<Value>>;
    /// All objects of a resource, in one namespace or in all.
    fn list(&self, group: &str, plural: &str, namespace: Option<&str>) -> Vec<Arc<Value>>;
    /// A number that differs after every change to the resource's objects, so that what was derived
    /// from them is known to be good still without listing them. `None`: not known, list and compare.
    fn version(&self, _group: &str, _plural: &str) -> Option<u64> {
        None
    }
}
