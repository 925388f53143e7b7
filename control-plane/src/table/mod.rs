//! Lists as tables: the `meta.k8s.io/v1` Table that `kubectl get` prints.

mod selector;

pub(crate) use self::selector::selector_text;

/// The columns of a kind.
#[derive(Debug)]
pub(crate) struct Columns {}

/// Name and age.
pub(crate) static GENERIC: Columns = Columns {};
