//! Keys, owner references and object references.

use std::{cmp::Ordering, fmt};

use k8s_openapi::{
    api::core::v1::ObjectReference,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use triomphe::ThinArc;

/// An object's namespace and name; the namespace is empty for objects that have none.
///
/// Tens of thousands of them stand in tables, most of them in several: both texts are in one
/// allocation, which clones share, and a key is as large as a pointer.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ObjectKey(
    /// `namespace/name`: no namespace has a slash (RFC 1123 labels).
    ThinArc<(), u8>,
);

impl ObjectKey {
    /// A key of these two parts.
    pub fn new(namespace: impl AsRef<str>, name: impl AsRef<str>) -> Self {
        let text = [namespace.as_ref(), name.as_ref()].join("/");
        Self(ThinArc::from_header_and_slice((), text.as_bytes()))
    }

    /// The key of an object with this metadata.
    pub fn of(metadata: &ObjectMeta) -> Self {
        Self::new(
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.name.as_deref().unwrap_or_default(),
        )
    }

    /// Empty if the object is cluster-scoped.
    pub fn namespace(&self) -> &str {
        self.parts().0
    }

    /// The name.
    pub fn name(&self) -> &str {
        self.parts().1
    }

    fn parts(&self) -> (&str, &str) {
        // It was a text with a slash.
        let text = str::from_utf8(&self.0.slice).unwrap_or_default();
        text.split_once('/').unwrap_or_default()
    }
}

impl Default for ObjectKey {
    fn default() -> Self {
        Self::new("", "")
    }
}

impl Ord for ObjectKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

impl PartialOrd for ObjectKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parts() {
            ("", name) => f.write_str(name),
            (namespace, name) => write!(f, "{namespace}/{name}"),
        }
    }
}

/// The reference by which `owner` controls another object; it blocks the owner's foreground
/// deletion, as Kubernetes' own controllers have it.
pub fn controller_reference<K: k8s_openapi::Resource>(owner: &ObjectMeta) -> OwnerReference {
    OwnerReference {
        api_version: K::API_VERSION.to_owned(),
        kind: K::KIND.to_owned(),
        name: owner.name.clone().unwrap_or_default(),
        uid: owner.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The owner that controls an object, if one does.
pub fn controller_of(metadata: &ObjectMeta) -> Option<&OwnerReference> {
    metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

/// Whether `owner` (by UID) controls the object.
pub fn is_controlled_by(metadata: &ObjectMeta, owner: &ObjectMeta) -> bool {
    controller_of(metadata).is_some_and(|o| Some(o.uid.as_str()) == owner.uid.as_deref())
}

/// A reference to an object, as events carry it.
pub fn object_reference<K>(object: &K) -> ObjectReference
where
    K: k8s_openapi::Metadata<Ty = ObjectMeta>,
{
    let metadata = object.metadata();
    ObjectReference {
        api_version: Some(K::API_VERSION.to_owned()),
        kind: Some(K::KIND.to_owned()),
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        resource_version: metadata.resource_version.clone(),
        field_path: None,
    }
}

/// A reference to an object of which no more than this is known, as events carry it.
pub fn reference_by_key<K: k8s_openapi::Resource>(
    key: &ObjectKey,
    uid: Option<String>,
) -> ObjectReference {
    ObjectReference {
        api_version: Some(K::API_VERSION.to_owned()),
        kind: Some(K::KIND.to_owned()),
        namespace: Some(key.namespace().to_owned()).filter(|namespace| !namespace.is_empty()),
        name: Some(key.name().to_owned()),
        uid,
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;

    use super::*;

    #[test]
    fn keys_are_their_parts_and_sort_by_the_namespace_first() {
        let parts = [("", ""), ("", "node"), ("a", ""), ("a", "z"), ("a-b", "a"), ("b", "a/b")];
        let keys = parts.map(|(namespace, name)| ObjectKey::new(namespace, name));
        for (key, (namespace, name)) in keys.iter().zip(parts) {
            assert_eq!((key.namespace(), key.name()), (namespace, name));
        }
        assert!(keys.is_sorted(), "a-b stands before a/");
        assert_eq!(keys[1].to_string(), "node");
        assert_eq!(keys[0], ObjectKey::default());
        assert_eq!(size_of::<Option<ObjectKey>>(), size_of::<usize>());
    }

    #[test]
    fn references_name_the_object() {
        let pod = Pod {
            metadata: ObjectMeta {
                namespace: Some("default".into()),
                name: Some("web".into()),
                uid: Some("u".into()),
                ..ObjectMeta::default()
            },
            ..Pod::default()
        };
        let reference = object_reference(&pod);
        assert_eq!(reference.kind.as_deref(), Some("Pod"));
        assert_eq!(reference.api_version.as_deref(), Some("v1"));
        let key = ObjectKey::of(&pod.metadata);
        assert_eq!(key.to_string(), "default/web");
        assert_eq!(reference_by_key::<Pod>(&key, Some("u".into())), reference);
        assert_eq!(reference_by_key::<Pod>(&ObjectKey::new("", "n"), None).namespace, None);

        let owned = ObjectMeta {
            owner_references: Some(vec![controller_reference::<Pod>(&pod.metadata)]),
            ..ObjectMeta::default()
        };
        assert!(is_controlled_by(&owned, &pod.metadata));
        assert!(!is_controlled_by(&pod.metadata, &pod.metadata));
    }
}
