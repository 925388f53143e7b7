//! What the tests of authentication, authorization and admission share.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use serde_json::Value;

use super::{
    Attributes, UserInfo,
    fields::{name, namespace, text},
};
use crate::lookup::Lookup;

type Key = (String, String, String, String);

/// A cluster's objects.
#[derive(Default)]
pub(crate) struct Objects {
    objects: Mutex<BTreeMap<Key, Arc<Value>>>,
    version: AtomicU64,
    /// Whether changes are counted for the callers.
    counts: bool,
}

impl Objects {
    pub(crate) fn of(objects: impl IntoIterator<Item = Value>) -> Self {
        let all = Self { counts: true, ..Self::default() };
        for object in objects {
            all.add(object);
        }
        all
    }

    /// Whether callers learn that nothing changed, or have to compare.
    pub(crate) fn counting(mut self, counts: bool) -> Self {
        self.counts = counts;
        self
    }

    fn key(object: &Value) -> Key {
        let (group, kind) = (
            text(object, &["apiVersion"]).rsplit_once('/').map_or("", |(group, _)| group),
            text(object, &["kind"]).to_ascii_lowercase(),
        );
        let plural = if kind.ends_with("ss") { format!("{kind}es") } else { format!("{kind}s") };
        (group.to_owned(), plural, namespace(object).to_owned(), name(object).to_owned())
    }

    /// Adds or replaces.
    pub(crate) fn add(&self, object: Value) {
        self.objects.lock().unwrap().insert(Self::key(&object), Arc::new(object));
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn remove(&self, object: &Value) {
        self.objects.lock().unwrap().remove(&Self::key(object));
        self.version.fetch_add(1, Ordering::SeqCst);
    }
}

impl Lookup for Objects {
    fn get(
        &self,
        group: &str,
        plural: &str,
        namespace: Option<&str>,
        name: &str,
    ) -> Option<Arc<Value>> {
        let key = [group, plural, namespace.unwrap_or_default(), name].map(str::to_owned).into();
        self.objects.lock().unwrap().get(&key).cloned()
    }

    fn list(&self, group: &str, plural: &str, namespace: Option<&str>) -> Vec<Arc<Value>> {
        self.objects
            .lock()
            .unwrap()
            .iter()
            .filter(|((g, p, n, _), _)| {
                g == group && p == plural && namespace.is_none_or(|wanted| wanted == n)
            })
            .map(|(_, object)| Arc::clone(object))
            .collect()
    }

    fn version(&self, _: &str, _: &str) -> Option<u64> {
        self.counts.then(|| self.version.load(Ordering::SeqCst))
    }
}

pub(crate) fn user(name: &str, groups: &[&str]) -> UserInfo {
    UserInfo {
        username: name.to_owned(),
        groups: groups.iter().map(|&g| g.to_owned()).collect(),
        ..UserInfo::default()
    }
}

/// A kubelet.
pub(crate) fn node(name: &str) -> UserInfo {
    user(&format!("system:node:{name}"), &["system:nodes", "system:authenticated"])
}

/// A request for a resource; `resource` may be `pods/log`.
pub(crate) fn resource(
    user: &UserInfo,
    verb: &str,
    group: &str,
    resource: &str,
    namespace: &str,
    name: &str,
) -> Attributes {
    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    Attributes {
        user: user.clone(),
        verb: verb.to_owned(),
        resource_request: true,
        group: group.to_owned(),
        version: "v1".to_owned(),
        resource: resource.to_owned(),
        subresource: subresource.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        ..Attributes::default()
    }
}

/// A request for another path.
pub(crate) fn path(user: &UserInfo, verb: &str, path: &str) -> Attributes {
    Attributes {
        user: user.clone(),
        verb: verb.to_owned(),
        path: path.to_owned(),
        ..Attributes::default()
    }
}
