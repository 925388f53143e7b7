//! The handlers of objects: one set for all resources.
//!
//! * [`selection`]: which objects a request wants (selectors).
//! * [`read`]: get and list, with pages.
//! * [`watch`]: the stream of changes.
//! * [`write`]: create, update and patch.
//! * [`delete`]: what a delete means for graceful periods, finalizers and namespaces.
//! * [`furnished`]: what a new pod waits for.
//! * [`subresources`]: scale, binding, eviction.
//!
//! All of them work on what a [`Resource`](crate::registry::Resource) says of itself and on the
//! watch cache; the store is asked for writes and for history only.

pub(crate) mod delete;
mod furnished;
pub(crate) mod read;
pub(crate) mod selection;
pub(crate) mod subresources;
pub(crate) mod watch;
pub(crate) mod write;
